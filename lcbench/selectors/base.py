"""What a selector is: from queries and keys, which blocks of keys each block of queries attends to.

The plane is cut into blocks of ``q_block`` queries by ``k_block`` keys; the last ones may be shorter. What is chosen is a block map
within the cell's mask: a block counts where it is kept, and in it the pairs that the mask has. Maps are per query head, per
key/value head or for all heads (``per``).

Under context parallelism a selector chooses what it chooses on one rank, bit for bit. So its work comes in units that any rank does
alike: ``of_keys`` looks at whole blocks of keys, each by itself; what all keys together say is worked out by every rank from all of
these, in the order of blocks (``of_all``); ``keep`` looks at one block of queries at a time. Which rank has which rows, and what
they tell one another, is not the selector's business.

That is one round. A method that has to know something of all tokens before it can look at keys, or that learns from some of the
queries, has more of them: ``rounds``, of which each knows what those before it came to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, get_args

import numpy as np

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import Keep, Sharing
from lcbench.problem import Heads, Problem
from lcbench.problem import check_whole as check_number

if TYPE_CHECKING:
    import torch

Features = dict[str, "torch.Tensor"]


def check_whole(option: str, value: object, least: int) -> None:
    """Raises ValueError unless the value of ``selector.<option>`` is a whole number of at least ``least``."""
    check_number(f"selector.{option}", value, least)


def block_edges(tokens: int, size: int) -> Ints:
    """Where blocks of ``size`` tokens begin, and the end: (blocks + 1,)."""
    return np.append(np.arange(0, tokens, size), tokens).astype(np.int64)


def pairs_of(mask: BandMask, edges: Ints) -> Ints:
    """How many pairs a mask of a few queries has in each block of keys, (columns of blocks,)."""
    _, begin, end = mask.intervals(np.arange(mask.num_q))
    inside = (bound[:, None].clip(edges[:-1], edges[1:]) for bound in (end, begin))
    pairs: Ints = np.subtract(*inside).sum(0)
    return pairs


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
class Round:
    """What ranks work out of the blocks that they have and tell one another, before any of them chooses.

    What is known starts empty. After a round it is ``all`` of what was known and what the ranks told one another: features of
    blocks of keys, in their order, and of blocks of queries, in theirs. Names must differ.

    Attributes:
        all: (features, known before among them; edges of the blocks of keys) to what is known: the same on every rank.
        keys: (k (T, Hk, D), the keys of some whole blocks, one behind the other; their tokens (blocks,); known) to tensors whose
            first dimension is tokens, or blocks where ``by_block`` names them. Each block must come out as if it were alone.
        by_block: names of the features of keys that have a row per block.
        queries: (a block of queries, known) to tensors with one row, so that what is told has a row per block.
        blocks: how many blocks of queries there are, to the numbers of those that ``queries`` looks at, rising.
    """

    all: Callable[[Features, Ints], Features]
    keys: Callable[[torch.Tensor, Ints, Features], Features] | None = None
    by_block: tuple[str, ...] = ()
    queries: Callable[[Rows, Features], Features] | None = None
    blocks: Callable[[int], Ints] = np.arange


@dataclass(frozen=True)
class Effort:
    """What choosing takes, counted: of all ranks together, but for ``shared``.

    Attributes:
        flops: of products.
        moved: bytes that torch's operations one by one read and write.
        kernels: operations.
        shared: bytes that every rank goes over by itself, to put together what all were told.
        told: bytes that ranks tell one another.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    shared: float = 0.0
    told: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


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

    def rounds(self, problem: Problem) -> Sequence[Round]:
        """What ranks tell one another before they choose, in this order: one round of keys, unless a method needs more."""
        return (
            Round(
                keys=lambda k, sizes, known: self.of_keys(k, sizes, problem),
                by_block=self.by_block(),
                all=lambda features, edges: self.of_all(features, edges, problem),
            ),
        )

    def asked(self, rows: Rows, edges: Ints) -> tuple[int, Keep] | None:
        """How many blocks of keys each map keeps for a block of queries, whose q is not known, and which in any case, bool
        (columns,); None: that depends on q and k."""
        return None

    def work(self, problem: Problem, pairs: float) -> Effort | None:
        """What choosing takes, for predictions; None: nobody has counted it.

        Args:
            pairs: of a query head within the cell's mask.
        """
        return None

    @abstractmethod
    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        """Which blocks of keys a block of queries attends to, bool (maps, columns of blocks).

        Every query that sees a key by the cell's mask must see one by what is kept. A block without pairs is not kept.

        Args:
            keys: what is known after the last round; where there is one round only, what ``of_all`` gave.
            edges: of the blocks of keys, (columns + 1,).
        """


def blocks_of(selector: Selector, problem: Problem) -> tuple[int, int]:
    """How many blocks of queries, and of keys, there are."""
    return -(-problem.queries // selector.q_block), -(-problem.seqlen // selector.k_block)
