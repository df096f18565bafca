"""Peaks: what a device of conf/device can do by its data sheet, and what a matrix product reaches here where no entry says it.

A device is known by its whole name, as torch and nvidia-smi give it (``names`` of an entry): variants share pieces of names and not
peaks. A MIG slice is known by its GPU and its profile, as in "NVIDIA H100 80GB HBM3 MIG 1g.10gb": its peak is its share of the SMs
(``mig_sms`` of ``sms``; slices over seven would be off by up to a third), its memory, bandwidth and cache are its eighths. A device
without an entry, and a slice whose SMs no entry gives, is measured.

Units of an entry: ``peak_tflops`` dense; ``memory_gbytes_per_s`` read and written; ``link_gbytes_per_s`` of all links that leave
one GPU together, one way (half of what data sheets print); ``cache_bytes`` of the last-level cache. Figures of data sheets were
checked in public quotations of them; an entry's comment says what could not be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Square products are tried at these sides, the smallest first, each for SIDE_S seconds, a GPU's long enough for its clocks to rise,
# and REPEATS times at least; a side whose one product would take LONGEST_S or more is left out. Small ones fit into a time slice of
# a busy machine.
SIDES = {"cuda": (4096, 8192), "cpu": (192, 384, 768)}
SIDE_S = {"cuda": 0.2, "cpu": 0.05}
LONGEST_S = {"cuda": 0.3, "cpu": 0.1}
REPEATS = 3
MIG = " MIG "
MEMORY_SLICES = 8  # of a whole GPU

_best: dict[tuple[str, str], float] = {}  # TFLOP/s of the best product of this process, by type (or tf32) and device


def entry_of(devices: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The conf/device entry of the device with this whole name, of a MIG slice its share; None for one that nobody wrote down."""
    whole, _, profile = name.partition(MIG)
    entry = next((device for device in devices if _plain(whole) in map(_plain, device.get("names", ()))), None)
    return _slice(entry, profile) if entry and profile else entry


def _plain(name: str) -> str:
    """A name in small letters, without the maker, which drivers before 470 left out."""
    return " ".join(name.lower().split()).removeprefix("nvidia ")


def _slice(entry: dict[str, Any], profile: str) -> dict[str, Any] | None:
    """The share of a MIG profile such as ``1g.10gb`` or ``1g.10gb+me``; None where its SMs are not written down."""
    profile = profile.strip().partition("+")[0]
    sms = entry["mig_sms"].get(profile)
    if sms is None:
        return None
    gbytes = float(profile.partition(".")[2].removesuffix("gb"))
    memory = round(MEMORY_SLICES * gbytes * 1e9 / entry["memory_bytes"]) / MEMORY_SLICES
    return entry | {
        "name": f"{entry['name']}-{profile}",
        "peak_tflops": {dtype: peak * sms / entry["sms"] for dtype, peak in entry["peak_tflops"].items()},
        "memory_bytes": int(entry["memory_bytes"] * memory),
        "memory_gbytes_per_s": entry["memory_gbytes_per_s"] * memory,
        "cache_bytes": int(entry["cache_bytes"] * memory),
    }


def configured_peak(devices: Sequence[dict[str, Any]], name: str, dtype: str) -> float | None:
    """Dense TFLOP/s of a device by its entry; None where it has none, or none for this type."""
    entry = entry_of(devices, name)
    peak = entry["peak_tflops"].get(dtype) if entry else None
    return None if peak is None else float(peak)


def configured_limit(devices: Sequence[dict[str, Any]], name: str, dtype: str) -> float | None:
    """TFLOP/s that nothing exceeds on a device by its entry; None as for ``configured_peak``.

    That is its peak, but for float32: a kernel may compute float32 on tensor cores, as three TF32 products (xformers does), and so
    exceed the peak of the float32 units, which the data sheet gives; TF32's it cannot exceed.
    """
    return configured_peak(devices, name, "tf32" if dtype == "float32" else dtype)


def measured_peak(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of the best square matrix product in this type on this device that this process has seen; measured at first use."""
    return _measured(_name(dtype), device, again=False)


def measured_limit(dtype: torch.dtype, device: torch.device, *, again: bool = False) -> float:
    """TFLOP/s that no sound kernel exceeds here, by measured products; ``again`` measures once more before it answers.

    What else runs on a machine only makes a product slower, so the best of all tries of this process is the nearest to the truth.
    For a half type that is the larger of its own product and float32's: where a CPU has no units for it, torch's product in it is
    slow, and kernels compute it in float32. For float32 on CUDA it is the larger of its own and TF32's (``configured_limit``).
    """
    name = _name(dtype)
    kinds = [name, "float32"] if dtype.itemsize < 4 else [name, "tf32"] if (name, device.type) == ("float32", "cuda") else [name]
    return max(_measured(kind, device, again=again) for kind in kinds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(kind: str, device: torch.device, *, again: bool) -> float:
    """``kind``: the name of a type, or tf32."""
    key = (kind, str(device))
    if again or key not in _best:
        with _tf32(kind == "tf32"):
            _best[key] = max(_best.get(key, 0.0), _product_tflops("float32" if kind == "tf32" else kind, device))
    return _best[key]


def _product_tflops(dtype: str, device: torch.device) -> float:
    """TFLOP/s of the fastest product of all sides that are tried; on CPU one thread's, times the threads.

    Threads of a product wait for one another, so where other processes are at work they may take a hundred times as long as alone.
    """
    best = 0.0
    with _one_thread(device) as threads:
        for side in SIDES[device.type]:
            flops = 2 * side**3
            if best and flops / best / 1e12 >= LONGEST_S[device.type]:
                break
            best = max(best, flops / min(_product_seconds(side, dtype, device)) / 1e12)
    return best * threads


def _product_seconds(side: int, dtype: str, device: torch.device) -> Iterator[float]:
    """Seconds of products of two square matrices, one after the other."""
    import torch

    a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    ends, repeats = time.perf_counter() + SIDE_S[device.type], 0
    while repeats < REPEATS or time.perf_counter() < ends:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.perf_counter() - started
        repeats += 1


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether products in float32 may use TF32 on CUDA."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """On CPU products run in one thread; gives how many there are otherwise, 1 elsewhere."""
    import torch

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
