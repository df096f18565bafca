"""What ``measure_cell`` needs of a cell: a ``Session`` per draw, which runs phases and checks what they gave.

A workload (``lcbench.workloads``) makes sessions. Nothing in ``lcbench.measure.cell`` knows what a phase computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lcbench.cp.base import Place
from lcbench.masks.mask import Mask
from lcbench.measure.bounds import Check
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.problem import ALONE, Mesh, Problem, Scale

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from lcbench.schedule.groups import Groups

# A phase gets what the one before returned, and the first None.
Phases = dict[str, Callable[[Any], Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Gang:
    """The ranks that measure together, as one of them sees it. All of them, by their global numbers; and, for the cell at hand, the
    context-parallel groups that they form (``arranged``), of which a strategy and a check know their own alone.

    Attributes:
        rank, world_size: among all ranks.
        groups: communicators of this rank's context-parallel group.
        devices: conf/device entries.
        mesh: which context-parallel groups are at work at once.
        scale: nodes x ranks per node of all ranks; None: one node.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: Groups
    devices: list[dict[str, Any]]
    mesh: Mesh = ALONE
    scale: Scale | None = None

    def arranged(self, mesh: Mesh, scale: Scale) -> Gang:
        """The same ranks as the context-parallel groups of a mesh.

        Raises:
            ValueError: ``scale`` has another number of ranks, or the mesh does not fit it.
        """
        if scale.world_size != self.world_size:
            raise ValueError(f"scale={scale} is not the scale of these {self.world_size} ranks")
        sets = mesh.groups(scale).reshape(mesh.count, -1).tolist()
        return replace(self, mesh=mesh, scale=scale, groups=self.groups.within(sets) if mesh.count > 1 else self.groups)

    @cached_property
    def grid(self) -> NDArray[np.int64]:
        """(dp, tp, cp): global ranks."""
        return self.mesh.groups(self.scale or Scale(1, self.world_size))

    @cached_property
    def _index(self) -> tuple[int, int, int]:
        dp, tp, cp = np.argwhere(self.grid == self.rank)[0].tolist()
        return dp, tp, cp

    @property
    def dp_index(self) -> int:
        """Which replica this rank is of: its data is its own."""
        return self._index[0]

    @property
    def tp_index(self) -> int:
        """Which share of the heads this rank has: heads ``tp_index * n ... + n - 1`` of tp * n."""
        return self._index[1]

    @property
    def cp_rank(self) -> int:
        """This rank's number in its context-parallel group."""
        return self._index[2]

    @property
    def first_of_node(self) -> bool:
        return self.rank % (self.scale.gpus_per_node if self.scale else self.world_size) == 0

    @property
    def place(self) -> Place:
        return Place(self.cp_rank, self.device, self.groups)

    @cached_property
    def ranks(self) -> Ranks:
        """Those of this context-parallel group, which share a sequence. Collective over all ranks on first use."""
        if self.mesh.count == 1:
            return EVERY
        return Ranks(self.place.group, f"group dp={self.dp_index} tp={self.tp_index}")

    def of_groups(self, value: Any) -> list[Any]:
        """The value that each context-parallel group has, in the order of ``grid``. Collective over all ranks."""
        every = EVERY.all_gather_object(value if self.cp_rank == 0 else None)
        return [every[rank] for rank in self.grid[:, :, 0].ravel()]

    def own_heads(self, mask: Mask, heads: int) -> Mask:
        """What this rank's ``heads`` query heads see, of the mask of all tp * ``heads``."""
        return mask if self.mesh.tp == 1 else mask.of_heads(self.tp_index * heads, heads, self.mesh.tp * heads)

    def communicator(self, *dims: str) -> dist.ProcessGroup:
        """That of the ranks which differ from this one in ``dims`` only, ascending. Collective over all ranks on first use.

        ``tp``: those that have the other heads of the same tokens, so that a row-parallel product is summed over them. ``dp``: the
        same part of other sequences. ``dp`` and ``cp``: all that have the same weights, over which their gradients are summed.
        It is no communicator of a strategy, so what goes over it may overlap with attention.
        """
        from lcbench.schedule.groups import MESH

        return self.groups.along(self.grid, tuple(("dp", "tp", "cp").index(dim) for dim in dims), MESH)

    @cached_property
    def device_mesh(self) -> DeviceMesh | None:
        """All ranks as torch's mesh: those that have the same weights, ``dp_cp``, and those that have parts of each, ``tp``.

        It has no dimension of one rank; None: there is one rank. Collective over all ranks on first use. It
        is kept as long as its communicators, which are those of ``communicator``.
        """
        # Ascending along each dimension, as the ranks of a communicator are.
        grid = np.sort(self.grid.transpose(0, 2, 1).reshape(-1, self.mesh.tp), axis=0)
        names = tuple(name for name, size in zip(("dp_cp", "tp"), grid.shape, strict=True) if size > 1)
        return self.groups.device_mesh(grid.squeeze(), names, self.device) if names else None


@dataclass(frozen=True)
class Cost:
    """What a phase costs any sound run.

    Attributes:
        flops: over all ranks, of all context-parallel groups.
        least_bytes_sent: by the rank that sends most, at the least.
        least_memory_bytes: read and written, at the least, by the rank with most of them.
        recomputed: FLOPs over all ranks that are done once more, by choice: no part of ``flops``.
    """

    flops: float
    least_bytes_sent: float
    least_memory_bytes: float
    recomputed: float = 0.0


@dataclass(frozen=True)
class Counted:
    """What was counted, over all ranks.

    Attributes:
        metrics: keys of ``measure.metrics``, the same on every rank.
        notes: for the provenance.
        bytes_sent: by phase, of the rank that sends most; without the phases that nobody counts.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    bytes_sent: dict[str, float] = field(default_factory=dict)


class Session(Protocol):
    """One draw of a cell, ready to run on this rank. All methods but ``vary`` are collective over all ranks, and what they say of
    the cell is the same on every rank.

    Attributes:
        refused: why the ranks cannot run it; nothing else is there then.
        wrong: what is wrong with how it is shared among ranks; None if nothing is.
        prepare_s: seconds that it took this rank to make ready.
    """

    refused: str | None
    wrong: str | None
    prepare_s: float

    @property
    def input_bytes(self) -> int:
        """Memory of this rank's inputs."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that the check holds between the first pass and the last."""
        ...

    def phases(self) -> Phases:
        """What is timed, in this order."""
        ...

    def costs(self) -> dict[str, Cost]:
        """The cost of each phase."""
        ...

    def first_pass(self) -> None:
        """Run every phase once, for ``check_first``, and count."""
        ...

    def counted(self) -> Counted:
        """What was counted in the first pass, and what is known of the draw without a run."""
        ...

    def check_first(self, say: Say) -> None:
        """Check the first pass, and by passes of its own what that leaves open. Inputs are as before it afterwards."""
        ...

    def check_again(self) -> None:
        """The short check of a later block of timings, with the first pass in it."""
        ...

    def vary(self) -> None:
        """Change the inputs in place, so that the next pass has another result that is known too."""
        ...

    def check_timed(self, passed: Any) -> None:
        """Check what the last phase of the last timed iteration returned."""
        ...

    def check_last(self) -> None:
        """Check one more pass, on inputs that no pass before had in this order."""
        ...

    def check(self) -> Check:
        """What all checks have found so far."""
        ...

    def variants(self) -> dict[str, Phases]:
        """The phases with ``compute`` alone and with ``communication`` alone; empty where they cannot be told apart."""
        ...

    def shares(self) -> dict[str, float]:
        """Metrics of what the whole is made of, by passes of their own."""
        return {}

    def series(self) -> dict[str, list[float]]:
        """Samples that the passes of ``shares`` have left."""
        return {}

    def remarks(self) -> dict[str, Any]:
        """Notes for the provenance that the passes of ``shares`` have left, the same on every rank."""
        return {}

    def alone(self) -> Phases:
        """What is timed while all other context-parallel groups are idle, by the names of ``phases``: it needs no rank of theirs.
        Empty where there is no such thing.
        """
        return {}

    def timeline(self) -> list[list[float]] | None:
        """Seconds of each step of one iteration on this rank; None where steps are not known."""
        ...


class Measurable(Protocol):
    """A cell as ``measure_cell`` sees it.

    Attributes:
        settings: how long to measure it (``measure`` of one block).
        draws: how many sessions there are, from draw 0 on.
    """

    @property
    def problem(self) -> Problem: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def draws(self) -> int: ...

    def arranged(self, gang: Gang) -> Gang:
        """All ranks, as the context-parallel groups of this cell."""
        ...

    def unavailable(self, gang: Gang) -> str | None:
        """Why this rank cannot run it on its machine, or None."""
        ...

    def start(self, draw: int, gang: Gang) -> Session:
        """One draw, built anew. Collective."""
        ...
