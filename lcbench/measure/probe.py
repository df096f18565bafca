"""Inputs of a pass whose every result is known in closed form, whatever the length: each row and column of each head is checked.

Keys of a key/value head are ``a * ALPHA * u`` and queries ``b * BETA * u`` with one vector of signs u and levels a, b of +1 and
-1, so a score takes two values, set apart by a whole power of two of the softmax weights, which every type holds exactly. Values
and dout are signs: binary digits of the position (Rademacher functions), and a constant. Then what a row sees enters its results
only through sums of digits over the keys of either level, which ``masks.sums`` has for all rows at once; so it is for columns.

Why these inputs: sums of alternating signs over any stretch of keys stay small, so that out of a row times its keys is a small
whole number, and a single key that is missing, extra or another one changes it by as much as it is, however many keys there are
and however few bits out has. Each digit is blind to what its period divides, and the next ones see it. The levels make the sums of
different stretches different, so that a merge with wrong weights shows, and the scale of the scores with them. Some dims of values
and dout hold the levels themselves: that makes dq and dk large sums of one sign, of which a wrong one shows. With ``zero`` all
queries are 0: then a kernel that rounds its scores has nothing to round, each LSE is the logarithm of a count, and all stretches
have both levels, which dq needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.masks.sums import Visible
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    Collect = Callable[[torch.Tensor], torch.Tensor]

VARIANTS = ((1, 1), (2, -1), (1, -1), (2, 1))  # (factor, sign) of the queries of the heads that share a key/value head, in turn
HALF_LARGEST = 8  # dout of the rows with most keys is two to this, so that no product leaves float16's range
STRETCHES = 32  # of the sequence, of which each has its own share of the two levels
LINES, ELEMENTS = 4, 1 << 24  # numbers of a row that ranks tell each other, by kind; and how many at a time
CONSTANT, LEVELS, DIGITS = 0, 1, 2  # patterns: ones, the levels, and from here on binary digits


def signs(values: torch.Tensor) -> torch.Tensor:
    """+1 for an even number of binary ones, -1 for an odd one (the Thue-Morse sequence), of whole numbers."""
    x = values.clone()
    for shift in (32, 16, 8, 4, 2, 1):
        x ^= x >> shift
    return 1 - 2 * (x & 1)


def magnitudes(dim: int) -> tuple[float, float]:
    """ALPHA and BETA, each with eight bits, so that softmax weights of the two levels are one to two as nearly as possible:
    ``2 * sqrt(dim) * ALPHA * BETA = ln 2``."""
    wanted = math.log(2) / 2 / math.sqrt(dim)
    exponent = math.floor(math.log2(wanted)) + 1
    bits = np.arange(128, 256) / 256
    off = np.abs(bits[:, None] * bits * 2.0 ** (exponent + np.arange(2)[:, None, None]) - wanted)
    power, i, j = np.unravel_index(np.argmin(off), off.shape)
    return float(bits[i]), float(bits[j] * 2.0 ** (exponent + power))


@dataclass(frozen=True)
class Kind:
    """What query heads share that have the same results up to signs."""

    number: int  # of the block map
    factor: int
    sign: int
    turn: int  # by how many patterns the dims are turned


@dataclass(frozen=True)
class Terms:
    """A tensor of one head, float64, and what its elements are summed from.

    ``spread``: root of the sum of the squares of the terms: how far roundings of their own carry it. ``common``: the sum of their
    sizes where roundings are the same for many terms. ``floor``: what the smallest number of the type is multiplied by.
    """

    value: torch.Tensor  # (T, D)
    spread: torch.Tensor  # (T, 1)
    common: torch.Tensor  # (T, 1) or (T, D)
    floor: torch.Tensor  # (T, 1)


@dataclass(frozen=True)
class Rows:
    """Results of one query head for the rows that a rank owns, float64. ``key``: what the lighter kind of key makes of the sum of
    weights. ``count``: keys of a row. ``gradient``: dq, of a problem with backward."""

    lse: torch.Tensor  # (T,)
    out: torch.Tensor  # (T, D)
    out_spread: torch.Tensor  # (T, 1)
    out_common: torch.Tensor  # (T, D)
    key: torch.Tensor  # (T,)
    count: torch.Tensor  # (T,)
    gradient: Terms | None = None


@dataclass(frozen=True)
class Columns:
    """Results of one key/value head for the columns that a rank owns; ``count``: rows that see a column."""

    dk: Terms
    dv: Terms
    count: torch.Tensor  # (T,)


class Probe:
    """One rank's part of a probe pass.

    Args:
        tokens: the rank's, global indices; those of all ranks together are 0 ... S-1.
        seed: signs, levels and where digits begin.
        zero: queries of zeros.
        collect: sums a tensor over all ranks.
    """

    def __init__(
        self, mask: Mask, problem: Problem, tokens: Ints, seed: int, device: torch.device, collect: Collect, *, zero: bool
    ) -> None:
        self.zero, self._mask, self._problem, self._tokens, self._device, self._collect = (
            zero,
            mask,
            problem,
            tokens,
            device,
            collect,
        )
        heads = problem.heads
        random = np.random.default_rng([seed, zero])
        self._digits = max(1, math.ceil(math.log2(max(2, problem.seqlen))))
        self._begin = random.integers(0, 1 << self._digits, 3)
        stretches = 2 * STRETCHES + 2
        self._heavy = random.permutation(np.arange(stretches) % 2).astype(bool)
        self._patterns = self._digits + DIGITS
        order = np.array([CONSTANT, LEVELS, LEVELS, *range(DIGITS, self._patterns)])
        self._turns = heads.dim < len(order)  # not every head has every pattern, but several heads have
        self._order = order
        self._u = random.choice([-1, 1], (heads.kv, heads.dim))
        self._v = random.choice([-1, 1], (heads.kv, heads.dim))
        # v times dout of a dim, by pattern: 1 or 2 together, so that the products of digits weigh alike; those of levels all agree.
        place = np.arange(heads.dim) // len(order)
        last = place == place[-1]
        even = np.bincount(np.arange(heads.dim) % len(order), minlength=len(order))[np.arange(heads.dim) % len(order)] % 2 == 0
        agrees = (order[np.arange(heads.dim) % len(order)] == LEVELS) | self._turns
        self._joint = np.where(agrees | (place % 2 == 0) | (last & even), 1, -1)
        # As their queries' signs are, so that dk adds up over the heads that share a key.
        group = heads.q // heads.kv
        own = [VARIANTS[head % group % len(VARIANTS)][1] for head in range(heads.q)]
        self._turn = np.repeat(random.choice([-1, 1], heads.kv), group) * np.array(own)
        self.alpha, beta = magnitudes(heads.dim)
        self.beta = 0.0 if zero else beta
        # Half the distance of the two scores, of factor 1.
        self._half = problem.softmax_scale * heads.dim * self.alpha * self.beta
        self._columns: dict[Kind, _Shared] = {}
        self._seen: dict[int, Visible] = {}  # by columns, of a map

    @property
    def largest_score(self) -> float:
        return self._half * max(factor for factor, _ in VARIANTS)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def kind(self, head: int) -> Kind:
        heads = self._problem.heads
        number = 0 if isinstance(self._mask, BandMask) else head // (heads.q // self._mask.maps)
        kv = head // (heads.q // heads.kv)
        turn = kv * heads.dim % len(self._order) if self._turns else 0
        return Kind(number, *VARIANTS[head % (heads.q // heads.kv) % len(VARIANTS)], turn)

    @cached_property
    def _own(self) -> torch.Tensor:
        """(T,): this rank's tokens, on the device: what has a number per token is made there."""
        import torch

        return torch.from_numpy(self._tokens).to(self._device)

    @cached_property
    def _every(self) -> torch.Tensor:
        """(S,): all tokens."""
        import torch

        return torch.arange(self._problem.seqlen, device=self._device)

    def _line(self, pattern: int, tokens: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """A pattern at tokens, whole numbers."""
        import torch

        if pattern == CONSTANT:
            return torch.ones_like(tokens)
        if pattern == LEVELS:
            return levels
        return 1 - 2 * ((tokens + int(self._begin[0])) >> (pattern - DIGITS) & 1)

    def _lines(self, levels: torch.Tensor) -> torch.Tensor:
        """(patterns, T): every pattern at this rank's tokens."""
        import torch

        return torch.stack([self._line(p, self._own, levels) for p in range(self._patterns)]).double()

    @cached_property
    def _value_lines(self) -> torch.Tensor:
        return self._lines(self._even_level(self._own))

    @cached_property
    def _dout_lines(self) -> torch.Tensor:
        return self._lines(self._query_level(self._own))

    @cached_property
    def _own_levels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) each: levels of this rank's keys and queries."""
        return self._key_level(self._own).double(), self._query_level(self._own).double()

    @cached_property
    def _kinds(self) -> list[Kind]:
        """Those of all heads, in their order."""
        return list(dict.fromkeys(self.kind(head) for head in range(self._problem.heads.q)))

    @cached_property
    def _used(self) -> list[int]:
        """Patterns that some head has."""
        return sorted({int(pattern) for kind in self._kinds for pattern in self._dims(kind)})

    def _even_level(self, tokens: torch.Tensor) -> torch.Tensor:
        """As many of either level in every stretch."""
        return signs(tokens + int(self._begin[1]))

    def _key_level(self, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        even = self._even_level(tokens)
        if self.zero:
            return even
        heavy = torch.from_numpy(self._heavy).to(self._device)[tokens + int(self._begin[1]) >> max(0, self._digits - 5)]
        return torch.where(heavy, 1, even)

    def _query_level(self, tokens: torch.Tensor) -> torch.Tensor:
        return signs(tokens + int(self._begin[2]))

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, torch.float64)

    def _dims(self, kind: Kind) -> Ints:
        """The pattern of each dim."""
        place = (np.arange(self._problem.heads.dim) + kind.turn) % len(self._order)
        return np.asarray(self._order[place])

    def fill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None) -> None:
        """Write the inputs of this rank's tokens into tensors q, dout (T, Hq, D), k, v (T, Hk, D)."""

        heads = self._problem.heads
        group = heads.q // heads.kv
        key_level, query_level = (levels[:, None] for levels in self._own_levels)
        for head in range(heads.kv):
            k[:, head] = (self.alpha * key_level * self._tensor(self._u[head])).to(k.dtype)
            v[:, head] = (self._value_lines[self._dims(self.kind(head * group))].T * self._tensor(self._v[head])).to(v.dtype)
        for head in range(heads.q):
            kind = self.kind(head)
            factor = self.beta * kind.factor * kind.sign
            q[:, head] = (factor * query_level * self._tensor(self._u[head // group])).to(q.dtype)
            if dout is not None:
                signs = self._tensor(self._dout_signs(head)) * self._scales[kind.number][:, None]
                dout[:, head] = (self._dout_lines[self._dims(kind)].T * signs).to(dout.dtype)

    def _dout_signs(self, head: int) -> Ints:
        heads = self._problem.heads
        return np.asarray(self._turn[head] * self._joint * self._v[head // (heads.q // heads.kv)])

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def _sums(self) -> dict[int, torch.Tensor]:
        """By map: (2, patterns, T): sums of each pattern over a row's keys of level +1 and of level -1."""
        import torch

        levels, even = self._key_level(self._every), self._even_level(self._every)
        visible = [
            Visible(self._mask, self._tokens, self._device, number)
            for number in range(1 if isinstance(self._mask, BandMask) else self._mask.maps)
        ]
        shape = (2, self._patterns, len(self._tokens))
        found = {number: torch.zeros(shape, dtype=torch.float64, device=self._device) for number in range(len(visible))}
        for pattern in self._used:
            line = self._line(pattern, self._every, even)
            lines = torch.stack([line * (levels > 0), line * (levels < 0)])
            for number, seen in enumerate(visible):
                found[number][:, pattern] = seen.sums(lines, whole=True)
        return found

    @cached_property
    def _scales(self) -> dict[int, torch.Tensor]:
        """(T,) by map, of dout: a power of two, about the number of a row's keys, so that all rows weigh alike in a column."""
        import torch

        def scale(sums: torch.Tensor) -> torch.Tensor:
            count = sums[:, 0].sum(0).clamp_min(1.0)
            return torch.exp2(torch.round(torch.log2(count)) - max(0, self._digits - HALF_LARGEST))

        return {number: scale(sums) for number, sums in self._sums.items()}

    def _weights(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        """(2, T): softmax weights of the keys of either level, unnormalised; (T,): their sum over a row's keys."""
        import torch

        score = kind.sign * kind.factor * self._half * self._own_levels[1]
        weights = torch.stack([torch.exp(score), torch.exp(-score)])
        return weights, (weights * self._sums[kind.number][:, 0]).sum(0)

    def _joined(self, kind: Kind) -> torch.Tensor:
        """(patterns, 1): the sum of v's times dout's sign over the dims of a pattern."""
        return self._tensor(np.bincount(self._dims(kind), self._joint, self._patterns))[:, None]

    @cached_property
    def _reach(self) -> torch.Tensor:
        """(patterns,): how large the sum of a pattern over any stretch of tokens can be."""
        return self._tensor(np.concatenate([[np.inf] * DIGITS, 2.0 ** np.arange(self._digits)]))

    @cached_property
    def _dealt_reach(self) -> torch.Tensor:
        """The same over a stretch of a rank's tokens: dealt out in turns to 2, 4 ... ranks, they agree in their lowest digits."""
        reach, usual = self._reach.clone(), int(np.median(np.diff(np.sort(self._tokens)))) if len(self._tokens) > 1 else 1
        same = (usual & -usual).bit_length() - 1
        reach[DIGITS : DIGITS + same] = math.inf
        return reach

    def _delta(self, kind: Kind) -> torch.Tensor:
        """(T,): rowsum(dout * out) of a head whose turn is +1."""
        import torch

        weights, total = self._weights(kind)
        mean = (weights[:, None] * self._sums[kind.number]).sum(0) / torch.where(total == 0, 1.0, total)
        return self._scales[kind.number] * (self._joined(kind) * self._dout_lines * mean).sum(0)

    def rows(self, head: int) -> Rows:
        """What a query head must give for this rank's rows."""
        import torch

        heads, kind = self._problem.heads, self.kind(head)
        kv = head // (heads.q // heads.kv)
        dims, sums = self._dims(kind), self._sums[kind.number]
        weights, total = self._weights(kind)
        safe = torch.where(total == 0, 1.0, total)
        count = sums[:, 0].sum(0)
        mean = (weights[:, None] * sums).sum(0) / safe
        out = mean[dims].T * self._tensor(self._v[kv])
        reach = self._reach[dims]
        common = (torch.minimum(reach, count[:, None]) * weights.amax(0)[:, None] / safe[:, None]).clamp_max(1.0)
        spread = torch.sqrt((weights.square() * sums[:, 0]).sum(0)) / safe
        found = Rows(torch.log(total), out, spread[:, None], common, weights.amin(0) / safe, count)
        if not self._problem.backward:
            return found
        turn, scale = int(self._turn[head]), self._scales[kind.number]
        delta = turn * self._delta(kind)
        products = turn * scale * (self._joined(kind) * self._dout_lines * sums).sum(1)  # (2, T): dout . v, summed by level
        side = weights * (products - delta * sums[:, 0]) / safe
        step = self._problem.softmax_scale * self.alpha
        size = self._size(kind) * scale + delta.abs()
        on_the_way = self._on_the_way(kind, count)
        gradient = Terms(
            (step * (side[0] - side[1]))[:, None] * self._tensor(self._u[kv]),
            step * spread[:, None] * size[:, None],
            step
            * ((weights * (products.abs() + delta.abs() * sums[:, 0])).sum(0) + weights.amax(0) * scale * on_the_way)[:, None]
            / safe[:, None],
            step * (1 + torch.sqrt(count) * size.clamp_min(1.0))[:, None],
        )
        return replace(found, gradient=gradient)

    def _on_the_way(self, kind: Kind, count: torch.Tensor) -> torch.Tensor:
        """(T,): how large the sum of dout . v over ``count`` tokens can be before it is whole, of dout of ones; the constant, which
        delta takes away from every term, is left out."""
        import torch

        reach = torch.minimum(self._dealt_reach[DIGITS:, None], count)
        return (self._joined(kind)[DIGITS:].abs() * reach).sum(0) + self._joined(kind)[LEVELS].abs() * count

    def _size(self, kind: Kind) -> float:
        """Root mean square of dout . v over all pairs, of dout of ones."""
        return float(self._joined(kind).square().sum().sqrt())

    # -- columns ---------------------------------------------------------------------------------------------------

    def _shared(self, kind: Kind) -> _Shared:
        """What a column sums over its rows, by the rows' level; collective when a kind is first asked for, and for some after it:
        at many ranks a message takes longer than what it brings."""
        import torch

        if kind not in self._columns:
            together = max(1, ELEMENTS // (LINES * self._problem.seqlen))
            some = [other for other in self._kinds if other not in self._columns][:together]
            lines = self._everywhere(torch.cat([self._lines_of(other) for other in some]))
            for other, whole in zip(some, lines.split(LINES), strict=True):
                self._columns[other] = self._summed(other, whole)
        return self._columns[kind]

    def _lines_of(self, kind: Kind) -> torch.Tensor:
        """(LINES, T): of each row what its columns sum."""
        import torch

        total, scale, delta = self._weights(kind)[1], self._scales[kind.number], self._delta(kind)
        safe = torch.where(total == 0, torch.inf, total)
        size = self._size(kind) * scale + delta.abs()
        return torch.stack([scale / safe, delta / safe, size / safe, scale])

    def _summed(self, kind: Kind, lines: torch.Tensor) -> _Shared:
        """``lines``: (LINES, S), those of every row."""
        import torch

        share, stats, sizes, bare = lines
        if kind.number not in self._seen:
            self._seen[kind.number] = Visible(self._mask.transpose(), self._tokens, self._device, kind.number)
        visible = self._seen[kind.number]
        levels = self._query_level(self._every)
        picked = torch.stack([levels > 0, levels < 0]).double()
        sums = torch.zeros((2, self._patterns, len(self._tokens)), dtype=torch.float64, device=self._device)
        for pattern in np.unique(self._dims(kind)).tolist():
            sums[:, pattern] = visible.sums(picked * share * self._line(pattern, self._every, levels))
        # A GPU sums in any order, so that nothing may come out as less than nothing.
        spreads = visible.sums(torch.cat([picked * share.square(), picked * sizes.square(), bare.square()[None]])).clamp_min(0.0)
        count = visible.sums(torch.ones_like(bare)[None], whole=True)[0]
        return _Shared(sums, visible.sums(picked * stats), spreads[:2], spreads[2:4], spreads[4], count)

    def _everywhere(self, own: torch.Tensor) -> torch.Tensor:
        """(n, S) of this rank's and all others' (n, T); collective."""
        import torch

        whole = torch.zeros((len(own), self._problem.seqlen), dtype=torch.float64, device=self._device)
        whole[:, self._own] = own
        return self._collect(whole)

    def columns(self, kv: int) -> Columns:
        """What a key/value head must give for this rank's columns; collective."""
        import torch

        heads, problem = self._problem.heads, self._problem
        group = heads.q // heads.kv
        level = self._own_levels[0]
        shape = (len(self._tokens), heads.dim)
        dk, dv, dv_common = (torch.zeros(shape, dtype=torch.float64, device=self._device) for _ in range(3))
        dk_common, *squares = torch.zeros((5, len(self._tokens)), dtype=torch.float64, device=self._device)
        for head in range(kv * group, (kv + 1) * group):
            kind = self.kind(head)
            shared, turn, dims = self._shared(kind), int(self._turn[head]), self._dims(kind)
            score = kind.sign * kind.factor * self._half * level
            weights = torch.stack([torch.exp(score), torch.exp(-score)])  # of rows of level +1 and -1
            dv += (weights[:, None] * shared.sums).sum(0)[dims].T * self._tensor(self._dout_signs(head))
            # Sums on the way may be larger than in the end, by what a digit's stretches of one sign hold.
            usual = (weights.square() * shared.dout_squares).sum(0) / shared.count.clamp_min(1.0)
            dv_common += torch.minimum(self._dealt_reach[dims], shared.count[:, None]) * usual.sqrt()[:, None]
            dv_common += (weights[:, None] * shared.sums.abs()).sum(0)[dims].T
            products = (self._joined(kind) * self._value_lines * shared.sums).sum(1)
            step = problem.softmax_scale * self.beta * kind.factor
            pull = weights * (products - shared.delta)
            dk += (turn * kind.sign * step * (pull[0] - pull[1]))[:, None] * self._tensor(self._u[kv])
            dk_common += step * (
                (weights * (products.abs() + shared.delta.abs())).sum(0) + usual.sqrt() * self._on_the_way(kind, shared.count)
            )
            squares[0] += step**2 * (weights.square() * shared.size_squares).sum(0)
            squares[1] += (weights.square() * shared.dout_squares).sum(0)
            squares[2] += step**2 * shared.count
            squares[3] += shared.bare_squares
        spreads = [x.sqrt()[:, None] for x in squares]
        return Columns(
            Terms(dk, spreads[0], dk_common[:, None], spreads[2]), Terms(dv, spreads[1], dv_common, spreads[3]), shared.count
        )


@dataclass(frozen=True)
class _Shared:
    """Sums over a column's rows; the first axis of two is the rows' level, +1 and -1."""

    sums: torch.Tensor  # (2, patterns, T): dout's size over the row's sum of weights, times each pattern
    delta: torch.Tensor  # (2, T)
    dout_squares: torch.Tensor  # (2, T)
    size_squares: torch.Tensor  # (2, T)
    bare_squares: torch.Tensor  # (T,)
    count: torch.Tensor  # (T,)
