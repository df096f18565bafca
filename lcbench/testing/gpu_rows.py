"""What the GPU check runs for one kernel, row by row: every mask against the float64 reference, then whole cells timed.

Needs torch and numpy, and Triton for our own kernels; kernels and masks are what conf/ names. Small masks go against the float64
reference tensor by tensor. Whole cells are measured as a sweep does it: checked, timed by CUDA events after a warm-up, inputs of
random data larger than L2, medians.
"""

from __future__ import annotations

import importlib
import inspect
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcbench.cp.none import Local
from lcbench.grid.paths import CONF
from lcbench.grid.values import axis_values, parse_tokens
from lcbench.inputs.drawing import draw
from lcbench.kernels.base import Kernel, Saved, Unsupported, prepare, refusal
from lcbench.kernels.reference import Reference
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.causal import causal
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure.cell import measure_cell
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.schedule.layout import zigzag
from lcbench.selectors.base import block_edges
from lcbench.testing.shrink import shrunk, tokens_of
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work

# Half-precision products summed in float32: this much of the largest value of a tensor.
BOUNDS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4, "float64": 1e-12}
SETTINGS = {"warmup": 2, "min_iterations": 5, "max_iterations": 50, "budget_s": 1.0, "precision": 0.02, "timeline": False}
# What matters most comes first: what the time does not suffice for is recorded as not reached.
TIMED = (
    ("causal", "32k"), ("block_random", "32k"), ("causal_document", "32k"), ("full", "32k"), ("sliding_window", "32k"),
    ("causal", "4k"), ("causal", "16k"), ("causal", "64k"), ("prefix_lm_causal", "32k"), ("block_causal", "32k"),
    ("causal", "128k"),
)  # fmt: skip
# First passes run several at once, so that compiling takes no time of the timings; a longer one would want much memory.
FIRST_TOKENS = 32 << 10
HEADS, SMALL_HEADS = Heads(64, 8, 128), (Heads(8, 2, 128), Heads(4, 4, 64))


Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One row to be: what it is about, its work, and how much work it is among those of its kernel (0: not known). ``alone``: no
    other process may use the device meanwhile.
    """

    head: Row
    run: Callable[[], Row]
    size: float = 0.0
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """What to run on which device."""

    device: torch.device
    dtype: str = "bfloat16"
    tokens: int = 1536
    small_heads: tuple[Heads, ...] = SMALL_HEADS
    heads: Heads = HEADS
    timed: tuple[tuple[str, str], ...] = TIMED
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
    """The kernels of conf/kernel that compute softmax attention, by name, but for the reference; our own, which need no library,
    come first."""
    found: dict[str, Kernel] = {}
    for path in sorted((CONF / "kernel").glob("*.yaml"), key=lambda path: (not path.stem.startswith("triton"), path.stem)):
        config = flat_yaml(path)
        name, target = config.pop("name"), config.pop("_target_")
        if name != "reference" and (wanted is None or name in wanted):
            found[name] = _object(target)(**config)
    return {name: kernel for name, kernel in found.items() if kernel.operator == "softmax"}


def devices() -> list[Row]:
    """The entries of conf/device."""
    return [flat_yaml(path) for path in sorted((CONF / "device").glob("*.yaml"))]


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
    edges = block_edges(tokens, 128)
    keep = np.random.default_rng(0).random((heads.kv, len(edges) - 1, len(edges) - 1)) < 0.5
    yield "chosen causal", chosen(keep | np.eye(len(edges) - 1, dtype=bool), edges, edges, causal(tokens))
    third = tokens // 3
    yield "holes", BandMask.of(tokens, tokens, [Band(5, third, 0, 300), Band(2 * third, tokens - 7, third, tokens, -third, -100)])
    yield "tall", BandMask.of(tokens, tokens, [Band(0, tokens, 100, 100 + third, -third, 50)])


def check_tasks(name: str, kernel: Kernel, plan: Plan) -> Iterator[Task]:
    """A row per mask and heads: errors of out, lse, dq, dk, dv against the float64 reference, as parts of the largest value."""
    for heads in plan.small_heads:
        for mask_name, mask in small_masks(plan.tokens, heads):
            problem, reason = _problem(kernel, mask, plan.tokens, heads, plan)
            head = {"kernel": name, "mask": mask_name, "heads": str(heads), "dtype": plan.dtype, "direction": problem.direction}
            run = partial(_refused, reason) if reason else partial(_compare, kernel, mask, problem, plan)
            yield Task(head, run)


def _problem(kernel: Kernel, mask: Mask, seqlen: int, heads: Heads, plan: Plan) -> tuple[Problem, str | None]:
    """Forward and backward, or forward alone for a kernel that has no backward; and why neither runs."""
    for direction in ("forward_backward", "forward"):
        problem = Problem(seqlen, heads, Scale(1, 1), plan.dtype, direction)
        reason = kernel.unsupported(problem, mask) or refusal(kernel, problem, plan.device)
        if reason is None:
            break
    return problem, reason


def _compare(kernel: Kernel, mask: Mask, problem: Problem, plan: Plan) -> Row:
    everything = np.arange(problem.seqlen)
    q, k, v, dout = (draw(name, everything, problem, 1, plan.device) for name in ("q", "k", "v", "dout"))
    scale, dtype = problem.softmax_scale, getattr(torch, problem.dtype)
    exact = prepare(Reference(), mask, problem.heads, dtype, plan.device)
    prepared = prepare(kernel, mask, problem.heads, dtype, plan.device)
    want = [*exact.forward(q, k, v, softmax_scale=scale)]
    out, lse = prepared.forward(q, k, v, softmax_scale=scale)
    got = [out, lse]
    if problem.backward:
        want += exact.backward(dout, Saved(q, k, v, want[0], want[1]), softmax_scale=scale)
        got += prepared.backward(dout, Saved(q, k, v, out.to(q.dtype), lse), softmax_scale=scale)
    errors = {}
    for tensor, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=False):
        difference = torch.where(mine.double() == reference, 0.0, (mine.double() - reference).abs())
        finite = reference[torch.isfinite(reference)]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        errors[tensor] = float(difference.max()) / (largest or 1.0)
    good = all(error <= BOUNDS[problem.dtype] for error in errors.values())  # NaN is not
    return {"status": "ok" if good else "wrong", "errors": errors, "calls": prepared.calls}


def first_tasks(name: str, kernel: Kernel, plan: Plan) -> Iterator[Task]:
    """A row per mask and length that will be timed and is not long: one pass, which compiles what it needs. Its result is not
    looked at."""
    for head, mask, problem, reason in _timed(name, kernel, plan):
        if reason is None and problem.seqlen <= FIRST_TOKENS:
            yield Task(head, partial(_first_pass, kernel, mask, problem, plan))


def time_tasks(name: str, kernel: Kernel, plan: Plan, peak_tflops: float) -> Iterator[Task]:
    """A row per mask and length: TFLOP/s forward and backward, the part of the measured peak, peak memory. What is timed is checked
    by the whole check of a sweep's cell.
    """
    gang = Gang(0, 1, plan.device, Groups(), devices())
    for head, mask, problem, reason in _timed(name, kernel, plan):
        if reason:
            yield Task(head, partial(_refused, reason))
        else:
            work = Work(Attention(), problem, partial(_same, mask), kernel, Local(), plan.settings, 0)
            yield Task(head, partial(_measure, work, gang, peak_tflops), float(problem.seqlen) ** 2, alone=True)


def _timed(name: str, kernel: Kernel, plan: Plan) -> Iterator[tuple[Row, Mask, Problem, str | None]]:
    """What is to be timed, and why a kernel does not run it."""
    for mask_name, length in plan.timed:
        seqlen = parse_tokens(length)
        head: Row = {"kernel": name, "mask": mask_name, "seqlen": seqlen, "heads": str(plan.heads), "dtype": plan.dtype}
        mask = mask_of(mask_name, seqlen, plan.heads)
        problem, reason = _problem(kernel, mask, seqlen, plan.heads, plan)
        if reason is None and isinstance(mask, BlockMap) and kernel.takes == "bands":
            reason = "left to a sweep: it runs a block map as bands, in very many calls"
        yield head, mask, problem, reason


def _first_pass(kernel: Kernel, mask: Mask, problem: Problem, plan: Plan) -> Row:
    tokens = np.arange(problem.seqlen)
    q, k, v, dout = (draw(name, tokens, problem, 1, plan.device) for name in ("q", "k", "v", "dout"))
    begun = time.perf_counter()
    prepared = prepare(kernel, mask, problem.heads, getattr(torch, problem.dtype), plan.device)
    out, lse = prepared.forward(q, k, v, softmax_scale=problem.softmax_scale)
    if problem.backward:
        prepared.backward(dout, Saved(q, k, v, out.to(q.dtype), lse), softmax_scale=problem.softmax_scale)
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    return {"status": "ok", "seconds": time.perf_counter() - begun}


def _refused(reason: str) -> Row:
    return {"status": "unsupported", "reason": reason}


def _measure(work: Work, gang: Gang, peak_tflops: float) -> Row:
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


def guarded(run: Callable[[], Row]) -> Row:
    """A kernel may fail in any way that its library knows; the rest goes on."""
    try:
        return run()
    except Unsupported as error:
        return {"status": "unsupported", "reason": str(error)}
    except Exception as error:
        kind = "oom" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
        where = traceback.format_exc()[-2000:]
        return {"status": "failed", "reason": f"{kind}: {str(error)[:400]}", "traceback": where}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _same(mask: Mask, draw: int) -> Mask:
    return mask
