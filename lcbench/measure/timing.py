"""Honest time: every rank starts together, an iteration lasts as long as its slowest rank, and all samples are kept.

On CUDA a kernel that is launched on an idle device waits for Python to launch the next one, and that gap would count. So the device
sleeps before a phase for as long as the host needs to launch all of it, and the clock starts, on the device, after the sleep. A
phase that waits for its own kernels is not faster for it, and not slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lcbench.measure import progress
from lcbench.measure.stopping import Stopping

# The device sleeps for this many times the shortest time in which the host has launched the phase so far, within bounds: the first
# sleep is before anything is known, and a phase that waits for its kernels would otherwise have as long a sleep as itself.
SLEEP_FACTOR = 1.5
FIRST_SLEEP_S = 2e-3
LONGEST_SLEEP_S = 20e-3
# The sleep counts cycles. No data-center GPU has a faster clock: at a slower one a sleep is longer.
CYCLES_PER_S = 2e9


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
    launch_s = dict.fromkeys(phases, math.inf)
    progress.own.has_pace()
    for _ in range(warmup):
        change()
        _, launched, _ = _iteration(phases, device, launch_s)
        if launched:
            _learn(launch_s, _slowest(launched, device))
        progress.own.iterate()
    begun = time.perf_counter()
    while True:
        change()
        own, launched, passed = _iteration(phases, device, launch_s)
        slowest = _slowest([*own.values(), time.perf_counter() - begun, *launched], device)
        _learn(launch_s, slowest[len(phases) + 1 :])
        progress.own.iterate()
        for name, mine, worst in zip(phases, own.values(), slowest, strict=False):
            samples.own[name].append(mine)
            samples.slowest[name].append(worst)
        totals = np.sum(list(samples.slowest.values()), axis=0)
        verdict = stopping.verdict(totals, spent_s=slowest[len(phases)])
        if verdict is not None:
            samples.stopped_by, samples.noise = verdict, stopping.noise(totals)
            return samples, passed
        del passed


def _iteration(
    phases: dict[str, Phase], device: torch.device, launch_s: dict[str, float]
) -> tuple[dict[str, float], list[float], Any]:
    """Seconds of each phase on this rank, on CUDA those in which the host launched each, and what the last phase returned.

    Args:
        launch_s: how long launching each phase is expected to take; the same on all ranks.
    """
    passed: Any = None
    times: dict[str, float] = {}
    launched: list[float] = []
    for name, phase in phases.items():
        _barrier(device)
        if device.type != "cuda":
            started = time.perf_counter()
            passed = phase(passed)
            times[name] = time.perf_counter() - started
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(_sleep_s(launch_s[name]) * CYCLES_PER_S))
        _meet(device)
        started = time.perf_counter()
        begin.record()
        passed = phase(passed)
        end.record()
        launched.append(time.perf_counter() - started)
        end.synchronize()
        times[name] = begin.elapsed_time(end) / 1e3
    return times, launched, passed


def _sleep_s(launch_s: float) -> float:
    return min(LONGEST_SLEEP_S, SLEEP_FACTOR * launch_s) if launch_s < math.inf else FIRST_SLEEP_S


def _learn(launch_s: dict[str, float], launched: Sequence[float]) -> None:
    for name, seconds in zip(launch_s, launched, strict=False):  # on a CPU nothing is launched
        launch_s[name] = min(launch_s[name], seconds)


def _meet(device: torch.device) -> None:
    """Have the ranks' devices, whose clocks make the same sleep differently long, go on together, without the host waiting."""
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "nccl":
        dist.all_reduce(torch.zeros(1, device=device))


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
