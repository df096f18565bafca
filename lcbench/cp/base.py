"""What a strategy is to the rest: options as a frozen dataclass, an honest refusal, and a schedule, or, of a library, a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lcbench.kernels.base import Kernel
from lcbench.masks.band import Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from lcbench.schedule.execute import Groups


class Strategy(Protocol):
    """A strategy as data, which the engine runs. One that is for a single rank sets ``one_rank = True``, which ``grid.build``
    reads: where nobody asks for a scale it gets 1x1. One whose messages may be told how to go is a ``cp.lowering.Lowered``.
    """

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """None if the schedule can run this problem, else the reason, stored word for word in the skipped result."""
        ...

    def schedule(self, problem: Problem, mask: Mask) -> Schedule: ...


class RankRun(Protocol):
    """A strategy at work on one rank; all tensors are packed and hold this rank's tokens. Collective, all three.

    A run may have an attribute ``own_lse``, read by ``getattr`` where a run is checked (``measure/cell.py``); without it, True.
    False: what ``lse`` gives was computed apart from ``forward``, by other code. It says nothing of the run, so it is compared
    with nothing, and the result says so. No member of the protocol, since every run would then need one.
    """

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """out (T, Hq, D), and what backward needs."""
        ...

    def lse(self, saved: Any) -> torch.Tensor:
        """(T, Hq), natural logarithm."""
        ...

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq (T, Hq, D), dk, dv (T, Hk, D)."""
        ...


@runtime_checkable
class Peer(Protocol):
    """A strategy of another library, run by that library and checked like ours: for comparison."""

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """None if the library can run this problem; it must refuse a mask that it would not respect."""
        ...

    def unavailable(self, problem: Problem, device: torch.device) -> str | None:
        """None if the library is here and runs on this device, else the reason; asked by the worker."""
        ...

    def tokens(self, problem: Problem, rank: int) -> Ints:
        """Global indices of the tokens of a rank, in the order of its tensors."""
        ...

    def start(
        self, problem: Problem, mask: Mask, kernel: Kernel, rank: int, device: torch.device, groups: Groups
    ) -> RankRun:  # fmt: skip
        """Ready to run, on communicators of ``groups``, which outlive the cell. Collective."""
        ...
