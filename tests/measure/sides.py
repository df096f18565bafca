"""Problems with two sides for the tests of the check, and dense float64 attention of them, which shares no code with lcbench."""

from __future__ import annotations

import numpy as np
import torch

from lcbench.inputs.drawing import draw, draw_sink
from lcbench.masks.mask import Mask
from lcbench.measure.owners import Owners
from lcbench.measure.reference import Shard
from lcbench.problem import PLAIN, Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.held import Held, Part
from lcbench.testing.dense import dense_attention, dense_heads

CPU = torch.device("cpu")
BATCHES = {
    "decode": Batch((Requests(3, 1, 130), Requests(2, 1, 61))),
    "chunk": Batch((Requests(1, 48, 200),)),
    "mixed": Batch((Requests(2, 40, 40), Requests(3, 1, 90), Requests(1, 30, 75))),
}
SHAPES = {
    "GQA, sink": (Heads(8, 2, 24), Softmax(sink=True)),
    "MLA, own scale": (Heads(4, 4, 24, 16), Softmax(scale=0.13)),
    "latent": (Heads(8, 1, 36, 32, latent=True), PLAIN),
    "latent, sink, softcap": (Heads(6, 1, 36, 32, latent=True), Softmax(sink=True, softcap=5.0, scale=0.2)),
    "softcap": (Heads(4, 2, 16), Softmax(softcap=8.0)),
    "values are longer": (Heads(4, 1, 8, 24), Softmax(sink=True)),
}


def problem(
    batch: Batch | None, shape: str, dtype: str = "float64", direction: str = "forward_backward", ranks: int = 1
) -> Problem:
    heads, softmax = SHAPES[shape]
    return Problem(90 if batch is None else batch.tokens, heads, Scale(1, ranks), dtype, direction, batch=batch, softmax=softmax)


def owned(queries: np.ndarray, keys: np.ndarray) -> Owners:
    """Tokens of one rank by itself."""
    own = Part(queries)
    return Owners(Held(own, Part(keys), own), None, True, True, True)


def shard(of: Problem, mask: Mask, queries: np.ndarray, keys: np.ndarray, seed: int = 3) -> Shard:
    """Seeded inputs of these tokens."""
    q, dout = (draw(name, queries, of, seed, CPU) for name in ("q", "dout"))
    k = draw("k", keys, of, seed, CPU)
    v = k[..., : of.heads.v] if of.heads.latent else draw("v", keys, of, seed, CPU)
    sink = draw_sink(of, mask.density * mask.num_k, seed, CPU) if of.softmax.sink else None
    return Shard(owned(queries, keys).held, q, k, v, dout, sink)


def dense(of: Problem, mask: Mask, given: Shard) -> dict[str, torch.Tensor]:
    """All results, from inputs in the order of indices."""
    leaves = [x.detach().clone().double().requires_grad_() for x in (given.q, given.k, given.v)]
    names = ["dq", "dk", "dv"]
    q, k, v = leaves
    if of.heads.latent:
        v = k[..., : of.heads.v]
        del leaves[2], names[2]
    sink = None
    if given.sink is not None:
        sink = given.sink.detach().clone().double().requires_grad_()
        leaves.append(sink)
        names.append("dsink")
    out, lse = dense_attention(q, k, v, dense_heads(mask, of.heads.q), of.softmax_scale, softcap=of.softmax.softcap, sink=sink)
    assert given.dout is not None
    grads = torch.autograd.grad(out, leaves, given.dout.double())
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}
