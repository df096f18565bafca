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

A softcap takes scores to two other values, and a sink is one more term of each row's sum of weights. Latent heads have digits in
the numbers of a key that are its value, where queries are 0, and the vector of signs in the others: so dq of the former, sums of
products of two digits, is all that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import Ints
from lcbench.masks.mask import Computed, maps_of
from lcbench.masks.sums import Visible
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from lcbench.measure.owners import Owners
    from lcbench.measure.reference import Shard
    from lcbench.schedule.held import Part

    Collect = Callable[[torch.Tensor], torch.Tensor]

VARIANTS = ((1, 1), (2, -1), (1, -1), (2, 1))  # (factor, sign) of the queries of the heads that share a key/value head, in turn
HALF_SMALLEST = 2.0**-14  # the smallest number that float16 holds with all bits
HALF_LARGEST = 8  # dout of the rows with most keys is two to this, so that no product leaves float16's range
STRETCHES = 32  # of the sequence, of which each has its own share of the two levels
SINKS = (-0.75, -0.25, 0.25, 0.75)  # of query heads in turn, around the logarithm of a row's keys
LINES, ELEMENTS = 4, 1 << 24  # numbers of a row that ranks tell each other, by kind; and how many at a time
CONSTANT, LEVELS, DIGITS = 0, 1, 2  # patterns: ones, the levels, and from here on binary digits


def signs(values: torch.Tensor) -> torch.Tensor:
    """+1 for an even number of binary ones, -1 for an odd one (the Thue-Morse sequence), of whole numbers."""
    x = values.clone()
    for shift in (32, 16, 8, 4, 2, 1):
        x ^= x >> shift
    return 1 - 2 * (x & 1)


def magnitudes(dim: int, softmax_scale: float) -> tuple[float, float]:
    """ALPHA and BETA, each with eight bits, so that softmax weights of the two levels are one to two as nearly as possible:
    ``2 * dim * softmax_scale * ALPHA * BETA = ln 2``; ``dim``: numbers of a key that scores come from."""
    wanted = math.log(2) / 2 / (dim * softmax_scale)
    exponent = math.floor(math.log2(wanted)) + 1
    bits = np.arange(128, 256) / 256
    off = np.abs(bits[:, None] * bits * 2.0 ** (exponent + np.arange(2)[:, None, None]) - wanted)
    power, i, j = np.unravel_index(np.argmin(off), off.shape)
    return float(bits[i]), float(bits[j] * 2.0 ** (exponent + power))


def impossible(problem: Problem) -> str | None:
    """Why there are no such inputs for a problem, or None."""
    heads = problem.heads
    if heads.latent and heads.dim == heads.v:
        return f"every number of a key of heads={heads} is one of its value, so none is left for scores that are known"
    beta = magnitudes(len(_scored(problem)), problem.softmax_scale)[1]
    if problem.dtype == "float16" and not HALF_SMALLEST <= beta <= 1 / HALF_SMALLEST:
        return f"a softmax scale of {problem.softmax_scale:g} asks for queries of {beta:.3g}, which float16 does not hold exactly"
    return None


def _scored(problem: Problem) -> range:
    """The numbers of a key that scores come from."""
    return range(problem.heads.v if problem.heads.latent else 0, problem.heads.dim)


@dataclass(frozen=True)
class Kind:
    """What query heads share that have the same results up to signs."""

    number: int  # of the block map
    factor: int
    sign: int
    turn: int  # by how many patterns the dims are turned
    sink: float  # minus infinity where there is none


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
    """Results of one query head for some rows, float64. ``key``: what the lighter kind of key makes of the sum of weights.
    ``count``: keys of a row. ``gradient``: the scored numbers of dq, of a problem with backward."""

    lse: torch.Tensor  # (T,)
    out: torch.Tensor  # (T, Dv)
    out_spread: torch.Tensor  # (T, 1)
    out_common: torch.Tensor  # (T, Dv)
    key: torch.Tensor  # (T,)
    count: torch.Tensor  # (T,)
    gradient: Terms | None = None


@dataclass(frozen=True)
class Columns:
    """Results of one key/value head for the columns that a rank holds; ``dk``: its scored numbers; ``count``: rows that see a
    column."""

    dk: Terms
    dv: Terms
    count: torch.Tensor  # (T,)


class Probe:
    """One rank's part of a probe pass.

    Args:
        owners: what the rank holds.
        seed: signs, levels and where digits begin.
        zero: queries of zeros.
        collect: sums a tensor over all ranks.
        keys: about how many a row sees, which sinks are as much as.
        rank: this one's number among them.
    """

    def __init__(
        self,
        mask: Computed,
        problem: Problem,
        owners: Owners,
        seed: int,
        device: torch.device,
        collect: Collect,
        *,
        zero: bool,
        keys: float = 1.0,
        rank: int = 0,
    ) -> None:
        self.zero, self._mask, self._problem, self._held, self._device, self._collect = (
            zero,
            mask,
            problem,
            owners.held,
            device,
            collect,
        )
        heads = problem.heads
        random = np.random.default_rng([seed, zero])
        self.digits = max(1, math.ceil(math.log2(max(2, problem.seqlen))))
        self._begin = random.integers(0, 1 << self.digits, 3)
        stretches = 2 * STRETCHES + 2
        self._heavy = random.permutation(np.arange(stretches) % 2).astype(bool)
        self._patterns = self.digits + DIGITS
        order = np.array([CONSTANT, LEVELS, LEVELS, *range(DIGITS, self._patterns)])
        self._turns = heads.v < len(order)  # not every head has every pattern, but several heads have
        self._order = order
        scored = _scored(problem)
        self.scored = slice(scored.start, scored.stop)
        self._u = random.choice([-1, 1], (heads.kv, len(scored)))
        self._v = random.choice([-1, 1], (heads.kv, heads.v))
        self._joint = _joint(order, heads.v, alike=self._turns)
        # As their queries' signs are, so that dk adds up over the heads that share a key.
        group = heads.q // heads.kv
        own = [VARIANTS[head % group % len(VARIANTS)][1] for head in range(heads.q)]
        self._turn = np.repeat(random.choice([-1, 1], heads.kv), group) * np.array(own)
        self.alpha, beta = magnitudes(len(scored), problem.softmax_scale)
        self.beta = 0.0 if zero else beta
        # Half the distance of the two scores, of factor 1 and before a softcap.
        self._half = problem.softmax_scale * len(scored) * self.alpha * self.beta
        # As much as the keys that a row sees in the mean, more or less, in the numbers of the type that sinks have.
        around = math.log(max(1.0, keys))
        # With queries of zeros they are equal: what cancels over heads that share a key is to cancel whole.
        offsets = (0.0,) if zero else SINKS
        self._sinks = [float(np.float32(around + more)) for more in offsets] if problem.softmax.sink else [-math.inf]
        self._columns: dict[Kind, _Shared] = {}
        self._seen: dict[int, Visible] = {}  # by columns, of a map
        self._results = _RowsOf(self, self._held.out.tokens)
        same = self._held.q is self._held.out or np.array_equal(self._held.q.tokens, self._held.out.tokens)
        self._queries = self._results if same else _RowsOf(self, self._held.q.tokens)
        # Columns need every row once: as ranks give their results, or else a stretch of all of them each.
        number, ranks = problem.queries, problem.scale.world_size
        stretch = np.arange(number * rank // ranks, number * (rank + 1) // ranks)
        self._share = self._results if owners.by_tokens else _RowsOf(self, stretch)

    @property
    def largest_score(self) -> float:
        return max(self.score(factor) for factor, _ in VARIANTS)

    def score(self, factor: int) -> float:
        """The score of two of the same level, of queries with this factor."""
        cap, score = self._problem.softmax.softcap, factor * self._half
        return cap * math.tanh(score / cap) if cap else score

    def slope(self, factor: int) -> float:
        """The derivative of such a score, of either sign, by what it is before a softcap."""
        cap = self._problem.softmax.softcap
        return 1 - (self.score(factor) / cap) ** 2 if cap else 1.0

    # -- inputs ----------------------------------------------------------------------------------------------------

    def kind(self, head: int) -> Kind:
        heads = self._problem.heads
        number = head // (heads.q // maps_of(self._mask))
        turn = self._kv(head) * heads.v % len(self._order) if self._turns else 0
        return Kind(number, *VARIANTS[head % (heads.q // heads.kv) % len(VARIANTS)], turn, self._sinks[head % len(self._sinks)])

    @cached_property
    def _keys(self) -> torch.Tensor:
        """(Tk,): the keys that this rank holds, on the device: what has a number per token is made there."""
        return self.at(self._held.kv.tokens)

    def at(self, tokens: Ints) -> torch.Tensor:
        import torch

        return torch.from_numpy(tokens).to(self._device)

    def _every(self, number: int) -> torch.Tensor:
        """(number,): all tokens of a side."""
        import torch

        return torch.arange(number, device=self._device)

    def _line(self, pattern: int, tokens: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """A pattern at tokens, whole numbers."""
        import torch

        if pattern == CONSTANT:
            return torch.ones_like(tokens)
        if pattern == LEVELS:
            return levels
        return 1 - 2 * ((tokens + int(self._begin[0])) >> (pattern - DIGITS) & 1)

    def lines(self, tokens: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """(patterns, T): every pattern at tokens."""
        import torch

        return torch.stack([self._line(p, tokens, levels) for p in range(self._patterns)]).double()

    @cached_property
    def _value_lines(self) -> torch.Tensor:
        return self.lines(self._keys, self._even_level(self._keys))

    @cached_property
    def _own_level(self) -> torch.Tensor:
        """(Tk,): levels of this rank's keys."""
        return self._key_level(self._keys).double()

    @cached_property
    def _kinds(self) -> list[Kind]:
        """Those of all heads, in their order."""
        return list(dict.fromkeys(self.kind(head) for head in range(self._problem.heads.q)))

    @cached_property
    def _used(self) -> list[int]:
        """Patterns that some head has."""
        return sorted({int(pattern) for kind in self._kinds for pattern in self.dims(kind)})

    def _even_level(self, tokens: torch.Tensor) -> torch.Tensor:
        """As many of either level in every stretch."""
        return signs(tokens + int(self._begin[1]))

    def _key_level(self, tokens: torch.Tensor) -> torch.Tensor:
        import torch

        even = self._even_level(tokens)
        if self.zero:
            return even
        heavy = torch.from_numpy(self._heavy).to(self._device)[tokens + int(self._begin[1]) >> max(0, self.digits - 5)]
        return torch.where(heavy, 1, even)

    def query_level(self, tokens: torch.Tensor) -> torch.Tensor:
        return signs(tokens + int(self._begin[2]))

    def _tensor(self, values: NDArray[np.generic]) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, torch.float64)

    def dims(self, kind: Kind) -> Ints:
        """The pattern of each dim of a value."""
        place = (np.arange(self._problem.heads.v) + kind.turn) % len(self._order)
        return np.asarray(self._order[place])

    def fill(self, shard: Shard) -> None:
        """Write this rank's inputs into a shard's tensors."""
        heads, queries = self._problem.heads, self._queries.level[:, None]
        group, key_level = heads.q // heads.kv, self._own_level[:, None]
        for place, head in enumerate(held_heads(self._held.kv, heads.kv)):
            values = self._value_lines[self.dims(self.kind(head * group))].T * self._tensor(self._v[head])
            (shard.k[..., : heads.v] if heads.latent else shard.v)[:, place] = values.to(shard.v.dtype)
            shard.k[:, place, self.scored] = (self.alpha * key_level * self._tensor(self._u[head])).to(shard.k.dtype)
        for place, head in enumerate(held_heads(self._held.q, heads.q)):
            kind = self.kind(head)
            factor = self.beta * kind.factor * kind.sign
            shard.q[:, place, : self.scored.start] = 0.0
            shard.q[:, place, self.scored] = (factor * queries * self.score_signs(head)).to(shard.q.dtype)
        if shard.dout is not None:
            for place, head in enumerate(held_heads(self._held.out, heads.q)):
                kind, results = self.kind(head), self._results
                signs = self._tensor(self._dout_signs(head)) * results.scales[kind.number][:, None]
                shard.dout[:, place] = (results.lines[self.dims(kind)].T * signs).to(shard.dout.dtype)
        if shard.sink is not None:
            shard.sink.copy_(self._tensor(np.array([self.kind(head).sink for head in range(heads.q)])))

    def _dout_signs(self, head: int) -> Ints:
        return np.asarray(self._turn[head] * self._joint * self._v[self._kv(head)])

    # -- rows ------------------------------------------------------------------------------------------------------

    def rows(self, head: int) -> Rows:
        """What a query head must give for the rows whose results are this rank's."""
        return self._results.of(head)

    def gradient(self, head: int) -> tuple[Terms, torch.Tensor]:
        """The scored numbers of dq of a query head for this rank's queries, and the keys of each, (Tq,)."""
        found = self._queries.of(head)
        assert found.gradient is not None
        return found.gradient, found.count

    def sinks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dsink of all query heads, (Hq,) each: exact, the spread of its terms and what is common to them. Collective."""
        import torch

        rows, found = self._share, []
        for head in range(self._problem.heads.q):
            kind = self.kind(head)
            share = math.exp(kind.sink) / rows.weights(kind)[1]
            whole = rows.of(head)
            size = rows.scales[kind.number]
            terms = share * self.turn(head) * rows.delta(kind)
            # Of each row out is rounded, and dout times it added up.
            rounded = (share * size).square() * (whole.out.square().sum(-1) + whole.out.shape[1] * whole.out_spread[:, 0].square())
            common = share * size * (self.joined(kind) * rows.mean(kind)).abs().sum(0)
            found.append(torch.stack([-terms.sum(), (rounded + terms.square()).sum(), common.sum()]))
        value, squares, common = self._collect(torch.stack(found, 1))
        return value, squares.sqrt(), common

    def sums_of(self, tokens: Ints) -> dict[int, torch.Tensor]:
        """By map: (2, patterns, T): sums of each pattern over the keys of level +1 and of level -1 that rows see."""
        import torch

        every = self._every(self._problem.seqlen)
        levels, even = self._key_level(every), self._even_level(every)
        visible = [Visible(self._mask, tokens, self._device, number) for number in range(maps_of(self._mask))]
        shape = (2, self._patterns, len(tokens))
        found = {number: torch.zeros(shape, dtype=torch.float64, device=self._device) for number in range(len(visible))}
        for pattern in self._used:
            line = self._line(pattern, every, even)
            lines = torch.stack([line * (levels > 0), line * (levels < 0)])
            for number, seen in enumerate(visible):
                found[number][:, pattern] = seen.sums(lines, whole=True)
        return found

    @property
    def backward(self) -> bool:
        return self._problem.backward

    def turn(self, head: int) -> int:
        """The sign of a query head's dout."""
        return int(self._turn[head])

    def value_signs(self, head: int) -> torch.Tensor:
        """(Dv,): those of the values that a query head reads."""
        return self._tensor(self._v[self._kv(head)])

    def score_signs(self, head: int) -> torch.Tensor:
        """The vector of signs in the keys that a query head reads."""
        return self._tensor(self._u[self._kv(head)])

    def key_step(self, kind: Kind) -> float:
        """How much a number of dq grows with the gradient of a score."""
        return self._problem.softmax_scale * self.alpha * self.slope(kind.factor)

    def _kv(self, head: int) -> int:
        return head // (self._problem.heads.q // self._problem.heads.kv)

    def joined(self, kind: Kind) -> torch.Tensor:
        """(patterns, 1): the sum of v's times dout's sign over the dims of a pattern."""
        return self._tensor(np.bincount(self.dims(kind), self._joint, self._patterns))[:, None]

    @cached_property
    def reach(self) -> torch.Tensor:
        """(patterns,): how large the sum of a pattern over any stretch of tokens can be."""
        return self._tensor(np.concatenate([[np.inf] * DIGITS, 2.0 ** np.arange(self.digits)]))

    @cached_property
    def dealt_reaches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same over a stretch of a rank's queries, and of its keys."""
        return self._dealt_reach(self._share.tokens), self._dealt_reach(self._held.kv.tokens)

    def _dealt_reach(self, tokens: Ints) -> torch.Tensor:
        """Tokens that are dealt out in turns to 2, 4 ... ranks agree in their lowest digits."""
        reach, usual = self.reach.clone(), int(np.median(np.diff(np.sort(tokens)))) if len(tokens) > 1 else 1
        same = (usual & -usual).bit_length() - 1
        reach[DIGITS : DIGITS + same] = math.inf
        return reach

    def on_the_way(self, kind: Kind, count: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """(T,): how large the sum of dout . v over ``count`` tokens can be before it is whole, of dout of ones; the constant, which
        delta takes away from every term, is left out."""
        import torch

        reach = torch.minimum(reach[DIGITS:, None], count)
        return (self.joined(kind)[DIGITS:].abs() * reach).sum(0) + self.joined(kind)[LEVELS].abs() * count

    def size(self, kind: Kind) -> float:
        """Root mean square of dout . v over all pairs, of dout of ones."""
        return float(self.joined(kind).square().sum().sqrt())

    # -- columns ---------------------------------------------------------------------------------------------------

    def _shared(self, kind: Kind) -> _Shared:
        """What a column sums over its rows, by the rows' level; collective when a kind is first asked for, and for some after it:
        at many ranks a message takes longer than what it brings."""
        import torch

        if kind not in self._columns:
            together = max(1, ELEMENTS // (LINES * self._problem.queries))
            some = [other for other in self._kinds if other not in self._columns][:together]
            lines = self._everywhere(torch.cat([self._lines_of(other) for other in some]))
            for other, whole in zip(some, lines.split(LINES), strict=True):
                self._columns[other] = self._summed(other, whole)
        return self._columns[kind]

    def _lines_of(self, kind: Kind) -> torch.Tensor:
        """(LINES, T): of each row of this rank's share what its columns sum."""
        import torch

        rows = self._share
        total, scale, delta = rows.weights(kind)[1], rows.scales[kind.number], rows.delta(kind)
        safe = torch.where(total == 0, torch.inf, total)
        size = self.size(kind) * scale + delta.abs()
        return torch.stack([scale / safe, delta / safe, size / safe, scale])

    def _summed(self, kind: Kind, lines: torch.Tensor) -> _Shared:
        """``lines``: (LINES, Nq), those of every row."""
        import torch

        share, stats, sizes, bare = lines
        if kind.number not in self._seen:
            self._seen[kind.number] = Visible(self._mask.transpose(), self._held.kv.tokens, self._device, kind.number)
        visible = self._seen[kind.number]
        every = self._every(self._problem.queries)
        levels = self.query_level(every)
        picked = torch.stack([levels > 0, levels < 0]).double()
        sums = torch.zeros((2, self._patterns, len(self._held.kv.tokens)), dtype=torch.float64, device=self._device)
        for pattern in np.unique(self.dims(kind)).tolist():
            sums[:, pattern] = visible.sums(picked * share * self._line(pattern, every, levels))
        # A GPU sums in any order, so that nothing may come out as less than nothing.
        spreads = visible.sums(torch.cat([picked * share.square(), picked * sizes.square(), bare.square()[None]])).clamp_min(0.0)
        count = visible.sums(torch.ones_like(bare)[None], whole=True)[0]
        return _Shared(sums, visible.sums(picked * stats), spreads[:2], spreads[2:4], spreads[4], count)

    def _everywhere(self, own: torch.Tensor) -> torch.Tensor:
        """(n, Nq) of this rank's share of rows and all others', (n, T) each; collective."""
        import torch

        whole = torch.zeros((len(own), self._problem.queries), dtype=torch.float64, device=self._device)
        whole[:, self.at(self._share.tokens)] = own
        return self._collect(whole)

    def columns(self, kv: int) -> Columns:
        """What a key/value head must give for this rank's columns; collective."""
        import torch

        heads, problem = self._problem.heads, self._problem
        group = heads.q // heads.kv
        level, reach, tokens = self._own_level, self.dealt_reaches[0], len(self._held.kv.tokens)
        dk, dv, dv_common = (
            torch.zeros((tokens, dim), dtype=torch.float64, device=self._device) for dim in (self._u.shape[1], heads.v, heads.v)
        )
        dk_common, *squares = torch.zeros((5, tokens), dtype=torch.float64, device=self._device)
        for head in range(kv * group, (kv + 1) * group):
            kind = self.kind(head)
            shared, turn, dims = self._shared(kind), self.turn(head), self.dims(kind)
            score = kind.sign * self.score(kind.factor) * level
            weights = torch.stack([torch.exp(score), torch.exp(-score)])  # of rows of level +1 and -1
            dv += (weights[:, None] * shared.sums).sum(0)[dims].T * self._tensor(self._dout_signs(head))
            # Sums on the way may be larger than in the end, by what a digit's stretches of one sign hold.
            usual = (weights.square() * shared.dout_squares).sum(0) / shared.count.clamp_min(1.0)
            dv_common += torch.minimum(reach[dims], shared.count[:, None]) * usual.sqrt()[:, None]
            dv_common += (weights[:, None] * shared.sums.abs()).sum(0)[dims].T
            products = (self.joined(kind) * self._value_lines * shared.sums).sum(1)
            step = problem.softmax_scale * self.beta * kind.factor * self.slope(kind.factor)
            pull = weights * (products - shared.delta)
            dk += (turn * kind.sign * step * (pull[0] - pull[1]))[:, None] * self._tensor(self._u[kv])
            dk_common += step * (
                (weights * (products.abs() + shared.delta.abs())).sum(0) + usual.sqrt() * self.on_the_way(kind, shared.count, reach)
            )
            squares[0] += step**2 * (weights.square() * shared.size_squares).sum(0)
            squares[1] += (weights.square() * shared.dout_squares).sum(0)
            squares[2] += step**2 * shared.count
            squares[3] += shared.bare_squares
        spreads = [x.sqrt()[:, None] for x in squares]
        return Columns(
            Terms(dk, spreads[0], dk_common[:, None], spreads[2]), Terms(dv, spreads[1], dv_common, spreads[3]), shared.count
        )


def _joint(order: Ints, dims: int, *, alike: bool) -> Ints:
    """(dims,): the sign of v times dout, of a value's dims that have the patterns of ``order`` in turn. Those of one come to 1
    or 2, so that the products of digits weigh alike; those of levels all agree, and ``alike`` those of every pattern.
    """
    place, pattern = np.divmod(np.arange(dims), len(order))
    last = place == place[-1]
    even = np.bincount(pattern, minlength=len(order))[pattern] % 2 == 0
    return np.where(alike | (order[pattern] == LEVELS) | (place % 2 == 0) | (last & even), 1, -1)


class _RowsOf:
    """What rows of a probe must give, of some tokens.

    Attributes:
        tokens: their indices among queries.
    """

    def __init__(self, probe: Probe, tokens: Ints) -> None:
        self._probe, self.tokens = probe, tokens

    @cached_property
    def level(self) -> torch.Tensor:
        """(T,)."""
        return self._probe.query_level(self._probe.at(self.tokens)).double()

    @cached_property
    def lines(self) -> torch.Tensor:
        """(patterns, T): every pattern of dout."""
        at = self._probe.at(self.tokens)
        return self._probe.lines(at, self._probe.query_level(at))

    @cached_property
    def sums(self) -> dict[int, torch.Tensor]:
        """By map: (2, patterns, T): sums of each pattern over a row's keys of level +1 and of level -1."""
        return self._probe.sums_of(self.tokens)

    @cached_property
    def scales(self) -> dict[int, torch.Tensor]:
        """(T,) by map, of dout: a power of two, about the number of a row's keys, so that all rows weigh alike in a column."""
        import torch

        def scale(sums: torch.Tensor) -> torch.Tensor:
            count = sums[:, 0].sum(0).clamp_min(1.0)
            return torch.exp2(torch.round(torch.log2(count)) - max(0, self._probe.digits - HALF_LARGEST))

        return {number: scale(sums) for number, sums in self.sums.items()}

    def weights(self, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
        """(2, T): softmax weights of the keys of either level, unnormalised; (T,): their sum over a row's keys, and the sink's."""
        import torch

        score = kind.sign * self._probe.score(kind.factor) * self.level
        weights = torch.stack([torch.exp(score), torch.exp(-score)])
        return weights, (weights * self.sums[kind.number][:, 0]).sum(0) + math.exp(kind.sink)

    def mean(self, kind: Kind) -> torch.Tensor:
        """(patterns, T): the weighted mean of each pattern over a row's keys."""
        import torch

        weights, total = self.weights(kind)
        return (weights[:, None] * self.sums[kind.number]).sum(0) / torch.where(total == 0, 1.0, total)

    def delta(self, kind: Kind) -> torch.Tensor:
        """(T,): rowsum(dout * out) of a head whose turn is +1."""
        return self.scales[kind.number] * (self._probe.joined(kind) * self.lines * self.mean(kind)).sum(0)

    def of(self, head: int) -> Rows:
        """What a query head must give."""
        import torch

        probe, kind = self._probe, self._probe.kind(head)
        dims, sums = probe.dims(kind), self.sums[kind.number]
        weights, total = self.weights(kind)
        safe = torch.where(total == 0, 1.0, total)
        count = sums[:, 0].sum(0)
        out = self.mean(kind)[dims].T * probe.value_signs(head)
        common = (torch.minimum(probe.reach[dims], count[:, None]) * weights.amax(0)[:, None] / safe[:, None]).clamp_max(1.0)
        spread = torch.sqrt((weights.square() * sums[:, 0]).sum(0)) / safe
        found = Rows(torch.log(total), out, spread[:, None], common, weights.amin(0) / safe, count)
        if not probe.backward:
            return found
        turn, scale = probe.turn(head), self.scales[kind.number]
        delta = turn * self.delta(kind)
        products = turn * scale * (probe.joined(kind) * self.lines * sums).sum(1)  # (2, T): dout . v, summed by level
        side = weights * (products - delta * sums[:, 0]) / safe
        step = probe.key_step(kind)
        size = probe.size(kind) * scale + delta.abs()
        on_the_way = probe.on_the_way(kind, count, probe.dealt_reaches[1])
        gradient = Terms(
            (step * (side[0] - side[1]))[:, None] * probe.score_signs(head),
            step * spread[:, None] * size[:, None],
            step
            * ((weights * (products.abs() + delta.abs() * sums[:, 0])).sum(0) + weights.amax(0) * scale * on_the_way)[:, None]
            / safe[:, None],
            step * (1 + torch.sqrt(count) * size.clamp_min(1.0))[:, None],
        )
        return replace(found, gradient=gradient)


def held_heads(part: Part, count: int) -> range:
    """The heads of a part, of ``count``."""
    return range(count) if part.heads is None else part.heads


@dataclass(frozen=True)
class _Shared:
    """Sums over a column's rows; the first axis of two is the rows' level, +1 and -1."""

    sums: torch.Tensor  # (2, patterns, T): dout's size over the row's sum of weights, times each pattern
    delta: torch.Tensor  # (2, T)
    dout_squares: torch.Tensor  # (2, T)
    size_squares: torch.Tensor  # (2, T)
    bare_squares: torch.Tensor  # (T,)
    count: torch.Tensor  # (T,)
