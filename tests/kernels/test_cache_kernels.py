"""Kernels that read caches against dense attention of what is stored: ours under Triton's interpreter, adapters on stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, product
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.grid.build import build_kernel
from lcbench.kernels.base import Platform, Unsupported
from lcbench.kernels.cache import STORAGES, Cache, CacheKind, unread
from lcbench.kernels.requests import RequestKernel
from lcbench.kernels.triton_decode import TritonDecode
from lcbench.kernels.triton_split import Dims
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_random import block_random
from lcbench.problem import Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.fake_libraries import cudnn, flash_attn2_cache, flash_attn3_cache, flash_attn4_cache, flashinfer_cache
from lcbench.testing.masks import load, names
from tests.kernels.test_cache import HOPPER, random_kv

Tensor = torch.Tensor
CPU = torch.device("cpu")
FAR = 1 << 20
LIBRARIES: dict[str, Callable[[], dict[str, ModuleType]]] = {
    "flash_attn2_cache": flash_attn2_cache.modules, "flash_attn3_cache": flash_attn3_cache.modules,
    "flash_attn4_cache": flash_attn4_cache.modules, "flashinfer_cache": flashinfer_cache.modules, "cudnn_paged": cudnn.modules,
}  # fmt: skip
# (new, total) of each request: a token, a first token, a chunk, a whole prompt, and tokens alone in their last page.
MIXED = ((1, 40), (1, 1), (3, 37), (5, 5), (2, 17))
DECODE = ((1, 40), (1, 1), (1, 33))
ALIKE = ((2, 48),) * 3
LATENT = Heads(16, 1, 576, 512, latent=True)


def kernel_of(name: str) -> Any:
    return build_kernel(load("kernel", name))


def requests_mask(requests: Any, full: bool = False) -> BandMask:
    """Each request's new tokens see its tokens causally from the bottom right, or all of them."""
    q, k = (np.cumsum([0, *counts]) for counts in zip(*requests, strict=True))
    bands = [Band(q[i], q[i + 1], k[i], k[i + 1], -FAR, FAR if full else k[i + 1] - q[i + 1]) for i in range(len(requests))]
    return BandMask.of(int(q[-1]), int(k[-1]), bands)


def check(
    kernel: RequestKernel, mask: BandMask, lengths: tuple[int, ...], heads: Heads, kind: CacheKind,
    dtype: torch.dtype = torch.float64, bound: float = 1e-12, softcap: float = 0.0, stale: float = 0.0,
) -> None:  # fmt: skip
    """A cache against dense attention of exactly what it holds; ``stale`` lies in the rest of pages that are partly filled."""
    k, v = random_kv(mask.num_k, heads, dtype, 1)
    q = (2 * torch.randn(mask.num_q, heads.q, heads.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).to(dtype)
    cache = Cache.of(k, v, lengths, kind, latent=heads.latent, seed=3)
    scale = heads.dim**-0.5
    want, want_lse = dense_attention(q.double(), *cache.stored(), dense_mask(mask.num_q, mask.num_k, mask), scale, softcap=softcap)
    if stale and cache.places is not None:
        rest = torch.ones(len(cache.k) * cache.kind.page, dtype=torch.bool)  # type: ignore[operator]
        rest[cache.places] = False
        for x in (cache.k,) if heads.latent else (cache.k, cache.v):
            pages = x.flatten(0, 1)  # a view: pages are back to back
            pages[rest.nonzero()[:, 0]] = torch.tensor(stale).to(x.dtype)
    prepared = kernel.prepare(mask, heads, dtype, CPU)
    assert prepared.calls == kernel.calls(mask, Platform("cpu"))
    capped = {"softcap": softcap} if softcap else {}
    for _ in range(2):  # the second time from what was made ready
        out, lse = prepared.forward_cache(q, cache, softmax_scale=scale, **capped)
        assert out.shape == (mask.num_q, heads.q, heads.v)
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        assert (out.double() - want).abs().max() <= bound * max(1.0, float(want.abs().max()))
        assert torch.where(want_lse == -torch.inf, 0.0, lse.double() - want_lse).abs().max() <= bound * 10
    if kind == CacheKind():
        out, lse = prepared.forward(q, k, v, softmax_scale=scale, **capped)
        assert (out.double() - want).abs().max() <= bound * max(1.0, float(want.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "storage"), [(None, "input"), (None, "float8"), (1, "bfloat16"), (8, "input"), (8, "float8"), (64, "bfloat16")]
)
@pytest.mark.parametrize(
    "heads", [Heads(6, 2, 16), Heads(4, 2, 24, 16), Heads(8, 1, 24, 16, latent=True), Heads(4, 1, 40, 24, latent=True)], ids=str
)
def test_our_decode_kernel_reads_every_cache(heads: Heads, page: int | None, storage: str) -> None:
    kernel, lengths = TritonDecode(split=32, block_k=32), tuple(total for _, total in MIXED)
    check(kernel, requests_mask(MIXED), lengths, heads, CacheKind(page, storage), stale=torch.nan)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60)).map(lambda x: (x[0], sum(x))), min_size=1, max_size=4),
    st.sampled_from([16, 32, 64]), st.sampled_from([None, 5]),
)  # fmt: skip
@settings(max_examples=8)
def test_splits_and_pages_of_any_requests(requests: Any, split: int, page: int | None) -> None:
    lengths = tuple(total for _, total in requests)
    kernel = TritonDecode(split=split, block_k=16)
    check(kernel, requests_mask(requests), lengths, Heads(4, 2, 16), CacheKind(page), torch.float32, 1e-5)


@pytest.mark.slow
def test_our_decode_kernel_takes_softcaps_single_precision_and_many_rows() -> None:
    kernel, lengths = TritonDecode(split=32, block_k=32), tuple(total for _, total in MIXED)
    check(kernel, requests_mask(MIXED), lengths, Heads(6, 2, 16), CacheKind(8, "float8"), softcap=3.0)
    check(kernel, requests_mask(MIXED), lengths, Heads(6, 2, 16), CacheKind(8), torch.float32, 1e-5, softcap=3.0)
    check(kernel, requests_mask(((40, 44),)), (44,), Heads(4, 2, 16), CacheKind(16))  # several blocks of rows
    check(TritonDecode(), requests_mask(((1, 20),)), (20,), LATENT, CacheKind(16))


def shares() -> dict[str, tuple[BandMask, tuple[int, ...]]]:
    """What ranks may have of requests: tokens of some, none of others, chunks that see all, and two chunks of one request."""
    return {
        "all seen": (requests_mask(((3, 20), (2, 9)), full=True), (20, 9)),
        "full and causal": (BandMask.of(8, 30, [Band(0, 4, 0, 20), Band(4, 8, 20, 30, -FAR, 22)]), (20, 10)),
        "none of a request": (BandMask.of(6, 20, [Band(0, 2, 0, 12, -FAR, 10), Band(4, 6, 12, 20)]), (12, 0, 8)),
        "two chunks of a request": (BandMask.of(4, 30, [Band(0, 2, 0, 12, -FAR, 10), Band(2, 4, 0, 30, -FAR, 26)]), (30,)),
        "rows without keys": (BandMask.of(6, 4, [Band(4, 6, 0, 4)]), (4,)),
        "nothing": (BandMask.of(3, 4, []), (4,)),
    }


@pytest.mark.parametrize("share", shares())
@pytest.mark.parametrize("name", ["triton_decode", *LIBRARIES])
def test_shares_of_requests(name: str, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    mask, lengths = shares()[share]
    for page in (None, 256):
        check(kernel_of(name), mask, lengths, Heads(4, 2, 16), CacheKind(page))


def test_a_bound_between_full_and_causal_runs_on_ours_and_is_refused_by_libraries() -> None:
    mask = BandMask.of(4, 10, [Band(0, 4, 0, 10, -FAR, 7)])  # rows see 8, 9, 10 and 10 keys
    check(TritonDecode(), mask, (10,), Heads(4, 2, 16), CacheKind(4))
    for name in LIBRARIES:
        with pytest.raises(Unsupported, match="rows 0:4 see keys neither all of them nor causally"):
            kernel_of(name).prepare(mask, Heads(4, 2, 16), torch.float64, CPU)


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module, standin in LIBRARIES.get(name, dict)().items():
        monkeypatch.setitem(sys.modules, module, standin)
    if name == "cudnn_paged":
        monkeypatch.setattr("lcbench.kernels.cudnn._handles", [])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_reads_the_caches_that_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    kernel, read = kernel_of(name), 0
    assert kernel.missing() is None
    of_heads = product([Heads(6, 2, 16)], [MIXED, DECODE, ALIKE]), product([Heads(4, 4, 192, 128), LATENT], [MIXED])
    for (heads, requests), page, storage in product(chain(*of_heads), [None, 16, 256], STORAGES):
        batch = Batch(tuple(Requests(1, new, total) for new, total in requests))
        problem = Problem(batch.tokens, heads, Scale(1, 1), "bfloat16", "forward", batch=batch)
        mask, kind = requests_mask(requests), CacheKind(page, storage)
        if kernel.unsupported(problem, mask) or unread(kernel, kind, problem, HOPPER):
            continue
        read += 1
        lengths = tuple(batch.total.tolist())
        check(kernel, mask, lengths, heads, kind, torch.bfloat16, 0.03, stale=400.0)
        if storage != "bfloat16":  # of float64 inputs no library reads it
            check(kernel, mask, lengths, heads, kind, stale=400.0, softcap=2.0 if kernel.softcaps and not heads.latent else 0.0)
    want = {"flash_attn2_cache": 8, "flash_attn3_cache": 30, "flash_attn4_cache": 24, "flashinfer_cache": 33, "cudnn_paged": 24}
    assert read == want[name]


def test_flash_attn2_copies_contiguous_requests_of_unequal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn2_cache")
    for requests in (MIXED, DECODE):
        check(kernel_of("flash_attn2_cache"), requests_mask(requests), tuple(n for _, n in requests), Heads(6, 2, 16), CacheKind())


@pytest.mark.parametrize(("name", "kind", "reason"), [
    ("flash_attn2_cache", CacheKind(16), "takes pages of whole 256 tokens, not of 16"),
    ("flash_attn2_cache", CacheKind(), "takes contiguous caches of equally long requests, others in pages of 256 tokens"),
    ("flash_attn2_cache", CacheKind(256, "float8"), "reads caches of the queries' type, bfloat16, not float8_e4m3fn"),
    ("flash_attn3_cache", CacheKind(16, "float8"), "reads float8 keys with float8 queries only"),
    ("flash_attn4_cache", CacheKind(16, "float8"), "reads caches of the queries' type"),
    ("cudnn_paged", CacheKind(48), "takes pages of a power of two of tokens, not of 48"),
    ("cudnn_paged", CacheKind(16, "float8"), "reads float8 keys with float8 queries only"),
])  # fmt: skip
def test_what_a_library_does_not_read_it_says(name: str, kind: CacheKind, reason: str) -> None:
    batch = Batch(tuple(Requests(1, new, total) for new, total in MIXED))
    problem = Problem(batch.tokens, Heads(4, 2, 64), Scale(1, 1), "bfloat16", "forward", batch=batch)
    assert reason in str(unread(kernel_of(name), kind, problem, HOPPER))


@pytest.mark.parametrize("name", ["triton_decode", *LIBRARIES])
def test_what_cannot_run_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, heads = kernel_of(name), Heads(4, 2, 64)
    problem = Problem(64, heads, Scale(1, 1), "bfloat16", "forward")
    causal = BandMask.of(64, 64, [Band(0, 64, 0, 64, -FAR, 0)])
    assert kernel.unsupported(problem, causal) is None
    assert "has no backward; direction=forward runs" in kernel.unsupported(replace(problem, direction="forward_backward"), causal)
    window = BandMask.of(64, 64, [Band(0, 64, 0, 64, -8, 0)])
    gaps = BandMask.of(64, 64, [Band(0, 64, 0, 10), Band(0, 64, 20, 30)])
    blocks = block_random(64, heads=heads, seed=(1, 0), density=0.3, block_size=16, sizes="uniform", per="all_heads")
    assert "bounds on the left" in kernel.unsupported(problem, window)
    assert "keys with gaps" in kernel.unsupported(problem, gaps)
    assert "not a dynamic block mask" in kernel.unsupported(problem, blocks)
    with pytest.raises(Unsupported, match="bounds on the left"):
        kernel.prepare(window, heads, torch.float32, CPU)
    install(monkeypatch, name)
    cache = Cache.of(*random_kv(64, heads, torch.float64), (30, 34), CacheKind(256))
    prepared, q = kernel.prepare(causal, heads, torch.float64, CPU), torch.zeros(64, 4, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match="not those of the requests of this cache"):
        prepared.forward_cache(q, cache, softmax_scale=1.0)
    with pytest.raises(ValueError, match="scales above 0, not -1"):
        prepared.forward_cache(q, cache, softmax_scale=-1.0)


def test_cudnn_packs_rows_only_where_requests_have_unequally_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of equally many rows are a plain batch, whose LSE lies by heads: a packed one of single rows is left out."""
    install(monkeypatch, "cudnn_paged")
    packed: list[bool] = []

    class Watched(cudnn.pygraph):
        def validate(self) -> None:
            super().validate()
            packed.append(self.inputs[0].offset is not None)

    monkeypatch.setattr(sys.modules["cudnn"], "pygraph", Watched)
    for requests in (MIXED, DECODE, ALIKE):
        mask, lengths = requests_mask(requests), tuple(total for _, total in requests)
        check(kernel_of("cudnn_paged"), mask, lengths, Heads(6, 2, 16), CacheKind(8))
    assert packed == [True, False, False]


def test_cudnn_graphs_have_the_cache_that_they_were_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous caches have no table to tell them apart: another number of tokens, or other strides, is another graph."""
    install(monkeypatch, "cudnn_paged")
    heads, mask = Heads(4, 2, 16), requests_mask(((2, 12),))
    prepared = kernel_of("cudnn_paged").prepare(mask, heads, torch.float64, CPU)
    q = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kv = random_kv(20, heads, torch.float64)
    beside = torch.stack(kv, 2).unbind(2)
    for (k, v), lengths in ((kv, (12, 8)), ((kv[0][:12], kv[1][:12]), (12,)), (beside, (12, 8))):
        for scale in (0.25, 0.5):
            out, lse = prepared.forward_cache(q, Cache.of(k, v, lengths), softmax_scale=scale)
            want, want_lse = dense_attention(
                *(x.double() for x in (q, k[:12], v[:12])), dense_mask(mask.num_q, mask.num_k, mask), scale
            )
            assert (out - want).abs().max() <= 1e-12
            assert (lse - want_lse).abs().max() <= 1e-12


def test_cudnn_that_is_known_to_be_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "cudnn_paged")
    kernel, heads = kernel_of("cudnn_paged"), Heads(8, 2, 64)

    def version(number: int) -> None:
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)

    version(91002)
    assert kernel.missing() == "cuDNN's paged attention has limits and bugs in cuDNN 9.10.2; 9.11.0 and later run"
    version(91100)
    assert kernel.missing() is None
    monkeypatch.setattr(torch, "from_numpy", lambda x: SimpleNamespace(to=lambda _: x))  # there is no such device here
    for capability, number, requests in product([(9, 0), (10, 0)], [91800, 91900, 92501, 92600], [DECODE, MIXED]):
        version(number)
        monkeypatch.setattr(Platform, "of", lambda _, found=capability: Platform("cuda", found))
        mask, wrong = requests_mask(requests), capability == (10, 0) and 91900 <= number < 92600 and requests == DECODE
        if wrong:
            with pytest.raises(Unsupported, match=r"computes single rows wrongly on this device, as all from 9\.19\.0 on"):
                kernel.prepare(mask, heads, torch.bfloat16, torch.device("cuda"))
        else:
            kernel.prepare(mask, heads, torch.bfloat16, torch.device("cuda"))


def test_heads_that_libraries_do_not_have_are_refused() -> None:
    problem = Problem(64, LATENT, Scale(1, 1), "bfloat16", "forward")
    causal = BandMask.of(64, 64, [Band(0, 64, 0, 64, -FAR, 0)])
    for name, runs in (
        ("flash_attn2_cache", False),
        ("flash_attn4_cache", False),
        ("cudnn_paged", False),
        ("flash_attn3_cache", True),
        ("flashinfer_cache", True),
    ):
        assert (kernel_of(name).unsupported(problem, causal) is None) == runs
        small = replace(problem, heads=Heads(4, 1, 48, 32, latent=True))
        assert str(small.heads.v) in str(kernel_of(name).unsupported(small, causal))
    capped = replace(problem, softmax=Softmax(softcap=30.0))
    assert "no softcap for latent heads" in str(kernel_of("flashinfer_cache").unsupported(capped, causal))
    assert TritonDecode().unsupported(problem, causal) is None
    assert TritonDecode().unavailable(problem, HOPPER) is None


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_adapter_names_a_release_that_it_cannot_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of(name)
    assert "cannot be imported" in str(kernel.missing())
    install(monkeypatch, name)
    assert kernel.missing() is None
    module = sys.modules[sys.modules[type(kernel).__module__].CALLS[0].module]
    function = sys.modules[type(kernel).__module__].CALLS[0].function

    class Older:
        def __init__(self, q: Any) -> None: ...

    monkeypatch.setattr(module, function, Older)
    assert "of this version is another" in str(kernel.missing())


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 128, 192, 256, 576])
def test_tiles_hold_every_number_of_a_head_once(dim: int) -> None:
    dims = Dims.of(Heads(2, 2, dim))
    held = [*range(min(dims.first, dim)), *range(dims.first, min(dims.first + dims.rest, dim))]
    assert held == list(range(dim))
    assert all(size in (0, 16, 32, 64, 128, 256, 512) for size in dims[:2])
    assert dim <= dims.value < 2 * max(16, dim)


def test_options_that_triton_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="no power of two"):
        TritonDecode(block_k=24)
    with pytest.raises(ValueError, match="a split of 32 keys is less than a tile of 64"):
        TritonDecode(split=32)


def test_every_kernel_that_reads_caches_is_tested_here() -> None:
    reading = {name for name in names("kernel") if isinstance(kernel_of(name), RequestKernel)}
    assert reading == {"triton_decode", *LIBRARIES}
