"""What a compressor is: scores of keys, of which the highest of each key/value head are passed on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange


@dataclass(frozen=True)
class Block:
    """A rank's block of one prompt.

    Attributes:
        q, k, v: of its tokens, (T, Hq, D), (T, Hk, D) and (T, Hk, Dv).
        last: queries of the prompt's last tokens, (n, Hq, D), as many as the compressor asks for.
        sees: which keys of the block these see, bool (n, T).
        place: (prompt, rank), whole numbers that no other block has.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    last: torch.Tensor
    sees: torch.Tensor
    place: tuple[int, int]


# Scores (T, Hk) of the keys of each block, from a rank's blocks of all prompts. Collective.
Scores = Callable[[Sequence[Block]], "list[torch.Tensor]"]


@dataclass(frozen=True)
class Compressor(ABC):
    """A way to choose keys, and its options.

    Attributes:
        odd: whether inputs that are all negated make it choose the same keys, so that results are negated too.
    """

    odd: ClassVar[bool] = True

    @property
    def asks(self) -> int:
        """How many of each prompt's last queries every rank is to be given."""
        return 0

    def missing(self) -> str | None:
        """Why it does not run in this process: which library is not installed."""
        return None

    @abstractmethod
    def start(self, problem: Problem, device: torch.device, exchange: Exchange) -> Scores:
        """Make ready to score keys.

        Raises:
            Unsupported: it cannot score the keys of this problem.
        """
