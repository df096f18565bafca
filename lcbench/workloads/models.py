"""Sizes of decoder-only transformer models, without their weights. No torch, so that planning costs no import of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from lcbench.problem import PLAIN, Heads, Problem


@dataclass(frozen=True)
class Model:
    """A model of Llama's kind: layers of RMSNorm, attention, RMSNorm and a gated MLP, without biases, then a norm and a head.

    Attributes:
        layers: of the whole model.
        hidden: width of a token between layers.
        heads_q, heads_kv: query heads and key/value heads; GQA where there are fewer of the latter.
        head_dim: of a head; heads_q * head_dim need not be ``hidden``.
        ffn: width of the MLP between its gate and its down projection.
        vocab: tokens that the head knows.
        rope_theta: base of the rotary embedding's wavelengths (arXiv 2104.09864).
        norm_eps: added under the root of every RMSNorm.
        qk_norm: whether each head of q and k has an RMSNorm, with one weight for all heads, before the rotary embedding.

    Raises:
        ValueError: a size below 1, key/value heads that do not divide the query heads, or a head whose dimension is odd.
    """

    layers: int
    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    norm_eps: float = 1e-5
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for size in fields(self):
            value = getattr(self, size.name)
            whole = size.type == "int"
            if size.type != "bool" and not (value >= 1 if whole else 0 < value < math.inf):
                raise ValueError(f"model.{size.name}={value} is not {'at least 1' if whole else 'above 0'}")
        if self.heads_q % self.heads_kv:
            raise ValueError(
                f"model.heads_q={self.heads_q} is no multiple of model.heads_kv={self.heads_kv}: each key/value head serves as many"
                " query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd, and the rotary embedding turns pairs of elements")

    def heads(self) -> Heads:
        return Heads(self.heads_q, self.heads_kv, self.head_dim)

    def check_layers(self, layers: int | None) -> None:
        """Raises ValueError unless so many layers, ``workload.layers``, can be run; None: all of them."""
        if layers is not None and not 1 <= layers <= self.layers:
            raise ValueError(f"workload.layers={layers} is none of the model's 1 to {self.layers} layers; all of them: layers=all")

    def divided(self, parts: int) -> Model:
        """The model as each of so many ranks of tensor parallelism has it, where they divide its sizes."""
        divided = ("heads_q", "heads_kv", "ffn", "vocab")
        return replace(self, **{name: getattr(self, name) // parts for name in divided})

    def layer_parameters(self) -> int:
        """Weights of a layer: the projections of q, k, v and o, the gate, up and down of the MLP, and its norms."""
        attention = 2 * self.hidden * (self.heads_q + self.heads_kv) * self.head_dim
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + 3 * self.hidden * self.ffn + norms

    def head_parameters(self) -> int:
        """Weights behind the layers: the final norm, and the projection to the vocabulary, which is as large as the embedding."""
        return self.vocab * self.hidden + self.hidden


def not_of_layers(problem: Problem, batch: str, float16: str) -> str | None:
    """Why layers of a model are not run on a problem, or None. ``batch`` and ``float16`` say why not on one with these."""
    if problem.batch is not None:
        return f"batch={problem.batch}: {batch}"
    if problem.softmax != PLAIN:
        return f"softmax={problem.softmax}: layers of its models have a plain softmax"
    return f"dtype=float16: {float16}" if problem.dtype == "float16" else None
