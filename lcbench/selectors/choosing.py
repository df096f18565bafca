"""What selectors share: how many blocks are kept, which of them always, which by their scores; and sums that every rank adds alike.

What is chosen must be the same on every rank, bit for bit, so nothing here depends on how many threads a rank has or on what else
it was given. Matrix products are done by one thread (``steady``), on tensors that begin where memory is aligned (``by_head``). Sums
over a block of keys are trees of elementwise sums (``block_sums``). Where scores are equal, the lower block is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lcbench.masks.band import Ints
from lcbench.masks.block import Keep
from lcbench.selectors.base import Effort, Features, Rows, Selector, blocks_of, check_whole

if TYPE_CHECKING:
    import torch

    from lcbench.problem import Problem


@dataclass(frozen=True)
class Budgeted(Selector):
    """A selector that keeps the blocks with the highest scores, as many as it is told.

    Attributes:
        density: share of the blocks that a block of queries sees, above 0 and up to 1, rounded to whole blocks, at least one.
        blocks: how many of them, at least one, instead of a share; all of them where there are fewer.
        sink: the first so many blocks that a block of queries sees are always kept.
        local: the blocks with the queries' own tokens and ``local - 1`` on either side are always kept; 0: none.

    Blocks that are always kept are counted in: they are more than they should be only where they alone are.

    Raises:
        ValueError: not exactly one of ``density`` and ``blocks``, or a number that none of them may be.
    """

    density: float | None = field(default=None, kw_only=True)
    blocks: int | None = field(default=None, kw_only=True)
    sink: int = field(default=0, kw_only=True)
    local: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and self.blocks is not None:
            raise ValueError(
                f"selector.density={self.density} and selector.blocks={self.blocks} both say how many blocks are kept; "
                "set one of them to null"
            )
        if self.density is None and self.blocks is None:
            raise ValueError("selector.density=null and selector.blocks=null say not how many blocks are kept; set one of them")
        if self.density is not None:
            check_share("density", self.density)
        else:
            check_whole("blocks", self.blocks, 1)
        check_whole("sink", self.sink, 0)
        check_whole("local", self.local, 0)

    def budget(self, rows: Rows) -> int:
        """How many blocks a block of queries keeps, of each map."""
        seen = int((rows.pairs > 0).sum())
        return min(seen, self.blocks if self.blocks is not None else share_of(seen, self.density))

    def always(self, rows: Rows, edges: Ints) -> Keep:
        """Blocks that are kept whatever their scores, bool (columns,)."""
        return sinks(rows, self.sink) | own_blocks(rows, edges, rows.number * self.q_block, self.local)

    def asked(self, rows: Rows, edges: Ints) -> tuple[int, Keep] | None:
        return self.budget(rows), self.always(rows, edges)

    def work(self, problem: Problem, pairs: float) -> Effort | None:
        """Scores, and their order."""
        scoring = self.scoring(problem, pairs)
        return None if scoring is None else scoring + ordering(self, problem, pairs)

    def scoring(self, problem: Problem, pairs: float) -> Effort | None:
        """What scores take, features of keys included; None: nobody has counted it.

        Args:
            pairs: of a query head within the cell's mask.
        """
        return None

    @abstractmethod
    def score(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> torch.Tensor:
        """How much a block of queries wants the blocks that it sees, (maps, last - first) of those that ``reach`` names; blocks
        without pairs among them may have any score. Of equal scores the lower block is kept."""

    def keep(self, rows: Rows, keys: Features, edges: Ints, problem: Problem) -> Keep:
        import torch

        first, last = reach(rows)
        if first == last:
            return np.zeros((self.maps(problem.heads), len(rows.pairs)), dtype=bool)
        with steady(rows.q.device):
            found = self.score(rows, keys, edges, problem)
        always = self.always(rows, edges)
        counts = self.counts(found, always[first:last], rows)
        found = torch.nn.functional.pad(found, (first, len(rows.pairs) - last), value=-torch.inf)
        return covering(found, counts, always, rows, edges)

    def counts(self, scores: torch.Tensor, always: Keep, rows: Rows) -> Ints:
        """How many blocks of each map are kept, (maps,); ``scores`` and ``always`` are of the blocks that ``reach`` names."""
        return np.full(len(scores), self.budget(rows))


# Bytes per score of a block, and operations per block of queries, to put the blocks in order and keep the first; bytes per bit of a
# map to put all of it together; operations of sums over a block of keys.
ORDERED, ORDERING, UNPACKED, SUMMING = 120, 10, 4, 5


def ordering(selector: Selector, problem: Problem, pairs: float) -> Effort:
    """What it takes to keep the blocks of highest scores and to tell all ranks, by ``pairs`` of a query head."""
    (rows, columns), maps = blocks_of(selector, problem), selector.maps(problem.heads)
    scores = maps * blocks_seen(selector, problem, pairs)
    bits = float(maps * rows * columns)
    return Effort(moved=ORDERED * scores, kernels=float(ORDERING * rows), shared=UNPACKED * bits, told=bits / 8)


def blocks_seen(selector: Selector, problem: Problem, pairs: float) -> float:
    """About how many blocks have some of the pairs of a query head: as many as they fill, and what is cut of each row of blocks."""
    rows, columns = blocks_of(selector, problem)
    return min(pairs / (selector.q_block * selector.k_block) + rows / 2, float(rows * columns))


def by_head_effort(problem: Problem, each: float = 1.0) -> Effort:
    """Whole keys, or ``each`` of a number of theirs, that all ranks are told and have by head."""
    numbers = each * problem.seqlen * problem.heads.kv * problem.heads.dim
    return Effort(shared=numbers * 2 * problem.sum_itemsize, told=numbers * problem.itemsize)


def check_share(option: str, value: object) -> None:
    """Raises ValueError unless the value of ``selector.<option>`` is a number above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"selector.{option}={value} is no share above 0 and up to 1, such as 0.2")


def share_of(seen: int, density: float | None) -> int:
    """A share of so many blocks, rounded to whole ones, at least one."""
    assert density is not None
    return max(1, round(density * seen))


def sinks(rows: Rows, count: int) -> Keep:
    """The first so many blocks of keys that a block of queries sees, bool (columns,)."""
    seen = rows.pairs > 0
    found: Keep = seen & (np.cumsum(seen) <= count)
    return found


def own_blocks(rows: Rows, edges: Ints, first: int, count: int) -> Keep:
    """The blocks of keys with a block of queries' own tokens, and ``count - 1`` on either side, of those it sees, bool (columns,).

    Args:
        first: the token of the first query.
        count: 0: none.
    """
    found = np.zeros(len(rows.pairs), dtype=bool)
    if count:
        own = np.searchsorted(edges, [first, first + len(rows.q) - 1], side="right") - 1
        found[max(0, own[0] - count + 1) : own[1] + count] = True
    return found & (rows.pairs > 0)


def top(scores: torch.Tensor, counts: Ints, always: Keep, seen: Keep) -> Keep:
    """As many blocks of highest scores of each map as ``counts`` has, those that are ``always`` kept among them; of equal ones the
    lower.

    Args:
        scores: (maps, columns).
        counts: of the blocks that are kept, (maps,); at least as many as ``always`` has are.
        always, seen: bool (columns,), the former also (maps, columns); blocks that are not ``seen`` are never kept.

    Returns:
        bool (maps, columns).
    """
    import torch

    columns = np.nonzero(seen)[0]
    keep = np.zeros(tuple(scores.shape), dtype=bool)
    own = scores[:, torch.from_numpy(columns).to(scores.device)]
    order = torch.sort(own, dim=-1, descending=True, stable=True).indices.cpu().numpy()
    first = np.take_along_axis(np.broadcast_to(always, keep.shape)[:, columns], order, axis=1)
    order = np.take_along_axis(order, np.argsort(~first, axis=1, kind="stable"), axis=1)
    kept = np.arange(len(columns)) < np.maximum(counts[:, None], first.sum(1, keepdims=True))
    np.put_along_axis(keep, columns[order], kept, axis=1)
    return keep


def covering(scores: torch.Tensor, counts: Ints, always: Keep, rows: Rows, edges: Ints) -> Keep:
    """As ``top``, and every query that sees a key sees one of a block that is kept: where the blocks of highest scores leave
    queries without, those that most of them see are always kept as well, of equal ones that of the highest score.

    Returns:
        bool (maps, columns); ``counts`` blocks of each map, unless so few cannot have a key for every query.
    """
    seen = rows.pairs > 0
    keep = top(scores, counts, always, seen)
    whole = rows.pairs == len(rows.q) * np.diff(edges)
    lacking = np.nonzero(~keep[:, whole].any(1))[0]
    if not len(lacking) or not seen.any():
        return keep
    visible = seen_blocks(rows, edges)
    visible = visible[visible.any(1)].astype(np.int64)
    forced = np.broadcast_to(always, keep.shape).copy()
    while len(lacking):
        without = (visible @ keep[lacking].T.astype(np.int64) == 0).T  # (maps, queries)
        some = without.any(1)
        lacking, without = lacking[some], without[some]
        if not len(lacking):
            break
        # Queries without a key, by blocks that are to be kept in any case; each round adds one such block.
        covered = (visible @ forced[lacking].T.astype(np.int64) > 0).T
        gain = (~covered).astype(np.int64) @ visible
        own = scores[lacking.tolist()].cpu().numpy()
        best = np.where(gain == gain.max(1, keepdims=True), own, -np.inf)
        forced[lacking, best.argmax(1)] = True
        keep[lacking] = top(scores[lacking.tolist()], counts[lacking], forced[lacking], seen)
    return keep


def seen_blocks(rows: Rows, edges: Ints) -> Keep:
    """Whether a query sees any key of a block, bool (T, columns)."""
    at, begin, end = rows.sees.intervals(np.arange(len(rows.q)))
    return _stretches(at, np.searchsorted(edges, begin, side="right") - 1, np.searchsorted(edges, end), rows, len(edges) - 1)


def seen_whole(rows: Rows, begins: Ints, ends: Ints) -> Keep:
    """Whether a query sees all keys ``begin ... end - 1`` of each of some stretches of keys, bool (T, stretches).

    Args:
        begins, ends: (stretches,), both rising.
    """
    at, begin, end = rows.sees.intervals(np.arange(len(rows.q)))
    first, last = np.searchsorted(begins, begin), np.searchsorted(ends, end, side="right")
    return _stretches(at, first, np.maximum(first, last), rows, len(begins))


def _stretches(at: Ints, first: Ints, last: Ints, rows: Rows, columns: int) -> Keep:
    """bool (T, columns): whether a column lies in ``first ... last - 1`` of one of a row's stretches."""
    step = np.zeros((len(rows.q), columns + 1), dtype=np.int32)
    np.add.at(step, (at, first), 1)
    np.add.at(step, (at, last), -1)
    found: Keep = np.cumsum(step, axis=1)[:, :-1] > 0
    return found


def seen_keys(rows: Rows, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """Which keys ``begin ... end - 1`` a query sees, bool (T, end - begin), on a device."""
    import torch

    q, k = (torch.arange(count, device=device) for count in (len(rows.q), end - begin))
    found = torch.zeros((len(q), len(k)), dtype=torch.bool, device=q.device)
    for band in rows.sees.crop(0, len(q), begin, end):
        part = slice(band.q0, band.q1), slice(band.k0, band.k1)
        distance = k[part[1]] - q[part[0], None]
        found[part] |= (distance >= band.lo) & (distance <= band.hi)
    return found


def reach(rows: Rows) -> tuple[int, int]:
    """(first column, last column + 1) of the blocks that a block of queries sees; (0, 0): it sees none."""
    columns = np.nonzero(rows.pairs)[0]
    return (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)


@contextmanager
def steady(device: torch.device) -> Iterator[None]:
    """Matrix products of a CPU done by one thread: several threads add in an order that depends on how many they are."""
    import torch

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def by_head(x: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as (H, T, D) in the type of sums, in memory of its own: products may depend on where their operands begin."""
    from lcbench.kernels.base import accumulation_dtype

    tokens, heads, dim = x.shape
    return x.new_empty((heads, tokens, dim), dtype=accumulation_dtype(x.dtype)).copy_(x.transpose(0, 1))


def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(Hq, T, n): of queries (Hq, T, D) with keys (Hk, n, D), Hq / Hk adjacent query heads with each key/value head."""
    each, tokens = len(q) // len(k), q.shape[1]
    with steady(q.device):
        return (q.reshape(len(k), each * tokens, -1) @ k.mT).view(len(q), tokens, -1)


def scores(q: torch.Tensor, k: torch.Tensor, problem: Problem) -> torch.Tensor:
    """``products`` scaled and softcapped as the problem says: what the softmax is of."""
    import torch

    found, cap = products(q, k) * problem.softmax_scale, problem.softmax.softcap
    return cap * torch.tanh(found / cap) if cap else found


def of_maps(x: torch.Tensor, maps: int) -> torch.Tensor:
    """(maps, ...): what (Hq, ...) says of each query head, summed over the query heads of each map."""
    return x.unflatten(0, (maps, -1)).sum(1)


def block_sums(x: torch.Tensor, sizes: Ints) -> torch.Tensor:
    """(blocks, ...): sums over each block's rows of (T, ...), blocks of ``sizes`` rows one behind the other, in the type of sums.

    A block's sum is a tree of elementwise sums, the same whichever blocks are summed together.
    """
    import torch

    from lcbench.kernels.base import accumulation_dtype

    width = 1 << int(max(sizes) - 1).bit_length() if len(sizes) else 1
    starts = np.cumsum(sizes) - sizes
    place = np.repeat(np.arange(len(sizes)) * width - starts, sizes) + np.arange(len(x))
    level = x.new_zeros((len(sizes) * width, *x.shape[1:]), dtype=accumulation_dtype(x.dtype))
    level[torch.from_numpy(place).to(x.device)] = x.to(level.dtype)
    level = level.unflatten(0, (len(sizes), width))
    while (width := width // 2) >= 1:
        level = level[:, :width] + level[:, width:]
    return level[:, 0]


def block_means(x: torch.Tensor, sizes: Ints) -> torch.Tensor:
    """(blocks, ...): means as ``block_sums`` adds them."""
    import torch

    sums = block_sums(x, sizes)
    return sums / torch.from_numpy(sizes).to(sums).unflatten(0, (-1, *[1] * (x.dim() - 1)))


def each_block(of: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, sizes: Ints) -> torch.Tensor:
    """What a function gives of the rows (T, ...) of every block, each by itself, one behind the other: for products, whose sums
    depend on how many rows there are."""
    import torch

    return torch.cat([of(own) for own in x.split(sizes.tolist())])


def of_columns(x: torch.Tensor, size: int, fill: float) -> torch.Tensor:
    """(..., n) as (..., blocks, size): the keys of each block, the last one filled up."""
    import torch

    blocks = -(-x.shape[-1] // size)
    return torch.nn.functional.pad(x, (0, blocks * size - x.shape[-1]), value=fill).unflatten(-1, (blocks, size))
