"""Look at a mask: ``python -m lcbench.masks mask=causal_document seqlen=64k [--ranks 8] [--out mask.png] [--json]``.

Takes the overrides of a sweep; each mask, length or batch, and seed that they name is shown once. ``--gallery`` draws every mask.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SQUARE
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lcbench.commands.arguments import add_plan_arguments, command_parser, plan_words
from lcbench.grid.axes import WAYS
from lcbench.grid.build import cell_mask, draws
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.paths import CONF
from lcbench.grid.values import axis_values
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.convert import varlen
from lcbench.masks.mask import Mask
from lcbench.masks.picture import drawn, save
from lcbench.problem import format_tokens
from lcbench.report.ending import bad_input
from lcbench.report.fitted import Column, Fitted, console
from lcbench.report.inert import plain
from lcbench.schedule.build import ORDERS

SHOWN_BANDS = 8
MANY_BANDS = 1 << 17  # packing more into varlen calls would take seconds
EXAMPLES = """
python -m lcbench.masks mask=causal_document seqlen=64k
python -m lcbench.masks mask=sliding_window mask.left=4k seqlen=64k --ranks 16 --out window.png
python -m lcbench.masks mask=full,causal seqlen=1m --json
python -m lcbench.masks mask=causal batch=2q1k_4q1s4k
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("masks", __doc__, EXAMPLES)
    add_plan_arguments(parser, "mask=... seqlen=... batch=... lengths=... heads=... seed=...")
    parser.add_argument("--ranks", type=int, default=8, help="ranks to balance over (default: 8)")
    parser.add_argument("--out", type=Path, help="write a picture (png, pdf, svg)")
    parser.add_argument("--gallery", type=Path, help="write a picture of every mask of conf/mask; seqlen=16k unless said")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    with bad_input():
        if options.ranks < 1:
            raise ValueError(f"--ranks {options.ranks} is no number of ranks of at least 1")
        overrides = plan_words(options)
        if options.gallery:
            return _gallery(overrides, options.gallery)
        every = [(cell, number) for cell in _cells(overrides) for number in range(draws(cell.config["mask"]))]
        shown = [(cell, number, cell_mask(cell, number)) for cell, number in every]
        rows = [_row(cell, number, mask, options.ranks) for cell, number, mask in shown]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        terminal = console()
        terminal.print(_table(rows, options.ranks))
        if len(shown) == 1:
            (_, _, mask), *_ = shown
            _print_picture(mask, terminal)
            _print_bands(mask)
    if options.out:
        save([(mask, _title(cell, number)) for cell, number, mask in shown], options.out)
        print(f"written to {options.out}", file=sys.stderr)
    return 0


def _cells(overrides: list[str]) -> list[Cell]:
    """One cell per mask, length or batch, heads and seed, in order."""
    found: dict[str, Cell] = {}
    for planned in look(overrides).cells:
        config = planned.cell.config
        key = json.dumps([config["mask"], config["seqlen"], config.get("batch"), config["seed"], config["heads"]])
        found.setdefault(key, planned.cell)
    return list(found.values())


def _row(cell: Cell, number: int, mask: Mask, ranks: int) -> dict[str, Any]:
    q_heads = cell.heads.q
    fits = mask.num_q >= 2 * ranks
    row: dict[str, Any] = {
        "mask": cell.config["mask"]["name"],
        "lengths": cell.config["mask"].get("lengths", {}).get("name"),
        "seqlen": cell.config["seqlen"],
        "batch": None if cell.batch is None else str(cell.batch),
        "seed": cell.config["seed"],
        "draw": number,
        "area": mask.pairs(q_heads) / q_heads,
        "density": mask.density,
        "imbalance": {name: layout(mask.num_q, ranks).imbalance(mask) if fits else None for name, layout in ORDERS.items()},
    }
    if isinstance(mask, BandMask):
        return row | {"bands": len(mask), "varlen_calls": len(varlen(mask)) if len(mask) <= MANY_BANDS else None}
    return row | {"maps": mask.maps, "blocks": len(mask)}


def _table(rows: list[dict[str, Any]], ranks: int) -> Fitted:
    """Imbalance is why one looks at a mask, so it is left out last."""
    varies = len({(row["seed"], row["draw"]) for row in rows}) > 1
    table = Fitted(f"busiest rank over the mean, of {ranks} ranks: 1.00 is perfect", [
        Column("mask", folds=True, wanted=32), Column("seqlen", right=True),
        *([Column("seed.draw", 1, right=True)] if varies else []),
        Column("density", 2, right=True), Column("area", 3, right=True), Column("bands or blocks", 4, right=True),
        Column("varlen\ncalls", 5, right=True), *(Column(name, right=True) for name in ORDERS),
    ])  # fmt: skip
    for row in rows:
        name = f"{row['mask']}({row['lengths']})" if row["lengths"] else row["mask"]
        parts = f"{row['bands']} bands" if "bands" in row else f"{row['blocks']} in {row['maps']} maps"
        balance = [f"{x:.2f}" if x is not None else "-" for x in row["imbalance"].values()]
        which, size = [f"{row['seed']}.{row['draw']}"] if varies else [], row["batch"] or format_tokens(row["seqlen"])
        calls = str(row.get("varlen_calls") or "-")
        table.add(name, size, *which, f"{row['density']:.2%}", f"{row['area']:.0f}", parts, calls, *balance)
    return table


def _print_picture(mask: Mask, terminal: Console) -> None:
    """The mask in a frame, small enough for any terminal."""
    rows = drawn(mask, ascii_only=terminal.options.ascii_only)
    terminal.print(Panel.fit(Text("\n".join(rows), no_wrap=True), box=SQUARE, padding=0))
    terminal.print(plain(f"queries down, keys across: {format_tokens(mask.num_q)} x {format_tokens(mask.num_k)} tokens", "dim"))


def _print_bands(mask: Mask) -> None:
    if not isinstance(mask, BandMask):
        return
    for band in list(mask)[:SHOWN_BANDS]:
        lo = f"{band.lo} <= " if band.cuts_below else ""
        hi = f" <= {band.hi}" if band.cuts_above else ""
        diagonal = f",  {lo}k - q{hi}" if lo or hi else ""
        print(f"  {band.q0} <= q < {band.q1},  {band.k0} <= k < {band.k1}{diagonal}")
    if len(mask) > SHOWN_BANDS:
        print(f"  ... and {len(mask) - SHOWN_BANDS} more")


def _title(cell: Cell, number: int) -> str:
    documents = cell.config["mask"].get("lengths", {}).get("name")
    name = cell.config["mask"]["name"] + (f"\n{documents}" if documents else "")
    return name if number == 0 else f"{name} draw {number}"


def _gallery(overrides: list[str], path: Path) -> int:
    length = [] if any(o.partition("=")[0] in WAYS["seqlen"] for o in overrides) else ["seqlen=16k"]
    pictures = []
    for cell in _cells([f"mask={','.join(axis_values(CONF, 'mask'))}", *length, *overrides]):
        try:
            pictures.append((cell_mask(cell), _title(cell, 0)))
        except DoesNotFit as error:
            print(f"{cell.config['mask']['name']} left out: {error}", file=sys.stderr)
    save(pictures, path)
    print(f"{len(pictures)} masks drawn to {path}")
    return 0
