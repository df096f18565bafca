"""Segments read one after the other, with an associative memory in each layer: ARMT (Rodkin et al., arXiv 2407.04841).

A sequence is cut into N segments. Behind the tokens of each stand ``memory_tokens`` learned ones. Layer l of segment n first adds
to every token what it recalls from the layer's memory, then is a transformer layer with attention within the segment, and at last
writes its memory tokens into the memory. So (n, l) needs (n, l - 1) for its tokens and (n - 1, l) for its memory, and nothing else.

``order=sequential`` runs the N x L of these one by one. ``order=diagonal`` runs all of one n + l as one group of launches, with
their layers' weights side by side: N + L - 1 groups, the same numbers (Sivtsov et al., arXiv 2506.05229).

With x a token, phi the DPFP features of arXiv 2102.11174 (nu rolls of [relu(x), relu(-x)] with itself), A (F, hidden) and z (F,)
the memory of a layer, 0 before the first segment, and eps = 1e-5:

    recall    x + phi(Wq x) A / (phi(Wq x) z + eps)
    write     of each memory token m: k = phi(Wk m), b = sigmoid(Wb m), v = Wv m, old = k A / (k z + eps)
              A + sum of k^T b (v - old);  z + sum of k clip(1 - k z / (k k + eps), 0, 1), whose factor has no gradient

All memory tokens of a segment are written at once, from the memory before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from lcbench.masks.band import OPEN, BandMask
from lcbench.problem import Problem
from lcbench.workloads.models import Model

Order = Literal["sequential", "diagonal"]


@dataclass(frozen=True)
class MemoryModel:
    """Layers with a memory, over segments.

    Attributes:
        model: sizes of a layer.
        layers: how many layers are run; None: all of the model's.
        segment: tokens of a segment; it divides the sequence.
        memory_tokens: behind those of each segment.
        memory_dim: of what is looked up in a memory, before its features.
        nu: rolls of the features, so that F = 2 nu memory_dim.
        order: ``sequential`` or ``diagonal``.

    Raises:
        ValueError: a count below 1, layers that the model has not, or an order that there is not.
    """

    model: Model
    layers: int | None = None
    segment: int = 1024
    memory_tokens: int = 16
    memory_dim: int = 64
    nu: int = 3
    order: Order = "sequential"

    def __post_init__(self) -> None:
        self.model.check_layers(self.layers)
        for name in ("segment", "memory_tokens", "memory_dim", "nu"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"workload.{name}={value} is no number of at least 1")
        if self.nu >= 2 * self.memory_dim:
            raise ValueError(f"workload.nu={self.nu} rolls more than the {2 * self.memory_dim} numbers that there are")
        if self.order not in get_args(Order):
            raise ValueError(f"workload.order={self.order} is none of {', '.join(get_args(Order))}")

    @property
    def depth(self) -> int:
        """L, layers that are run."""
        return self.layers or self.model.layers

    @property
    def features(self) -> int:
        """F, of what is looked up."""
        return 2 * self.nu * self.memory_dim

    @property
    def rows(self) -> int:
        """Tokens of a segment with those of its memory."""
        return self.segment + self.memory_tokens

    def segments(self, problem: Problem) -> int:
        """N."""
        return problem.seqlen // self.segment

    def groups(self, segments: int) -> Iterator[list[tuple[int, int]]]:
        """(n, l) that run together, one after the other; in a group layers rise by one."""
        layers = self.depth
        if self.order == "sequential":
            yield from ([(n, layer)] for n in range(segments) for layer in range(layers))
            return
        for total in range(segments + layers - 1):
            yield [(total - layer, layer) for layer in range(max(0, total - segments + 1), min(total + 1, layers))]

    def group_sizes(self, problem: Problem) -> list[int]:
        """How many (n, l) its groups have, each size once, rising."""
        return sorted({len(group) for group in self.groups(self.segments(problem))})

    def of_group(self, problem: Problem, size: int) -> tuple[Problem, BandMask]:
        """What the attention of a group computes: the segments of ``size`` (n, l) side by side, each causal by itself."""
        starts = self.rows * np.arange(size, dtype=np.int64)
        bands = np.stack([starts, starts + self.rows, starts, starts + self.rows, np.full(size, -OPEN), np.zeros_like(starts)], 1)
        tokens = size * self.rows
        return replace(problem, seqlen=tokens), BandMask.of(tokens, tokens, bands)


def shapes(options: MemoryModel) -> dict[str, tuple[int, ...]]:
    """The weights of a layer, by name."""
    model, inner = options.model, options.memory_dim
    heads = model.heads()
    found: dict[str, tuple[int, ...]] = {
        "attention_norm": (model.hidden,), "q": (heads.q * heads.dim, model.hidden), "k": (heads.kv * heads.dim, model.hidden),
        "v": (heads.kv * heads.dim, model.hidden), "o": (model.hidden, heads.q * heads.dim),
        "mlp_norm": (model.hidden,), "gate": (model.ffn, model.hidden), "up": (model.ffn, model.hidden),
        "down": (model.hidden, model.ffn),
        "memory_q": (inner, model.hidden), "memory_k": (inner, model.hidden), "memory_v": (model.hidden, model.hidden),
        "memory_b": (1, model.hidden),
    }  # fmt: skip
    return found | ({"q_norm": (heads.dim,), "k_norm": (heads.dim,)} if model.qk_norm else {})


def flops(options: MemoryModel, segments: int) -> tuple[float, float]:
    """(FLOPs of matrix products with weights and with memories, forward; pairs of a query and a key) of all segments and layers."""
    of_weights = 2.0 * sum(
        math.prod(shape) * (options.memory_tokens if name in ("memory_k", "memory_v", "memory_b") else options.rows)
        for name, shape in shapes(options).items() if len(shape) > 1
    )  # fmt: skip
    width = options.features * (options.model.hidden + 1)
    of_memories = 2.0 * width * (options.rows + 2 * options.memory_tokens)
    cells = segments * options.depth
    return cells * (of_weights + of_memories), cells * options.rows * (options.rows + 1) / 2
