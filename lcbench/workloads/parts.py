"""What a workload is made of, phase by phase, in a vocabulary that a machine can be asked about. No torch, so that plans use it.

Counts are of one rank. What a part takes is ``lcbench.predict``'s business: a workload says how much there is, never how long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lcbench.kernels.cache import CacheKind
from lcbench.measure.flops import pass_flops
from lcbench.problem import ALONE, Mesh, Problem
from lcbench.selectors.base import Selector


@dataclass(frozen=True)
class Attend:
    """Passes of the cell's attention, by its strategy, with messages.

    Attributes:
        direction: which pass.
        times: how often; a share where some of it is done.
        again: whether it has been done before, so that no FLOPs are counted.
        share: the pairs of a pass over those of the cell's mask, where it is of something else.
    """

    direction: Literal["forward", "backward"]
    times: float = 1.0
    again: bool = False
    share: float = 1.0


@dataclass(frozen=True)
class Compute:
    """What a rank computes of its own tokens, without messages.

    Attributes:
        flops: of matrix products.
        operand_bytes: read and written by these: weights, tokens, results.
        moved_bytes: read and written by all that goes element by element: norms, rotations, gates, losses, sums, steps of weights.
        launches: kernels.
        again: as of ``Attend``.
        useful: the share of ``flops`` that counts: the rest is of tokens that nothing is asked of.
    """

    flops: float = 0.0
    operand_bytes: float = 0.0
    moved_bytes: float = 0.0
    launches: float = 0.0
    again: bool = False
    useful: float = 1.0

    def times(self, count: float, *, again: bool = False) -> Compute:
        return replace(
            self, flops=count * self.flops, operand_bytes=count * self.operand_bytes, moved_bytes=count * self.moved_bytes,
            launches=count * self.launches, again=again or self.again,
        )  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """A collective among the ranks that share weights, or parts of the same tokens.

    Attributes:
        operations: one after the other; an all-reduce is a reduce-scatter and an all-gather.
        over: dimensions of the mesh that its ranks differ in.
        bytes: of the whole tensor: what an all-gather gives, what a reduce-scatter takes.
        times: how often.
        beside: whether it goes on while the phase computes, so that only what takes longer than that shows.
    """

    operations: tuple[str, ...]
    over: tuple[str, ...]
    bytes: float
    times: float = 1.0
    beside: bool = False


@dataclass(frozen=True)
class ToHost:
    """Bytes that are copied to the host's memory, or back, while the phase computes."""

    bytes: float


@dataclass(frozen=True)
class Copied:
    """Bytes that copies on the device read and write, one after the other with all else."""

    bytes: float


Part = Attend | Compute | Exchange | ToHost | Copied
BATCH = "batch"  # the phase of a batch of documents that is all its micro-batches; others come once
REDUCED, GATHERED = ("reduce_scatter", "all_gather"), ("all_gather",)


@dataclass(frozen=True)
class Share:
    """What a rank has of a cell.

    Attributes:
        problem: of its context-parallel group.
        tokens: of the rank.
        mesh: which groups there are.
        finals: (tokens, heads) of results that it computes for others and keeps for backward.
        buffers: bytes of each of its strategy's buffers that are kept from forward to backward.
        fused: whether a norm is one kernel, as on CUDA.
        hides: bytes that it can copy to the host's memory while it does some parts.
        keys: tokens whose keys and values it holds, and ``kv_heads``: of how many heads; None: its even share, of all heads.
        replicas: ranks that hold each key.
        selector: who chooses the keys; None: nobody does.
        seen: pairs of a query head among which it chooses; None: half of all, as a causal mask has.
        calls: tiles that a rank computes and messages that it sends in a pass; what it takes to plan goes by these.
        copies: whether a cache of some kind is copied out before it is computed on, since no kernel of this cell reads it.
    """

    problem: Problem
    tokens: int
    mesh: Mesh = ALONE
    finals: Sequence[tuple[int, int]] = ()
    buffers: Sequence[int] = ()
    fused: bool = True
    hides: Callable[[Sequence[Part]], float] = lambda _: 0.0
    keys: int | None = None
    kv_heads: int | None = None
    replicas: int = 1
    selector: Selector | None = None
    seen: float | None = None
    calls: int = 1
    copies: Callable[[CacheKind], bool] = lambda _: True

    @property
    def cached(self) -> float:
        """Numbers of the keys and values that it holds."""
        problem = self.problem
        keys = problem.seqlen / problem.scale.world_size if self.keys is None else self.keys
        return keys * (self.kv_heads or problem.heads.kv) * problem.heads.kv_width


@dataclass(frozen=True)
class Room:
    """Memory of a rank, in bytes, without what the attention's kernel needs inside and without buffers between ranks.

    Attributes:
        classes: what is held, by what it is for (``weights``, ``gradients``, ``optimizer``, ``activations``).
        peak: the most at once, weights included, where no attention is under way.
        attending: what is held while the attention of a layer is in backward, its own results not counted.
    """

    classes: dict[str, float]
    peak: float
    attending: float


@dataclass(frozen=True)
class Made:
    """What a cell is made of.

    Attributes:
        phases: in their order, by name.
        room: beside the attention; None: there is nothing else.
        metrics: by keys of ``measure.metrics``, as sessions count them.
        key_bytes: of a number of keys and values as kernels read it; 0: as inputs have it.
        drawn: what of the attention was drawn, since nobody knows it before; empty: nothing.
        held: bytes that are held beside inputs while the attention is under way; of what has a ``room``, none.
    """

    phases: dict[str, tuple[Part, ...]]
    room: Room | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    key_bytes: float = 0.0
    held: float = 0.0
    drawn: str = ""

    def attends(self, direction: str | None = None, *, again: bool = True) -> float:
        """Passes of the attention in one direction or in both; ``again``: those that have been done before included."""
        return sum(
            part.times for parts in self.phases.values() for part in parts
            if isinstance(part, Attend) and direction in (None, part.direction) and (again or not part.again)
        )  # fmt: skip


def attention_alone(share: Share) -> Made:
    """A workload that is its attention and nothing else."""
    names: tuple[Literal["forward", "backward"], ...] = ("forward", "backward") if share.problem.backward else ("forward",)
    return Made({name: (Attend(name),) for name in names})


def flops_of(
    parts: Iterable[Part], pairs: Callable[[Attend], float], problem: Problem, ranks: float, *, again: bool = False
) -> float:
    """Of parts, over all ranks.

    Args:
        pairs: of one of the passes, of all query heads of all ranks.
        ranks: how many compute as much as the one whose parts these are.
        again: of what has been done before, else of what has not.
    """
    found = 0.0
    for part in parts:
        if isinstance(part, Attend) and part.again == again:
            found += part.times * pass_flops(part.direction, pairs(part), problem)
        elif isinstance(part, Compute) and part.again == again:
            found += ranks * part.flops * part.useful
    return found
