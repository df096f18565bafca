"""Every kernel that conf/ names against dense float64 attention, on masks with holes, windows and documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcbench.grid.build import build_kernel
from lcbench.kernels.base import merge, prepare
from lcbench.kernels.sdpa import SDPA
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import load, names, small

HARD = {
    "holes": BandMask.of(37, 37, [Band(2, 9, 0, 37), Band(20, 30, 3, 9), Band(20, 30, 12, 37, -4, 6)]),
    "empty": BandMask.of(37, 37, []),
}


@pytest.mark.parametrize("kernel_name", names("kernel"))
@pytest.mark.parametrize("name", [*names(), *HARD])
@pytest.mark.parametrize("heads", [Heads(4, 4, 8), Heads(6, 2, 16)], ids=str)
def test_kernel_matches_dense_attention(kernel_name: str, name: str, heads: Heads, tmp_path: Path) -> None:
    mask: Mask = HARD[name] if name in HARD else small(name, 37, heads, tmp_path)
    kernel = build_kernel(load("kernel", kernel_name))
    device = torch.device("cpu")
    problem = Problem(37, heads, Scale(1, 1), "float64", "forward_backward")
    if reason := kernel.unsupported(problem, mask) or kernel.unavailable(problem, device):
        pytest.skip(reason)
    torch.manual_seed(0)
    # Scores far from zero and a scale that is not 1 / sqrt(D).
    q, k, v, dout = (torch.randn(37, h, heads.dim, dtype=torch.float64) for h in (heads.q, heads.kv, heads.kv, heads.q))
    q = 3 * q
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense_attention(*leaves, dense_heads(mask, heads.q), 0.7)
    want_grads = torch.autograd.grad(want, leaves, dout)
    prepared = prepare(kernel, mask, device)
    out, lse = prepared.forward(q, k, v, softmax_scale=0.7)
    grads = prepared.backward(dout, q, k, v, out, lse, softmax_scale=0.7)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    seen = lse != -torch.inf
    for got, wanted in zip([out, lse[seen], *grads], [want, want_lse[seen], *want_grads], strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-12 if got.numel() else True


def test_merge_of_huge_scores_and_of_empty_rows_is_finite() -> None:
    out, lse = torch.ones(3, 1, 2, dtype=torch.float64), torch.tensor([[1e4], [-torch.inf], [-torch.inf]], dtype=torch.float64)
    other = 2 * torch.ones_like(out)
    other_lse = torch.tensor([[1e4], [-1e4], [-torch.inf]], dtype=torch.float64)
    out[1:] = 0
    other[2] = 0
    merged, merged_lse = merge(out, lse, other, other_lse)
    assert merged[:, 0, 0].tolist() == [1.5, 2.0, 0.0]
    assert torch.allclose(merged_lse[:2, 0], torch.tensor([1e4 + 0.6931471805599453, -1e4], dtype=torch.float64))
    assert merged_lse[2, 0] == -torch.inf


@pytest.mark.parametrize("per", ["all_heads", "kv_head", "q_head"])
def test_block_maps_reach_the_heads_they_belong_to(per: str) -> None:
    heads = Heads(6, 2, 8)
    mask = block_random(64, heads=heads, seed=(1, 0), density=0.3, block_size=8, sizes="variable", per=per)  # type: ignore[arg-type]
    q, k, v, dout = (torch.randn(64, h, 8, dtype=torch.float64) for h in (6, 2, 2, 6))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, _ = dense_attention(*leaves, dense_heads(mask, 6), 0.5)
    want_grads = torch.autograd.grad(want, leaves, dout)
    prepared = prepare(SDPA(), mask, torch.device("cpu"))
    out, lse = prepared.forward(q, k, v, softmax_scale=0.5)
    grads = prepared.backward(dout, q, k, v, out, lse, softmax_scale=0.5)
    for got, wanted in zip([out, *grads], [want, *want_grads], strict=True):
        assert (got - wanted).abs().max() <= 1e-12
