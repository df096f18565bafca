"""The peak that MFU is measured against: configured for a known device, else measured here by a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 5


def entry_of(devices: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The conf/device entry whose ``match`` is in the device's name; None for a device nobody wrote down."""
    return next((device for device in devices if device["match"].lower() in name.lower()), None)


def configured_peak(devices: Sequence[dict[str, Any]], name: str, dtype: str) -> float | None:
    """Dense TFLOP/s of a device by its entry; None where it has none, or none for this type."""
    entry = entry_of(devices, name)
    peak = entry["peak_tflops"].get(dtype) if entry else None
    return None if peak is None else float(peak)


def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of the best of a few square matrix products in this type on this device."""
    import torch

    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e12
