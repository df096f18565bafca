"""What a schedule is simulated on: a machine, its links, and how long a kernel takes for a tile. ``simulate`` plays on it.

Nothing in here is measured. Numbers come from conf/machine or from a fit (``lcbench.predict``), which says where it has them from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.problem import Problem

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Link:
    """A way between ranks, in each direction.

    Attributes:
        latency_s: from when both ends are ready until the first byte is there.
        bytes_per_s: of one rank, one way.
    """

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Collective:
    """How a collective does on the links: ``latency_s`` x ranks of the set + bytes x (1 + ``fewer`` / ranks) / (``efficiency`` x
    bandwidth) seconds. Sets of few ranks use less of the links.
    """

    latency_s: float = 0.0
    efficiency: float = 1.0
    fewer: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What ranks are and what is between them.

    Attributes:
        name: of its file in conf/machine.
        device: name of its entry in conf/device; ``cpu`` for ranks that are CPU processes.
        inside: the link between ranks of a node.
        across: the link of a NIC to other nodes.
        nics: of a node, each shared by as many ranks; 0: every rank has its own.
        memory_bytes: of a device; 0: not known.
        memory_bytes_per_s: of a rank, for copies, merges and sums.
        read_bytes_per_s: of a device's memory by its data sheet, which no kernel reads keys and values faster than; 0: not known,
            as of CPU ranks, whose caches hold what was read before.
        cores: of a node, which its ranks share; 0: every rank has a device of its own.
        launch_s: the host's time to start a kernel or a copy.
        message_s: the host's time to start a batch of messages.
        host_bytes_per_s: of a rank, one way, to pinned memory of the host; 0: the host's memory is its own.
        collectives: by operation (``all_to_all``, ``all_gather``, ``reduce_scatter``); those that are not named are as the links.
    """

    name: str
    device: str
    inside: Link
    across: Link
    memory_bytes: int
    memory_bytes_per_s: float
    launch_s: float
    message_s: float
    collectives: dict[str, Collective] = field(default_factory=dict)
    cores: int = 0
    nics: int = 0
    host_bytes_per_s: float = 0.0
    read_bytes_per_s: float = 0.0

    def nics_of(self, ranks: int) -> int:
        """NICs of a node with so many ranks; no rank has more than one."""
        return min(self.nics or ranks, ranks)

    def collective_s(
        self, operation: str, block: float, ranks: int, together: int, fewest: int | None = None, shared: int = 1
    ) -> float:
        """Seconds of a collective.

        Args:
            block: bytes from each rank of the set to each other.
            ranks: of the set.
            together, fewest: those of them that are in one node, at most and at least; None: as many in each.
            shared: ranks of the set that leave their node by the same NIC, at most.
        """
        how, several = self.collectives.get(operation, Collective()), together < ranks
        fewest = together if fewest is None else fewest
        if operation == "all_to_all":  # inside the node and out of it at once
            bound = max(
                block * (together - 1) / self.inside.bytes_per_s,
                block * (ranks - fewest) * several * shared / self.across.bytes_per_s,
            )
        else:  # rings through all nodes: what leaves a node leaves it by the network links of all its ranks at once
            within = self.inside.bytes_per_s if together > 1 else np.inf
            bound = block * (ranks - 1) / min(within, fewest / shared * self.across.bytes_per_s if several else np.inf)
        latency = how.latency_s * ranks + (self.across if several else self.inside).latency_s
        return float(latency + bound * (1 + how.fewer / ranks) / how.efficiency)


@dataclass(frozen=True)
class Tiles:
    """What a kernel's time depends on, an entry per tile, arrays (n,).

    Attributes:
        pairs: unmasked pairs of one head.
        covered: pairs of the 128 x 128 blocks that hold one of them: what a kernel computes that skips empty blocks only.
        rows, keys: of the operands.
        pieces: bands of the tile's mask: documents, windows, triangles.
        q_heads, kv_heads: of the head group.
        calls: native calls.
        gathered_rows, gathered_keys: that are copied for these calls, and merged or added up after them, of each head.
        most_rows, most_keys: of these, of the largest call, each as often as a copy of it is held at once.
        read: keys that some row sees; what no row sees need not be read.
    """

    pairs: Floats
    covered: Floats
    rows: Ints
    keys: Ints
    pieces: Ints
    q_heads: Ints
    kv_heads: Ints
    calls: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gathered_rows: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gathered_keys: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    most_rows: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    most_keys: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    read: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        """Where nobody says more a tile is one call, which takes its operands as they are, and reads all keys."""
        if len(self.read) != len(self):
            object.__setattr__(self, "read", self.keys)
        for name, each in (("calls", 1), *((name, 0) for name in ("gathered_rows", "gathered_keys", "most_rows", "most_keys"))):
            if len(getattr(self, name)) != len(self):
                object.__setattr__(self, name, np.broadcast_to(np.int64(each), len(self)))  # which takes no memory

    def __len__(self) -> int:
        return len(self.pairs)


class KernelModel(Protocol):
    """How long a kernel takes on a device, and what it allocates there."""

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """Seconds of each tile, (n,): of its forward, or of its backward."""
        ...

    def calls(self, tiles: Tiles) -> Ints:
        """Native calls of each tile, (n,)."""
        ...

    def workspace_bytes(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """Bytes that a call holds beside its operands and results, of each tile, (n,)."""
        ...
