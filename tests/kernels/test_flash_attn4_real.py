"""The real flash-attn-4: it is one that both adapters can call, and it compiles for Hopper without a GPU through them."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcbench.kernels.base import Kernel, Saved
from lcbench.kernels.flash_attn4 import FlashAttn4
from lcbench.kernels.flash_attn4_sparse import FlashAttn4Sparse
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.testing import wheels

WHEELS = (
    "flash-attn-4==4.0.0b36", "quack-kernels==0.6.5", "nvidia-cutlass-dsl==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-cu12==4.8.1", "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5", "einops", "cuda-python", "cuda-bindings", "cuda-pathfinder", "cuda-core",
)  # fmt: skip
# What the library asks where there is no GPU to ask.
HOPPER = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
TOKENS, HEADS = 256, Heads(4, 2, 128)


def check(folder: Path) -> None:
    site.addsitedir(str(folder))
    window = BandMask.of(TOKENS, TOKENS, [Band(0, TOKENS, 0, TOKENS, -64, 0)])
    blocks = block_random(TOKENS, heads=HEADS, seed=(1, 0), density=0.5, block_size=128, sizes="uniform", per="all_heads")
    for kernel, mask in ((FlashAttn4(), window), (FlashAttn4Sparse(), blocks)):
        assert kernel.missing() is None
        # A CPU build of torch cannot even index a pretended CUDA tensor.
        if torch.version.cuda:
            compile_both_directions(kernel, mask)


def compile_both_directions(kernel: Kernel, mask: Mask) -> None:
    """Forward and backward with tensors that are pretended: all but the launch happens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    cuda = torch.device("cuda", 0)

    def pretended(values: object) -> torch.Tensor:
        real = torch.as_tensor(values)
        return torch.empty(real.shape, dtype=real.dtype, device=cuda)

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch, "from_numpy", pretended)
        q, dout = (torch.empty((TOKENS, HEADS.q, HEADS.dim), dtype=torch.bfloat16, device=cuda) for _ in range(2))
        kv = torch.empty((TOKENS, HEADS.kv, 2, HEADS.dim), dtype=torch.bfloat16, device=cuda)
        k, v = kv[:, :, 0], kv[:, :, 1]
        prepared = kernel.prepare(mask, HEADS, torch.bfloat16, cuda)
        out, lse = prepared.forward(q, k, v, softmax_scale=0.1)
        assert (out.shape, lse.shape) == (q.shape, q.shape[:2])
        grads = prepared.backward(dout, Saved(q, k, v, out, lse), softmax_scale=0.1)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

        assert all(len(function.compile_cache.cache) for function in (_flash_attn_fwd, _flash_attn_bwd))


@pytest.mark.slow
def test_flash_attn4_fits_its_adapters_and_compiles(tmp_path: Path) -> None:
    if reason := wheels.install(tmp_path, *WHEELS):
        pytest.skip(reason)
    command = [sys.executable, __file__, str(tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **HOPPER, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr
    if not torch.version.cuda:
        pytest.skip("flash-attn-4 fits its adapters; to compile it takes a CUDA build of torch, without a GPU")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
