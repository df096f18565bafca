"""Measure one cell on all ranks: build, check against the reference, time, measure memory. A number without a check is none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lcbench.cp.base import Peer, Run, Strategy
from lcbench.cp.execute import Executor, Groups
from lcbench.kernels.base import Kernel, Unsupported, refusal
from lcbench.masks.mask import Mask
from lcbench.measure.environment import device_name
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.inputs import draw
from lcbench.measure.memory import peak_bytes
from lcbench.measure.numerics import Check, Result, Shard, check
from lcbench.measure.peak import configured_peak, measured_peak
from lcbench.measure.stopping import Stopping, summary
from lcbench.measure.timing import measure
from lcbench.problem import Problem


@dataclass
class Measured:
    """What a cell gave; ``unavailable`` says why it could not run on this machine, ``check`` is None then."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    check: Check | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None


@dataclass(frozen=True)
class Gang:
    """The ranks that measure together, as one of them sees it."""

    rank: int
    world_size: int
    device: torch.device
    groups: Groups
    devices: list[dict[str, Any]]  # conf/device entries


@dataclass(frozen=True)
class Work:
    """A cell as objects: what to run, how long to measure it (the cell's ``measure``), and the seed of its inputs.

    ``make_mask`` gives draw 0, 1, ... ``draws - 1`` of the mask.
    """

    problem: Problem
    make_mask: Callable[[int], Mask]
    kernel: Kernel
    strategy: Strategy | Peer
    settings: dict[str, Any]
    seed: int
    draws: int = 1


def measure_cell(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
    """Run a cell, once per draw of its mask. Collective; every rank returns the same metrics. ``say`` gets a line per phase."""
    unavailable = _first_word(
        refusal(work.kernel, work.problem, gang.device)
        or (work.strategy.unavailable(work.problem, gang.device) if isinstance(work.strategy, Peer) else None)
    )
    if unavailable:
        return Measured(unavailable=unavailable)
    measured: list[Measured] = []
    for number in range(work.draws):
        if work.draws > 1:
            say(f"draw {number} of {work.draws}")
        measured.append(_measure_draw(work, number, gang, say))
        check = measured[-1].check
        if check is None or check.failures:
            measured[-1].notes["draw"] = number
            return measured[-1]
    return measured[0] if len(measured) == 1 else over_draws(measured)


def _measure_draw(work: Work, number: int, gang: Gang, say: Callable[[str], None]) -> Measured:
    problem, kernel, device = work.problem, work.kernel, gang.device
    measured = Measured()
    started = time.perf_counter()
    mask = work.make_mask(number)
    pairs = mask.pairs(problem.heads.q)
    executor: Executor | None = None
    run: Run
    unsupported = None
    try:
        if isinstance(work.strategy, Peer):
            tokens = work.strategy.tokens(problem, gang.rank)
            run = work.strategy.start(problem, mask, kernel, gang.rank, device)
        else:
            schedule = work.strategy.schedule(problem, mask)
            tokens = schedule.layout.tokens(gang.rank)
            run = executor = Executor(schedule, mask, kernel, problem, rank=gang.rank, device=device, groups=gang.groups)
    except Unsupported as reason:
        unsupported = str(reason)
    # One rank's tile may be what its kernel cannot run while the others' are well.
    measured.unavailable = _first_word(unsupported)
    if measured.unavailable:
        return measured
    prepare_s = time.perf_counter() - started
    say(f"drawing {len(tokens)} of {problem.seqlen} tokens")
    names = ("q", "k", "v", "dout") if problem.backward else ("q", "k", "v")
    shard = Shard(tokens, *(draw(name, tokens, problem, work.seed, device) for name in names))

    say("checking against the float64 reference")
    started = time.perf_counter()
    out, saved = run.forward(shard.q, shard.k, shard.v)
    forward_bytes, backward_bytes = executor.bytes_sent if executor else 0, 0
    grads: tuple[torch.Tensor | None, ...] = (None, None, None)
    if shard.dout is not None:
        grads = run.backward(shard.dout, saved)
        backward_bytes = executor.bytes_sent if executor else 0
    measured.check = check(mask, problem, shard, Result(out, run.lse(saved), *grads), seed=work.seed)
    del out, saved, grads
    metrics = measured.metrics
    for name, error in measured.check.errors.items():
        metrics[f"check/{name}_error"] = error
        metrics[f"check/{name}_bound"] = measured.check.bounds[name]
    metrics["time/prepare_s"] = max(_from_all(prepare_s))
    metrics["time/check_s"] = time.perf_counter() - started
    metrics["mask/area"], metrics["mask/density"] = pairs / problem.heads.q, mask.density
    if executor is not None:
        rank_pairs = _from_all(executor.pairs)
        if sum(rank_pairs) != pairs:
            raise AssertionError(f"the ranks compute {sum(rank_pairs)} pairs over all query heads, the mask has {pairs}")
        metrics["balance/area_max_over_mean"] = max(rank_pairs) * len(rank_pairs) / pairs if pairs else 1.0
        metrics["comm/forward/bytes"] = float(max(_from_all(forward_bytes)))
        metrics["comm/backward/bytes"] = float(max(_from_all(backward_bytes)))
        metrics["comm/bytes"] = float(max(_from_all(forward_bytes + backward_bytes)))
        metrics["memory/buffer_bytes"] = float(max(_from_all(executor.buffer_bytes)))
        measured.notes["kernel_calls"] = _from_all(executor.calls)
        metrics["kernel/calls"] = float(max(measured.notes["kernel_calls"]))
    if measured.check.failures:
        return measured  # a wrong result has no speed

    say("timing")
    started = time.perf_counter()
    phases: dict[str, Callable[[Any], Any]] = {"forward": lambda _: run.forward(shard.q, shard.k, shard.v)[1]}
    if shard.dout is not None:
        dout = shard.dout
        phases["backward"] = lambda saved: run.backward(dout, saved)
    timed = measure(phases, Stopping.from_config(work.settings), work.settings["warmup"], device)
    measured.notes["stopped_by"] = timed.stopped_by
    metrics["time/iterations"] = float(len(timed.slowest["forward"]))
    metrics["time/noise"] = timed.noise

    say("measuring memory")
    peak = peak_bytes(lambda: _once(run, shard), device)
    # The engine's buffers are there before and after, and are needed all the same.
    held = executor.buffer_bytes if executor else 0
    peaks = _from_all(-1 if peak is None else peak + held)
    if min(peaks) >= 0:
        metrics["memory/peak_bytes"] = float(max(peaks))
        measured.samples["rank_peak_bytes"] = [float(p) for p in peaks]

    flops = {"forward": forward_flops(pairs, problem.heads)}
    if problem.backward:
        flops["backward"] = backward_flops(pairs, problem.heads)
    slowest = dict(timed.slowest)
    slowest["total"] = np.sum([slowest[phase] for phase in flops], axis=0).tolist()
    flops["total"] = sum(flops.values())
    peak_tflops, source = _peak(gang, problem.dtype)
    metrics["compute/peak_tflops"], measured.notes["peak_source"] = peak_tflops, source
    for phase, seconds in slowest.items():
        for name, value in summary(seconds).items():
            metrics[f"time/{phase}/{name}_s"] = value
        rate = flops[phase] / metrics[f"time/{phase}/median_s"] / gang.world_size / 1e12
        metrics[_compute(phase, "tflops_per_gpu")] = rate
        metrics[_compute(phase, "mfu")] = rate / peak_tflops
        measured.samples[f"{phase}_s"] = seconds
    for phase, own in timed.own.items():
        measured.samples[f"rank_{phase}_median_s"] = _from_all(float(np.median(own)))
    if executor is not None and gang.world_size > 1:
        say("timing computing and communicating apart")
        _measure_overlap(measured, executor, shard, work.settings, device)
    if executor is not None and work.settings["timeline"]:
        _from_all(None)  # ranks begin together
        measured.notes["timeline"] = _from_all(executor.timeline(shard.q, shard.k, shard.v, shard.dout))
    metrics["time/measure_s"] = time.perf_counter() - started
    return measured


def _measure_overlap(measured: Measured, executor: Executor, shard: Shard, settings: dict[str, Any], device: torch.device) -> None:
    """The same schedule without its messages, and without its kernels: what of the communication is hidden."""
    stopping = Stopping.from_config(settings | {"budget_s": settings["budget_s"] / 4})
    _, saved = executor.forward(shard.q, shard.k, shard.v)
    dout = shard.dout
    alone: dict[str, dict[str, float]] = {}
    for name, switch in (("compute", {"communicate": False}), ("communication", {"compute": False})):
        # A bare pass has no result to go on with, so backward takes what the whole one saved.
        phases: dict[str, Callable[[Any], Any]] = {
            "forward": lambda _, switch=switch: executor.forward(shard.q, shard.k, shard.v, **switch)  # type: ignore[misc]
        }
        if dout is not None:
            phases["backward"] = lambda _, switch=switch: executor.backward(dout, saved, **switch)  # type: ignore[misc]
        timed = measure(phases, stopping, 1, device)
        alone[name] = {phase: float(np.median(seconds)) for phase, seconds in timed.slowest.items()}
    for phase in alone["compute"]:
        whole = measured.metrics[f"time/{phase}/median_s"]
        compute, communication = alone["compute"][phase], alone["communication"][phase]
        measured.metrics[f"overlap/{phase}/compute_s"] = compute
        measured.metrics[f"overlap/{phase}/communication_s"] = communication
        measured.metrics[f"overlap/{phase}/exposed_s"] = max(0.0, whole - compute)
        hideable = min(compute, communication)
        hidden = (compute + communication - whole) / hideable if hideable else 0.0
        measured.metrics[f"overlap/{phase}/efficiency"] = min(1.0, max(0.0, hidden))


def over_draws(draws: list[Measured]) -> Measured:
    """One record of several draws of a mask, the spread over draws apart from the spread over iterations.

    Times, areas, bytes and balance are means over the draws, so that FLOPs over time is the rate of all the work done; errors,
    memory and noise are those of the worst draw. ``draws/...`` hold what differs between draws.
    """
    every = [m.metrics for m in draws]
    joined = Measured(metrics={key: float(np.mean([m[key] for m in every])) for key in every[0]}, notes=dict(draws[0].notes))
    metrics = joined.metrics
    for key in metrics:
        if key.startswith(("check/", "memory/")) or key == "time/noise":
            metrics[key] = max(m[key] for m in every)
    metrics["draws/count"] = float(len(draws))
    joined.samples["draw_area"] = [m["mask/area"] for m in every]
    for phase in ("forward", "backward", "total"):
        key = f"time/{phase}/median_s"
        if key not in metrics:
            continue
        times = np.array([m[key] for m in every])
        rates = np.array([m[_compute(phase, "tflops_per_gpu")] for m in every])
        # Rate times time is the work of a draw, up to a factor that they share.
        metrics[_compute(phase, "tflops_per_gpu")] = rate = float((rates @ times) / times.sum())
        metrics[_compute(phase, "mfu")] = rate / metrics["compute/peak_tflops"]
        metrics[f"draws/{phase}/min_s"], metrics[f"draws/{phase}/max_s"] = float(times.min()), float(times.max())
        metrics[f"draws/{phase}/spread"] = float((times.max() - times.min()) / np.median(times))
        joined.samples[f"draw_{phase}_median_s"] = times.tolist()
    for key in draws[0].samples:
        if key.startswith("rank_"):
            joined.samples[key] = np.max([m.samples[key] for m in draws], axis=0).tolist()
        else:
            joined.samples[key] = [value for m in draws for value in m.samples[key]]
    joined.notes["stopped_by"] = ", ".join(sorted({m.notes["stopped_by"] for m in draws}))
    for key in {"kernel_calls", "timeline"} & set(draws[0].notes):
        joined.notes[key] = [m.notes[key] for m in draws]
    checks = [m.check for m in draws if m.check is not None]
    # Errors are judged against the bound of their own draw, so the worst is the one that comes nearest to it.
    joined.check = max(checks, key=lambda c: max(c.errors[n] / c.bounds[n] if c.bounds[n] else 0.0 for n in c.errors))
    return joined


def _compute(phase: str, name: str) -> str:
    return f"compute/{name}" if phase == "total" else f"compute/{phase}/{name}"


def _once(run: Run, shard: Shard) -> None:
    out, saved = run.forward(shard.q, shard.k, shard.v)
    if shard.dout is not None:
        run.backward(shard.dout, saved)
    del out, saved


def _peak(gang: Gang, dtype: str) -> tuple[float, str]:
    """(dense TFLOP/s per device, where it comes from)."""
    name = device_name(gang.device)
    known = configured_peak(gang.devices, name, dtype)
    if known is not None:
        return known, f"conf/device entry for {name}"
    return min(_from_all(_measured_peak(dtype, gang.device))), f"matrix product measured on {name}"


@cache
def _measured_peak(dtype: str, device: torch.device) -> float:
    return measured_peak(getattr(torch, dtype), device)


def _first_word(reason: str | None) -> str | None:
    """The first rank's reason not to run, or None when every rank can."""
    return next((r for r in _from_all(reason) if r), None)


def _from_all(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
