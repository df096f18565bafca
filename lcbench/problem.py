"""What one attention computation is: its heads, its scale, its numbers' type.

A leaf module: everything imports it, it imports nothing of lcbench and neither torch nor Hydra, so that planning
ten thousand cells on a login node costs no torch import.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Nodes x GPUs per node; their product is the context-parallel world size P."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}"


@dataclass(frozen=True)
class Problem:
    """Everything a kernel or a strategy may ask about before it says whether it can run.

    Attributes:
        seqlen: total tokens over the context-parallel group.
        heads: head counts and head dimension.
        scale: nodes x GPUs per node.
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
