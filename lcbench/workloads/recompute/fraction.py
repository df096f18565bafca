"""The largest fraction of tokens whose activations can go to the host: MEMO's linear program (arXiv 2407.12117)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from scipy.optimize import linprog

from lcbench.kernels.base import Unsupported
from lcbench.measure.ranks import EVERY
from lcbench.workloads.recompute.host import room
from lcbench.workloads.transformer import Stack

COPIED = 16 << 20  # bytes of a copy whose time is taken
TIMED = 3  # how often each is timed, after once without; the middle one counts


@dataclass(frozen=True)
class Fraction:
    """What a fraction was found from, and what it is.

    Attributes:
        always_bytes: of a layer, which go to the host with any fraction: of the rank with most.
        other_bytes: of a layer, of which the fraction goes.
        forward_s: seconds of a layer's forward, of the fastest rank.
        bandwidth: bytes per second of a copy to the host or back, the slower of both, on the slowest rank.
        host_bytes: memory of its host that every rank can have.
        layers: of the model.
        fraction: 0 to 1.
        hidden: whether a layer's transfers take no longer than its forward; at fraction 0 they may.
    """

    always_bytes: int
    other_bytes: int
    forward_s: float
    bandwidth: float
    host_bytes: int
    layers: int
    fraction: float
    hidden: bool


def measured(stack: Stack, x: torch.Tensor, layers: int, always: int, whole: int) -> Fraction:
    """Measure a layer's forward and copies, and find the fraction. Collective, the same on all ranks.

    Args:
        layers: of the model that the stack stands for.
        always, whole: bytes of a layer that go to the host with the fraction 0 and 1.

    Raises:
        Unsupported: the memory of some host is too small for fraction 0.
    """
    with torch.no_grad():
        forward = _seconds(lambda: stack.layers[0](x, stack.rope), x.device)
    ranks = EVERY.all_gather_object((always, whole, forward, _bandwidth(x.device)))
    always, whole = max(one[0] for one in ranks), max(one[1] for one in ranks)
    forward, bandwidth = min(one[2] for one in ranks), min(one[3] for one in ranks)
    free, refused = room(layers * always)
    if refused:
        raise Unsupported(f"{refused}, with the fraction 0 and {layers} layers")
    fraction, hidden = largest(always, whole - always, forward * bandwidth, free / layers)
    return Fraction(always, whole - always, forward, bandwidth, free, layers, fraction, hidden)


def largest(always: float, other: float, hides: float, holds: float) -> tuple[float, bool]:
    """The largest fraction f of 0 to 1 with ``always + f * other`` at most ``hides`` and ``holds``, all in bytes; and whether there
    is one. Else it is 0: what always goes takes longer than what would hide it.

    Raises:
        ValueError: ``always`` is above ``holds``.
    """
    if always > holds:
        raise ValueError(f"{always} bytes of a layer are more than the {holds} that there is room for")
    if always > hides:
        return 0.0, False
    limit = min(hides, holds) or 1.0  # rows near 1, whatever the bytes
    found = linprog([-1.0], A_ub=[[other / limit]] * 2, b_ub=[(each - always) / limit for each in (hides, holds)], bounds=[(0, 1)])
    if found.status != 0:
        raise RuntimeError(f"the linear program of the fraction has no end: {found.message}")
    return min(max(float(found.x[0]), 0.0), 1.0), True


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy of ``COPIED`` bytes to the host or back, the slower of both."""
    there = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    host = torch.zeros(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copies = partial(host.copy_, there, non_blocking=True), partial(there.copy_, host, non_blocking=True)
    return COPIED / max(_seconds(copy, device) for copy in copies)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(1 + TIMED):
        _end(device)
        begun = time.perf_counter()
        function()
        _end(device)
        found.append(time.perf_counter() - begun)
    return sorted(found[1:])[TIMED // 2]


def _end(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
