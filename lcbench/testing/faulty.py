"""A kernel for tests that fails on purpose while a certain file exists, and is torch's own kernel once it is gone."""

from __future__ import annotations

import ctypes
import inspect
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.kernels.base import OutLse, Prepared
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import Band, BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Blind(SDPAFlash):
    """Ignores the mask."""

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return super().prepare(BandMask.of(mask.num_q, mask.num_k, [Band(0, mask.num_q, 0, mask.num_k)]), heads, dtype, device)


@dataclass(frozen=True)
class Faulty(SDPAFlash):
    """``fault``: raise, exit, hang, kill, segfault, forks (who forks ranks is killed), stop (to be scheduled), wrong, blind (to the
    mask), oom (more memory than there is), oom_killer (more than the memory cgroup ``LCBENCH_TEST_CGROUP`` gives) or disconnect
    (from all other ranks); it happens on rank ``rank`` of the gang while ``while_file`` exists. With ``again`` it happens in a
    later block of timings, and once: the file is removed.
    """

    fault: str = "raise"
    while_file: str = ""
    rank: int = 0
    again: bool = False

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        from lcbench.measure.cell import measure_again

        prepared = super().prepare(mask, heads, dtype, device)
        if not Path(self.while_file).exists() or int(os.environ.get("RANK", "0")) != self.rank:
            return prepared
        if self.again:
            if not any(frame.function == measure_again.__name__ for frame in inspect.stack(0)):
                return prepared
            Path(self.while_file).unlink()
        if self.fault == "raise":
            raise RuntimeError("the faulty kernel raises, as told")
        if self.fault == "exit":
            os._exit(17)
        if self.fault == "kill":
            os.kill(os.getpid(), 9)
        if self.fault == "segfault":
            ctypes.string_at(0)
        if self.fault == "forks":
            os.kill(os.getppid(), 9)
        if self.fault == "stop":
            os.kill(os.getpid(), 19)
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "oom":
            import torch

            torch.empty(1 << 50, dtype=torch.uint8)
        if self.fault == "oom_killer":
            (Path(os.environ["LCBENCH_TEST_CGROUP"]) / "cgroup.procs").write_text(str(os.getpid()))
            taken = []
            while True:
                taken.append(bytearray(os.urandom(1 << 20)))
        if self.fault == "disconnect":
            for number in os.listdir("/proc/self/fd"):
                with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
            return prepared
        if self.fault == "blind":
            return Blind().prepare(mask, heads, dtype, device)
        return _Wrong(prepared)


class _Wrong:
    """Right but for a factor that a loose check would not see."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self.calls, self.backward = prepared, prepared.calls, prepared.backward

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> OutLse:
        out, lse = self._prepared.forward(q, k, v, softmax_scale=softmax_scale)
        return out * 1.001, lse
