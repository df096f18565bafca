"""Two partial results joined in place: by torch's operations and by our kernel, against softmax weights in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcbench.kernels.base import prepare
from lcbench.kernels.merge import merge_into, plain_merge_into
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.kernels.triton_merge import fused_merge_into
from lcbench.masks.band import Band, BandMask
from lcbench.problem import Heads
from lcbench.testing.dense import dense_attention, dense_heads

Merge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
TOKENS, HEADS, DIM = 37, 3, 24  # no power of two, no multiple of a block


def expected(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as sums of exponentials, shifted by a constant of the row: in float64, with none of the code that is tested."""
    every = torch.stack([lse.double(), other_lse.double()])
    shift = every.amax(0).nan_to_num(neginf=0.0)
    weights = (every - shift).exp()
    total = weights.sum(0)
    joined = (weights[0, ..., None] * out.double() + weights[1, ..., None] * other.double()) / total.clamp(min=1e-300)[..., None]
    return joined, total.log() + shift


def parts(dtype: torch.dtype, other_dtype: torch.dtype, spread: float) -> list[torch.Tensor]:
    """Two results with rows empty in one, in the other and in both; what an empty row holds is 0."""
    generator = torch.Generator().manual_seed(5)
    out = torch.randn(TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)
    other = torch.randn(TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)
    lse, other_lse = (spread * torch.randn(TOKENS, HEADS, generator=generator, dtype=torch.float64) for _ in range(2))
    for rows, x, x_lse in ((slice(0, 5), out, lse), (slice(3, 9), other, other_lse)):
        x[rows], x_lse[rows] = 0, -torch.inf
    return [out.to(dtype), lse.to(dtype), other.to(other_dtype), other_lse.to(dtype)]


def test_what_the_kernel_cannot_address_is_refused_on_every_device() -> None:
    out, lse, other, other_lse = parts(torch.float32, torch.float32, 1.0)
    for wrong in (
        (out[None], lse[None], other[None], other_lse[None]),  # batches of pieces
        (out.mT.contiguous().mT, lse, other, other_lse),
        (out, lse[1:], other, other_lse),
    ):
        with pytest.raises(ValueError, match="partial results are"):
            merge_into(*wrong)


def test_pieces_are_joined_by_the_kernel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where every batch of pieces is merged by it."""
    joined: list[torch.Size] = []

    def fused(*parts: torch.Tensor) -> None:
        joined.append(parts[0].shape)
        fused_merge_into(*parts)

    monkeypatch.setattr("lcbench.kernels.merge.plain_merge_into", fused)
    heads, mask = Heads(2, 1, 8), BandMask.of(40, 40, [Band(2, 9, 0, 40), Band(12, 40, 3, 9), Band(12, 40, 12, 40, -4, 6)])
    q, k, v = (torch.randn(40, n, 8, dtype=torch.float64) for n in (2, 1, 1))
    want, want_lse = dense_attention(q, k, v, dense_heads(mask, 2), 0.3)
    out, lse = prepare(SDPAFlash(), mask, heads, torch.float64, torch.device("cpu")).forward(q, k, v, softmax_scale=0.3)
    assert joined
    assert (out - want).abs().max() <= 1e-12
    seen = torch.isfinite(want_lse)
    assert (lse - want_lse)[seen].abs().max() <= 1e-12


@pytest.mark.parametrize("merge", [merge_into, plain_merge_into, fused_merge_into])
def test_two_partial_results_are_what_softmax_makes_of_them(merge: Merge) -> None:
    for dtype, other_dtype, bound in (
        (torch.float64, torch.float64, 1e-14), (torch.float32, torch.float32, 1e-6), (torch.float32, torch.bfloat16, 1e-6),
        (torch.float32, torch.float16, 1e-6),
    ):  # fmt: skip
        for spread in (1.0, 1e4):  # scores whose exponentials overflow
            out, lse, other, other_lse = parts(dtype, other_dtype, spread)
            want, want_lse = expected(out, lse, other, other_lse)
            merge(out, lse, other, other_lse)
            assert (out.double() - want).abs().max() <= bound
            assert torch.equal(torch.isinf(lse), torch.isinf(want_lse))
            assert torch.isinf(lse[3:5]).all()  # empty in both
            assert not out[3:5].any()
            seen = torch.isfinite(want_lse)
            assert ((lse.double() - want_lse)[seen].abs() <= bound * want_lse[seen].abs().clamp(min=1)).all()


@pytest.mark.parametrize("merge", [merge_into, plain_merge_into, fused_merge_into])
def test_slices_of_larger_tensors_are_merged_and_nothing_beside_them_is_touched(merge: Merge) -> None:
    for dtype in (torch.float64, torch.float32):
        out, lse, other, other_lse = parts(dtype, dtype, 1.0)
        want, want_lse = out.clone(), lse.clone()
        merge(want, want_lse, other, other_lse)
        # Some rows and heads of more; LSE by heads first, as libraries give it; out as one of two that are interleaved.
        whole = torch.full((TOKENS + 4, HEADS + 2, 2, DIM), 7.0, dtype=dtype)
        whole_lse = torch.full((HEADS + 2, TOKENS + 4), 7.0, dtype=dtype)
        rows, heads = slice(3, 3 + TOKENS), slice(1, 1 + HEADS)
        whole[rows, heads, 1], whole_lse[heads, rows] = out, lse.T
        wide = torch.zeros(TOKENS, HEADS, DIM, 2, dtype=dtype)
        wide[..., 0] = other  # heads that do not lie whole
        merge(whole[rows, heads, 1], whole_lse[heads, rows].T, wide[..., 0], other_lse.T.contiguous().T)
        # Vectors and single numbers may differ by a rounding.
        bound = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(whole[rows, heads, 1], want, rtol=bound, atol=bound)
        torch.testing.assert_close(whole_lse[heads, rows].T, want_lse, rtol=bound, atol=bound)
        whole[rows, heads, 1], whole_lse[heads, rows] = 7.0, 7.0
        assert (whole == 7.0).all()
        assert (whole_lse == 7.0).all()


def test_nothing_to_merge_is_nothing() -> None:
    for merge in (merge_into, plain_merge_into, fused_merge_into):
        empty = torch.zeros(0, HEADS, DIM), torch.zeros(0, HEADS)
        merge(*empty, *empty)


PROGRAM = """
import json, sys
import triton.language as tl
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lcbench.kernels.triton_merge import ROWS, WARPS, merge_kernel

for capability, other, sums, dim in ((90, "fp32", tl.float32, 128), (90, "bf16", tl.float32, 64), (80, "bf16", tl.float32, 96),
                                     (90, "fp64", tl.float64, 128)):
    constants = {"D": dim, "PAD": triton.next_power_of_2(dim), "ROWS": ROWS, "SUM": sums}
    total = "fp64" if sums is tl.float64 else "fp32"
    kinds = {"out": total, "lse": total, "other": other, "other_lse": total}
    signature = {name: "constexpr" if name in constants else f"*{kinds[name]}" if name in kinds else "i32"
                 for name in merge_kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(merge_kernel.arg_names)
               if name in kinds or name.endswith(("_t", "_h"))}
    source = ASTSource(merge_kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    ptx = made.asm["ptx"]
    print(json.dumps([capability, dim, made.metadata.shared, ".local" in ptx, "ld.global.v" in ptx, "st.global.v" in ptx]))
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_moves_vectors_and_spills_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)  # which would not compile
    program = tmp_path / "compile.py"  # from a file: Triton reads the source of its functions
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for _, _, shared, local, loads, stores in rows:
        assert shared <= 48 << 10
        assert not local
        assert loads
        assert stores
