"""Sizes of a transformer model."""

from __future__ import annotations

from dataclasses import dataclass

from lcbench.problem import Heads


@dataclass(frozen=True)
class Model:
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

    def heads(self) -> Heads:
        return Heads(self.heads_q, self.heads_kv, self.head_dim)
