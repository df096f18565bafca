"""The dense oracle of tests: masks as boolean matrices, attention as a few lines of float64. Shares no code with lcbench."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def dense_mask(num_q: int, num_k: int, bands: Iterable[Sequence[int]]) -> NDArray[np.bool_]:
    """The (num_q, num_k) matrix of a set of bands, point by point; asserts that no pair is in two bands."""
    q, k = np.arange(num_q)[:, None], np.arange(num_k)[None, :]
    count = np.zeros((num_q, num_k), dtype=int)
    for q0, q1, k0, k1, lo, hi in bands:
        count += (q0 <= q) & (q < q1) & (k0 <= k) & (k < k1) & (lo <= k - q) & (k - q <= hi)
    assert count.max(initial=0) <= 1, "bands overlap"
    return count.astype(bool)


def dense_heads(mask: Any, q_heads: int) -> NDArray[np.bool_]:
    """The (q_heads, num_q, num_k) matrix of a band mask or of a block map, blocks expanded one by one, each as it was drawn."""
    if not hasattr(mask, "maps"):
        return np.broadcast_to(dense_mask(mask.num_q, mask.num_k, mask), (q_heads, mask.num_q, mask.num_k))
    found = np.zeros((q_heads, mask.num_q, mask.num_k), dtype=bool)
    for head in range(q_heads):
        keep = mask.drawn(head * mask.maps // q_heads)
        for i, j in zip(*np.nonzero(keep), strict=True):
            found[head, mask.q_edges[i] : mask.q_edges[i + 1], mask.k_edges[j] : mask.k_edges[j + 1]] = True
    return found if mask.within is None else found & dense_mask(mask.num_q, mask.num_k, mask.within)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: NDArray[np.bool_],
    softmax_scale: float,
    *,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (Tq, Hq, Dv) and natural-log LSE (Tq, Hq) of q (Tq, Hq, D), k (Tk, Hk, D) and v (Tk, Hk, Dv); an empty row gives 0 and
    -inf.

    Args:
        mask: (Tq, Tk), or (Hq, Tq, Tk) where heads differ.
        softcap: scores are ``softcap * tanh(score / softcap)``; 0: they are as they are.
        sink: (Hq,), one more score of each row, without a value.
    """
    group, keys = q.shape[1] // k.shape[1], len(k)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.from_numpy(np.array(mask)), float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(-1, len(q), 1)], -1)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])[..., :keys]
    return torch.einsum("hqk,khd->qhd", weights, v), lse.T
