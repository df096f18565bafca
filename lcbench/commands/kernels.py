"""What runs what: ``python -m lcbench.kernels [kernel=flex,triton_band] [mask=causal,document] [--platform h200]``.

For each kernel, mask, type and direction: ``native`` (one call), ``grouped`` (several, merged by LSE) or ``no``, with the reason.
Of the machine it runs on, with what is installed; ``--platform`` asks about another one, as if everything were installed there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lcbench.commands.arguments import add_plan_arguments, command_parser, plan_words
from lcbench.grid.build import build_kernel
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.own import answer
from lcbench.grid.paths import CONF
from lcbench.grid.refusals import mask_of
from lcbench.grid.values import axis_values
from lcbench.kernels.base import Platform, native_calls
from lcbench.masks.block import BlockMap
from lcbench.problem import DIRECTIONS, DTYPES, format_tokens
from lcbench.report.ending import bad_input
from lcbench.report.fitted import Column, Fitted, console
from lcbench.report.inert import plain

DEFAULTS, LENGTHS = {"seqlen": "4k", "heads": "64x8x128", "cp": "none", "scale": "1x1"}, "lengths=uniform"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
CUDA = "on CUDA devices"  # what every reason for a GPU says
EXAMPLES = """
python -m lcbench.kernels
python -m lcbench.kernels kernel=flex,triton_band mask=causal,document
python -m lcbench.kernels --platform h200
"""


def main(arguments: list[str]) -> int:
    """The command: print what runs what. Returns 0; raises SystemExit(2) for bad input."""
    parser = command_parser("kernels", __doc__, EXAMPLES)
    add_plan_arguments(parser, "kernel=... mask=... seqlen=... heads=...; all kernels and masks if not said")
    parser.add_argument("--platform", default="this", help="this (default), cpu, or an entry of conf/device, such as h200")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", action="store_true", help="print JSON: an entry per kernel, mask, type and direction")
    options = parser.parse_args(arguments)
    with bad_input():
        platform = _platform(options.platform)
        cells = _cells(plan_words(options))
        rows = list(matrix(cells, platform, installed=options.platform != "this"))
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    first = cells[0].config
    title = f"{options.platform}: {format_tokens(first['seqlen'])} tokens, heads {first['heads']}"
    found = _by_kernel(rows)
    lines = [_line(name, own) for name, own in found.items()]
    if options.markdown:
        print(_markdown(title, lines))
    else:
        console().print(_table(title, found, lines))
    return 0


def matrix(cells: list[Cell], platform: Platform, *, installed: bool) -> Iterator[dict[str, Any]]:
    """An entry per kernel and mask of the cells, type and direction; ``installed``: as if every library were."""
    for cell in cells:
        config = cell.config
        name = config["mask"]["name"]
        kernel, mask = build_kernel(config["kernel"]), mask_of(cell)
        ask = partial(answer, "kernel", config["kernel"])
        missing = None if installed else ask(kernel.missing)
        calls: int | None = None
        for dtype, direction in product(DTYPES, DIRECTIONS):
            problem = replace(cell.problem, dtype=dtype, direction=direction)
            reason = ask(kernel.unsupported, problem, mask) or ask(kernel.unavailable, problem, platform) or missing
            if kernel.operator != "softmax":
                reason = f"is for {kernel.operator} attention, which has no masks (workload={kernel.operator}_attention)"
            if reason is None and calls is None:
                calls = native_calls(kernel, mask, platform)
            yield {
                "kernel": config["kernel"]["name"], "mask": name, "blocks": isinstance(mask, BlockMap), "dtype": dtype,
                "direction": direction, "support": "no" if reason else "native" if calls == 1 else "grouped",
                "calls": None if reason else calls, "reason": reason,
            }  # fmt: skip


def _platform(name: str) -> Platform:
    if name == "this":
        import torch

        return Platform.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "cpu":
        return Platform("cpu")
    devices = {entry["name"]: entry for entry in known_devices()}
    if name not in devices:
        raise ValueError(f"--platform {name} is not one of this, cpu, {', '.join(devices)}")
    major, minor = devices[name]["capability"]
    return Platform("cuda", (major, minor), devices[name]["memory_bytes"])


def _cells(overrides: list[str]) -> list[Cell]:
    """A cell per kernel and mask; all there are where the overrides name none, but for kernels of linear attention, which know no
    masks, and masks that need a file of the user's."""
    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    whole = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in given]
    for axis in ("kernel", "mask"):
        if axis not in given:
            whole.append(f"{axis}={','.join(axis_values(CONF, axis))}")
    if "lengths" not in given and "mask" not in given:  # among all masks are some of documents
        whole.append(LENGTHS)
    cells = look([*whole, *overrides]).cells
    if "lengths" not in given and LENGTHS not in whole and any("lengths" in planned.cell.config["mask"] for planned in cells):
        cells = look([*whole, LENGTHS, *overrides]).cells
    found = [planned.cell for planned in cells]
    return found if "kernel" in given else [cell for cell in found if build_kernel(cell.config["kernel"]).operator == "softmax"]


def _by_kernel(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["kernel"], []).append(row)
    return found


def _line(kernel: str, rows: list[dict[str, Any]]) -> list[str]:
    """kernel, what it does in each type, masks in one call, masks in several, what it does not run and why."""
    types = []
    for dtype in DTYPES:
        directions = {row["direction"] for row in rows if row["dtype"] == dtype and row["support"] != "no"}
        types.append("fwd+bwd" if "forward_backward" in directions else "fwd" if directions else "-")
    runs = {row["mask"]: row["calls"] for row in rows if row["support"] != "no"}
    native = [mask for mask, calls in runs.items() if calls == 1]
    grouped = [f"{mask} {calls}" for mask, calls in runs.items() if calls != 1]
    every = {row["mask"] for row in rows}
    bands, blocks = ({row["mask"] for row in rows if row["blocks"] is kind} for kind in (False, True))
    names = ", ".join(native)
    for label, group in (("all", every), ("all static masks", bands), ("all block maps", blocks)):
        if group and set(native) == group:
            names = label
            break
    refused = {row["mask"] for row in rows} - set(runs)
    # Types that it lacks are told by the columns before; --json has every reason.
    reasons = dict.fromkeys(row["reason"] for row in rows if row["mask"] in refused and row["dtype"] == DTYPES[0])
    return [kernel, *types, names, ", ".join(grouped), "; ".join(reasons)]


COLUMNS = ("kernel", *SHORT.values(), "one call", "several calls, merged by LSE", "does not run")


def _table(title: str, found: dict[str, list[dict[str, Any]]], lines: list[list[str]]) -> Group:
    """A row per kernel that runs anything; below it what needs several calls, and what it does not run and why. Then a line for
    each reason for which kernels run nothing.
    """
    table = Fitted(f"{title}; yes: forward and backward", [
        Column("kernel"), *(Column(name) for name in SHORT.values()), Column("one call", folds=True),
    ])  # fmt: skip
    idle: dict[str, list[str]] = {}
    for rows, (name, *types, native, several, refused) in zip(found.values(), lines, strict=True):
        if all(row["support"] == "no" for row in rows):
            idle.setdefault(CUDA if CUDA in refused else refused, []).append(name)
            continue
        more = [f"several calls, merged by LSE: {several}"] if several else []
        more += [f"does not run: {refused}"] if refused else []
        marks = ["yes" if text == "fwd+bwd" else text for text in types]
        table.add(name, *marks, native or "-", below=Text("\n".join(more), "dim"))
    shown: list[RenderableType] = [table] if len(table) else []
    if idle:
        shown += [Text(), plain("what runs nothing here, and why (--json says more)", "bold")]
        shown += [plain(f"{'run ' if why == CUDA else ''}{why}: {', '.join(names)}") for why, names in idle.items()]
    return Group(*shown)


def _markdown(title: str, lines: list[list[str]]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return f"# What runs: {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
