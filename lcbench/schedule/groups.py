"""Communicators among ranks, by channel, made once and kept.

Those of a context-parallel group know its own ranks only; there may be several groups at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from copy import copy
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh

MAIN = "main"  # the channel on which the communicator of all ranks is the default one
MESH = "mesh"  # that of communicators across context-parallel groups


class Groups:
    """Process groups by channel and set of ranks, made once and kept until the process group of all ranks is destroyed.

    Who asks for them knows the ranks of its own context-parallel group only, as 0 ... P-1; there may be several (``within``).
    Making a process group is slow, takes device memory, and is collective: all ranks make the same ones in the same order, also
    those that are not in them. So what one context-parallel group asks for is made for each of the others too.

    Attributes:
        ranks: global ranks of this rank's context-parallel group, ascending.
    """

    def __init__(self, *, timeout: timedelta | None = None, through_host: bool | None = None) -> None:
        """
        Args:
            timeout: of operations; None: the backend's own.
            through_host: see ``goes_through_host``; None: as the backend needs it.
        """
        self._timeout, self._through_host = timeout, through_host
        self._made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}
        self._took: dict[tuple[str, tuple[int, ...]], float] = {}  # seconds that making each took, and its first use
        self._used: set[tuple[str, tuple[int, ...]]] = set()
        self._meshes: dict[tuple[Any, ...], DeviceMesh] = {}
        self._every: list[tuple[int, ...]] | None = None  # ranks of each context-parallel group; None: one of all ranks

    def within(self, groups: Sequence[Sequence[int]]) -> Groups:
        """The same communicators as several context-parallel groups see them; ``groups``: global ranks of each, ascending."""
        found = copy(self)
        found._every = [tuple(ranks) for ranks in groups]
        return found

    @property
    def _sets(self) -> list[tuple[int, ...]]:
        return [tuple(range(dist.get_world_size()))] if self._every is None else self._every

    @property
    def ranks(self) -> tuple[int, ...]:
        return next(ranks for ranks in self._sets if dist.get_rank() in ranks)

    def of(self, channel: str) -> dist.ProcessGroup:
        """The communicator of a channel, over this context-parallel group. Collective over all ranks on first use."""
        group = self.among(tuple(range(len(self._sets[0]))), channel)
        assert group is not None
        return group

    def among(self, ranks: tuple[int, ...], channel: str = MAIN) -> dist.ProcessGroup | None:
        """The communicator of some ranks of this context-parallel group on a channel, None on its others. Collective over all ranks
        on first use.

        The ranks are in ascending order within the group, however they are given. On ``main`` that of all ranks is the default one.
        """
        members = sorted(set(ranks))
        return self.one_of([tuple(group[rank] for rank in members) for group in self._sets], channel)

    def one_of(self, sets: Iterable[tuple[int, ...]], channel: str) -> dist.ProcessGroup | None:
        """The communicator of the set of global ranks, ascending, that this rank is in, None where it is in none. Collective over
        all ranks on first use; a rank is in one set at most.
        """
        found = [self._of_ranks(channel, members) for members in sets]
        return next((group for group in found if group is not None), None)

    def device_mesh(self, grid: NDArray[np.int64], names: tuple[str, ...], device: torch.device) -> DeviceMesh:
        """torch's mesh of a grid of all global ranks, made once; ``names``: of the grid's dimensions. Collective over all ranks.

        Its communicators are on a channel of their own, so that what goes over them waits for no message of attention.
        """
        key = names, grid.shape, tuple(grid.ravel().tolist())
        if key not in self._meshes:
            own = [self.along(grid, (axis,), MESH) for axis in range(grid.ndim)]
            whole = torch.from_numpy(np.ascontiguousarray(grid))
            self._meshes[key] = DeviceMesh.from_group(own, device.type, whole, mesh_dim_names=names)
        return self._meshes[key]

    def along(self, grid: NDArray[np.int64], axes: tuple[int, ...], channel: str) -> dist.ProcessGroup:
        """The communicator of the ranks of a grid of all global ranks that differ from this one along ``axes`` only, ascending.
        Collective over all ranks on first use.
        """
        lines = np.moveaxis(grid, axes, range(-len(axes), 0)).reshape(-1, math.prod(grid.shape[axis] for axis in axes))
        group = self.one_of((tuple(sorted(line)) for line in lines.tolist()), channel)
        assert group is not None
        return group

    def _of_ranks(self, channel: str, members: tuple[int, ...]) -> dist.ProcessGroup | None:
        key = channel, members
        if key not in self._made:
            if key == (MAIN, tuple(range(dist.get_world_size()))):
                self._made[key] = dist.group.WORLD
            else:
                begun = time.perf_counter()
                made = dist.new_group(list(members), self._timeout, pg_options=group_options(dist.get_backend()))
                self._took[key] = time.perf_counter() - begun
                self._made[key] = made if dist.get_rank() in members else None
        return self._made[key]

    def prepare(self, wanted: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Make what this context-parallel group will ask ``among`` for: (channel, ranks). Collective over all ranks.

        Its ranks give the same list. Another group, of which a mask asks for other messages, may give another one.
        """
        every: list[Any] = [wanted]
        if self._every is not None and len(self._every) > 1:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, wanted)
        for channel, ranks in dict.fromkeys(each for own in every for each in own):
            self.among(ranks, channel)

    def took(self, wanted: Sequence[tuple[str, tuple[int, ...]]], device: torch.device) -> tuple[int, float]:
        """How many communicators these are besides those that are there anyway, (channel, ranks) each, and the seconds that this
        rank took to make them and, of those that it is in, to use them once: NCCL connects ranks then. Collective over all ranks.
        """
        if not wanted:
            return 0, 0.0  # perhaps there is one rank, which has no communicators
        sets = self._sets
        keys = [(channel, tuple(group[rank] for rank in sorted(ranks))) for channel, ranks in wanted for group in sets]
        for key in keys:
            if (group := self._made[key]) is not None and key in self._took and key not in self._used:
                begun = time.perf_counter()
                dist.all_reduce(torch.zeros(1, device=device), group=group)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                self._took[key] += time.perf_counter() - begun
                self._used.add(key)
        made = [self._took[key] for key in dict.fromkeys(keys) if key in self._took]
        return len(made), sum(made)

    def goes_through_host(self, device: torch.device) -> bool:
        """Whether messages of this device's tensors are copied to the host's memory and back.

        gloo needs that for a GPU's: some of its collectives copy by themselves, its point-to-point messages do not.
        """
        if self._through_host is not None:
            return self._through_host
        return device.type == "cuda" and dist.get_backend() == "gloo"


def group_options(backend: str) -> Any:
    """How a process group is made: NCCL's copies go ahead of kernels that wait for a multiprocessor.

    An attention kernel that fills the device would hold them back until its thread blocks end. Other backends: None.
    """
    return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True) if backend == "nccl" else None
