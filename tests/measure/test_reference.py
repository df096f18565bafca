"""The reference takes heads and rows apart, so that a long cell's check fits where the cell does, and gives the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lcbench.inputs.drawing import draw
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.measure import reference
from lcbench.measure.ranks import EVERY
from lcbench.measure.reference import Exact, Shard, columns, rows
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.held import Held, Part
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import small

HEADS, SEQLEN = Heads(6, 3, 8), 90


def exact(mask: Mask) -> dict[str, Exact]:
    problem = Problem(SEQLEN, HEADS, Scale(1, 1), "float64", "forward_backward")
    everything = np.arange(SEQLEN)
    own = Part(everything)
    shard = Shard(
        Held(own, own, own), *(draw(name, everything, problem, 3, torch.device("cpu")) for name in ("q", "k", "v", "dout"))
    )
    wanted = np.array([0, 1, 7, 44, 45, 88, 89])
    dense = dense_heads(mask, HEADS.q)
    leaves = [x.clone().requires_grad_() for x in (shard.q, shard.k, shard.v)]
    out, lse = dense_attention(*leaves, dense, problem.softmax_scale)
    grads = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, shard.dout), strict=True))
    found = rows(mask, problem, shard, wanted, EVERY, scores=True)
    found |= columns(mask, problem, shard, wanted, EVERY, lse.detach(), out.detach(), scores=True)
    for name, want in {"out": out.detach(), "lse": lse.detach(), **grads}.items():
        assert torch.allclose(found[name].value, want[wanted], rtol=0, atol=1e-12), name
    return found


@pytest.mark.parametrize("name", ["full", "causal_document", "per head", "chosen_causal", "chosen_document"])
@pytest.mark.parametrize(("heads_at_a_time", "rows_at_a_time"), [(1, 1), (2, 3), (1, 100), (3, 2)])
def test_parts_give_what_the_whole_gives(
    name: str, heads_at_a_time: int, rows_at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_head = block_random(SEQLEN, heads=HEADS, seed=(1, 0), density=0.4, block_size=10, sizes="uniform", per="q_head")
    mask = per_head if name == "per head" else small(name, SEQLEN, HEADS, tmp_path)
    whole = exact(mask)
    group = HEADS.q // HEADS.kv
    monkeypatch.setattr(reference, "HEAD_ELEMENTS", heads_at_a_time * group * SEQLEN * HEADS.dim)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", {"cpu": rows_at_a_time * heads_at_a_time * group * SEQLEN})
    parts = exact(mask)
    for tensor in ("out", "lse", "dq", "dk", "dv"):
        for what in ("value", "spread", "common", "floor", "count"):
            one, other = (getattr(found[tensor], what) for found in (whole, parts))
            assert one.shape == other.shape, (tensor, what)
            assert torch.allclose(one, other, rtol=1e-13, atol=1e-13), (tensor, what)


def test_no_more_than_a_part_is_in_float64_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1m tokens of 32 heads on one GPU would be 34 GB a tensor."""
    problem = Problem(1 << 20, Heads(32, 8, 128), Scale(1, 1), "bfloat16", "forward_backward")
    parts = reference._parts(problem, 200, problem.seqlen, 4, torch.device("cpu"))
    assert [p.kv for p in parts] == [slice(n, n + 1) for n in range(8)]
    assert [p.q for p in parts] == [slice(4 * n, 4 * n + 4) for n in range(8)]
    assert all(np.concatenate([np.arange(200)[c] for c in p.chunks]).tolist() == list(range(200)) for p in parts)
    short = replace(problem, seqlen=4096)
    assert len(reference._parts(short, 200, short.seqlen, 4, torch.device("cpu"))) == 1
    # Absorbed heads share one key/value head, which a key's queries are more than fit beside it.
    absorbed = replace(problem, seqlen=1 << 17, heads=Heads(128, 1, 576, 512, latent=True))
    (part,) = reference._parts(absorbed, 200, absorbed.seqlen, 128, torch.device("cpu"))
    assert part.split == [slice(head, head + 1) for head in range(128)]
