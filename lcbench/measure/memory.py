"""Peak memory of a piece of code above what was there before it, in bytes."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class _MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``: bytes of all arenas."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    )


def in_use(device: torch.device) -> int:
    """Bytes that are allocated now: on CUDA by torch; on CPU from the C library, in which torch's tensors are, whether they were
    written to or not, or the resident size of the process where it cannot tell."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return _status_bytes("VmRSS") if sys.platform.startswith("linux") else 0
    ask.restype = _MallInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak while ``run()`` runs, above the level before it; None where neither CUDA nor Linux can tell.

    On CUDA: the allocator's own peak. On CPU: the resident peak of this process, which Linux lets a process reset; freed
    heap is returned to the system first, since a peak inside memory that was never given back would go unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # reset the peak to the present level
    except OSError:
        run()
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no {key}")
