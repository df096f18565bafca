"""What a selector is: from queries and keys, which blocks of keys each block of queries attends to.

The plane is cut into blocks of ``q_block`` queries by ``k_block`` keys; the last ones may be shorter. What is chosen is a block map
within the cell's mask: a block counts where it is kept, and in it the pairs that the mask has. Maps are per query head, per
key/value head or for all heads (``per``).

Under context parallelism a selector chooses what it chooses on one rank, bit for bit. So its work comes in units that any rank does
alike: ``of_keys`` looks at whole blocks of keys, each by itself; what all keys together say is worked out by every rank from all of
these, in the order of blocks (``of_all``); ``keep`` looks at one block of queries at a time. Which rank has which rows, and what
they tell one another, is not the selector's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, get_args

import numpy as np

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import Keep, Sharing
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

Features = dict[str, "torch.Tensor"]


def check_whole(option: str, value: object, least: int) -> None:
    """Raises ValueError unless the value of ``selector.<option>`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"selector.{option}={value} is no whole number of at least {least}")


def block_edges(tokens: int, size: int) -> Ints:
    """Where blocks of ``size`` tokens begin, and the end: (blocks + 1,)."""
    return np.append(np.arange(0, tokens, size), tokens).astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """A block of queries, for which keys are chosen.

    Attributes:
        number: of the block of queries.
        q: (T, Hq, D), all of its queries.
        pairs: how many pairs the cell's mask has in each block of keys, int64 (columns of blocks,); 0: no query sees any of it.
        sees: the cell's mask of these queries and all keys, cropped: query 0 is the first of the block.
        lse: (T, Hq) over all keys that the cell's mask lets them see, of an earlier step; only where ``Selector.needs_lse``.
    """

    number: int
    q: torch.Tensor
    pairs: Ints
    sees: BandMask
    lse: torch.Tensor | None = None


@dataclass(frozen=True)
class Selector(ABC):
    """A way to choose blocks of keys, and its options.

    Attributes:
        q_block, k_block: queries and keys of a block.
        per: whose map it is: each query head's, that of the query heads that share a key/value head, or all heads'.
        every: steps that use one choice: the time of choosing is divided among them where it is amortised.
        needs_lse: whether it is given the LSE of an earlier step.
        dense: whether it keeps everything, so that there is nothing to choose.
    """

    needs_lse: ClassVar[bool] = False
    dense: ClassVar[bool] = False

    q_block: int = field(default=128, kw_only=True)
    k_block: int = field(default=128, kw_only=True)
    per: Sharing = field(default="q_head", kw_only=True)
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("q_block", "k_block", "every"):
            check_whole(name, getattr(self, name), 1)
        if self.per not in get_args(Sharing):
            raise ValueError(f"selector.per={self.per} is not one of {', '.join(get_args(Sharing))}")

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot choose for a problem, stored word for word in the skipped result; None: it can."""
        return None

    def missing(self) -> str | None:
        """Why it does not run in this process: which library is not installed."""
        return None

    def maps(self, heads: Heads) -> int:
        """How many block maps there are."""
        return {"all_heads": 1, "kv_head": heads.kv, "q_head": heads.q}[self.per]

    def of_keys(self, k: torch.Tensor, sizes: Ints, problem: Problem) -> Features:
        """What others need to know of whole blocks of keys, each of them by itself.

        Args:
            k: (T, Hk, D), the keys of some blocks, one block behind the other.
            sizes: their tokens, (blocks,).

        Returns:
            Tensors whose first dimension is tokens or blocks (``by_block`` says which): rows of one global tensor.
        """
        return {}

    def by_block(self) -> tuple[str, ...]:
        """The features that have a row per block of keys; the others have a row per key."""
        return ()

    def of_all(self, features: Features, edges: Ints, problem: Problem) -> Features:
        """What choosing needs of all keys, from the features of all of them in order: the same on every rank."""
        return features

    @abstractmethod
    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        """Which blocks of keys a block of queries attends to, bool (maps, columns of blocks).

        Every query that sees a key by the cell's mask must see one by what is kept. A block without pairs is not kept.

        Args:
            keys: what ``of_all`` gave.
            edges: of the blocks of keys, (columns + 1,).
        """
