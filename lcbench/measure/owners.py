"""Who holds what of both sides of a problem: whether each result is given once and each key that is used is there at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lcbench.masks.mask import Mask, maps_of
from lcbench.masks.sums import Visible
from lcbench.measure.ranks import EVERY, Ranks, first_refusal
from lcbench.problem import Problem
from lcbench.schedule.held import Held, Part


@dataclass(frozen=True)
class Owners:
    """How what ranks hold adds up.

    Attributes:
        held: what this rank holds.
        wrong: what is wrong with it, of the first context-parallel group that something is wrong with; None if nothing is.
        queries_once, keys_once: whether no two ranks are given the same queries, or the same keys.
        by_tokens: whether each rank is given whole tokens, all heads of them, that no other rank is given, and gives the results of
            its queries.
    """

    held: Held
    wrong: str | None
    queries_once: bool
    keys_once: bool
    by_tokens: bool


def owners(held: Held, mask: Mask, problem: Problem, device: torch.device, ranks: Ranks) -> Owners:
    """What all ranks that share a problem hold together. Collective over all ranks.

    Args:
        mask: what of keys and queries is used.
    """
    parts = (held.out, held.q, held.kv)
    same = np.array_equal(held.q.tokens, held.out.tokens)
    every = ranks.all_gather_object((tuple(part.heads for part in parts), same))
    of_ranks, alike = zip(*every, strict=True)
    counts = [
        list(_counted(part, heads, number, count, device, ranks))
        for part, heads, number, count in zip(
            parts,
            zip(*of_ranks, strict=True),
            (problem.queries, problem.queries, problem.seqlen),
            (problem.heads.q, problem.heads.q, problem.heads.kv),
            strict=True,
        )
    ]
    own = (
        _results(counts[0])
        or _inputs("queries", counts[1], mask, problem, device)
        or _inputs("keys", counts[2], mask, problem, device)
    )
    wrong = first_refusal(EVERY.all_gather_object(own and (f"{ranks.name}: {own}" if ranks.name else own)))
    once = [all(bool((stretch.counts == 1).all()) for stretch in found) for found in counts]
    whole = all(heads is None for of_rank in of_ranks for heads in of_rank)
    return Owners(held, wrong, once[1], once[2], whole and all(alike) and once[1] and once[2])


@dataclass(frozen=True)
class _Stretch:
    """Heads that each rank has all of or none of. ``counts``: how many ranks hold each token, (tokens,). ``outside``: how often
    ranks name a token that there is not."""

    heads: range
    counts: torch.Tensor
    outside: int


def _counted(
    part: Part, heads: tuple[range | None, ...], number: int, count: int, device: torch.device, ranks: Ranks
) -> Iterator[_Stretch]:
    """How many ranks hold each of ``number`` tokens, by stretches of ``count`` heads; ``heads``: those of each rank. Collective."""
    cuts = sorted({0, count} | {end for some in heads if some is not None for end in (some.start, some.stop)})
    mine = range(count) if part.heads is None else part.heads
    inside = part.tokens[(part.tokens >= 0) & (part.tokens < number)]
    found = np.append(np.bincount(inside, minlength=number), len(part.tokens) - len(inside))
    for first, end in pairwise(cuts):
        has = mine.start <= first < mine.stop
        sums = ranks.reduce(torch.from_numpy(found if has else np.zeros_like(found)).to(device))
        yield _Stretch(range(first, end), sums[:-1], int(sums[-1] if 0 <= first < count else sums.sum()))


def _results(found: list[_Stretch]) -> str | None:
    """Each is to be given once."""
    for stretch in found:
        number, heads = len(stretch.counts), _heads(stretch, found)
        if stretch.outside:
            return f"{stretch.outside} tokens that ranks own{heads} are not among the {number} of the sequence"
        wrong = torch.nonzero(stretch.counts != 1).flatten()
        if len(wrong):
            first = int(wrong[0])
            counted = int(stretch.counts[first])
            return f"{len(wrong)} of {number} tokens{heads} are not owned by exactly one rank; token {first} by {counted}"
    return None


def _inputs(what: str, found: list[_Stretch], mask: Mask, problem: Problem, device: torch.device) -> str | None:
    """Each that the mask uses is to be given to some rank."""
    for stretch in found:
        number, heads = len(stretch.counts), _heads(stretch, found)
        if stretch.outside:
            return f"{stretch.outside} {what} that ranks hold{heads} are not among the {number} of the sequence"
        absent = stretch.counts == 0
        if bool(absent.any()):
            side = mask if what == "queries" else mask.transpose()
            group = 1 if what == "queries" else problem.heads.q // problem.heads.kv
            absent &= _used(side, range(stretch.heads.start * group, stretch.heads.stop * group), problem, device)
        wrong = torch.nonzero(absent).flatten()
        if len(wrong):
            return f"{len(wrong)} of {number} {what}{heads} are held by no rank, the first of them {int(wrong[0])}"
    return None


def _used(mask: Mask, heads: range, problem: Problem, device: torch.device) -> torch.Tensor:
    """bool (rows,): which rows see something, for one of these query heads."""
    each = problem.heads.q // maps_of(mask)
    every, ones = np.arange(mask.num_q), torch.ones((1, mask.num_k), device=device)
    numbers = sorted({head // each for head in heads})
    return torch.stack([Visible(mask, every, device, number).sums(ones, whole=True)[0] > 0 for number in numbers]).any(0)


def _heads(stretch: _Stretch, found: list[_Stretch]) -> str:
    """Which heads, where ranks have different ones."""
    return f" of heads {stretch.heads.start} to {stretch.heads.stop - 1}" if len(found) > 1 else ""
