"""Batches of requests, heads and masks for tests of strategies that serve, and what attention over them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lcbench.kernels.naive import Naive
from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.masks.requests import of_requests
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Batch, Heads, Problem, Requests
from lcbench.testing.dense import dense_attention

CPU = torch.device("cpu")
BOUND = 1e-12
NAIVE = Naive()
BATCHES = {
    "decode": Batch((Requests(3, 1, 17), Requests(1, 1, 1), Requests(1, 1, 40))),
    "chunked prefill": Batch((Requests(1, 5, 23), Requests(2, 3, 3), Requests(1, 9, 31))),
    "mixed": Batch((Requests(1, 7, 12), Requests(4, 1, 9), Requests(1, 2, 2))),
}
HEADS = {
    "MHA": Heads(24, 24, 8), "GQA": Heads(24, 4, 8), "MLA": Heads(24, 24, 12, 8), "latent": Heads(24, 1, 12, 8, latent=True),
}  # fmt: skip
# A mask, and whether position q of a request sees its position k.
SEES: dict[str, tuple[Callable[[int], BandMask], Callable[[Any, Any], Any]]] = {
    "causal": (causal, lambda q, k: k <= q),
    "full": (full, lambda q, k: k >= 0),
    "window": (lambda n: sliding_window(n, left=4, right=0), lambda q, k: (k <= q) & (k >= q - 4)),
}


def mask_of(batch: Batch, family: Callable[[int], BandMask]) -> Mask:
    """The family's mask of every request."""
    return of_requests(batch, lambda total, _: family(total), alike=True)


def seen(batch: Batch, sees: Callable[[Any, Any], Any]) -> torch.Tensor:
    """(queries, keys), request by request from where its tokens stand in it."""
    found = torch.zeros(batch.queries, batch.tokens, dtype=torch.bool)
    for new, total, q, k in zip(
        *(x.tolist() for x in (batch.new, batch.total, batch.q_bounds[:-1], batch.k_bounds[:-1])), strict=True
    ):
        found[q : q + new, k : k + total] = sees(torch.arange(total - new, total)[:, None], torch.arange(total)[None])
    return found


def dense(problem: Problem, allowed: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and LSE; ``allowed``: (Tq, Tk), or (Hq, Tq, Tk)."""
    softmax = problem.softmax
    return dense_attention(
        inputs["q"], inputs["k"], inputs["v"], allowed.numpy(), problem.softmax_scale,
        softcap=softmax.softcap, sink=inputs["sink"] if softmax.sink else None,
    )  # fmt: skip


def drawn(problem: Problem) -> dict[str, torch.Tensor]:
    heads = problem.heads
    shapes = {
        "q": (problem.queries, heads.q, heads.dim), "k": (problem.seqlen, heads.kv, heads.dim),
        "v": (problem.seqlen, heads.kv, heads.v), "sink": (heads.q,),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if heads.latent:
        found["v"] = found["k"][..., : heads.v]
    return found


def near(case: str, got: torch.Tensor, want: torch.Tensor, bound: float = BOUND) -> None:
    assert got.shape == want.shape, f"{case}: {tuple(got.shape)} for {tuple(want.shape)}"
    if got.numel():
        error = torch.where(got == want, 0.0, got - want).abs().max()  # infinities of rows without keys are equal
        assert error <= bound, f"{case}: {error}"
