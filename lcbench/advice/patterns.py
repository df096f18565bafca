"""How a strategy shares attention, and what a mask looks like, in words that do not depend on whose code does it.

Frameworks have few ways to share attention: heads exchanged, keys and values around a ring, keys and values gathered. A strategy
that is none of these, or no product of them, has no pattern, and no framework has it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from functools import singledispatch
from typing import Any

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Strategy
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.none import Local
from lcbench.cp.peers.library import segments
from lcbench.cp.peers.ring_flash_attn import OWN, RingFlashAttention
from lcbench.cp.peers.te import COMMUNICATIONS, TransformerEngine
from lcbench.cp.peers.torch_cp import ROTATIONS, TorchCP
from lcbench.cp.peers.yunchang import YunchangUSP
from lcbench.cp.ring import Ring
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Problem


@dataclass(frozen=True)
class Pattern:
    """How P ranks share attention; ``heads`` x ``ring`` x ``gathered`` is P.

    Attributes:
        heads: ranks of one exchange of heads; 1: there is none.
        ring: ranks around which keys and values travel; 1: they do not.
        gathered: ranks whose keys and values each of them gathers; 1: none.
        windows: of a double ring; 1: a plain one.
        layout: order in which tokens are dealt out: zigzag, striped, contiguous; ``auto``: whichever suits the mask.
        apart: whether the ranks of an exchange of heads are no neighbours, but those of a ring are.
        says: options of the strategy that are in this pattern.
    """

    heads: int = 1
    ring: int = 1
    gathered: int = 1
    windows: int = 1
    layout: str = "auto"
    apart: bool = False
    says: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """P."""
        return self.heads * self.ring * self.gathered


def pattern_of(strategy: Strategy, problem: Problem) -> Pattern | None:
    """The pattern of a strategy at this problem, or None where it is none that frameworks know.

    A class of a user's that is made from one of these may do anything else, and has none.
    """
    return _pattern(strategy, problem) if type(strategy) in _pattern.registry else None


@singledispatch
def _pattern(strategy: Strategy, problem: Problem) -> Pattern:
    raise NotImplementedError(type(strategy))


@_pattern.register
def _(strategy: Local, problem: Problem) -> Pattern:
    return Pattern()


@_pattern.register
def _(strategy: Ring, problem: Problem) -> Pattern:
    return Pattern(ring=problem.scale.world_size, layout=strategy.layout, says=("layout",))


@_pattern.register
def _(strategy: AllGather, problem: Problem) -> Pattern:
    return Pattern(gathered=problem.scale.world_size, layout=strategy.layout, says=("layout",))


@_pattern.register
def _(strategy: Ulysses, problem: Problem) -> Pattern:
    return Pattern(heads=problem.scale.world_size)


@_pattern.register
def _(strategy: USP, problem: Problem) -> Pattern:
    said = ("ulysses_degree", "layout", "ulysses")
    return _grid(problem, strategy.degree(problem), layout=strategy.layout, apart=strategy.ulysses == "outside", says=said)


@_pattern.register
def _(strategy: LoongTrain, problem: Problem) -> Pattern:
    return _grid(
        problem, strategy.degree(problem), windows=strategy.windows(problem), layout=strategy.layout,
        apart=strategy.placement == "context_first", says=("ulysses_degree", "window", "placement", "layout"),
    )  # fmt: skip


@_pattern.register
def _(strategy: TransformerEngine, problem: Problem) -> Pattern:
    return replace(_pattern(COMMUNICATIONS[strategy.comm], problem), says=("comm",))


@_pattern.register
def _(strategy: TorchCP, problem: Problem) -> Pattern:
    return replace(_pattern(ROTATIONS[strategy.rotate], problem), says=("rotate",))


@_pattern.register
def _(strategy: RingFlashAttention, problem: Problem) -> Pattern:
    return replace(_pattern(OWN[strategy.variant], problem), says=("variant",))


@_pattern.register
def _(strategy: YunchangUSP, problem: Problem) -> Pattern:
    return _grid(problem, strategy.degree(problem), layout="zigzag", says=("ulysses_degree",))


def _grid(problem: Problem, degree: int, **rest: Any) -> Pattern:
    return Pattern(heads=degree, ring=problem.scale.world_size // degree, **rest)


def left_out(strategy: Strategy, pattern: Pattern) -> list[str]:
    """Options of a strategy, away from their defaults, that its pattern does not say, as they are typed."""
    return [
        f"cp.{option.name}={value}"
        for option in fields(strategy)  # type: ignore[arg-type]
        if option.name not in pattern.says
        and option.default is not MISSING
        and (value := getattr(strategy, option.name)) != option.default
    ]


@dataclass(frozen=True)
class Shape:
    """A mask as frameworks know it: documents that see themselves, whole or causally, or one sequence with a window.

    Attributes:
        lengths: tokens of each document; one: the whole sequence.
        causal: whether nothing to the right of the query is seen.
        left: keys before the query that it sees; None: all of its document.
        right: keys after the query that it sees; None: all of its document, or none where it is causal.
    """

    lengths: tuple[int, ...]
    causal: bool
    left: int | None = None
    right: int | None = None

    @property
    def documents(self) -> bool:
        """Whether there are several."""
        return len(self.lengths) > 1

    @property
    def windowed(self) -> bool:
        return self.left is not None or self.right is not None


def shape_of(mask: Mask) -> Shape | None:
    """The shape of a mask, or None where it is anything else."""
    if (found := segments(mask)) is not None:
        ends = found.bounds[1:]
        return Shape(tuple(end - begin for begin, end in zip(found.bounds, ends, strict=False)), found.causal)
    if not isinstance(mask, BandMask):
        return None
    (band, *more) = mask
    if more or (band.q0, band.q1, band.k0, band.k1) != (0, mask.num_q, 0, mask.num_k):
        return None
    left, right = (-band.lo if band.cuts_below else None), (band.hi if band.cuts_above else None)
    if (left is not None and left < 0) or (right is not None and right < 0):
        return None
    return Shape((mask.num_q,), right == 0, left, None if right == 0 else right)
