"""What one attention computation is: its heads, its scale, its numbers' type.

A leaf module: everything imports it, it imports nothing of lcbench and neither torch nor Hydra, so that planning
ten thousand cells on a login node costs no torch import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

DTYPES = ("bfloat16", "float16", "float32", "float64")
DIRECTIONS = ("forward", "forward_backward")
REDUCE_DTYPES = ("float32", "input")


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


@dataclass(frozen=True)
class Heads:
    """Head counts: ``q`` query heads, ``kv`` key/value heads (GQA when fewer than ``q``), ``dim`` per head."""

    q: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.q}x{self.kv}x{self.dim}"


@dataclass(frozen=True)
class Scale:
    """Nodes x GPUs per node; their product is the number of ranks, P of a context-parallel group that has them all."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}"


@dataclass(frozen=True)
class Mesh:
    """Several context-parallel groups at once: ``tp`` of them share the heads of a sequence, and ``dp`` sequences are computed.

    The ranks of a scale are a grid of tp x cp x dp, cp being what is left: ranks / (tp * dp). A context-parallel group is the cp
    ranks that agree in the other two.

    Attributes:
        tp: tensor-parallel ranks: each has q / tp query heads and kv / tp key/value heads of the whole sequence.
        dp: data-parallel replicas: each has a sequence of its own.
        order: the three dimensions from the innermost, whose neighbours are adjacent ranks, outwards: Megatron-LM's order string
            (``tp-cp-ep-dp-pp`` there, ``megatron/core/parallel_state.py``).

    Raises:
        ValueError: a count below 1, or an order that does not name each dimension once.
    """

    DIMENSIONS: ClassVar[tuple[str, ...]] = ("tp", "cp", "dp")

    tp: int = 1
    dp: int = 1
    order: str = "tp-cp-dp"

    def __post_init__(self) -> None:
        for name, count in (("tp", self.tp), ("dp", self.dp)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"mesh.{name}={count} is no whole number of at least 1")
        if sorted(str(self.order).split("-")) != sorted(self.DIMENSIONS):
            raise ValueError(f"mesh.order={self.order} is no order of tp, cp and dp from the innermost out, such as tp-cp-dp")

    @property
    def count(self) -> int:
        """Context-parallel groups."""
        return self.tp * self.dp

    def heads(self, heads: Heads) -> Heads:
        """The heads of one context-parallel group.

        Raises:
            ValueError: tp does not divide the query heads or the key/value heads.
        """
        for name, count in (("query", heads.q), ("key/value", heads.kv)):
            if count % self.tp:
                raise ValueError(f"mesh.tp={self.tp} does not divide the {count} {name} heads of heads={heads}")
        return Heads(heads.q // self.tp, heads.kv // self.tp, heads.dim)

    def groups(self, scale: Scale) -> NDArray[np.int64]:
        """(dp, tp, cp): the global ranks of a scale; ``[i, j]`` are those of the context-parallel group (i, j), ascending.

        Raises:
            ValueError: tp * dp does not divide the ranks.
        """
        ranks = scale.world_size
        if ranks % self.count:
            raise ValueError(f"mesh.tp={self.tp} times mesh.dp={self.dp} does not divide the {ranks} ranks of scale={scale}")
        sizes = {"tp": self.tp, "cp": ranks // self.count, "dp": self.dp}
        inwards = self.order.split("-")[::-1]
        grid = np.arange(ranks, dtype=np.int64).reshape([sizes[name] for name in inwards])
        return np.ascontiguousarray(grid.transpose([inwards.index(name) for name in ("dp", "tp", "cp")]))

    def group_scale(self, scale: Scale) -> Scale:
        """The nodes that one context-parallel group spans x its ranks on each.

        Raises:
            ValueError: tp * dp does not divide the ranks, or some group has more ranks on one node than on another, or than other
                groups have.
        """
        groups = self.groups(scale).reshape(self.count, -1)
        # By group: its ranks on each node, without the nodes that it has none on.
        shares = [[count for count in np.bincount(nodes).tolist() if count] for nodes in groups // scale.gpus_per_node]
        odd = next((i for i, own in enumerate(shares) if own != [shares[0][0]] * len(shares[0])), None)
        if odd is not None:
            ranks, counts = (" ".join(map(str, each)) for each in (groups[odd].tolist(), shares[odd]))
            raise ValueError(
                f"{self} lays context-parallel groups unevenly over the nodes of scale={scale}: of ranks {ranks} they have {counts}"
                + (f", of the first group's {' '.join(map(str, shares[0]))}" if odd else "")
            )
        return Scale(len(shares[0]), shares[0][0])

    def __str__(self) -> str:
        return f"mesh.tp={self.tp} mesh.dp={self.dp} mesh.order={self.order}"


ALONE = Mesh()  # all ranks are one context-parallel group


@dataclass(frozen=True)
class Problem:
    """Everything a kernel or a strategy may ask about before it says whether it can run: of one context-parallel group.

    Attributes:
        seqlen: total tokens over the context-parallel group.
        heads: head counts and head dimension.
        scale: nodes that the group spans x its GPUs on each.
        dtype: one of ``DTYPES``.
        direction: ``forward`` or ``forward_backward``.
        reduce_dtype: type of partial results and gradients under way between ranks: ``float32`` (float64 for float64 inputs), or
            ``input``, the inputs' type, which is fewer bytes and less exact.
    """

    seqlen: int
    heads: Heads
    scale: Scale
    dtype: str
    direction: str
    reduce_dtype: str = "float32"

    @property
    def itemsize(self) -> int:
        """Bytes per element of the inputs."""
        return itemsize(self.dtype)

    @property
    def backward(self) -> bool:
        return self.direction == "forward_backward"

    @property
    def input_bytes(self) -> float:
        """Bytes of q, k, v and, with backward, dout of a rank that has its even share of the tokens."""
        heads = self.heads
        per_token = heads.dim * self.itemsize * (heads.q * (2 if self.backward else 1) + 2 * heads.kv)
        return self.seqlen / self.scale.world_size * per_token

    @property
    def softmax_scale(self) -> float:
        return float(self.heads.dim**-0.5)
