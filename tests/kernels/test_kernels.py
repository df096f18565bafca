"""Every kernel that conf/ names and this machine runs, against dense float64 attention, on every mask and on masks with holes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcbench.grid.build import build_kernel
from lcbench.kernels.base import Kernel, Platform, Saved, native_calls, prepare, refusal
from lcbench.kernels.requests import RequestKernel
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.faulty import Blind
from lcbench.testing.masks import every_mask, load, small, softmax_kernels

CPU = torch.device("cpu")
SEQLEN = 70
GROUPED, EQUAL = Heads(6, 2, 16), Heads(4, 4, 24)
HARD = {
    "holes": BandMask.of(SEQLEN, SEQLEN, [Band(2, 9, 0, 70), Band(20, 60, 3, 9), Band(20, 60, 12, 70, -4, 6)]),
    # More rows than keys under a window: what flash-attn 2 gets wrong.
    "tall": BandMask.of(SEQLEN, SEQLEN, [Band(0, 70, 10, 30, -20, 10)]),
    "empty": BandMask.of(SEQLEN, SEQLEN, []),
}
# Tiles small enough that a test's sequence has whole ones, cut ones and empty ones.
TILES = {"block_q": 16, "block_k": 32, "block_dk": 32, "block_dq": 16}


def kernel_of(name: str) -> Kernel:
    config = load("kernel", name)
    return build_kernel(config | {key: size for key, size in TILES.items() if key in config})


def problem_of(heads: Heads, dtype: str = "float64") -> Problem:
    return Problem(SEQLEN, heads, Scale(1, 1), dtype, "forward_backward")


def runs_here(kernel: Kernel) -> bool:
    """Whether this machine runs it; kernels of requests, which have no backward, have tests of their own."""
    return refusal(kernel, problem_of(GROUPED), CPU) is None and not isinstance(kernel, RequestKernel)


HERE = [name for name in softmax_kernels() if runs_here(kernel_of(name))]


def test_cpu_has_its_kernels() -> None:
    wanted = {"naive", "reference", "sdpa_math", "sdpa_flash", "flex", "flex_sparse", "triton_band", "triton_block_sparse"}
    assert set(HERE) == wanted


def check_kernel(kernel: Kernel, mask: Mask, heads: Heads, dtype: torch.dtype, bound: float, scale: float = 0.7) -> None:
    """Outputs and gradients against dense attention, as errors of the largest value."""
    torch.manual_seed(0)
    # Scores far from zero, and a scale that is not 1 / sqrt(D).
    q, k, v, dout = (torch.randn(mask.num_q, h, heads.dim, dtype=torch.float64) for h in (heads.q, heads.kv, heads.kv, heads.q))
    q, k, v, dout = (x.to(dtype) for x in (2 * q, k, v, dout))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense_attention(*leaves, dense_heads(mask, heads.q), scale)
    want_grads = torch.autograd.grad(want, leaves, dout.double())
    want, want_lse = want.detach(), want_lse.detach()
    prepared = prepare(kernel, mask, heads, dtype, CPU)
    assert prepared.calls == native_calls(kernel, mask, Platform("cpu"))
    out, lse = prepared.forward(q, k, v, softmax_scale=scale)
    grads = prepared.backward(dout, Saved(q, k, v, out, lse), softmax_scale=scale)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    seen = lse != -torch.inf
    for name, got, wanted in zip(
        ("out", "lse", "dq", "dk", "dv"), [out, lse[seen], *grads], [want, want_lse[seen], *want_grads], strict=True
    ):
        assert got.shape == wanted.shape
        if got.numel():
            assert (got.double() - wanted).abs().max() <= bound * max(1.0, float(wanted.abs().max())), name


@pytest.mark.slow
@pytest.mark.parametrize("kernel_name", HERE)
@pytest.mark.parametrize("name", [*every_mask(), *HARD])
def test_kernel_matches_dense_attention(kernel_name: str, name: str, tmp_path: Path) -> None:
    kernel = kernel_of(kernel_name)
    mask = HARD[name] if name in HARD else small(name, SEQLEN, GROUPED, tmp_path)
    if kernel.takes == "blocks" and not isinstance(mask, BlockMap):
        assert "takes dynamic block masks only" in str(kernel.unsupported(problem_of(GROUPED), mask))
        return
    assert kernel.unsupported(problem_of(GROUPED), mask) is None
    check_kernel(kernel, mask, GROUPED, torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_name", HERE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kernel_with_equal_heads_and_in_single_precision(kernel_name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kernel = kernel_of(kernel_name)
    for name in ("block_random",) if kernel.takes == "blocks" else ("causal_document", "block_random"):
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        check_kernel(kernel, small(name, SEQLEN, EQUAL, tmp_path), EQUAL, dtype, bound)


@pytest.mark.slow
@pytest.mark.parametrize("kernel_name", ["flex_sparse", "triton_block_sparse", "sdpa_flash"])
@pytest.mark.parametrize("sizes", ["uniform", "variable"])
@pytest.mark.parametrize("per", ["all_heads", "kv_head", "q_head"])
def test_block_maps_reach_the_heads_they_belong_to(kernel_name: str, sizes: str, per: str) -> None:
    mask = block_random(SEQLEN, heads=GROUPED, seed=(1, 0), density=0.3, block_size=16, sizes=sizes, per=per)  # type: ignore[arg-type]
    check_kernel(kernel_of(kernel_name), mask, GROUPED, torch.float64, 1e-12)


def test_tile_sizes_that_triton_cannot_have_are_refused() -> None:
    for size in (0, 24, "many"):
        with pytest.raises(ValueError, match="no power of two"):
            build_kernel(load("kernel", "triton_band") | {"block_q": size})


def test_kernels_of_all_scores_refuse_what_cannot_fit() -> None:
    large = Problem(1 << 20, Heads(32, 8, 128), Scale(1, 8), "bfloat16", "forward")
    for name in ("naive", "sdpa_math", "flex"):
        assert "GiB or more" in str(kernel_of(name).unavailable(large, Platform("cpu", memory_bytes=64 << 30)))
    assert kernel_of("flex").unavailable(large, Platform("cuda", (9, 0), 64 << 30)) is None


def test_a_kernel_that_ignores_the_mask_is_not_what_dense_attention_gives(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_kernel(Blind(), small("causal", SEQLEN, GROUPED, tmp_path), GROUPED, torch.float64, 1e-12)
