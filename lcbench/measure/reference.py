"""The float64 reference: exact results for some query rows (out, LSE, dq) and key columns (dk, dv), and dsink of all rows; and how
far roundings carry each.

A row needs only its partial over every rank's own keys and an all-reduce, so a row costs what it sees, however long the sequence
is, and no rank ever holds more than its own tokens. Imports no kernel and uses a mask only by rows and columns, on global indices:
bands as intervals, block maps as a look-up; so it shares neither the layout algebra nor the tiles with what it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.by_head import BandsByHead
from lcbench.masks.mask import Computed
from lcbench.measure.ranks import Ranks
from lcbench.problem import Problem
from lcbench.schedule.held import Held

ELEMENTS = 1 << 22  # rows times keys times heads that are looked at at the least
SAMPLE = 64  # rows, and columns, beyond the corners, however long the sequence is
MAX_CORNERS = 64
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}  # scores at a time, over all heads that are looked at together
HEAD_ELEMENTS = 1 << 27  # of keys, or queries, in float64 at a time


@dataclass(frozen=True)
class Shard:
    """What one rank is given.

    Attributes:
        held: global indices of its queries and keys, and their heads. The reference takes shards by tokens: all heads of each.
        q: (Tq, Hq, D).
        k: (Tk, Hk, D).
        v: (Tk, Hk, Dv), of latent heads a view of k.
        dout: (Tq, Hq, Dv), of the results that the rank gives.
        sink: (Hq,) of all query heads, the same on every rank.
    """

    held: Held
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None = None
    sink: torch.Tensor | None = None


@dataclass(frozen=True)
class Exact:
    """A tensor's exact rows, float64, and of each element the ``spread`` of its terms and what is ``common`` to them
    (``measure.bounds``); ``floor``: what the smallest number of a type is multiplied by; ``count``: how many terms there are."""

    value: torch.Tensor
    spread: torch.Tensor
    common: torch.Tensor
    floor: torch.Tensor
    count: torch.Tensor


def sample(mask: Computed, side: str, seed: list[int], heads: int) -> Ints:
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


def rows(mask: Computed, problem: Problem, shard: Shard, wanted: Ints, ranks: Ranks, *, scores: bool) -> dict[str, Exact]:
    """out, lse and dq of global rows, the same on every rank; collective.

    Args:
        ranks: those that share the sequence.
        scores: spreads are those of a kernel that rounds its scores.
    """
    given = [x for x in (shard.q, shard.dout) if x is not None]
    q_some, *douts = collected(given, shard.held.q.tokens, wanted, ranks)
    heads: dict[str, list[Exact]] = {}
    visible = _Seen(mask, wanted, shard.held.kv.tokens, problem, q_some.device)
    for part in _parts(problem, len(wanted), problem.seqlen, 1, q_some.device):
        keys, values = (x[:, part.kv].double() for x in (shard.k, shard.v))
        sink = None if shard.sink is None else shard.sink[part.q].double()[:, None]
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        for chunk in part.chunks:
            allowed = visible.of(chunk, part.q)
            seen = _some(allowed.any(0).any(0))
            q, allowed, k, v = q_some[chunk, part.q], allowed[..., seen], keys[seen], values[seen]
            s, slope = _scores(q, k, problem)
            s.masked_fill_(~allowed, -torch.inf)
            top = ranks.reduce(s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:2], -torch.inf), "max")
            if sink is not None:
                top = torch.maximum(top, sink)
            shift = torch.where(top == -torch.inf, 0.0, top)
            weights = (s - shift[..., None]).exp_()
            total, count = ranks.reduce(torch.stack([weights.sum(-1), (weights > 0).double().sum(-1)]))
            if sink is not None:
                total = total + torch.exp(sink - shift)
            p = weights.div_(torch.where(total == 0, 1.0, total)[..., None])
            squared, sizes = p.square(), torch.where(p > 0, s, 0.0).square_()
            squares = squared * (1 + sizes) if scores else squared
            sums = [_over_keys(p, v), _over_keys(squares, v.square()), sizes.mul_(squared).sum(-1)]
            if douts:
                sums.append(_over_keys(p, k))
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
            dp = _products(dout, v)
            moved = _times(dp.abs().add_(delta.abs()), slope).square_().mul_(squares)
            dq, spread = ranks.reduce_together(
                _over_keys(_times(dp.sub_(delta).mul_(p), slope), k) * problem.softmax_scale,
                _over_keys(moved, k.square()),
            )
            # A rounded out shifts delta, and that a whole row.
            common = dq.abs() + problem.softmax_scale * product.square().sum(-1, keepdim=True).sqrt() * means[0].abs()
            terms = (dq, problem.softmax_scale * spread.sqrt(), common, floor.expand_as(dq), count.T[..., None])
            found.setdefault("dq", []).append(terms)
        _join(heads, found)
    return {name: _joined(exact, 1) for name, exact in heads.items()}


def columns(
    mask: Computed,
    problem: Problem,
    shard: Shard,
    wanted: Ints,
    ranks: Ranks,
    lse: torch.Tensor,
    out: torch.Tensor,
    *,
    scores: bool,
) -> dict[str, Exact]:
    """dk and dv of global columns, from LSE and out of this rank's rows; of latent heads dk alone, with dv in its first numbers.
    The same on every rank of ``ranks``; collective."""
    assert shard.dout is not None
    every_key, every_value = collected([shard.k, shard.v], shard.held.kv.tokens, wanted, ranks)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    heads: dict[str, list[Exact]] = {}
    visible = _Seen(mask.transpose(), wanted, shard.held.q.tokens, problem, every_key.device)
    group = problem.heads.q // problem.heads.kv
    for part in _parts(problem, len(wanted), problem.queries, group, every_key.device):
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        sums: list[tuple[torch.Tensor, ...]] = []
        for some in part.split:
            of_chunks: list[tuple[torch.Tensor, ...]] = []
            q_some, dout_some, out_some = (x[:, some].double() for x in (shard.q, shard.dout, out))
            lse_some = lse[:, some].double()
            each = q_some.shape[1] // (part.kv.stop - part.kv.start)
            for chunk in part.chunks:
                allowed = visible.of(chunk, some)
                seen = _some(allowed.any(0).any(0))
                allowed = allowed[..., seen].transpose(-1, -2)
                q, dout = q_some[seen], dout_some[seen]
                product = dout * out_some[seen]
                delta = product.sum(-1).T[..., None]
                s, slope = _scores(q, every_key[chunk, part.kv], problem)
                p = (s - lse_some[seen].T[..., None]).exp_().masked_fill_(~allowed, 0.0)
                dp = _products(dout, every_value[chunk, part.kv])
                squared = p.square()
                squares = squared * s.square_().add_(1) if scores else squared
                terms = dp.abs().add_(delta.abs()).square_().mul_(squares).add_(squared * product.square().sum(-1).T[..., None])
                of_chunks.append((
                    _over_queries(p, dout, each),
                    _over_queries(squares, dout.square(), each),
                    _over_queries(_times(dp.sub_(delta).mul_(p), slope), q, each),
                    _over_queries(_times(terms, None if slope is None else slope.square()), q.square(), each),
                    (p > 0).double().sum(1).unflatten(0, (-1, each)).sum(1).T[..., None],
                ))  # fmt: skip
            sums = [_added(*both) for both in zip(sums, of_chunks, strict=True)] if sums else of_chunks
        for own in sums:
            dv, dv_square, dk, dk_square, count = ranks.reduce_together(*own)
            for name, value, square, size in _of_keys(problem, dk, dk_square, dv, dv_square):
                found.setdefault(name, []).append((value, square.sqrt(), size, (1 + count.sqrt()).expand_as(value), count))
        _join(heads, found)
    return {name: _joined(exact, 1) for name, exact in heads.items()}


def sinks(problem: Problem, shard: Shard, ranks: Ranks, lse: torch.Tensor, out: torch.Tensor) -> Exact:
    """dsink of all query heads, (Hq,), from LSE and out of this rank's rows; collective."""
    assert shard.dout is not None
    assert shard.sink is not None
    sums = []
    for head in range(problem.heads.q):  # one in float64 at a time
        share = torch.exp(shard.sink[head].double() - lse[:, head].double())
        product = shard.dout[:, head].double() * out[:, head].double()
        term = share * product.sum(-1)
        squares = share.square() * product.square().sum(-1) + term.square()
        sums.append(torch.stack([-term.sum(), squares.sum(), (share > 0).double().sum()]))
    value, squares, count = ranks.reduce(torch.stack(sums, 1))
    return Exact(value, squares.sqrt(), value.abs(), count.sqrt(), count)


def _added(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(one + other for one, other in zip(some, others, strict=True))


def _of_keys(
    problem: Problem, dk: torch.Tensor, dk_square: torch.Tensor, dv: torch.Tensor, dv_square: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, gradient, squares of its terms, what is common to these) of keys and of values, from sums over pairs without the
    softmax scale."""
    dk, dk_square = dk * problem.softmax_scale, dk_square * problem.softmax_scale**2
    if not problem.heads.latent:
        yield "dk", dk, dk_square, dk.abs()
        yield "dv", dv, dv_square, dv.abs()
        return
    dv, dv_square = (torch.nn.functional.pad(x, (0, problem.heads.dim - problem.heads.v)) for x in (dv, dv_square))
    yield "dk", dk + dv, dk_square + dv_square, dk.abs() + dv.abs()


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

    def __init__(self, mask: Computed, wanted: Ints, tokens: Ints, problem: Problem, device: torch.device) -> None:
        self._mask, self._wanted, self._tokens, self._device = mask, wanted, tokens, device
        if isinstance(mask, BandMask):
            return
        self._map = torch.arange(problem.heads.q, device=device) // (problem.heads.q // mask.maps)  # of each head
        if isinstance(mask, BandsByHead):
            return
        sides = (mask.q_edges, wanted), (mask.k_edges, tokens)
        row, column = (np.searchsorted(edges, at, side="right") - 1 for edges, at in sides)
        self._kept = torch.from_numpy(np.stack([mask.drawn(i)[row] for i in range(mask.maps)])).to(device)
        self._within = mask.within
        self._column = torch.from_numpy(column).to(device)

    def of(self, some: slice, heads: slice) -> torch.Tensor:
        """bool (heads, rows, tokens) of some of the rows, on the device; (1, rows, tokens) where heads do not differ."""
        if isinstance(self._mask, BandMask):
            return self._by_bands(self._mask, some)
        if isinstance(self._mask, BandsByHead):
            numbers = self._map[heads].tolist()
            of_maps = [_allowed_by_bands(self._mask.bands(n), self._wanted[some], self._tokens) for n in dict.fromkeys(numbers)]
            place = torch.tensor([number - numbers[0] for number in numbers], device=self._device)
            return torch.from_numpy(np.stack(of_maps)).to(self._device)[place]
        kept = self._kept[:, some][self._map[heads]][..., self._column]
        return kept if self._within is None else kept & self._by_bands(self._within, some)

    def _by_bands(self, mask: BandMask, some: slice) -> torch.Tensor:
        return torch.from_numpy(_allowed_by_bands(mask, self._wanted[some], self._tokens))[None].to(self._device)


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


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(H, rows, keys): of q (rows, H, D) with k (keys, Hk, D), which the query heads of a group share."""
    return torch.einsum("qhgd,khd->hgqk", q.unflatten(1, (k.shape[1], -1)), k).flatten(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (H, rows, keys), and the derivative of each by the product of its query and key times the softmax scale; None: 1."""
    s, cap = _products(q, k).mul_(problem.softmax_scale), problem.softmax.softcap
    if not cap:
        return s, None
    share = torch.tanh(s / cap)
    return cap * share, 1 - share.square()


def _times(x: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
    """x times a derivative of scores, in place: what is here as large as all scores is read and written as seldom as may be."""
    return x if slope is None else x.mul_(slope)


def _over_keys(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(rows, H, D): sums over keys of p (H, rows, keys) times x (keys, Hk, D)."""
    return torch.einsum("hgqk,khd->qhgd", p.unflatten(0, (x.shape[1], -1)), x).flatten(1, 2)


def _over_queries(p: torch.Tensor, x: torch.Tensor, group: int) -> torch.Tensor:
    """(keys, Hk, D): sums over rows, and over the query heads of each group, of p (H, rows, keys) times x (rows, H, D)."""
    return torch.einsum("hgqk,qhgd->khd", p.unflatten(0, (-1, group)), x.unflatten(1, (-1, group)))


@dataclass(frozen=True)
class _Part:
    """Some key/value heads with their query heads, and which rows or columns are looked at together: so that what is in float64 at
    a time is small beside what a cell needs anyway. ``split``: the query heads in stretches, of which one is in float64."""

    kv: slice
    q: slice
    split: list[slice]
    chunks: list[slice]


def _parts(problem: Problem, count: int, others: int, heads_each: int, device: torch.device) -> list[_Part]:
    """All heads and ``count`` rows or columns; the same on every rank, whatever it owns, since each part is a message.

    Args:
        others: how many keys, or queries, there are to look at over all ranks.
        heads_each: how many heads of these are in float64 for a key/value head.
    """
    heads, tokens = problem.heads, -(-others // problem.scale.world_size)
    group, most = heads.q // heads.kv, max(1, HEAD_ELEMENTS // (tokens * max(heads.dim, heads.v)))
    together = min(heads.kv, max(1, most // heads_each))
    at_once = group * together if heads_each <= most else most
    size = max(1, CHUNK_ELEMENTS[device.type] // (group * together * tokens))
    chunks = [slice(begin, begin + size) for begin in range(0, count, size)]
    found = []
    for at in range(0, heads.kv, together):
        q = slice(at * group, min(at + together, heads.kv) * group)
        split = [slice(begin, min(begin + at_once, q.stop)) for begin in range(q.start, q.stop, at_once)]
        found.append(_Part(slice(at, min(at + together, heads.kv)), q, split, chunks))
    return found


def _join(heads: dict[str, list[Exact]], found: dict[str, list[tuple[torch.Tensor, ...]]]) -> None:
    """Add what chunks of rows gave to what heads gave."""
    for name, chunks in found.items():
        heads.setdefault(name, []).append(_joined([Exact(*terms) for terms in chunks], 0))


def _joined(parts: list[Exact], dim: int) -> Exact:
    names = [f.name for f in fields(Exact)]
    return Exact(*(torch.cat([getattr(part, name) for part in parts], dim) for name in names))
