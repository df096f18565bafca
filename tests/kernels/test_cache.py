"""What a cache holds is what was put in, to the last bit or within the rounding of its type; every page has one owner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcbench.kernels.base import Platform
from lcbench.kernels.cache import STORAGES, Cache, CacheKind, cast_error, head_scales, unread
from lcbench.kernels.naive import Naive
from lcbench.kernels.triton_decode import TritonDecode
from lcbench.problem import Heads, Problem, Scale

Tensor = torch.Tensor
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HOPPER, AMPERE = Platform("cuda", (9, 0)), Platform("cuda", (8, 0))


def random_kv(tokens: int, heads: Heads, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Keys and values whose heads have sizes of their own, from ``spread`` down to its inverse."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(1, -1, heads.kv, base=spread, dtype=torch.float64)[:, None]
    k, v = (torch.randn(tokens, heads.kv, dim, generator=make, dtype=torch.float64) * sizes for dim in (heads.dim, heads.v))
    k, v = k.to(dtype), v.to(dtype)
    return k, k[..., : heads.v] if heads.latent else v


KINDS = st.builds(CacheKind, st.sampled_from([None, 1, 3, 16]), st.sampled_from(STORAGES))
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple)
HEADS = st.sampled_from([Heads(4, 2, 16), Heads(4, 2, 24, 16), Heads(4, 1, 24, 16, latent=True)])


@given(LENGTHS, KINDS, HEADS, st.sampled_from(DTYPES), st.integers(0, 9))
def test_a_cache_gives_back_what_was_put_in(lengths: Any, kind: CacheKind, heads: Heads, dtype: torch.dtype, seed: int) -> None:
    k, v = random_kv(sum(lengths), heads, dtype, seed, spread=30.0)
    cache = Cache.of(k, v, lengths, kind, latent=heads.latent, seed=seed)
    for given_, read, stored, scale in zip((k, v), cache.read(), cache.stored(), (cache.k_scale, cache.v_scale), strict=True):
        assert read.dtype == dtype
        assert read.shape == stored.shape == given_.shape
        assert torch.equal(read.double(), stored), "a kernel that cannot read the cache gets other numbers"
        assert ((stored - given_.double()).abs() <= cast_error(given_, kind.storage, scale)).all()
        if kind.storage == "input" or (kind.storage, dtype) == ("bfloat16", torch.bfloat16):
            assert torch.equal(read, given_)
    assert cache.latent == (cache.v.data_ptr() == cache.k.data_ptr() and heads.latent)


def by_hand(cache: Cache, request: int, token: int) -> Tensor:
    """One token of one request, in the way that a table of pages is meant."""
    assert cache.table is not None
    assert cache.kind.page is not None
    return cache.k[int(cache.table[request, token // cache.kind.page]), token % cache.kind.page]


def test_every_token_lies_where_the_table_says_and_every_page_has_one_owner() -> None:
    lengths, page = (5, 0, 16, 1, 23), 4
    k, v = random_kv(sum(lengths), Heads(2, 2, 8), torch.float32)
    cache = Cache.of(k, v, lengths, CacheKind(page), seed=1)
    assert cache.table is not None
    starts = np.cumsum([0, *lengths])
    for request, length in enumerate(lengths):
        for token in range(length):
            assert torch.equal(by_hand(cache, request, token), k[starts[request] + token])
    pages = [int(p) for row, n in zip(cache.table, lengths, strict=True) for p in row[: -(-n // page)]]
    assert sorted(pages) == list(range(len(cache.k)))
    assert pages != sorted(pages), "pages of a real allocator are scattered"
    assert not torch.equal(cache.table, Cache.of(k, v, lengths, CacheKind(page), seed=2).table)  # type: ignore[arg-type]
    assert (cache.table.dtype, cache.table.shape) == (torch.int32, (5, 6))


def test_bytes_are_those_that_a_call_has_to_read() -> None:
    lengths, heads, latent = (5, 0, 16), Heads(8, 2, 24, 16), Heads(8, 1, 24, 16, latent=True)

    def of(heads: Heads, page: int | None, storage: str) -> int:
        k, v = random_kv(21, heads, torch.float32)
        return Cache.of(k, v, lengths, CacheKind(page, storage), latent=heads.latent).bytes

    assert of(heads, None, "input") == 21 * 2 * (24 + 16) * 4
    assert of(heads, 4, "bfloat16") == 21 * 2 * (24 + 16) * 2 + 4 * (2 + 4)  # entries of the table: pages in use
    assert of(heads, None, "float8") == 21 * 2 * (24 + 16) + 2 * 2 * 4  # a float32 scale for each head's keys and values
    assert of(latent, 16, "float8") == 21 * 24 + 4 + 4 * (1 + 1)


@given(st.floats(1e-30, 1e30), st.sampled_from([torch.float64, torch.float32]))
def test_a_scale_is_the_smallest_power_of_two_that_fits(most: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[[most / 3, -most], [0.0, 0.0]]], dtype=dtype)
    scale, zeros = head_scales(x).double().tolist()
    largest = float(x.abs().max())
    assert zeros == 1.0
    assert np.log2(scale) == int(np.log2(scale))
    assert largest <= 448 * scale
    assert largest > 448 * scale / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_of_a_cast_is_reached_and_holds_for_every_number_of_float8(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()
    middles = (every[1:] + every[:-1]) / 2
    x = torch.cat([every, middles, middles * (1 + 2.0**-7), middles * (1 - 2.0**-7)]).to(dtype)[:, None, None]
    scale = head_scales(x)
    assert scale.tolist() == [1.0]
    stored = Cache.of(x, x, (len(x),), CacheKind(None, "float8")).stored()[0]
    assert torch.equal(stored[: len(every), 0, 0], every), "numbers of float8 are stored as they are"
    ratio = (stored - x.double()).abs() / cast_error(x, "float8", scale).clamp(min=1e-300)
    assert 0.9 < ratio.max() <= 1


def test_kinds_that_are_none_are_refused() -> None:
    for page in (0, -4, 2.5, True):
        with pytest.raises(ValueError, match="a page of"):
            CacheKind(page)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input, bfloat16, float8, not as int4"):
        CacheKind(None, "int4")
    k, v = random_kv(6, Heads(2, 2, 8), torch.float32)
    with pytest.raises(ValueError, match="requests of 5 tokens together"):
        Cache.of(k, v, (2, 3))
    with pytest.raises(ValueError, match="latent values are the view"):
        Cache.of(k, v, (6,), latent=True)


def test_who_reads_what() -> None:
    problem = Problem(64, Heads(4, 2, 64), Scale(1, 1), "bfloat16", "forward")
    assert "in the inputs' type" in str(unread(Naive(), CacheKind(), problem, HOPPER))
    assert unread(TritonDecode(), CacheKind(16, "float8"), problem, HOPPER) is None
    assert "8.9" in str(unread(TritonDecode(), CacheKind(16, "float8"), problem, AMPERE))
