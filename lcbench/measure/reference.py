"""The float64 reference: exact results for some query rows (out, LSE, dq) and key columns (dk, dv), how far roundings carry each.

A row needs only its partial over every rank's own keys and an all-reduce, so a row costs what it sees, however long the sequence
is, and no rank ever holds more than its own tokens. Imports no kernel and uses a mask only by rows and columns, on global indices:
bands as intervals, block maps as a look-up; so it shares neither the layout algebra nor the tiles with what it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.measure.ranks import Ranks
from lcbench.problem import Problem

ELEMENTS = 1 << 22  # rows times keys times heads that are looked at at the least
SAMPLE = 64  # rows, and columns, beyond the corners, however long the sequence is
MAX_CORNERS = 64
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}  # scores at a time, over all heads that are looked at together
HEAD_ELEMENTS = 1 << 27  # of keys, or queries, in float64 at a time


@dataclass(frozen=True)
class Shard:
    """What one rank owns: global token indices and the tensors of these tokens."""

    tokens: Ints
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None = None


@dataclass(frozen=True)
class Exact:
    """A tensor's exact rows, float64, and of each element the ``spread`` of its terms and what is ``common`` to them
    (``measure.bounds``); ``floor``: what the smallest number of a type is multiplied by; ``count``: how many terms there are."""

    value: torch.Tensor
    spread: torch.Tensor
    common: torch.Tensor
    floor: torch.Tensor
    count: torch.Tensor


def sample(mask: Mask, side: str, seed: list[int], heads: int) -> Ints:
    """Rows (``side="q"``) or columns to check: all of them where that is cheap, else the first and last of bands (the corners of
    the mask), and a seeded draw."""
    number = mask.num_q if side == "q" else mask.num_k
    wanted = max(SAMPLE, ELEMENTS // (heads * max(1, mask.num_k if side == "q" else mask.num_q)))
    if wanted >= number:
        return np.arange(number)
    corners = np.unique(np.concatenate([[0, number - 1], mask.corners(side)]))
    random = np.random.default_rng([*seed, number, side == "k"])
    if len(corners) > MAX_CORNERS:
        corners = np.concatenate([corners[[0, -1]], random.choice(corners, MAX_CORNERS, replace=False)])
    return np.unique(np.concatenate([corners, random.integers(0, number, wanted)])).astype(np.int64)


def rows(mask: Mask, problem: Problem, shard: Shard, wanted: Ints, ranks: Ranks, *, scores: bool) -> dict[str, Exact]:
    """out, lse and dq of global rows, the same on every rank; collective.

    Args:
        ranks: those that share the sequence.
        scores: spreads are those of a kernel that rounds its scores.
    """
    q_some, *douts = collected([x for x in (shard.q, shard.dout) if x is not None], shard.tokens, wanted, ranks)
    heads: dict[str, list[Exact]] = {}
    visible = _Seen(mask, wanted, shard.tokens, problem, q_some.device)
    for part in _parts(problem, len(wanted), q_some.device):
        keys, values = (_per_query_head(x[:, part.kv].double(), problem) for x in (shard.k, shard.v))
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for chunk in part.chunks:
            allowed = visible.of(chunk, part.q)
            seen = _some(allowed.any(0).any(0))
            q, allowed, k, v = q_some[chunk, part.q], allowed[..., seen], keys[seen], values[seen]
            s = torch.einsum("qhd,khd->hqk", q, k) * problem.softmax_scale
            s = s.masked_fill(~allowed, -torch.inf)
            top = ranks.reduce(s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:2], -torch.inf), "max")
            shift = torch.where(top == -torch.inf, 0.0, top)
            weights = torch.exp(s - shift[..., None])
            total, count = ranks.reduce(torch.stack([weights.sum(-1), (weights > 0).double().sum(-1)]))
            p = weights / torch.where(total == 0, 1.0, total)[..., None]
            size = torch.where(p > 0, s, 0.0)
            squares = p.square() * (1 + size.square() if scores else 1.0)
            sums = [torch.einsum("hqk,khd->qhd", p, v), torch.einsum("hqk,khd->qhd", squares, v.square())]
            sums.append((p.square() * size.square()).sum(-1))
            if douts:
                sums.append(torch.einsum("hqk,khd->qhd", p, k))
            out, spread, rough, *means = ranks.reduce_together(*sums)
            floor = (1 + count.sqrt()).T[..., None]
            found.setdefault("out", []).append((out, spread.sqrt(), out.abs(), floor.expand_as(out), count.T[..., None]))
            lse = (torch.log(total) + shift).T
            found.setdefault("lse", []).append((lse, rough.sqrt().T, torch.zeros_like(lse), torch.zeros_like(lse), count.T))
            if not douts:
                continue
            dout = douts[0][chunk, part.q]
            product = dout * out
            delta = product.sum(-1).T[..., None]
            dp = torch.einsum("qhd,khd->hqk", dout, v)
            dq, spread = ranks.reduce_together(
                torch.einsum("hqk,khd->qhd", p * (dp - delta), k) * problem.softmax_scale,
                torch.einsum("hqk,khd->qhd", squares * (dp.abs() + delta.abs()).square(), k.square()),
            )
            # A rounded out shifts delta, and that a whole row.
            common = dq.abs() + problem.softmax_scale * product.square().sum(-1, keepdim=True).sqrt() * means[0].abs()
            terms = (dq, problem.softmax_scale * spread.sqrt(), common, floor.expand_as(dq), count.T[..., None])
            found.setdefault("dq", []).append(terms)
        _join(heads, found)
    return {name: _joined(exact, 1) for name, exact in heads.items()}


def columns(
    mask: Mask, problem: Problem, shard: Shard, wanted: Ints, ranks: Ranks, lse: torch.Tensor, out: torch.Tensor, *, scores: bool
) -> dict[str, Exact]:
    """dk and dv of global columns, from LSE and out of this rank's rows; the same on every rank of ``ranks``; collective."""
    assert shard.dout is not None
    keys, values = (_per_query_head(x, problem) for x in collected([shard.k, shard.v], shard.tokens, wanted, ranks))
    heads: dict[str, list[Exact]] = {}
    visible = _Seen(mask.transpose(), wanted, shard.tokens, problem, keys.device)
    for part in _parts(problem, len(wanted), keys.device):
        q_all, dout_all, out_all = (x[:, part.q].double() for x in (shard.q, shard.dout, out))
        lse_all = torch.where(lse == -torch.inf, 0.0, lse)[:, part.q].double()
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for chunk in part.chunks:
            allowed = visible.of(chunk, part.q)
            seen = _some(allowed.any(0).any(0))
            allowed = allowed[..., seen].transpose(-1, -2)
            q, dout = q_all[seen], dout_all[seen]
            product = dout * out_all[seen]
            delta = product.sum(-1).T[..., None]
            s = torch.einsum("qhd,khd->hqk", q, keys[chunk, part.q]) * problem.softmax_scale
            p = torch.exp(s - lse_all[seen].T[..., None]).masked_fill(~allowed, 0.0)
            dp = torch.einsum("qhd,khd->hqk", dout, values[chunk, part.q])
            squares = p.square() * (1 + s.square() if scores else 1.0)
            shifted = p.square() * product.square().sum(-1).T[..., None]
            sums = [
                torch.einsum("hqk,qhd->khd", p, dout),
                torch.einsum("hqk,qhd->khd", squares, dout.square()),
                torch.einsum("hqk,qhd->khd", p * (dp - delta), q),
                torch.einsum("hqk,qhd->khd", squares * (dp.abs() + delta.abs()).square() + shifted, q.square()),
                (p > 0).double().sum(1).T[..., None],
            ]
            dv, dv_square, dk, dk_square, count = ranks.reduce_together(*(_per_kv_head(x, problem) for x in sums))
            for name, value, square, scale in (("dk", dk, dk_square, problem.softmax_scale), ("dv", dv, dv_square, 1.0)):
                value = value * scale
                terms = (value, scale * square.sqrt(), value.abs(), (1 + count.sqrt()).expand_as(value), count)
                found.setdefault(name, []).append(terms)
        _join(heads, found)
    return {name: _joined(exact, 1) for name, exact in heads.items()}


def owned(tokens: Ints, wanted: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """(local positions, positions in ``wanted``) of the wanted tokens that this rank owns; ``wanted`` is sorted."""
    at = np.searchsorted(wanted, tokens).clip(0, len(wanted) - 1)
    hit = np.nonzero(wanted[at] == tokens)[0]
    return torch.from_numpy(hit), torch.from_numpy(at[hit])


def collected(tensors: Sequence[torch.Tensor], tokens: Ints, wanted: Ints, ranks: Ranks) -> list[torch.Tensor]:
    """Global rows ``wanted`` of tensors of which every rank owns some rows, in float64, on every rank."""
    mine, positions = owned(tokens, wanted)
    found = [torch.zeros((len(wanted), *x.shape[1:]), dtype=torch.float64, device=x.device) for x in tensors]
    for into, x in zip(found, tensors, strict=True):
        into[positions] = x[mine].double()
    return ranks.reduce_together(*found)


def _some(seen: torch.Tensor) -> slice | torch.Tensor:
    """What picks the tokens that are seen: where it holds few others, the stretch from the first to the last, which is no copy."""
    places = torch.nonzero(seen).flatten()
    if not len(places):
        return slice(0, 0)
    stretch = slice(int(places[0]), int(places[-1]) + 1)
    return stretch if 2 * len(places) >= stretch.stop - stretch.start else places


class _Seen:
    """Which of a rank's tokens the wanted rows see."""

    def __init__(self, mask: Mask, wanted: Ints, tokens: Ints, problem: Problem, device: torch.device) -> None:
        self._mask, self._wanted, self._tokens, self._device = mask, wanted, tokens, device
        if isinstance(mask, BandMask):
            return
        self._map = torch.arange(problem.heads.q, device=device) // (problem.heads.q // mask.maps)  # of each head
        sides = (mask.q_edges, wanted), (mask.k_edges, tokens)
        row, column = (np.searchsorted(edges, at, side="right") - 1 for edges, at in sides)
        self._kept = torch.from_numpy(np.stack([mask.keep(i)[row] for i in range(mask.maps)])).to(device)
        self._column = torch.from_numpy(column).to(device)

    def of(self, some: slice, heads: slice) -> torch.Tensor:
        """bool (heads, rows, tokens) of some of the rows, on the device; (1, rows, tokens) where heads do not differ."""
        if isinstance(self._mask, BandMask):
            return torch.from_numpy(_allowed_by_bands(self._mask, self._wanted[some], self._tokens))[None].to(self._device)
        return self._kept[:, some][self._map[heads]][..., self._column]


def _allowed_by_bands(mask: BandMask, wanted: Ints, keys: Ints) -> NDArray[np.bool_]:
    """bool (rows, keys): each band gives each of its rows one interval of keys."""
    allowed = np.zeros((len(wanted), len(keys)), dtype=bool)
    for q0, q1, k0, k1, lo, hi in mask.bands[_touching(mask, wanted)]:
        inside = np.nonzero((q0 <= wanted) & (wanted < q1))[0]
        begin = np.maximum(k0, wanted[inside] + lo)[:, None]
        end = np.minimum(k1, wanted[inside] + hi + 1)[:, None]
        allowed[inside] |= (begin <= keys) & (keys < end)
    return allowed


def _touching(mask: BandMask, wanted: Ints) -> Ints:
    """Indices of the bands that hold one of the rows (sorted)."""
    first = np.searchsorted(wanted, mask.bands[:, 0])
    return np.nonzero((first < len(wanted)) & (wanted[np.minimum(first, len(wanted) - 1)] < mask.bands[:, 1]))[0]


def _per_query_head(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    return x.repeat_interleave(problem.heads.q // problem.heads.kv, 1)


def _per_kv_head(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    return x.unflatten(1, (-1, problem.heads.q // problem.heads.kv)).sum(2)


@dataclass(frozen=True)
class _Part:
    """Some key/value heads with their query heads, and which rows or columns are looked at together: so that what is in float64 at
    a time is small beside what a cell needs anyway."""

    kv: slice
    q: slice
    chunks: list[slice]


def _parts(problem: Problem, count: int, device: torch.device) -> list[_Part]:
    """All heads and ``count`` rows or columns; the same on every rank, whatever it owns, since each part is a message."""
    heads, tokens = problem.heads, -(-problem.seqlen // problem.scale.world_size)
    group = heads.q // heads.kv
    together = min(heads.kv, max(1, HEAD_ELEMENTS // (group * tokens * heads.dim)))
    size = max(1, CHUNK_ELEMENTS[device.type] // (group * together * tokens))
    chunks = [slice(begin, begin + size) for begin in range(0, count, size)]
    starts = range(0, heads.kv, together)
    return [_Part(slice(at, at + together), slice(at * group, (at + together) * group), chunks) for at in starts]


def _join(heads: dict[str, list[Exact]], found: dict[str, list[tuple[torch.Tensor, ...]]]) -> None:
    """Add what chunks of rows gave to what heads gave."""
    for name, chunks in found.items():
        heads.setdefault(name, []).append(_joined([Exact(*terms) for terms in chunks], 0))


def _joined(parts: list[Exact], dim: int) -> Exact:
    names = [f.name for f in fields(Exact)]
    return Exact(*(torch.cat([getattr(part, name) for part in parts], dim) for name in names))
