"""Honest time: every rank starts together, an iteration lasts as long as its slowest rank, and all samples are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lcbench.measure import progress
from lcbench.measure.stopping import Stopping


@dataclass
class Samples:
    """Seconds per iteration and phase. ``slowest``: the slowest rank of each; ``own``: this rank's."""

    slowest: dict[str, list[float]] = field(default_factory=dict)
    own: dict[str, list[float]] = field(default_factory=dict)
    stopped_by: str = ""
    noise: float = float("nan")


Phase = Callable[[Any], Any]


def measure(
    phases: dict[str, Phase], stopping: Stopping, warmup: int, device: torch.device, between: Callable[[], None] | None = None
) -> tuple[Samples, Any]:
    """Run the phases one after the other, again and again, each timed on its own; a phase gets what the one before returned.
    Returns what the last one of the last iteration returned, too.

    Collective. Ranks agree on every iteration's time (one small all-reduce outside of the timed part), so that they stop
    after the same iteration. ``between`` is called before every iteration, outside of the timed part.
    """
    samples = Samples({name: [] for name in phases}, {name: [] for name in phases})
    change = between or (lambda: None)
    progress.own.has_pace()
    for _ in range(warmup):
        change()
        _iteration(phases, device)
        progress.own.iterate()
    begun = time.perf_counter()
    while True:
        change()
        own, passed = _iteration(phases, device)
        slowest = _slowest([*own.values(), time.perf_counter() - begun], device)
        progress.own.iterate()
        for name, mine, worst in zip(phases, own.values(), slowest, strict=False):
            samples.own[name].append(mine)
            samples.slowest[name].append(worst)
        totals = np.sum(list(samples.slowest.values()), axis=0)
        verdict = stopping.verdict(totals, spent_s=slowest[-1])
        if verdict is not None:
            samples.stopped_by, samples.noise = verdict, stopping.noise(totals)
            return samples, passed
        del passed


def _iteration(phases: dict[str, Phase], device: torch.device) -> tuple[dict[str, float], Any]:
    """Seconds of each phase on this rank, and what the last one returned."""
    passed: Any = None
    times: dict[str, float] = {}
    if device.type == "cuda":
        for name, phase in phases.items():
            _barrier(device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            passed = phase(passed)
            end.record()
            end.synchronize()
            times[name] = begin.elapsed_time(end) / 1e3
        return times, passed
    for name, phase in phases.items():
        _barrier(device)
        started = time.perf_counter()
        passed = phase(passed)
        times[name] = time.perf_counter() - started
    return times, passed


def _barrier(device: torch.device) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(times: Sequence[float], device: torch.device) -> list[float]:
    values = torch.tensor(times, dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    result: list[float] = values.tolist()
    return result
