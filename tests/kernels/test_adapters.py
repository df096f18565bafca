"""Adapters of GPU libraries against stand-ins with the libraries' own signatures and conventions, on every mask, without a GPU."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lcbench.kernels import flashinfer as flashinfer_kernel
from lcbench.kernels.base import Gradients, Kernel, Platform, Prepared, Saved, Unsupported, accumulation_dtype, importable, prepare
from lcbench.kernels.flex import PreparedFlex
from lcbench.kernels.library import LibraryCall, signature_of, unfit
from lcbench.kernels.te_fused import FORMATS
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.selectors.base import block_edges
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.fake_libraries import (
    fastvideo,
    flash_attn2,
    flash_attn3,
    flash_attn4,
    flashinfer,
    flashmask,
    magi_attention,
    torch_operators,
    transformer_engine,
    xformers,
)
from lcbench.testing.masks import WITHIN, names, small
from tests.kernels.test_kernels import CPU, GROUPED, HARD, SEQLEN, check_kernel, kernel_of, problem_of

Tensor = torch.Tensor
H200 = Platform("cuda", (9, 0), 141 << 30)
DENSE: dict[str, Callable[[], dict[str, ModuleType]]] = {
    "flash_attn2": flash_attn2.modules, "flash_attn3": flash_attn3.modules, "flash_attn4": flash_attn4.modules,
    "te_fused": transformer_engine.modules, "te_fused 2.5": partial(transformer_engine.modules, "2.5"),
    "xformers": xformers.modules, "ffa": magi_attention.modules,
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

    def backward(self, dout: Tensor, saved: Saved, *, softmax_scale: float) -> Gradients:
        q, k, v, out, lse = saved
        out, lse = among_heads(out.to(accumulation_dtype(out.dtype))), lse.T.contiguous().T
        laid = Saved(among_heads(q), *interleaved(k, v), out, lse)
        return self.prepared.backward(among_heads(dout), laid, softmax_scale=softmax_scale)


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


def every_mask(folder: Path, heads: Heads = GROUPED) -> dict[str, Mask]:
    return {name: small(name, SEQLEN, heads, folder) for name in [*names(), *WITHIN]} | HARD


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType]) -> None:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("library", DENSE)
@pytest.mark.slow
def test_dense_library_runs_every_mask(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DENSE[library]())
    kernel = kernel_of(library.partition(" ")[0])
    assert kernel.missing() is None
    assert kernel.unavailable(problem_of(Heads(6, 2, 64), "bfloat16"), H200) is None
    check_adapter(kernel, every_mask(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_torch_cuda_backend_runs_every_mask(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, fake in torch_operators.operators().items():
        monkeypatch.setattr(torch.ops.aten, operator, fake)
    check_adapter(kernel_of(name), every_mask(tmp_path).values())


@pytest.mark.slow
def test_torch_flash_on_cuda_runs_every_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lcbench.kernels.sdpa_flash import _CUDA, SDPAFlash
    from lcbench.kernels.varlen import count_varlen, prepare_varlen

    for operator, fake in torch_operators.operators().items():
        monkeypatch.setattr(torch.ops.aten, operator, fake)

    class OnCuda(SDPAFlash):
        def calls(self, mask: Mask, platform: Platform) -> int:  # type: ignore[override]
            return count_varlen(mask)  # type: ignore[arg-type]

        def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
            return prepare_varlen(mask, device, _CUDA)  # type: ignore[arg-type]

    check_adapter(OnCuda(), every_mask(tmp_path).values())


@pytest.mark.slow
def test_flashmask_runs_every_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of several sizes, so that a test's sequence has many of them, and bounds lie within and between them."""
    kernel, masks = kernel_of("flashmask"), every_mask(tmp_path)
    for block_q, block_k in ((8, 16), (16, 4), (64, 64)):
        monkeypatch.setattr(torch.ops, "flashmask", flashmask.operators(block_q, block_k), raising=False)
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
    install(monkeypatch, flashinfer.modules())
    kernel = kernel_of("flashinfer")
    assert "direction=forward runs" in str(kernel.unsupported(problem_of(GROUPED), HARD["holes"]))
    for mask in every_mask(tmp_path).values():
        check_forward(kernel, mask, GROUPED, 0.7)


def test_flashinfer_sparse_runs_block_maps_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flashinfer.modules())
    kernel = kernel_of("flashinfer_sparse")
    forward = Problem(SEQLEN, GROUPED, Scale(1, 1), "bfloat16", "forward")
    for mask in every_mask(tmp_path).values():
        if isinstance(mask, BlockMap) and not mask.blocks_cut:
            assert kernel.unsupported(forward, mask) is None
            check_forward(kernel, mask, GROUPED, 0.7)
    each = block_random(64, heads=GROUPED, seed=(1, 0), density=0.3, block_size=8, sizes="uniform", per="q_head")
    assert "one per query head" in str(kernel.unsupported(forward, each))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block", "heads"), [("flash_attn4_sparse", 128, Heads(4, 2, 16)), ("vsa", 64, Heads(2, 2, 16))])
def test_sparse_library_runs_its_blocks(name: str, block: int, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"flash_attn4_sparse": flash_attn4.modules, "vsa": fastvideo.modules}[name]())
    kernel = kernel_of(name)
    assert kernel.missing() is None
    for per in ("all_heads", "kv_head", "q_head"):
        mask = block_random(4 * block, heads=heads, seed=(1, 0), density=0.4, block_size=block, sizes="uniform", per=per)  # type: ignore[arg-type]
        assert kernel.unsupported(problem_of(heads), mask) is None
        check_adapter(kernel, [mask], heads, heads.dim**-0.5)
    other = block_random(4 * block, heads=heads, seed=(1, 0), density=0.4, block_size=block // 2, sizes="uniform", per="q_head")
    refused = str(kernel.unsupported(problem_of(heads), other))
    assert f"takes uniform blocks of {block} tokens" in refused
    assert f"selector.q_block={block} selector.k_block={block}" in refused
    with pytest.raises(Unsupported, match="uniform blocks"):
        prepare(kernel, other, heads, torch.float64, CPU)


@pytest.mark.parametrize("name", ["flashinfer_sparse", "flash_attn4_sparse", "vsa"])
def test_a_library_of_whole_blocks_refuses_blocks_that_are_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, STANDINS[name]())
    kernel, heads, seqlen = kernel_of(name), Heads(2, 2, 64), 512
    problem = Problem(seqlen, heads, Scale(1, 1), "bfloat16", "forward")
    edges = block_edges(seqlen, 64 if name == "vsa" else 128)
    count = len(edges) - 1
    below = np.tril(np.ones((heads.kv, count, count), dtype=bool), -1)
    whole, cut = (chosen(keep, edges, edges, causal(seqlen)) for keep in (below, below | np.eye(count, dtype=bool)))
    assert kernel.unsupported(problem, whole) is None
    check_forward(kernel, whole, heads, heads.dim**-0.5)
    reason = f"takes whole blocks only: {2 * count} of {count * (count + 1)} kept blocks are cut by the mask that they lie within"
    assert reason in str(kernel.unsupported(problem, cut))
    with pytest.raises(Unsupported, match="whole blocks only"):
        prepare(kernel, cut, heads, torch.float64, CPU)


@pytest.mark.parametrize("name", [name for name in names("kernel") if kernel_of(name).missing()])
def test_a_library_that_is_not_here_says_so(name: str) -> None:
    assert "cannot be imported" in str(kernel_of(name).missing())


STANDINS = {
    **{name: library for name, library in DENSE.items() if " " not in name},
    "flash_attn4_sparse": flash_attn4.modules, "vsa": fastvideo.modules, "flashinfer": flashinfer.modules,
    "flashinfer_sparse": flashinfer.modules,
}  # fmt: skip


def calls_of(name: str) -> list[LibraryCall]:
    """What an adapter says of the functions that it calls, methods before their classes."""
    module = import_module(type(kernel_of(name)).__module__)
    calls = module.CALLS if hasattr(module, "CALLS") else module._calls()
    return sorted((call for call in calls if call.keywords is not None), key=lambda call: -call.function.count("."))


def owner_of(call: LibraryCall) -> tuple[Any, str]:
    *path, last = call.function.split(".")
    owner: Any = import_module(call.module)
    for part in path:
        owner = getattr(owner, part)
    return owner, last


@pytest.fixture
def without_gpu_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", ModuleType("einops"))


@pytest.mark.usefixtures("without_gpu_libraries")
@pytest.mark.parametrize("name", STANDINS)
def test_an_adapter_says_how_it_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are called as their ``LibraryCall`` says, and one that no longer takes an argument is a reason, not a TypeError."""
    install(monkeypatch, STANDINS[name]())
    kernel, seen = kernel_of(name), []
    assert kernel.missing() is None
    for call in calls_of(name):
        owner, last = owner_of(call)
        function = getattr(owner, last)
        for keyword in call.keywords or ():
            monkeypatch.setattr(owner, last, without(function, keyword))
            assert keyword in str(kernel.missing()) or keyword in FORMATS, f"{call.function} without {keyword}"
        monkeypatch.setattr(owner, last, recorded(function, call, seen))
    heads = Heads(2, 2, 16)
    block = {"flash_attn4_sparse": 128, "vsa": 64, "flashinfer_sparse": 64}.get(name)
    mask = (
        block_random(2 * block, heads=heads, seed=(1, 0), density=0.5, block_size=block, sizes="uniform", per="all_heads")
        if block
        else BandMask.of(64, 64, [Band(0, 64, 0, 64, -9, 0)])
    )
    if kernel.unsupported(problem_of(heads), mask):
        check_forward(kernel, mask, heads, 0.25)
    else:
        check_kernel(kernel, mask, heads, torch.float64, 1e-12, 0.25)
    assert set(seen) == {call.function for call in calls_of(name)}


def recorded(function: Callable[..., Any], call: LibraryCall, seen: list[str]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        assert (len(args), set(kwargs)) == (call.positional, set(call.keywords or ())), call.function
        seen.append(call.function)
        return function(*args, **kwargs)

    run.__signature__ = signature_of(function)  # type: ignore[attr-defined]
    return staticmethod(run) if isinstance(function, MethodType) else run


def without(function: Callable[..., Any], keyword: str) -> Any:
    """A function of another release, which does not know an argument."""
    signature = signature_of(function)
    assert signature is not None

    def other(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    left = [parameter for name, parameter in signature.parameters.items() if name != keyword]
    other.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return staticmethod(other) if isinstance(function, MethodType) else other


def test_a_signature_is_seen_through_an_operator_of_torch() -> None:
    def operator(q: Tensor, scale: float, window_size_left: int = -1) -> Tensor:
        return q * scale

    made = torch.library.custom_op("lcbench_test::operator", mutates_args=())(operator)
    assert list(inspect.signature(made).parameters) == ["args", "kwargs"]
    found = signature_of(made)
    assert found is not None
    assert list(found.parameters) == ["q", "scale", "window_size_left"]


def test_flash_attn3_of_the_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _flash_attn_forward(q: Any, k: Any, v: Any, k_new: Any, v_new: Any, qv: Any, out: Any, cu_seqlens_q: Any) -> None:
        raise AssertionError("not to be called")

    modules = flash_attn3.modules()
    install(monkeypatch, modules)
    assert kernel_of("flash_attn3").missing() is None
    monkeypatch.setattr(modules["flash_attn_interface"], "_flash_attn_forward", _flash_attn_forward)
    assert "branch main is what runs" in str(kernel_of("flash_attn3").missing())


def test_flash_attn4_under_an_older_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def _flash_attn_fwd(q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, causal: bool = False) -> None:
        raise AssertionError("not to be called")

    modules = flash_attn4.modules()
    install(monkeypatch, modules)
    for kernel in map(kernel_of, ("flash_attn4", "flash_attn4_sparse")):
        assert kernel.missing() is None
    monkeypatch.setattr(modules["flash_attn.cute.interface"], "_flash_attn_fwd", _flash_attn_fwd)
    assert "install flash-attn-4 after it" not in str(kernel_of("flash_attn4").missing())
    install(monkeypatch, flash_attn2.modules())
    for kernel in map(kernel_of, ("flash_attn4", "flash_attn4_sparse")):
        assert "install flash-attn-4 after it" in str(kernel.missing())


def test_magi_attention_that_returns_a_bare_lse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = magi_attention.modules()
    install(monkeypatch, modules)
    assert kernel_of("ffa").missing() is None
    monkeypatch.delattr(modules["magi_attention.functional.flex_flash_attn"], "AttnForwardMeta")
    assert "MagiAttention 1.1 or later runs" in str(kernel_of("ffa").missing())


def test_xformers_is_refused_where_it_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = xformers.modules()
    install(monkeypatch, modules)
    for version, refused in (("0.0.35", False), ("0.0.35.post1+cu130", False), ("0.0.36", True), ("0.1.0.dev3", True)):
        monkeypatch.setattr(modules["xformers"], "__version__", version)
        assert ("was tried" in str(kernel_of("xformers").missing())) == refused, version
    monkeypatch.setattr(modules["xformers"], "__version__", "0.0.35")
    install(monkeypatch, flash_attn4.modules())
    assert "beside both or neither" in str(kernel_of("xformers").missing())
    install(monkeypatch, flash_attn2.modules())
    assert kernel_of("xformers").missing() is None


def test_releases_of_cudnn_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, transformer_engine.modules() | {"cudnn": ModuleType("cudnn")})
    for version, reason in (
        (90600, "9.6.0"),
        (91000, "9.10.0 has known bugs"),
        (91001, "9.10.1 has known bugs"),
        (90700, ""),
        (91900, ""),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        for kernel in map(kernel_of, ("te_fused", "cudnn")):
            found = kernel.missing()
            assert (reason in str(found)) if reason else found is None, version
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    for tokens, left, refused in ((2048, 64, True), (1024, 64, False), (2048, None, False)):
        band = Band(0, tokens, 0, tokens, hi=0) if left is None else Band(0, tokens, 0, tokens, -left, 0)
        mask = BandMask.of(tokens, tokens, [band])
        with pytest.raises(Unsupported, match=r"9\.14\.0") if refused else nullcontext():
            prepare(kernel_of("te_fused"), mask, GROUPED, torch.bfloat16, CPU)


@pytest.mark.parametrize("raised", [TypeError, ValueError, AssertionError, KeyError, NotImplementedError, ZeroDivisionError])
def test_a_library_whose_import_raises_anything_is_missing(
    raised: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{raised.__name__.lower()}"
    (tmp_path / f"{name}.py").write_text(f"raise {raised.__name__}('\\n half of another version\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert str(importable(name)).startswith(f"{name} cannot be imported: ")
    assert "half of another version" in str(importable(name))
    assert str(unfit(LibraryCall(name, "anything"))) == importable(name)


def test_flashinfer_has_room_for_its_partial_results(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flashinfer.modules())
    heads, mask = Heads(64, 8, 128), BandMask.of(64, 64, [Band(0, 64, 0, 64)])
    check_forward(kernel_of("flashinfer"), mask, heads, 0.1)
    first, second = flashinfer_kernel.workspace(heads, CPU), flashinfer_kernel.workspace(heads, CPU)
    assert first is second
    monkeypatch.setattr(flashinfer_kernel, "WORKSPACE_BYTES", 96 << 20)
    with pytest.raises(AssertionError, match="batch_prefill_tmp_v"):
        check_forward(kernel_of("flashinfer"), mask, heads, 0.1)


def test_flashinfer_refuses_a_plan_that_the_host_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flashinfer.modules())
    long = block_random(1 << 17, heads=GROUPED, seed=(1, 0), density=0.25, block_size=64, sizes="uniform", per="kv_head")
    monkeypatch.setattr(Platform, "of", lambda device: Platform("cpu", memory_bytes=1 << 30))
    with pytest.raises(Unsupported, match=r"lists the tokens of every kept block: \d+ GiB"):
        prepare(kernel_of("flashinfer_sparse"), long, GROUPED, torch.bfloat16, CPU)


def test_xformers_whose_compiled_part_is_for_another_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = xformers.modules()
    install(monkeypatch, modules)
    assert kernel_of("xformers").missing() is None
    monkeypatch.setattr(modules["xformers._cpp_lib"], "_built_with_cuda", False)
    monkeypatch.setattr(modules["xformers._cpp_lib"], "_cpp_library_load_exception", OSError("built for PyTorch 2.10.0\nmore"))
    assert str(kernel_of("xformers").missing()).endswith("is not for this torch and CUDA: built for PyTorch 2.10.0")


@pytest.mark.slow
def test_what_flex_compiles_holds_no_tensor_of_its_own() -> None:
    """Inductor takes no constant tensor in a mask function, which a number among its indices becomes."""
    mask = BandMask.of(256, 256, [Band(5, 80, 0, 100), Band(100, 250, 0, 256, -100, 0), Band(100, 250, 0, 20, -1000, -150)])
    heads = Heads(4, 2, 16)
    for some in (mask, block_random(256, heads=heads, seed=(1, 0), density=0.4, block_size=64, sizes="uniform", per="kv_head")):
        prepared = PreparedFlex(some, heads, CPU)
        inputs = [torch.zeros(1, h, 256, 16) for h in (4, 2, 2)]
        backward = [*inputs, inputs[0], torch.zeros(1, 4, 256), inputs[0]]
        for (direction, given), softcap in product((("forward", inputs), ("backward", backward)), (0.0, 30.0)):
            graph = prepared._trace(direction, 0.25, softcap, [*given, *prepared._block_tensors, *prepared._tables])
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
