"""What stand-ins of libraries that read caches share: one request at a time, and pages as strict as the libraries' kernels."""

from __future__ import annotations

import torch

from lcbench.testing.fake_libraries.common import Tensor, sums, table


def request(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """out (L, Hq, Dv) in the type of q and LSE (Hq, L), natural, of L rows that see all keys, or causally from the bottom right."""
    wide = sums(q.dtype)
    keys, values = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if causal:
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] > len(k) - len(q)
        scores = scores.masked_fill(ahead, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), values).to(q.dtype), lse


def in_pages(x: Tensor, pages: Tensor, length: int) -> Tensor:
    """(length, ...) of one request from x (pages, page, ...) by its row of the table of pages."""
    used = -(-length // x.shape[1])
    assert used <= len(pages), "the table has too few pages"
    assert ((pages[:used] >= 0) & (pages[:used] < len(x))).all(), "no such page"
    return x[pages[:used].long()].flatten(0, 1)[:length]


def numbers(x: Tensor, count: int, like: Tensor) -> list[int]:
    """A list of the library: int32, contiguous, on the device, of so many entries."""
    table(x, like=like)
    assert x.shape == (count,)
    return [int(i) for i in x]


def packed_requests(
    q: Tensor, cu_q: Tensor, requests: list[tuple[Tensor, Tensor]], causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """out (T, Hq, Dv) and LSE (Hq, T) of packed rows (T, Hq, D) against the (k, v) of each request."""
    ends = numbers(cu_q, len(requests) + 1, cu_q)
    assert ends[0] == 0
    assert ends[-1] == len(q)
    found = [
        request(q[begin:end], k, v, causal, scale, softcap) for begin, end, (k, v) in zip(ends, ends[1:], requests, strict=False)
    ]
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found], 1)


def flash_requests(
    k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, used: Tensor, pages: Tensor | None, max_k: int
) -> list[tuple[Tensor, Tensor]]:
    """The (k, v) of each request as flash-attn 3 and 4 find them: in pages, or from where ``cu_k`` says on."""
    count = len(cu_q) - 1
    lengths = numbers(used, count, cu_q)
    assert max(lengths) <= max_k
    if pages is not None:
        assert cu_k is None, "page_table is not supported with cu_seqlens_k"
        assert pages.dtype == torch.int32
        assert pages.stride(-1) == 1
        assert pages.shape[0] == count
        assert k.dim() == v.dim() == 4
        assert k.shape[:3] == v.shape[:3]
        return [tuple(in_pages(x, pages[i], n) for x in (k, v)) for i, n in enumerate(lengths)]  # type: ignore[misc]
    assert cu_k is not None
    assert k.dim() == v.dim() == 3
    begins = numbers(cu_k, count + 1, cu_q)
    assert all(begin + n <= len(k) for begin, n in zip(begins, lengths, strict=False))
    return [(k[begin : begin + n], v[begin : begin + n]) for begin, n in zip(begins, lengths, strict=False)]
