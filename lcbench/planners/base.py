"""What a planner is: from the documents of a batch, the ranks and what things cost, to an assignment.

A batch is computed in micro-batches, one after the other. In each, some sub-groups of ranks share some documents. A rank goes on to
its next micro-batch as soon as its own sub-group is done: nobody waits for ranks that it shares nothing with.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints

Floats = NDArray[np.float64]
LEAST = 2  # tokens of a rank that shares documents with others, on average of its group
Say = Callable[[str], None]  # takes a line of progress


class Infeasible(ValueError):
    """Why there is no assignment of a batch, in one line."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch, numbered as they lie in its sequence.

    Attributes:
        tokens: of each, (n,).
        pairs: unmasked (query, key) pairs of each, of one query head, (n,).
    """

    tokens: Ints
    pairs: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, numbers: Sequence[int] | Ints) -> Documents:
        """Some of them."""
        chosen = np.asarray(numbers, dtype=np.int64)
        return Documents(self.tokens[chosen], self.pairs[chosen])


@dataclass(frozen=True)
class Fleet:
    """The ranks of a batch.

    Attributes:
        ranks: N.
        per_node: ranks of a node, which are adjacent; it divides N.
        capacity: tokens that a rank may have in a micro-batch, at most.
        waits: whether activations of layers wait on ranks for backward, as of a training step that computes nothing again.
    """

    ranks: int
    per_node: int
    capacity: int
    waits: bool = True

    def needed(self, tokens: int) -> int:
        """The fewest ranks whose capacity holds so many tokens."""
        return -(-tokens // self.capacity)


@dataclass(frozen=True)
class Group:
    """Ranks that share some documents in a micro-batch.

    Attributes:
        ranks: their numbers, in the order in which they hold the tokens; they need not be neighbours.
        documents: their numbers, in the order in which they are packed.
        method: the name of the strategy by which the ranks share them, one of ``Cost.methods``.
        offload: share of what backward needs that is in the host's memory meanwhile, 0 to 1.
    """

    ranks: tuple[int, ...]
    documents: tuple[int, ...]
    method: str
    offload: float = 0.0

    def held(self, documents: Documents) -> int:
        """Tokens of the rank with most, of which the share that is not offloaded counts."""
        tokens = -(-int(documents.tokens[list(self.documents)].sum()) // len(self.ranks))
        return math.ceil(tokens * (1 - self.offload))


@dataclass(frozen=True)
class Assignment:
    """``micro_batches[m]``: the sub-groups that are at work in micro-batch m; a rank is in one at most, and may be in none."""

    micro_batches: tuple[tuple[Group, ...], ...]

    def wrong(self, documents: Documents, fleet: Fleet) -> str | None:
        """Why it is no assignment of these documents, or None: each is computed once, by ranks that there are and that hold it."""
        seen = np.zeros(len(documents), dtype=np.int64)
        for number, groups in enumerate(self.micro_batches):
            busy: set[int] = set()
            for group in groups:
                name = f"micro-batch {number}, ranks {group.ranks[0] if group.ranks else 'none'}..."
                if not group.ranks or not group.documents:
                    return f"{name}: a group without ranks or without documents"
                if len(set(group.ranks)) < len(group.ranks) or busy & set(group.ranks):
                    return f"{name}: a rank is there twice"
                if min(group.ranks) < 0 or max(group.ranks) >= fleet.ranks:
                    return f"{name}: there are ranks 0 to {fleet.ranks - 1}"
                if min(group.documents) < 0 or max(group.documents) >= len(documents):
                    return f"{name}: there are documents 0 to {len(documents) - 1}"
                if not 0 <= group.offload <= 1:
                    return f"{name}: offload {group.offload} is no share"
                busy |= set(group.ranks)
                np.add.at(seen, list(group.documents), 1)
                if (held := group.held(documents)) > fleet.capacity:
                    return f"{name}: {held} tokens on a rank are more than the capacity of {fleet.capacity}"
        odd = np.nonzero(seen != 1)[0]
        return f"document {odd[0]} is computed {seen[odd[0]]} times" if len(odd) else None

    def without_spare_ranks(self, documents: Documents, cost: Cost) -> Assignment:
        """The same without ranks that leave fewer than ``LEAST`` tokens to each of their group, which no strategy shares so widely:
        a group of few tokens has the first of its ranks only."""

        def fitting(group: Group) -> Group:
            own, count = documents.of(group.documents), len(group.ranks)
            most = max(1, int(own.tokens.sum()) // LEAST)
            if count <= most:
                return group
            able = (d for d in cost.degrees if d <= most and np.isfinite(cost.documents_s(own, d, group.method)).all())
            return replace(group, ranks=group.ranks[: max(able, default=1)])

        return Assignment(tuple(tuple(map(fitting, groups)) for groups in self.micro_batches))

    @property
    def groups(self) -> list[tuple[int, Group]]:
        """All groups with the number of their micro-batch, in order."""
        return [(number, group) for number, groups in enumerate(self.micro_batches) for group in groups]

    def played(self, seconds: Sequence[float], ranks: int) -> tuple[Floats, Floats]:
        """(begins, ends) of all ``groups``, which take so long: each begins when the last of its ranks is done with what it has
        before. The batch takes until the last one ends."""
        free, begins = np.zeros(ranks), np.zeros(len(seconds))
        for place, ((_, group), own) in enumerate(zip(self.groups, seconds, strict=True)):
            members = list(group.ranks)
            begins[place] = free[members].max()
            free[members] = begins[place] + own
        return begins, begins + np.asarray(seconds)

    def seconds(self, documents: Documents, cost: Cost) -> list[float]:
        """What each of ``groups`` takes by its own method."""

        def of(group: Group) -> float:
            degree, own = len(group.ranks), documents.of(group.documents)
            return float(cost.documents_s(own, degree, group.method).sum()) + cost.overhead_s(degree)

        return [of(group) for _, group in self.groups]

    def makespan_s(self, documents: Documents, cost: Cost, ranks: int) -> float:
        """Seconds of the batch by a cost, what is summed at its end included."""
        return float(self.played(self.seconds(documents, cost), ranks)[1].max(initial=0.0)) + cost.reduce_s

    def plain(self) -> list[list[dict[str, Any]]]:
        """As plain values, for results."""
        return [
            [
                {"ranks": list(g.ranks), "documents": list(g.documents), "method": g.method}
                | ({"offload": g.offload} if g.offload else {})
                for g in groups
            ]
            for groups in self.micro_batches
        ]

    @classmethod
    def of_plain(cls, plain: Sequence[Sequence[dict[str, Any]]]) -> Assignment:
        """From what ``plain`` gives."""

        def group(said: dict[str, Any]) -> Group:
            return Group(tuple(said["ranks"]), tuple(said["documents"]), said["method"], said.get("offload", 0.0))

        return cls(tuple(tuple(map(group, groups)) for groups in plain))


@dataclass(frozen=True)
class Offload:
    """What of a training step may wait for backward in the host's memory (ByteScale, arXiv 2502.21231, section 4).

    Attributes:
        layers: of the model; the first and the last are not offloaded.
        token_bytes: of activations of a token in all layers, on all ranks that share its heads.
        host_bytes_per_s: between a rank and its host.
        forward: share of a document's seconds that is forward, during which activations are moved.
    """

    layers: int
    token_bytes: float
    host_bytes_per_s: float
    forward: float

    def seconds(self, tokens: Floats) -> Floats:
        """To move all activations of so many tokens of a rank."""
        return tokens * (self.token_bytes / self.host_bytes_per_s)

    def gone(self, ratio: Floats) -> Floats:
        """Share of all activations that is in the host's memory where a ratio of those that may be is: of all layers but two."""
        return ratio * (max(0, self.layers - 2) / self.layers)


class Cost(Protocol):
    """What documents cost on the machine at hand, by its simulator's fitted model: seconds of forward and, where cells have it,
    backward.

    Documents of a group cost the sum of what each costs there, and the group's overhead once.

    Attributes:
        methods: names of the strategies by which a group may share documents.
        degrees: sizes of groups that some method can run, ascending, 1 among them.
        reduce_s: of what is summed over all ranks at the end of the batch.
        basis: what it rests on, in words.
        offloads: what documents may offload; None: nothing, as where a cell has no layers.
        prepared_s: seconds spent so far on making ready what it rests on, which no plan counts as its own.
    """

    methods: tuple[str, ...]
    degrees: tuple[int, ...]
    reduce_s: float
    basis: str
    offloads: Offload | None = None
    prepared_s: float = 0.0

    @abstractmethod
    def documents_s(self, documents: Documents, degree: int, method: str | None = None) -> Floats:
        """(n,), what each adds to a group of ``degree`` ranks that are as near to each other as can be; infinite where no method
        can share it among so many.

        Args:
            method: by which; None: by that which is fastest for each.
        """

    @abstractmethod
    def overhead_s(self, degree: int) -> float:
        """What a group takes in a micro-batch whatever is in it."""

    @abstractmethod
    def group(self, documents: Documents, ranks: Sequence[int]) -> tuple[float, str]:
        """Seconds of a group of these ranks, wherever they are, with these documents, by the method that is fastest for all of them
        together, and its name; the overhead is in it."""


class Planner(Protocol):
    """A frozen dataclass of options, found by conf/planner/<name>.yaml. It is deterministic, and knows no torch."""

    def unsupported(self, documents: Documents, fleet: Fleet) -> str | None:
        """Why it never plans such a batch on such ranks, whatever things cost there: said before anything runs. None: it may."""
        return None

    @abstractmethod
    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        """Assign all documents of a batch.

        Args:
            say: gets a line now and then where it takes long.

        Raises:
            Infeasible: there is no assignment, or not by this method; one line.
        """
