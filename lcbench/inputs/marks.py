"""The structure of seeded queries and keys: what each head attends to, and the numbers that make it do so.

Beside noise in all channels a key has marks, and a query asks for some of them, in channels of their own::

    sink        the first tokens of a request                       a vector of signs
    vertical    single keys, at a rate of the key/value head        another vector of signs
    topic       segments of keys, a quarter of which have one       orthogonal vectors of signs
    position    all keys: cos(w_f t), sin(w_f t), as rotary embeddings have it, with periods from a few tokens to twice the length

    score = noise + sum over parts of size * (how much of the part the key has for this query)

A key has all of the local band at distance 0 and of a slash line at its distance d: it has ``mean over f of cos(w_f (i - j - d))``
of it, over the periods above the line's width, so that a slash line is a phase of the query. Query heads that share keys ask for
other parts of them, in other sizes.

Which tokens have which mark is drawn on the CPU by block of tokens, and tables of cosines are only multiplied and added: any rows
of any heads are made alone, in time that does not grow with the length, and are the same bit for bit wherever they are made, but
for the noise, which is that of the device's generator.

Sizes are calibrated: some rows of the second half are looked at under a causal mask, and one number is added to all sizes of a head
until the keys that hold 90 % of the weight are the share that was aimed at. The share that was reached is stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.inputs.base import MOST_CRITICAL
from lcbench.inputs.drawing import BLOCK, ELEMENTS, seed_of
from lcbench.masks.band import Ints
from lcbench.problem import Batch, Heads, Softmax

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PARTS = ("sink", "vertical", "local", "slash", "topic")
# Shares of the structure's weight by kind of head and part: each between two numbers, then made to sum to one.
SHARES = {
    "a_shape": ((0.2, 0.6), (0.0, 0.0), (0.4, 0.8), (0.0, 0.0), (0.0, 0.0)),
    "vertical_slash": ((0.1, 0.3), (0.2, 0.5), (0.1, 0.3), (0.2, 0.5), (0.0, 0.0)),
    "block": ((0.05, 0.2), (0.0, 0.0), (0.1, 0.3), (0.0, 0.0), (0.5, 0.8)),
}
DEALT = ("vertical_slash", "a_shape", "vertical_slash", "block")  # of four heads; which has which is drawn

SINKS = 4
SEGMENT, TOPICAL = 128, 0.25  # tokens that have one topic; the share of segments whose keys have one
NOISE = 0.5  # of each number of a key, and of a query where scores have the usual scale
SPARSE_MARK, COMMON_MARK = 3.0, 1.5  # numbers of a mark that few keys have, and of one that many or all have
WEAKEST = 0.7  # a vertical mark's part of a whole one, at the least
QUIET = 0.2  # of the noise, what keys have that are sinks or have a vertical mark
SHORTEST = 8.0  # tokens of the fastest cosine's period
NARROW = 16  # keys of a local band at least; of a slash line a third
MASS = 0.9  # of a row's weight, which its critical keys hold
ROWS = 12  # rows that calibration looks at
WHOLE = 16384  # keys of a row up to which it looks at all; of more at a sample, with weights
EXACT, RATIO = 64, 1.02  # of that sample: keys on either side of a line that are all in it, and how strata widen beyond
VERTICALS = 64  # and keys with a vertical mark
STEP, LOWEST, STEPS = 0.125, -10.0, 128  # of the number that is added to sizes
ROUNDS, MOVE = 4, 1.0  # in which sizes of parts are set against one another, each by so much at most
LIKE = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Head:
    """What a query head attends to.

    Attributes:
        kind: one of ``SHARES``.
        local: keys of its band, which ends at the query.
        slashes: distances of its slash lines; ``width``: keys of each.
        topics: how many it asks for, from its segment's own on.
        parts: shares of the structure's weight that were aimed at, of each of ``PARTS``.
        sizes: scores that each adds to a key that has all of it.
        share: of the keys that a row sees under a causal mask, those that hold 90 % of its weight, heaviest first: what
            calibration found, in the mean over rows of the second half.
        masses: share of a row's weight on the keys of each part, found so too; a key may be of several parts.
    """

    kind: str
    local: int
    slashes: tuple[int, ...]
    width: int
    topics: int
    parts: tuple[float, ...]
    sizes: tuple[float, ...]
    share: float = 0.0
    masses: tuple[float, ...] = ()

    def stated(self) -> dict[str, Any]:
        has = {part: round(mass, 3) for part, mass, size in zip(PARTS, self.masses, self.sizes, strict=True) if size}
        lines = {"local": self.local, "slashes": list(self.slashes), "slash_width": self.width if self.slashes else 0}
        return {"kind": self.kind, "critical_share": round(self.share, 4), **lines, "topics": self.topics, "masses": has}


@dataclass(frozen=True)
class Marks:
    """What tokens are: ``sink`` (T,); ``vertical`` (T, Hk), how much of a vertical mark they have; the ``topic`` of keys, -1 for
    none, and that which queries ``ask`` for first, (T, Hk) each."""

    sink: Bools
    vertical: Floats
    topic: Ints
    ask: Ints


@dataclass(frozen=True)
class Block:
    """Some adjacent tokens: vertical marks (BLOCK, Hk), topics that segments have and ask for, (segments, Hk), and the cosine and
    sine of the first one's position, (2, Hk, F)."""

    vertical: Floats
    topic: Ints
    ask: Ints
    begin: Floats


@dataclass(frozen=True, eq=False)
class Plan:
    """The structure of all heads of one sequence or batch.

    Attributes:
        text: seeds what is drawn by block.
        order: (Hk, D), the channel of each coordinate: sink, vertical, topic, position, the rest.
        sink, vertical: (Hk, D // 8) signs.
        periods: (Hk, F), tokens.
        rates: (Hk,), vertical marks per key.
    """

    requests: Batch
    counts: Heads
    softmax: Softmax
    text: str
    order: Ints
    sink: Floats
    vertical: Floats
    periods: Floats
    rates: Floats
    heads: tuple[Head, ...] = ()
    blocks: dict[int, Block] = field(default_factory=dict, repr=False)  # those that were looked at

    # -- what a token is -------------------------------------------------------------------------------------------

    def places(self, name: str, tokens: Ints) -> Ints:
        """Where rows of q, or of k, are among all tokens."""
        if name == "k":
            return tokens
        requests = self.requests
        number = np.searchsorted(requests.q_bounds, tokens, "right") - 1
        return np.asarray(tokens - requests.q_bounds[number + 1] + requests.k_bounds[number + 1], dtype=np.int64)

    def marks(self, places: Ints) -> Marks:
        drawn, inverse = self._of(places)
        number = np.searchsorted(self.requests.k_bounds, places, "right") - 1
        within, segment = places % BLOCK, places % BLOCK // SEGMENT
        vertical = np.stack([each.vertical for each in drawn])[inverse, within]
        topic, ask = np.stack([each.topic for each in drawn]), np.stack([each.ask for each in drawn])
        return Marks(places - self.requests.k_bounds[number] < SINKS, vertical, topic[inverse, segment], ask[inverse, segment])

    def _of(self, places: Ints) -> tuple[list[Block], Ints]:
        """The blocks of tokens, and which of them each token is in. Each is made by itself, so that no number depends on which
        others are made with it."""
        numbers, inverse = np.unique(places // BLOCK, return_inverse=True)
        for number in numbers.tolist():
            if number not in self.blocks:
                self.blocks[number] = self._block(number)
        return [self.blocks[number] for number in numbers.tolist()], inverse

    def _block(self, block: int) -> Block:
        random, heads = np.random.default_rng(seed_of(f"{self.text}/{block}")), self.counts.kv
        vertical = np.where(random.random((BLOCK, heads)) < self.rates, random.uniform(WEAKEST, 1.0, (BLOCK, heads)), 0.0)
        topic, ask = random.integers(0, self.topics, (2, BLOCK // SEGMENT, heads))
        has = random.random((BLOCK // SEGMENT, heads)) < TOPICAL
        angle = 2 * np.pi * np.remainder(block * BLOCK / self.periods, 1.0)
        return Block(vertical, np.where(has, topic, -1), ask, np.stack([np.cos(angle), np.sin(angle)]))

    # -- numbers -----------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.counts.dim**-0.5) if self.softmax.scale is None else self.softmax.scale

    @property
    def topics(self) -> int:
        return _topics(self.counts.dim)

    @cached_property
    def codes(self) -> Floats:
        """(topics + 1, topics): orthogonal signs (Sylvester's matrix), and zeros for no topic."""
        matrix = np.ones((1, 1))
        while len(matrix) < self.topics:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return np.vstack([matrix, np.zeros(self.topics)])

    @cached_property
    def _turns(self) -> Floats:
        """(2, BLOCK, Hk, F): cosine and sine within a block."""
        angles = 2 * np.pi * np.arange(BLOCK)[:, None, None] / self.periods
        return np.stack([np.cos(angles), np.sin(angles)])

    def _phases(self, places: Ints, kv: Ints, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position, (T, len(kv), F): those of the block's begin turned by those within it."""
        blocks, inverse = self._of(places)
        first = np.stack([block.begin for block in blocks], 1)[:, :, kv]  # (2, blocks, len(kv), F)
        a, b = (_like(x, like)[_index(inverse, like)] for x in first)
        c, d = (_like(x, like)[_index(places % BLOCK, like)] for x in self._turns[:, :, kv])
        return a * c - b * d, a * d + b * c

    def put(self, name: str, tokens: Ints, heads: range, into: torch.Tensor) -> None:
        """Scale noise, (T, len(heads), D), and add the marks of q or of k to it, in place."""
        rows = max(1, ELEMENTS // max(1, len(heads) * self.counts.dim))
        for first in range(0, len(tokens), rows):
            part = slice(first, first + rows)
            places = self.places(name, tokens[part])
            marks = self.marks(places)
            made, noise = (
                (self.queries, self.query_noise) if name == "q" else (self.keys, self.key_noise(marks)[:, heads.start : heads.stop])
            )
            into[part] *= _like(noise, into)[..., None]
            into[part] += made(places, marks, heads, into)

    @property
    def query_noise(self) -> Floats:
        """(1, 1), of each number."""
        return np.full((1, 1), NOISE / (self.scale * math.sqrt(self.counts.dim)))

    def key_noise(self, marks: Marks) -> Floats:
        """(T, Hk), of each number: little where a key has a mark that few have, so that what few keys weigh is the same however
        the noise falls."""
        return NOISE * np.where(marks.sink[:, None] | (marks.vertical > 0), QUIET, 1.0)

    def keys(self, places: Ints, marks: Marks, heads: range, like: torch.Tensor) -> torch.Tensor:
        """Marks of keys, (T, len(heads), D)."""
        kv = np.asarray(heads)
        cos, sin = self._phases(places, kv, like)
        sink = marks.sink[:, None, None] * (SPARSE_MARK * self.sink[kv])
        vertical = marks.vertical[:, kv, None] * (SPARSE_MARK * self.vertical[kv])
        topic = COMMON_MARK * self.codes[marks.topic[:, kv]]
        return self._placed([_like(x, like) for x in (sink, vertical, topic)] + [cos * COMMON_MARK, sin * COMMON_MARK], kv)

    def queries(self, places: Ints, marks: Marks, heads: range, like: torch.Tensor) -> torch.Tensor:
        """What queries ask for, (T, len(heads), D)."""
        own = [self.heads[head] for head in heads]
        return self._asked(places, marks, heads, np.array([head.sizes for head in own]), like)

    def _asked(self, places: Ints, marks: Marks, heads: range, sizes: Floats, like: torch.Tensor) -> torch.Tensor:
        """The same of other sizes, (len(heads), parts)."""
        kv = np.asarray(heads) // (self.counts.q // self.counts.kv)
        own, scale = [self.heads[head] for head in heads], self.scale
        of_sink, of_vertical, of_topic = ((sizes[:, PARTS.index(part), None] / scale) for part in ("sink", "vertical", "topic"))
        sink = np.broadcast_to(
            of_sink * self.sink[kv] / (self.sink.shape[1] * SPARSE_MARK), (len(places), len(kv), self.sink.shape[1])
        )
        vertical = np.broadcast_to(of_vertical * self.vertical[kv] / (self.vertical.shape[1] * SPARSE_MARK), sink.shape)
        # Codes of the topics from each one on, as many as a head asks for, summed.
        sums = np.stack([sum(np.roll(self.codes[:-1], -n, 0) for n in range(head.topics)) + 0 * self.codes[:-1] for head in own])
        topic = of_topic * sums[np.arange(len(own)), marks.ask[:, kv]] / (self.topics * COMMON_MARK)
        wave = np.stack([self._wave(head, at, size) for head, at, size in zip(own, kv, sizes, strict=True)]) / (scale * COMMON_MARK)
        cos, sin = self._phases(places, kv, like)
        real, imaginary = _like(wave.real, like), _like(wave.imag, like)
        waves = [cos * real - sin * imaginary, sin * real + cos * imaginary]
        return self._placed([_like(x, like) for x in (sink, vertical, topic)] + waves, kv)

    def _wave(self, head: Head, kv: int, sizes: Floats) -> NDArray[np.complex128]:
        """(F,): by how much a query turns and scales each position of its own."""
        periods = self.periods[kv]
        local, slash = sizes[PARTS.index("local")], sizes[PARTS.index("slash")]
        wave = local * _wide(periods, 4 * head.local) + 0j
        for distance in head.slashes:
            wave = wave + slash * _wide(periods, 2 * head.width) * np.exp(-2j * np.pi * distance / periods)
        return wave

    def _placed(self, coordinates: Sequence[torch.Tensor], kv: Ints) -> torch.Tensor:
        """Coordinates, (T, len(kv), some) each, in their channels."""
        made = torch.cat(list(coordinates), -1)
        made = torch.nn.functional.pad(made, (0, self.counts.dim - made.shape[-1]))
        channels = _index(np.argsort(self.order[kv], -1), made)
        return made.gather(-1, channels.expand(len(made), -1, -1))

    # -- what it is --------------------------------------------------------------------------------------------------

    def stated(self) -> dict[str, Any]:
        """For people: by query head its kind, where its lines are and what was found of its weights."""
        return {
            "critical_share_mean": round(float(np.mean([head.share for head in self.heads])), 4),
            "vertical_rates": [round(float(rate), 6) for rate in self.rates],
            "heads": [head.stated() for head in self.heads],
        }


def _like(x: NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x).to(like.device, like.dtype)


def _index(x: Ints, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x).to(like.device)


def _topics(dim: int) -> int:
    return 1 << ((dim // 4).bit_length() - 1)


def _wide(periods: Floats, shortest: float) -> Floats:
    """Weights of cosines that sum to one, of those with periods from ``shortest`` on; of the two slowest at least."""
    kept = periods >= min(shortest, np.sort(periods)[-2])
    return kept / kept.sum()


@lru_cache(maxsize=64)
def plan(
    critical: float, spread: float, requests: Batch, heads: Heads, softmax: Softmax, seed: int, group: tuple[int, int], layer: int
) -> Plan:
    """The structure of a problem, calibrated."""
    text = f"{seed}/structure/{layer}/{group[0]}/{group[1]}"
    random = np.random.default_rng(seed_of(text))
    longest = int(requests.total.max())
    seen = max(1.0, 0.75 * longest)  # keys of a row of the second half, in the mean
    marks, topics = heads.dim // 8, _topics(heads.dim)
    waves = (heads.dim - 2 * marks - topics) // 2
    steps = np.arange(waves) + random.uniform(-0.3, 0.3, (heads.kv, waves))
    ratio = max(1.05, (2 * longest / SHORTEST) ** (1 / max(1, waves - 1)))
    rare, frequent = 4 / seen, max(16 / seen, 1 / 256)
    made = Plan(
        requests, heads, softmax, text,
        order=np.stack([random.permutation(heads.dim) for _ in range(heads.kv)]),
        sink=random.choice([-1.0, 1.0], (heads.kv, marks)),
        vertical=random.choice([-1.0, 1.0], (heads.kv, marks)),
        periods=SHORTEST * ratio**steps,
        rates=np.minimum(0.5, np.exp(random.uniform(math.log(rare), math.log(frequent), heads.kv))),
    )  # fmt: skip
    normal = NormalDist()
    aims = np.exp([spread * normal.inv_cdf((n + 0.5) / heads.q) for n in range(heads.q)])
    aims = random.permutation(np.minimum(MOST_CRITICAL, critical * aims / aims.mean()))
    kinds = random.permutation([DEALT[n % len(DEALT)] for n in range(heads.q)])
    group_size = heads.q // heads.kv
    rough = tuple(
        _head(str(kind), float(aim) * seen, seen, float(made.rates[n // group_size]), topics, random)
        for n, (kind, aim) in enumerate(zip(kinds, aims, strict=True))
    )
    made = replace(made, heads=rough)
    return replace(made, heads=tuple(_calibrated(made, n, float(aim)) for n, aim in enumerate(aims)))


def _head(kind: str, keys: float, seen: float, rate: float, topics: int, random: np.random.Generator) -> Head:
    """A head whose structure is about so many keys of those that a row sees; its sizes give the structure 95 % of the weight
    where noise has a standard deviation of one."""
    parts = np.array([random.uniform(*between) for between in SHARES[kind]])
    parts /= parts.sum()
    local = int(min(max(NARROW, keys * (1.0 if kind == "a_shape" else 0.3)), seen / 2)) or 1
    slashes: tuple[int, ...] = ()
    lines = int(random.integers(1, 4))
    width = int(max(NARROW / 3, 0.7 * keys / lines))
    if kind == "vertical_slash":
        nearest = max(32, local + 2 * width)
        farthest = max(nearest + 1, 0.7 * seen)
        slashes = tuple(sorted(int(d) for d in np.exp(random.uniform(math.log(nearest), math.log(farthest), lines))))
    asked = int(np.clip(round(keys * topics / (TOPICAL * seen)), 1, max(1, topics // 2))) if kind == "block" else 0
    counts = np.array([SINKS, rate * seen, local, max(1, len(slashes) * width), max(1.0, asked * TOPICAL * seen / topics)])
    background = seen * math.exp(0.5)
    with np.errstate(divide="ignore"):
        sizes = np.where(parts > 0, np.log(19 * background * parts / counts), -np.inf)
    return Head(kind, local, slashes, width, asked, tuple(parts.tolist()), tuple(sizes.tolist()))


# -- calibration -----------------------------------------------------------------------------------------------------


def _calibrated(made: Plan, number: int, aim: float) -> Head:
    """The head with sizes whose parts have about the shares that they were to have, and whose share of critical keys is nearest to
    the aim; and with what was found of its weights."""
    head, looked, softcap = made.heads[number], _looked_at(made, number), made.softmax.softcap
    raw, parts = np.array(head.sizes), np.array(head.parts)

    def sizes(step: int) -> Floats:
        return np.maximum(0.0, raw + LOWEST + STEP * step)

    def share(step: int) -> float:
        return float(np.mean([row.share(sizes(step), softcap) for row in looked]))

    def fitting() -> int:
        low, high = 0, STEPS  # share falls as sizes grow
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) > aim else (low, middle)
        return min((low, high), key=lambda one: abs(share(one) - aim))

    def masses(step: int) -> Floats:
        return np.asarray(np.mean([row.masses(sizes(step), softcap) for row in looked], 0))

    for _ in range(ROUNDS):
        found = masses(fitting()) * (parts > 0)
        wanted = parts * found.sum()
        raw[parts > 0] += np.clip(np.log(wanted[parts > 0] / np.maximum(found[parts > 0], 1e-6)), -MOVE, MOVE)
    step = fitting()
    return replace(head, sizes=tuple(sizes(step).tolist()), share=share(step), masses=tuple(masses(step).tolist()))


@dataclass(frozen=True)
class _Row:
    """A row and keys that it sees: ``weights``, how many keys each stands for; ``noise`` and ``parts`` (parts, keys) of scores;
    ``of`` (parts, keys): which keys are of which part."""

    weights: Floats
    noise: Floats
    parts: Floats
    of: Bools

    def _weighted(self, sizes: Floats, softcap: float) -> tuple[Floats, Floats]:
        scores = self.noise + sizes @ self.parts
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        mass = self.weights * np.exp(scores - scores.max())
        return scores, mass / mass.sum()

    def share(self, sizes: Floats, softcap: float) -> float:
        scores, mass = self._weighted(sizes, softcap)
        order = np.argsort(-scores, kind="stable")
        last = int(np.searchsorted(np.cumsum(mass[order]), MASS))
        return float(self.weights[order[: last + 1]].sum() / self.weights.sum())

    def masses(self, sizes: Floats, softcap: float) -> Floats:
        return np.asarray(self.of @ self._weighted(sizes, softcap)[1])


def _looked_at(made: Plan, number: int) -> list[_Row]:
    """Rows of the second half of the longest request, each with the keys that a causal mask shows it."""
    heads, head = made.counts, made.heads[number]
    random = np.random.default_rng(seed_of(f"{made.text}/calibration/{number}"))
    request = int(made.requests.total.argmax())
    begin, end = made.requests.k_bounds[request : request + 2].tolist()
    kv, single = number // (heads.q // heads.kv), range(number, number + 1)
    bounds = np.linspace((begin + end) // 2, end, ROWS + 1).astype(np.int64).tolist()
    found = []
    for first, last in pairwise(bounds):
        place = int(random.integers(first, max(first + 1, last)))
        seen = (
            _all_keys(made, kv, begin, end).until(place)
            if end - begin <= WHOLE
            else _some_keys(made, kv, begin, place, head, random)
        )
        row = made.marks(np.array([place]))
        asked = [made._asked(np.array([place]), row, single, one[None], LIKE)[0, 0].numpy() for one in np.eye(len(PARTS))]
        noise = made.query_noise[0] * random.standard_normal(heads.dim)
        distance = place - seen.places
        near = np.abs(distance[:, None] - np.array(head.slashes, dtype=np.int64)) <= head.width
        topic = (seen.topic >= 0) & ((seen.topic - row.ask[0, kv]) % made.topics < head.topics)
        of = np.stack([seen.sink, seen.vertical, distance < head.local, near.any(1), topic])
        found.append(_Row(seen.weights, made.scale * seen.k @ noise, made.scale * np.stack(asked) @ seen.k.T, of))
    return found


@dataclass(frozen=True)
class _Keys:
    """Keys of one head, (T,) each but ``k`` (T, D), with noise; ``weights``: how many keys each stands for."""

    places: Ints
    weights: Floats
    sink: Bools
    vertical: Bools
    topic: Ints
    k: Floats

    @classmethod
    def of(cls, made: Plan, kv: int, places: Ints, weights: Floats, marks: Marks, random: np.random.Generator) -> _Keys:
        k = made.keys(places, marks, range(kv, kv + 1), LIKE)[:, 0].numpy()
        k += made.key_noise(marks)[:, kv, None] * random.standard_normal(k.shape)
        return cls(places, weights, marks.sink, marks.vertical[:, kv] > 0, marks.topic[:, kv], k)

    def until(self, place: int) -> _Keys:
        """Those up to a place, of adjacent ones."""
        count = place + 1 - int(self.places[0])
        return _Keys(*(getattr(self, one.name)[:count] for one in fields(self)))


@lru_cache(maxsize=1)
def _all_keys(made: Plan, kv: int, begin: int, end: int) -> _Keys:
    places = np.arange(begin, end)
    random = np.random.default_rng(seed_of(f"{made.text}/keys/{kv}"))
    return _Keys.of(made, kv, places, np.ones(len(places)), made.marks(places), random)


def _some_keys(made: Plan, kv: int, begin: int, place: int, head: Head, random: np.random.Generator) -> _Keys:
    """A sample of a row's keys: the sinks, those near its lines, one of each stratum beyond, each counted from its nearest line;
    and some that are taken as vertical marks, which strata would seldom meet."""
    count, lines = place + 1 - begin, np.array([0, *head.slashes], dtype=np.int64)
    edges = np.unique(np.geomspace(EXACT, count, int(math.log(count / EXACT) / math.log(RATIO))).astype(np.int64))
    widths = np.diff(edges)
    picked = edges[:-1] + (random.random(len(widths)) * widths).astype(np.int64)
    offsets = np.concatenate([-picked[::-1], np.arange(1 - EXACT, EXACT), picked])
    sizes = np.concatenate([widths[::-1], np.ones(2 * EXACT - 1), widths]).astype(np.float64)
    distances = (lines[:, None] + offsets).ravel()
    nearest = np.abs(distances[:, None] - lines).argmin(1) == np.repeat(np.arange(len(lines)), len(offsets))
    kept = np.flatnonzero(nearest & (distances >= 0) & (distances < count - SINKS))
    distances, several = np.unique(distances[kept], return_index=True)
    places = np.concatenate([np.arange(begin, begin + SINKS), place - distances, place - random.integers(0, count, VERTICALS)])
    weights = np.concatenate([np.ones(SINKS), np.tile(sizes, len(lines))[kept[several]], np.zeros(VERTICALS)])
    marks, rate = made.marks(places), float(made.rates[kv])
    sampled, added = weights > 1, np.arange(len(places)) >= len(places) - VERTICALS
    weights = np.where(sampled, weights * (1 - rate), np.where(added, rate * weights[sampled].sum() / VERTICALS, weights))
    strength = added * random.uniform(WEAKEST, 1.0, len(places))
    vertical = np.where((sampled | added)[:, None], strength[:, None], marks.vertical)
    return _Keys.of(made, kv, places, weights, replace(marks, vertical=vertical), random)
