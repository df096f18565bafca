"""The peak of the devices that measure, and whether what was measured stays below it and above what it must cost."""

from __future__ import annotations

import torch

from lcbench.measure.environment import device_name
from lcbench.measure.peak import configured_limit, configured_peak, entry_of, measured_limit
from lcbench.measure.plausible import implausible
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Cost, Gang
from lcbench.problem import Problem

# A peak that was measured is measured again so often before a rate above it is refused.
PEAK_TRIES = 3


def peak_tflops(problem: Problem, gang: Gang) -> tuple[float, str]:
    """(dense TFLOP/s of a device in the type of the problem, where that is known from). Collective."""
    known = configured_peak(gang.devices, device_name(gang.device), problem.dtype)
    return (_measured(problem, gang) if known is None else known), _source(known, gang)


def _source(configured: float | None, gang: Gang) -> str:
    """Where a peak or a limit is known from."""
    how = "matrix product measured on" if configured is None else "conf/device entry for"
    return f"{how} {device_name(gang.device)}"


def cannot_be(
    problem: Problem, gang: Gang, slowest: dict[str, list[float]], costs: dict[str, Cost], bytes_sent: dict[str, float]
) -> str | None:
    """Why the times cannot be true; None if they can. Collective.

    Args:
        slowest: seconds of every iteration by phase, of its slowest rank.
        costs: what each phase costs any sound run.
        bytes_sent: by phase, of the rank that sends most; without the phases that nobody counts.
    """
    configured = configured_limit(gang.devices, device_name(gang.device), problem.dtype)
    reason = None
    for attempt in range(PEAK_TRIES if configured is None else 1):
        limit = _measured(problem, gang, again=attempt > 0) if configured is None else configured
        reason = _above(limit, _source(configured, gang), gang, slowest, costs, bytes_sent)
        if reason is None:
            break
    return reason


def _above(
    limit: float,
    source: str,
    gang: Gang,
    slowest: dict[str, list[float]],
    costs: dict[str, Cost],
    bytes_sent: dict[str, float],
) -> str | None:
    entry = entry_of(gang.devices, device_name(gang.device)) or {}
    reasons = (
        implausible(
            phase,
            seconds=min(seconds),
            flops=costs[phase].flops / gang.world_size,
            peak_tflops=limit,
            peak_source=source,
            bytes_sent=bytes_sent.get(phase),
            least_bytes_sent=costs[phase].least_bytes_sent,
            link_gbytes_per_s=entry.get("link_gbytes_per_s"),
            memory_bytes=costs[phase].least_memory_bytes,
            memory_gbytes_per_s=entry.get("memory_gbytes_per_s"),
            cache_bytes=entry.get("cache_bytes"),
        )
        for phase, seconds in slowest.items()
    )
    return next((reason for reason in reasons if reason), None)


def _measured(problem: Problem, gang: Gang, *, again: bool = False) -> float:
    """Collective. Ranks of a node share its cores, so on a CPU one of each node measures."""
    measures = gang.device.type == "cuda" or gang.first_of_node
    dtype = getattr(torch, problem.dtype)
    return max(EVERY.all_gather_object(measured_limit(dtype, gang.device, again=again) if measures else 0.0))
