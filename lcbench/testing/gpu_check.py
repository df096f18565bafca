"""On a machine with a CUDA device: every kernel that runs there, checked on every mask and then timed. ``make gpu-check``.

Needs torch and numpy, and Triton for our own kernels; kernels and masks are what conf/ names. Small masks go against the float64
reference tensor by tensor. Then whole cells are measured as a sweep does it: checked on sampled rows, timed by CUDA events after a
warm-up, inputs of random data larger than L2, medians. A kernel that fails is recorded and the next one goes on. Writes
``results/<gpu>/gpu-check.json`` and ``.md``; exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcbench.cp.execute import Groups
from lcbench.cp.layout import zigzag
from lcbench.cp.none import Local
from lcbench.grid.paths import CONF, REPOSITORY
from lcbench.grid.values import axis_values, parse_tokens
from lcbench.kernels.base import Kernel, Unsupported, prepare, refusal
from lcbench.kernels.reference import Reference
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.causal import causal
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure.cell import Gang, Work, measure_cell
from lcbench.measure.environment import describe, device_name
from lcbench.measure.inputs import draw
from lcbench.measure.peak import entry_of, measured_peak
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.shrink import shrunk, tokens_of

# Half-precision products summed in float32: this much of the largest value of a tensor.
BOUNDS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4, "float64": 1e-12}
SETTINGS = {"warmup": 2, "min_iterations": 5, "max_iterations": 50, "budget_s": 1.0, "precision": 0.02, "timeline": False}
# What matters most comes first: what a kernel's time does not suffice for is recorded as not reached.
TIMED = (
    ("causal", "32k"), ("full", "32k"), ("causal_document", "32k"), ("sliding_window", "32k"), ("block_random", "32k"),
    ("causal", "4k"), ("causal", "16k"), ("causal", "64k"), ("causal", "128k"), ("prefix_lm_causal", "32k"),
    ("block_causal", "32k"),
)  # fmt: skip
HEADS, SMALL_HEADS = Heads(64, 8, 128), (Heads(8, 2, 128), Heads(4, 4, 64))


@dataclass(frozen=True)
class Plan:
    """What to run on which device; seconds are shared out evenly among the kernels that run there."""

    device: torch.device
    dtype: str = "bfloat16"
    tokens: int = 1536
    small_heads: tuple[Heads, ...] = SMALL_HEADS
    heads: Heads = HEADS
    timed: tuple[tuple[str, str], ...] = TIMED
    check_s: float = 150.0
    time_s: float = 210.0
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))


def flat_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of plain values, and of lists and maps in one line: Hydra's own reader is not on every machine with a GPU."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        key, colon, value = line.split(" #")[0].partition(":")
        if colon and not line.startswith("#"):
            found[key.strip()] = _plain(value.strip())
    return found


def _plain(text: str) -> Any:
    """``[a, b]``, ``{a: 1}`` or a value."""
    if text.startswith(("[", "{")):
        items = [item.strip() for item in text[1:-1].split(",") if item.strip()]
        if text.startswith("["):
            return [_plain(item) for item in items]
        return {key: _plain(value.strip()) for key, _, value in (item.partition(":") for item in items)}
    for read in (int, float, lambda x: {"true": True, "false": False, "null": None}[x]):
        try:
            return read(text)
        except (ValueError, KeyError):
            continue
    return text


def _object(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def kernels(wanted: list[str] | None = None) -> dict[str, Kernel]:
    """The kernels of conf/kernel by name, but for the reference."""
    found = {}
    for path in sorted((CONF / "kernel").glob("*.yaml")):
        config = flat_yaml(path)
        name, target = config.pop("name"), config.pop("_target_")
        if name != "reference" and (wanted is None or name in wanted):
            found[name] = _object(target)(**config)
    return found


def mask_of(name: str, seqlen: int, heads: Heads, *, shrink: bool = False) -> Mask:
    """A mask of conf/mask at a length; ``shrink`` scales its token counts, which are meant for long sequences, down to it."""
    config = flat_yaml(CONF / "mask" / f"{name}.yaml")
    function = _object(config["_target_"])
    parameters = inspect.signature(function).parameters
    options = {option: value for option, value in config.items() if option in parameters}
    for option, value in options.items():
        tokens = tokens_of(value)
        if tokens is not None:
            options[option] = shrunk(tokens, seqlen) if shrink else tokens
    given = {"heads": heads, "seed": (0, 0), "lengths": Uniform(1, seqlen // 3 if shrink else 8192)}
    found: Mask = function(seqlen, **{k: v for k, v in given.items() if k in parameters}, **options)
    return found


def small_masks(tokens: int, heads: Heads) -> Iterator[tuple[str, Mask]]:
    """Every mask, and what a rank of a context-parallel group gives its kernel: tiles of a zigzag ring, holes, empty rows."""
    for name in axis_values(CONF, "mask"):
        try:
            yield name, mask_of(name, tokens, heads, shrink=True)
        except DoesNotFit:
            continue
    layout = zigzag(2 * tokens, 2)
    for name, whole in (("causal", causal(2 * tokens)), ("window", sliding_window(2 * tokens, left=tokens // 8, right=0))):
        for q, k in ((0, 1), (1, 0), (1, 1)):
            yield f"{name} tile {q}{k}", layout.tile(whole, q, k).merged()
    third = tokens // 3
    yield "holes", BandMask.of(tokens, tokens, [Band(5, third, 0, 300), Band(2 * third, tokens - 7, third, tokens, -third, -100)])
    yield "tall", BandMask.of(tokens, tokens, [Band(0, tokens, 100, 100 + third, -third, 50)])


def check_kernel(name: str, kernel: Kernel, plan: Plan, seconds: float) -> Iterator[dict[str, Any]]:
    """A row per mask and heads: errors of out, lse, dq, dk, dv against the float64 reference, as parts of the largest value."""
    ends = time.monotonic() + seconds
    for heads in plan.small_heads:
        for mask_name, mask in small_masks(plan.tokens, heads):
            problem, reason = _problem(kernel, mask, plan.tokens, heads, plan)
            row = {"kernel": name, "mask": mask_name, "heads": str(heads), "dtype": plan.dtype, "direction": problem.direction}
            if reason:
                yield row | {"status": "unsupported", "reason": reason}
            elif time.monotonic() > ends:
                yield row | {"status": "not reached", "reason": "no time left for this kernel"}
            else:
                yield row | _guarded(partial(_compare, kernel, mask, problem, plan))


def _problem(kernel: Kernel, mask: Mask, seqlen: int, heads: Heads, plan: Plan) -> tuple[Problem, str | None]:
    """Forward and backward, or forward alone for a kernel that has no backward; and why neither runs."""
    for direction in ("forward_backward", "forward"):
        problem = Problem(seqlen, heads, Scale(1, 1), plan.dtype, direction)
        reason = kernel.unsupported(problem, mask) or refusal(kernel, problem, plan.device)
        if reason is None:
            break
    return problem, reason


def _compare(kernel: Kernel, mask: Mask, problem: Problem, plan: Plan) -> dict[str, Any]:
    everything = np.arange(problem.seqlen)
    q, k, v, dout = (draw(name, everything, problem, 1, plan.device) for name in ("q", "k", "v", "dout"))
    scale, dtype = problem.softmax_scale, getattr(torch, problem.dtype)
    exact = prepare(Reference(), mask, problem.heads, dtype, plan.device)
    prepared = prepare(kernel, mask, problem.heads, dtype, plan.device)
    want = [*exact.forward(q, k, v, softmax_scale=scale)]
    out, lse = prepared.forward(q, k, v, softmax_scale=scale)
    got = [out, lse]
    if problem.backward:
        want += exact.backward(dout, q, k, v, want[0], want[1], softmax_scale=scale)
        got += prepared.backward(dout, q, k, v, out.to(q.dtype), lse, softmax_scale=scale)
    errors = {}
    for tensor, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        difference = torch.where(mine.double() == reference, 0.0, (mine.double() - reference).abs())
        finite = reference[torch.isfinite(reference)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        errors[tensor] = float(difference.max()) / (largest or 1.0)
    good = all(error <= BOUNDS[problem.dtype] for error in errors.values())  # NaN is not
    return {"status": "ok" if good else "wrong", "errors": errors, "calls": prepared.calls}


def time_kernel(name: str, kernel: Kernel, plan: Plan, seconds: float, peak_tflops: float) -> Iterator[dict[str, Any]]:
    """A row per mask and length: TFLOP/s forward and backward, the part of the measured peak, peak memory."""
    ends = time.monotonic() + seconds
    gang = Gang(0, 1, plan.device, Groups(), [])
    for mask_name, length in plan.timed:
        seqlen = parse_tokens(length)
        row: dict[str, Any] = {"kernel": name, "mask": mask_name, "seqlen": seqlen, "heads": str(plan.heads), "dtype": plan.dtype}
        mask = mask_of(mask_name, seqlen, plan.heads)
        problem, reason = _problem(kernel, mask, seqlen, plan.heads, plan)
        if reason is not None:
            yield row | {"status": "unsupported", "reason": reason}
        elif time.monotonic() > ends:
            yield row | {"status": "not reached", "reason": "no time left for this kernel"}
        else:
            work = Work(problem, partial(_same, mask), kernel, Local(), plan.settings, 0)
            yield row | _guarded(partial(_measure, work, gang, peak_tflops))


def _measure(work: Work, gang: Gang, peak_tflops: float) -> dict[str, Any]:
    measured = measure_cell(work, gang, lambda _: None)
    if measured.unavailable:
        return {"status": "unsupported", "reason": measured.unavailable}
    assert measured.check is not None
    if measured.check.failures:
        return {"status": "wrong", "reason": "; ".join(measured.check.failures), "check": measured.check.as_dict()}
    if measured.implausible:
        return {"status": "wrong", "reason": measured.implausible, "check": measured.check.as_dict()}
    rates = {
        phase: measured.metrics[key]
        for phase in ("forward", "backward")
        if (key := f"compute/{phase}/tflops_per_gpu") in measured.metrics
    }
    parts = {f"{phase}_of_measured_peak": rate / peak_tflops for phase, rate in rates.items()}
    notes = {"metrics": measured.metrics, "samples": measured.samples, "check": measured.check.as_dict(), "notes": measured.notes}
    return {"status": "ok", "tflops": rates, **parts, **notes}


def _guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A kernel may fail in any way that its library knows; the rest goes on."""
    try:
        return run()
    except Unsupported as error:
        return {"status": "unsupported", "reason": str(error)}
    except Exception as error:
        kind = "oom" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        return {"status": "failed", "reason": f"{kind}: {str(error)[:400]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _same(mask: Mask, draw: int) -> Mask:
    return mask


def report(plan: Plan, wanted: list[str] | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Check, then time, each kernel that runs here."""
    began = time.time()
    peak = measured_peak(getattr(torch, plan.dtype), plan.device)
    absent: dict[str, str] = {}
    checks: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    here: dict[str, Kernel] = {}
    for name, kernel in kernels(wanted).items():
        problem = Problem(plan.tokens, plan.heads, Scale(1, 1), plan.dtype, "forward")
        if reason := refusal(kernel, problem, plan.device):
            absent[name] = reason
        else:
            here[name] = kernel
    for name, kernel in here.items():
        rows = list(check_kernel(name, kernel, plan, plan.check_s / len(here)))
        checks += rows
        count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "wrong", "failed", "not reached")}
        say(f"{name}: {', '.join(f'{n} {status}' for status, n in count.items() if n)}")
        for row in [row for row in rows if row["status"] in ("wrong", "failed")][:3]:
            say(f"  {row['mask']} {row['heads']}: {row.get('reason') or row['errors']}")
    for name, kernel in here.items():
        for row in time_kernel(name, kernel, plan, plan.time_s / len(here), peak):
            timings.append(row)
            say(_line(row))
    return {
        "provenance": describe(plan.device), "measured_at": began, "seconds": time.time() - began, "settings": plan.settings,
        "measured_peak_tflops": peak, "bounds": BOUNDS, "absent": absent, "checks": checks, "timings": timings,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    head = f"{row['kernel']:<20}{row['mask']:<18}{row['seqlen']:>7}  "
    if row["status"] != "ok":
        return f"{head}{row['status']}: {str(row['reason'])[:90]}"
    metrics = row["metrics"]
    for phase, rate in row["tflops"].items():
        part = row[f"{phase}_of_measured_peak"]
        head += f"{phase} {metrics[f'time/{phase}/median_s'] * 1e3:9.3f} ms {rate:6.1f} TFLOP/s {part:4.0%}  "
    peak = metrics.get("memory/peak_bytes")
    return head if peak is None else f"{head}peak {peak / 2**20:8.1f} MiB"


def markdown(found: dict[str, Any]) -> str:
    """The report as tables."""
    provenance = found["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    lines = [
        f"# Kernels on {provenance['device']}", "",
        f"Commit {provenance['git']['commit']}{' with changes' if provenance['git']['dirty'] else ''}; {versions}. "
        f"Matrix product measured at {found['measured_peak_tflops']:.0f} TFLOP/s. {found['seconds']:.0f} s in all.", "",
        "| kernel | mask | tokens | forward TFLOP/s | of peak | backward TFLOP/s | of peak | peak MiB | |", "| --- " * 9 + "|",
    ]  # fmt: skip
    for row in found["timings"]:
        cells = ["", "", "", "", ""]
        if row["status"] == "ok":
            for i, phase in enumerate(("forward", "backward")):
                if phase in row["tflops"]:
                    cells[2 * i : 2 * i + 2] = [f"{row['tflops'][phase]:.1f}", f"{row[f'{phase}_of_measured_peak']:.0%}"]
            peak = row["metrics"].get("memory/peak_bytes")
            cells[4] = "" if peak is None else f"{peak / 2**20:.0f}"
        why = "" if row["status"] == "ok" else f"{row['status']}: {str(row['reason']).splitlines()[0][:120]}"
        lines.append(f"| {' | '.join([row['kernel'], row['mask'], str(row['seqlen']), *cells, why])} |")
    lines += ["", "| kernel | masks checked | wrong | failed | not reached |", "| --- " * 5 + "|"]
    for name in dict.fromkeys(row["kernel"] for row in found["checks"]):
        own = [row["status"] for row in found["checks"] if row["kernel"] == name]
        lines.append(f"| {name} | {own.count('ok')} | {own.count('wrong')} | {own.count('failed')} | {own.count('not reached')} |")
    lines += ["", "Not here:", "", *(f"- {name}: {reason}" for name, reason in found["absent"].items())]
    return "\n".join(lines) + "\n"


def folder(device: torch.device) -> Path:
    """results/<gpu>: by the name of its conf/device entry, else its own."""
    name = device_name(device)
    entry = entry_of([flat_yaml(path) for path in sorted((CONF / "device").glob("*.yaml"))], name)
    return REPOSITORY / "results" / (entry["name"] if entry else "".join(c if c.isalnum() else "-" for c in name.lower()))


def failed(found: dict[str, Any]) -> bool:
    return any(
        row["status"] in ("wrong", "failed") and "oom" not in str(row.get("reason")) for row in found["checks"] + found["timings"]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.testing.gpu_check", description=__doc__)
    parser.add_argument("kernels", nargs="*", help="names of kernels; all there are if not said")
    parser.add_argument("--out", type=Path, help="folder of the report (default: results/<gpu>)")
    options = parser.parse_args(arguments)
    if unknown := set(options.kernels) - set(kernels()):
        print(f"error: {', '.join(sorted(unknown))} is not one of {', '.join(kernels())}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    found = report(Plan(device), options.kernels or None, partial(print, flush=True))
    out = options.out or folder(device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu-check.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "gpu-check.md").write_text(markdown(found))
    print("\n".join(["", *(_line(row) for row in found["timings"] if row["status"] == "ok"), "", f"written to {out}"]))
    return 1 if failed(found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
