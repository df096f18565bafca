"""Kernels on heads whose values have another dimension than their keys, on softcapped scores, and on masks of caches: fewer queries
than keys. Each against dense float64 attention, and each that cannot says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lcbench.kernels.base import Kernel, Platform, Saved, Unsupported, dims, half_on_cuda, prepare, softmax_arguments
from lcbench.kernels.triton_band import TritonBand
from lcbench.kernels.triton_block_sparse import TritonBlockSparse
from lcbench.kernels.triton_shapes import SHARED, SUMS, key_width, value_width
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block import BlockMap
from lcbench.masks.block_random import block_random
from lcbench.masks.mask import Mask
from lcbench.problem import PLAIN, Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.fake_libraries import cudnn, flash_attn2, flash_attn3, flash_attn4, flashinfer, flashmask, torch_operators
from lcbench.testing.masks import softmax_kernels
from tests.kernels.test_adapters import DENSE, H200, STANDINS, among_heads, every_mask, install
from tests.kernels.test_kernels import CPU, HERE, kernel_of

Tensor = torch.Tensor
SHORTER, LONGER, LATENT = Heads(4, 2, 24, 16), Heads(2, 2, 16, 40), Heads(4, 1, 40, 32, latent=True)
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def requests(*each: tuple[int, int], causal: bool = True) -> BandMask:
    """(new tokens, all tokens) of each request: the new ones are the last rows of a square mask."""
    bands, q0, k0 = [], 0, 0
    for new, total in each:
        reach = (k0 + total - new) - q0 if causal else 1 << 20
        bands.append(Band(q0, q0 + new, k0, k0 + total, -(1 << 20), reach))
        q0, k0 = q0 + new, k0 + total
    return BandMask.of(q0, k0, bands)


CACHES = {
    "decode": requests((1, 9), (1, 33), (1, 1), (1, 20)),
    "chunk": requests((13, 47)),
    "mixed": requests((1, 21), (7, 26), (9, 9), (1, 5)),
    "windows": BandMask.of(12, 45, [Band(0, 5, 0, 20, 6, 15), Band(5, 12, 20, 45, 8, 33)]),
}


def check(
    kernel: Kernel, mask: Mask, heads: Heads, softcap: float = 0.0, *, strided: bool = False, backward: bool = True,
    scale: float = 0.4,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    sizes = (mask.num_q, heads.q, heads.dim), (mask.num_k, heads.kv, heads.dim), (mask.num_k, heads.kv, heads.v)
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    dout = torch.randn(mask.num_q, heads.q, heads.v, generator=generator, dtype=torch.float64)
    q, k, dout = (among_heads(x) for x in (q, k, dout)) if strided else (q, k, dout)
    v = k[..., : heads.v] if heads.latent else among_heads(v) if strided else v
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense_attention(leaves[0], leaves[1], leaves[2], dense_heads(mask, heads.q), scale, softcap=softcap)
    wanted = [want, want_lse, *(torch.autograd.grad(want, leaves, dout) if backward else ())]

    arguments = {"softmax_scale": scale} | ({"softcap": softcap} if softcap else {})
    prepared = prepare(kernel, mask, heads, torch.float64, CPU)
    out, lse = prepared.forward(q, k, v, **arguments)
    found = [out, lse, *(prepared.backward(dout, Saved(q, k, v, out, lse), **arguments) if backward else ())]
    for name, got, reference in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=backward):
        assert got.shape == reference.shape, name
        assert torch.equal(got == -torch.inf, reference == -torch.inf), name
        reference = reference.detach()
        error = torch.where(reference == -torch.inf, 0.0, got - reference).abs().max()
        largest = torch.where(reference == -torch.inf, 0.0, reference).abs().max()
        assert error <= 1e-12 * max(1.0, float(largest)), (name, float(error))


def blocks(heads: Heads) -> Mask:
    return block_random(48, heads=heads, seed=(1, 0), density=0.4, block_size=16, sizes="uniform", per="kv_head")


def problem(heads: Heads, dtype: str = "bfloat16", direction: str = "forward_backward", softmax: Softmax = PLAIN) -> Problem:
    return Problem(1024, heads, Scale(1, 1), dtype, direction, softmax=softmax)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_kernels_of_this_machine(name: str) -> None:
    kernel = kernel_of(name)
    caps = (0.0, 1.5) if kernel.softcaps else (0.0,)
    if kernel.takes == "blocks":
        for heads, softcap in product((SHORTER, LATENT), caps):
            check(kernel, blocks(heads), heads, softcap)
        return
    everywhere(kernel)
    for mask, heads in ((blocks(LATENT), LATENT), (BandMask.of(5, 9, []), SHORTER)):
        if kernel.unsupported(problem(heads), mask) is None:
            check(kernel, mask, heads, caps[-1])


@pytest.mark.parametrize("name", HERE)
def test_single_precision(name: str) -> None:
    """A softcap's tanh is as exact as the type."""
    kernel = kernel_of(name)
    if not kernel.softcaps:
        pytest.skip("it has no softcap")
    mask = blocks(SHORTER) if kernel.takes == "blocks" else CACHES["mixed"]
    sizes = (mask.num_q, 4, 24), (mask.num_k, 2, 24), (mask.num_k, 2, 16)
    q, k, v = (torch.randn(size, generator=torch.Generator().manual_seed(5)) for size in sizes)
    want, want_lse = dense_attention(q.double(), k.double(), v.double(), dense_heads(mask, q.shape[1]), 2.0, softcap=0.7)
    out, lse = prepare(kernel, mask, SHORTER, torch.float32, CPU).forward(q, k, v, softmax_scale=2.0, softcap=0.7)
    assert (out.double() - want).abs().max() <= 1e-5
    assert torch.where(want_lse == -torch.inf, 0.0, lse.double() - want_lse).abs().max() <= 1e-5


@pytest.mark.parametrize("library", DENSE)
def test_dense_libraries(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, DENSE[library]())
    everywhere(kernel_of(library.partition(" ")[0]))


def everywhere(kernel: Kernel) -> None:
    """Each mask with some head dims, capped in turn, and one mask with all of them. Forward alone where there is no backward."""
    caps, every = (0.0, 1.5) if kernel.softcaps else (0.0,), (SHORTER, LONGER, LATENT)
    plan = [(mask, every[i % 3], caps[i % len(caps)], False) for i, mask in enumerate(CACHES)]
    plan += [("mixed", heads, caps[(i + 1) % len(caps)], True) for i, heads in enumerate(every)]
    run = 0
    for mask, heads, softcap, strided in plan:
        refused = [kernel.unsupported(problem(heads, direction=d), CACHES[mask]) for d in ("forward", "forward_backward")]
        if refused[0] is None:
            check(kernel, CACHES[mask], heads, softcap, strided=strided, backward=refused[1] is None)
            run += 1
    assert run >= len(every) + 1


@pytest.mark.parametrize("name", ["sdpa_efficient", "sdpa_cudnn"])
def test_backends_of_torch_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, fake in torch_operators.operators().items():
        monkeypatch.setattr(torch.ops.aten, operator, fake)
    everywhere(kernel_of(name))


@pytest.mark.slow
def test_cudnn_by_its_frontend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, cudnn.modules())
    monkeypatch.setattr("lcbench.kernels.cudnn._handles", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    everywhere(kernel_of("cudnn"))
    for mask in every_mask(tmp_path, SHORTER).values():
        check(kernel_of("cudnn"), mask, SHORTER)


def test_flashmask_and_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "flashmask", flashmask.operators(8, 16), raising=False)
    everywhere(kernel_of("flashmask"))
    install(monkeypatch, flashinfer.modules() | {"einops": ModuleType("einops")})
    everywhere(kernel_of("flashinfer"))
    for heads, softcap in product((SHORTER, LONGER), (0.0, 1.5)):
        check(kernel_of("flashinfer_sparse"), blocks(heads), heads, softcap, backward=False)


def test_flash_attn4_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn4.modules())
    for heads, softcap in product((SHORTER, LONGER), (0.0, 1.5)):
        mask = block_random(256, heads=heads, seed=(1, 0), density=0.5, block_size=128, sizes="uniform", per="kv_head")
        check(kernel_of("flash_attn4_sparse"), mask, heads, softcap)


def test_head_dims_that_a_library_takes_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    deepseek, hopper = Heads(2, 2, 192, 128), Platform("cuda", (9, 0))
    install(monkeypatch, flash_attn3.modules() | flashinfer.modules() | flash_attn2.modules())
    for name, padded in (("flash_attn3", False), ("flashinfer", False), ("flash_attn2", True)):
        kernel = kernel_of(name)
        assert kernel.pads(deepseek, hopper) == padded
        check(kernel, CACHES["mixed"], deepseek, backward=name != "flashinfer", scale=0.1)


def test_flash_attn3_on_latent_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the values' numbers are a product of their own, forward only."""
    install(monkeypatch, flash_attn3.modules())
    kernel, heads = kernel_of("flash_attn3"), Heads(4, 1, 320, 256, latent=True)
    for mask, strided in product(CACHES.values(), (False, True)):
        check(kernel, mask, heads, 1.5 * strided, strided=strided, backward=False, scale=0.1)
    whole = Heads(128, 1, 576, 512, latent=True)
    assert "no backward of head dims 576:512; direction=forward runs" in str(kernel.unsupported(problem(whole), CACHES["chunk"]))
    decode = problem(whole, direction="forward")
    assert kernel.unsupported(decode, CACHES["chunk"]) is None
    assert kernel.unavailable(decode, H200) is None
    assert "not 576:512" in str(kernel.unavailable(problem(replace(whole, latent=False)), H200))


@pytest.mark.parametrize("name", softmax_kernels())
def test_a_softcap_is_computed_or_refused(name: str) -> None:
    kernel, mask = kernel_of(name), CACHES["chunk"]
    heads = Heads(4, 4, 64)
    plain, capped = (problem(heads, direction="forward", softmax=softmax) for softmax in (PLAIN, Softmax(softcap=30.0)))
    square = block_random(1024, heads=heads, seed=(1, 0), density=0.5, block_size=128, sizes="uniform", per="all_heads")
    for given in (mask, square):
        reason = kernel.unsupported(capped, given)
        if kernel.softcaps:
            assert reason == kernel.unsupported(plain, given)
        else:
            assert reason == "computes no softcapped scores (softmax=softcap30)"
    assert softmax_arguments(plain) == {"softmax_scale": 0.125}
    assert softmax_arguments(capped) == {"softmax_scale": 0.125, "softcap": 30.0}


def test_refusals_name_head_dims_by_role() -> None:
    def refused(dim: int, v: int, head_dim: int = 256, dim_v: int = 0) -> str | None:
        return half_on_cuda(problem(Heads(2, 2, dim, v)), H200, "it", head_dim=head_dim, dim_v=dim_v)

    assert refused(192, 128) is None
    assert refused(192, 132) == "it takes head dims up to 256 in steps of 8, not 192:132"
    assert refused(576, 512) == "it takes head dims up to 256 in steps of 8, not 576:512"
    longer = "it takes head dims up to 576 for keys and 512 for values in steps of 8, not 576:520"
    assert refused(576, 520, head_dim=576, dim_v=512) == longer
    assert dims(Heads(2, 2, 64, 64)) == "64"
    deepseek, blackwell = problem(Heads(8, 8, 192, 128)), Platform("cuda", (10, 0))
    assert "up to 128 in steps of 8, not 192:128" in str(kernel_of("ffa").unavailable(deepseek, H200))
    for name in ("cudnn", "te_fused", "sdpa_cudnn", "flash_attn4"):
        assert kernel_of(name).unavailable(deepseek, H200) is None
        other = kernel_of(name).unavailable(problem(Heads(8, 8, 192, 96)), blackwell)
        assert str(other).endswith("up to 128 in steps of 8 and 192:128, not 192:96")
    assert "not 192:128" in str(kernel_of("sdpa_cudnn").unavailable(deepseek, Platform("cuda", (8, 0))))
    capped = problem(Heads(8, 8, 128), softmax=Softmax(softcap=30.0))
    assert "no backward of softcapped" in str(kernel_of("flash_attn4").unavailable(capped, Platform("cuda", (12, 0))))
    assert kernel_of("flash_attn4").unavailable(capped, H200) is None


def test_cudnn_that_is_too_old_for_the_head_dims_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcbench.kernels.cudnn import too_old_for_dims

    blackwell = Platform("cuda", (10, 0))
    monkeypatch.setattr(Platform, "of", lambda device: blackwell)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(Unsupported, match=r"cuDNN 9\.10\.2 takes no head dims 192:128"):
        too_old_for_dims(Heads(8, 8, 192, 128), torch.device("cuda"))
    too_old_for_dims(Heads(8, 8, 128), torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91100)
    too_old_for_dims(Heads(8, 8, 192, 128), torch.device("cuda"))


def test_vsa_has_its_own_scale() -> None:
    vsa, heads = kernel_of("vsa"), Heads(4, 4, 64)
    mask = block_random(1024, heads=heads, seed=(1, 0), density=0.5, block_size=64, sizes="uniform", per="all_heads")
    assert vsa.unsupported(problem(heads), mask) is None
    assert vsa.unsupported(problem(heads, softmax=Softmax(scale=0.125)), mask) is None
    assert "softmax=scale0.3 is not" in str(vsa.unsupported(problem(heads, softmax=Softmax(scale=0.3)), mask))
    assert vsa.unsupported(problem(replace(heads, dim_v=32)), mask) is None
    assert "values are longer than keys: 64:128" in str(vsa.unsupported(problem(replace(heads, dim_v=128)), mask))


def test_vsa_runs_shorter_values_and_rectangles(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, STANDINS["vsa"]())
    heads = Heads(2, 2, 16, 8)
    mask = block_random(192, heads=heads, seed=(1, 0), density=0.6, block_size=64, sizes="uniform", per="q_head")
    check(kernel_of("vsa"), mask, heads, scale=0.25)
    first = BlockMap(mask.q_edges[:2], mask.k_edges, mask.maps, lambda number: mask.keep(number)[:1])
    check(kernel_of("vsa"), first, heads, scale=0.25)


def test_kernels_of_all_scores_count_queries_and_keys() -> None:
    naive = kernel_of("naive")
    machine = Platform("cpu", memory_bytes=8 << 30)
    long = Problem(1 << 17, Heads(32, 8, 128), Scale(1, 1), "bfloat16", "forward")
    assert "GiB or more" in str(naive.unavailable(long, machine))
    decode = replace(long, batch=Batch((Requests(1, 1, 1 << 17),)))
    assert naive.unavailable(decode, machine) is None


def test_keys_are_read_in_the_fewest_numbers() -> None:
    widths = {16: (16, 0), 24: (32, 0), 40: (32, 16), 64: (64, 0), 80: (64, 16), 96: (64, 32), 112: (128, 0), 128: (128, 0)}
    widths |= {192: (128, 64), 256: (256, 0), 576: (512, 64)}
    for dim, (first, rest) in widths.items():
        width = key_width(dim)
        assert (width.padded, width.rest_padded) == (first, rest), dim
        assert width.first + width.rest == dim
        assert width.whole <= value_width(dim)


def test_launch_shapes_of_long_heads_fit_the_device() -> None:
    for kernel, heads in product((TritonBand(), TritonBlockSparse()), (Heads(8, 8, 192, 128), Heads(16, 1, 576, 512, latent=True))):
        key, value = key_width(heads.dim).whole, value_width(heads.v)
        for capability, size in product(SHARED, (2, 4)):
            shapes = kernel.shapes(heads, size, capability)
            sums = {"forward": value, "dq": key, "dkv": key + value}
            for step, shape in shapes._asdict().items():
                kept = key if step == "forward" else key + value
                needed = (shape.rows * kept + shape.stages * shape.columns * (key + value)) * size
                assert needed <= SHARED[capability] << 10, (heads, step, shape)
                assert shape.rows * sums[step] <= SUMS or shape.rows == 16
                assert min(shape.rows, shape.columns, shape.tested) >= 16


def shown(name: str) -> str:
    """The row of a kernel in the table of docs/kernels.md, of an H200."""
    kernel = kernel_of(name)

    def takes(heads: Heads) -> str:
        reasons = []
        for direction in ("forward_backward", "forward"):
            asked = problem(heads, direction=direction)
            mask = block_random(1024, heads=heads, seed=(1, 0), density=0.5, block_size=128, sizes="uniform", per="all_heads")
            mask64 = block_random(1024, heads=heads, seed=(1, 0), density=0.5, block_size=64, sizes="uniform", per="all_heads")
            masks = (mask, mask64, CACHES["chunk"])
            reasons.append(all(kernel.unsupported(asked, x) for x in masks) or bool(kernel.unavailable(asked, H200)))
        if all(reasons):
            return "no"
        return ("padded" if kernel.pads(heads, H200) else "yes") + (", forward" if reasons[0] else "")

    cells = takes(Heads(16, 16, 192, 128)), takes(Heads(16, 1, 576, 512, latent=True)), "yes" if kernel.softcaps else "no"
    return f"| `{name}` | {' | '.join(cells)} |"


def test_docs_say_which_kernel_takes_what() -> None:
    text = DOCS.read_text()
    for name in softmax_kernels():
        assert shown(name) in text, shown(name)
