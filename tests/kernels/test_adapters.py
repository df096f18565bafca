"""Adapters of GPU libraries against stand-ins with the libraries' own signatures and conventions, on every mask, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_kernels import CPU, GROUPED, HARD, SEQLEN, check_kernel, kernel_of, problem_of

from lcbench.kernels.base import Kernel, Platform, Prepared, Unsupported, accumulation_dtype, prepare
from lcbench.kernels.flex import PreparedFlex
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing import fake_libraries
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import names, small

Tensor = torch.Tensor
H200 = Platform("cuda", (9, 0), 141 << 30)
DENSE: dict[str, Callable[[], dict[str, ModuleType]]] = {
    "flash_attn2": fake_libraries.flash_attn2, "flash_attn3": fake_libraries.flash_attn3, "flash_attn4": fake_libraries.flash_attn4,
    "te_fused": fake_libraries.transformer_engine, "te_fused 2.5": partial(fake_libraries.transformer_engine, "2.5"),
    "xformers": fake_libraries.xformers, "ffa": fake_libraries.magi_attention,
}  # fmt: skip


class LikeTheEngine(Kernel):
    """A kernel that gets tensors as the engine may hand them over: keys and values interleaved, queries and dout with strides of
    their own, out in the type that partial results are merged in."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.takes = kernel.takes  # type: ignore[misc]

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return self._kernel.unavailable(problem, platform)

    def calls(self, mask: BandMask, platform: Platform) -> int:
        return self._kernel.calls(mask, platform)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return Strided(self._kernel.prepare(mask, heads, dtype, device))


@dataclass
class Strided:
    prepared: Prepared

    @property
    def calls(self) -> int:
        return self.prepared.calls

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> tuple[Tensor, Tensor]:
        return self.prepared.forward(among_heads(q), *interleaved(k, v), softmax_scale=softmax_scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = among_heads(out.to(accumulation_dtype(out.dtype))), lse.T.contiguous().T
        return self.prepared.backward(
            among_heads(dout), among_heads(q), *interleaved(k, v), out, lse, softmax_scale=softmax_scale
        )  # fmt: skip


def among_heads(x: Tensor) -> Tensor:
    """The same values as a part of the heads, and of the tokens, of a larger tensor."""
    larger = torch.full((len(x) + 2, x.shape[1] + 3, x.shape[2]), torch.nan, dtype=x.dtype)
    larger[1:-1, 2:-1] = x
    return larger[1:-1, 2:-1]


def interleaved(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.stack([k, v], dim=2)
    return both[:, :, 0], both[:, :, 1]


def check_adapter(kernel: Kernel, masks: Iterable[Mask], heads: Heads = GROUPED, scale: float = 0.7) -> None:
    """Every mask in float64, in both layouts, and the first in bfloat16, whose statistics are float32."""
    masks = list(masks)
    for mask in masks:
        check_kernel(LikeTheEngine(kernel), mask, heads, torch.float64, 1e-12, scale)
    check_kernel(kernel, masks[0], heads, torch.float64, 1e-12, scale)
    for some in (kernel, LikeTheEngine(kernel)):
        check_kernel(some, masks[0], heads, torch.bfloat16, 0.05, scale)


def every_mask(folder: Path) -> dict[str, Mask]:
    return {name: small(name, SEQLEN, GROUPED, folder) for name in names()} | HARD


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("library", DENSE)
def test_dense_library_runs_every_mask(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DENSE[library]())
    kernel = kernel_of(library.partition(" ")[0])
    assert kernel.missing() is None
    assert kernel.unavailable(problem_of(Heads(6, 2, 64), "bfloat16"), H200) is None
    check_adapter(kernel, every_mask(tmp_path).values())


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_torch_cuda_backend_runs_every_mask(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, fake in fake_libraries.torch_cuda_ops().items():
        monkeypatch.setattr(torch.ops.aten, operator, fake)
    check_adapter(kernel_of(name), every_mask(tmp_path).values())


def test_torch_flash_on_cuda_runs_every_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcbench.kernels.sdpa_flash import _CUDA, SDPAFlash
    from lcbench.kernels.varlen import count_varlen, prepare_varlen

    for operator, fake in fake_libraries.torch_cuda_ops().items():
        monkeypatch.setattr(torch.ops.aten, operator, fake)

    class OnCuda(SDPAFlash):
        def calls(self, mask: Mask, platform: Platform) -> int:  # type: ignore[override]
            return count_varlen(mask)  # type: ignore[arg-type]

        def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
            return prepare_varlen(mask, device, _CUDA)  # type: ignore[arg-type]

    check_adapter(OnCuda(), every_mask(tmp_path).values())


def test_flashmask_runs_every_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several sizes, so that a test's sequence has many of them, and bounds lie within and between them."""
    kernel, masks = kernel_of("flashmask"), every_mask(tmp_path)
    for block_q, block_k in ((8, 16), (16, 4), (64, 64)):
        monkeypatch.setattr(torch.ops, "flashmask", fake_libraries.flashmask_ops(block_q, block_k), raising=False)
        check_adapter(kernel, masks.values())
    native = [name for name, mask in masks.items() if not isinstance(mask, BlockMap) and kernel.calls(mask, H200) == 1]
    assert len(native) > 10


def check_forward(kernel: Kernel, mask: Mask, heads: Heads, scale: float) -> None:
    q, k, v = (torch.randn(mask.num_q, h, heads.dim, dtype=torch.float64) for h in (heads.q, heads.kv, heads.kv))
    q, (k, v) = among_heads(q), interleaved(k, v)
    want, want_lse = dense_attention(q, k, v, dense_heads(mask, heads.q), scale)
    out, lse = prepare(kernel, mask, heads, torch.float64, CPU).forward(q, k, v, softmax_scale=scale)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert (out - want).abs().max() <= 1e-12
    assert torch.where(want_lse == -torch.inf, 0.0, lse - want_lse).abs().max() <= 1e-12


def test_flashinfer_runs_every_mask_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_libraries.flashinfer())
    kernel = kernel_of("flashinfer")
    assert "direction=forward runs" in str(kernel.unsupported(problem_of(GROUPED), HARD["holes"]))
    for mask in every_mask(tmp_path).values():
        check_forward(kernel, mask, GROUPED, 0.7)


def test_flashinfer_sparse_runs_block_maps_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_libraries.flashinfer())
    kernel = kernel_of("flashinfer_sparse")
    forward = Problem(SEQLEN, GROUPED, Scale(1, 1), "bfloat16", "forward")
    for mask in every_mask(tmp_path).values():
        if isinstance(mask, BlockMap):
            assert kernel.unsupported(forward, mask) is None
            check_forward(kernel, mask, GROUPED, 0.7)
    each = block_random(64, heads=GROUPED, seed=(1, 0), density=0.3, block_size=8, sizes="uniform", per="q_head")
    assert "one per query head" in str(kernel.unsupported(forward, each))


@pytest.mark.parametrize(("name", "block", "heads"), [("flash_attn4_sparse", 128, Heads(4, 2, 16)), ("vsa", 64, Heads(2, 2, 16))])
def test_sparse_library_runs_its_blocks(name: str, block: int, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"flash_attn4_sparse": fake_libraries.flash_attn4, "vsa": fake_libraries.fastvideo}[name]())
    kernel = kernel_of(name)
    assert kernel.missing() is None
    for per in ("all_heads", "kv_head", "q_head"):
        mask = block_random(4 * block, heads=heads, seed=(1, 0), density=0.4, block_size=block, sizes="uniform", per=per)  # type: ignore[arg-type]
        assert kernel.unsupported(problem_of(heads), mask) is None
        check_adapter(kernel, [mask], heads, heads.dim**-0.5)
    other = block_random(4 * block, heads=heads, seed=(1, 0), density=0.4, block_size=block // 2, sizes="uniform", per="q_head")
    assert f"takes uniform blocks of {block} tokens" in str(kernel.unsupported(problem_of(heads), other))
    with pytest.raises(Unsupported, match="uniform blocks"):
        prepare(kernel, other, heads, torch.float64, CPU)


@pytest.mark.parametrize("name", [name for name in names("kernel") if kernel_of(name).missing()])
def test_a_library_that_is_not_here_says_so(name: str) -> None:
    assert "cannot be imported" in str(kernel_of(name).missing())


def test_xformers_whose_compiled_part_is_for_another_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = fake_libraries.xformers()
    install(monkeypatch, modules)
    assert kernel_of("xformers").missing() is None
    monkeypatch.setattr(modules["xformers._cpp_lib"], "_built_with_cuda", False)
    monkeypatch.setattr(modules["xformers._cpp_lib"], "_cpp_library_load_exception", OSError("built for PyTorch 2.10.0\nmore"))
    assert str(kernel_of("xformers").missing()).endswith("is not for this torch and CUDA: built for PyTorch 2.10.0")


def test_what_flex_compiles_holds_no_tensor_of_its_own() -> None:
    """Inductor takes no constant tensor in a mask function, which a number among its indices becomes."""
    mask = BandMask.of(256, 256, [Band(5, 80, 0, 100), Band(100, 250, 0, 256, -100, 0), Band(100, 250, 0, 20, -1000, -150)])
    heads = Heads(4, 2, 16)
    for some in (mask, block_random(256, heads=heads, seed=(1, 0), density=0.4, block_size=64, sizes="uniform", per="kv_head")):
        prepared = PreparedFlex(some, heads, CPU)
        inputs = [torch.zeros(1, h, 256, 16) for h in (4, 2, 2)]
        for direction, given in (("forward", inputs), ("backward", [*inputs, inputs[0], torch.zeros(1, 4, 256), inputs[0]])):
            graph = prepared._trace(direction, 0.25, [*given, *prepared._block_tensors, *prepared._tables])
            parts = dict(graph.named_modules())  # type: ignore[attr-defined]
            assert any("mask" in name for name in parts)
            assert not [name for part in parts.values() for name in vars(part) if name.startswith("_tensor_constant")]
            assert not [node for part in parts.values() for node in part.graph.nodes if "lift_fresh" in str(node.target)]


def test_limits_name_what_is_wrong() -> None:
    kernel = kernel_of("flash_attn3")
    halves = problem_of(Heads(6, 2, 64), "bfloat16")
    assert "runs on CUDA devices only" in str(kernel.unavailable(halves, Platform("cpu")))
    assert "needs compute capability 9.0 to 9.0, this device has 10.0" in str(kernel.unavailable(halves, Platform("cuda", (10, 0))))
    assert "not float64" in str(kernel.unavailable(problem_of(Heads(6, 2, 64)), H200))
    assert "in steps of 8, not 60" in str(kernel.unavailable(problem_of(Heads(6, 2, 60), "bfloat16"), H200))
