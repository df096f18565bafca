"""Real ring-flash-attn and yunchang, through our adapters, on gloo ranks, with a stand-in for flash-attn alone."""

from __future__ import annotations

import site
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from lcbench.cp.base import Place, Strategy
from lcbench.grid.build import build_strategy
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing import wheels
from lcbench.testing.fake_libraries import flash_attn2
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from tests.cp.test_regressions import CPU, dense, errors, results, tensors

WHEELS = ("ring-flash-attn==0.1.8", "yunchang==0.6.4")
SEQLEN, HEADS = 64, Heads(4, 2, 16)
MASKS = {
    "full": full(SEQLEN), "causal": causal(SEQLEN),
    "documents": causal_document(SEQLEN, seed=(0, 0), lengths=Explicit([30, 1, 33])),
}  # fmt: skip
# Of the largest value; the libraries keep out and gradients of half types in between.
BOUND = 0.02


def peers(ranks: int) -> dict[str, Strategy]:
    found: dict[str, Strategy] = {}
    for name in names("cp"):
        if name.startswith("ring_flash_attn"):
            found[name] = build_strategy(load("cp", name))
    # With a ring of one, yunchang's backward sends to itself, which gloo does not do.
    for degree in range(1, ranks // 2 + 1):
        found[f"yunchang {degree}"] = build_strategy({**load("cp", "yunchang_usp"), "ulysses_degree": degree})
    return found


def check_peers(rank: int, ranks: int, folder: str) -> None:
    site.addsitedir(folder)
    sys.modules.update(flash_attn2.modules())
    problem = Problem(SEQLEN, HEADS, Scale(1, ranks), "bfloat16", "forward_backward")
    inputs, groups, ran = tensors(problem), Groups(), []
    for name, peer in peers(ranks).items():
        assert peer.missing() is None
        for mask_name, mask in MASKS.items():
            if peer.unsupported(problem, mask):
                continue
            want = dense(problem, mask, inputs)
            run = peer.start(problem, mask, SDPAFlash(), Place(rank, CPU, groups))
            communicators = len(dist.distributed_c10d._world.pg_map)
            found = errors(results(run, run.tokens, inputs), want, run.tokens)
            peer.start(problem, mask, SDPAFlash(), Place(rank, CPU, groups))
            assert len(dist.distributed_c10d._world.pg_map) == communicators, "communicators are kept"
            sizes = {part: float(exact.abs().max()) for part, exact in zip(found, want, strict=True)}
            assert all(found[part] <= BOUND * max(1.0, sizes[part]) for part in found), (name, mask_name, found)
            ran.append((name.split()[0], mask_name))
    wanted = {
        ("ring_flash_attn_zigzag", "full"), ("ring_flash_attn_zigzag", "causal"), ("ring_flash_attn_stripe", "causal"),
        ("ring_flash_attn_llama3", "full"), ("ring_flash_attn_llama3", "causal"), ("ring_flash_attn_llama3", "documents"),
        ("yunchang", "full"), ("yunchang", "causal"),
    }  # fmt: skip
    assert set(ran) == wanted


@pytest.mark.gloo
@pytest.mark.slow
def test_real_peers_agree_with_dense_attention(tmp_path: Path) -> None:
    if reason := wheels.install(tmp_path, *WHEELS, "einops"):
        pytest.skip(reason)
    run_ranks(4, check_peers, 4, str(tmp_path))
