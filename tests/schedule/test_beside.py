"""Schedules of sub-groups side by side, without processes: they are proven, and cost what each costs by itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.masks.band import BandMask
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.documents import packed
from lcbench.masks.lengths import Explicit
from lcbench.masks.prefix_lm_document import prefix_lm_document
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.beside import Member, beside
from lcbench.schedule.fault import ScheduleError
from lcbench.schedule.layout import documents
from lcbench.schedule.lowering import OPERATIONS, Collective, collectives
from lcbench.schedule.simulate import Modelled, prepare
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_mask

HEADS = Heads(8, 2, 8)
SHARED: tuple[Scheduled, ...] = (
    Ring(), Ring("documents"), Ring("striped"), Ulysses(), Ulysses(uneven_heads=True), Ulysses(stages=2), USP(), USP(2),
    LoongTrain(), AllGather(), AllGather(heads_per_step=1), GroupCast(), TokenRing(), LightSeq(), Hybrid(),
)  # fmt: skip


def problem_of(seqlen: int, scale: Scale, direction: str = "forward_backward") -> Problem:
    return Problem(seqlen, HEADS, scale, "bfloat16", direction)


Placed = tuple[Scheduled, list[int], list[int]]  # a strategy, ranks and documents


def members(mask: BandMask, groups: list[Placed], direction: str = "forward_backward") -> list[tuple[Member, BandMask, Problem]]:
    bounds, _ = documents(mask)
    found = []
    for strategy, ranks, numbers in groups:
        tile = packed(mask, bounds, np.array(numbers))
        problem = problem_of(tile.num_q, Scale(1, len(ranks)), direction)
        assert strategy.unsupported(problem, tile) is None
        stretches = np.stack([bounds[numbers], np.diff(bounds)[numbers]], axis=1)
        found.append((Member(strategy.schedule(problem, tile), np.array(ranks), stretches), tile, problem))
    return found


@st.composite
def compositions(draw: st.DrawFn) -> tuple[BandMask, list[Placed], int]:
    """A mask of documents, which sub-groups share them by which strategy, and how many ranks there are."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    make = draw(st.sampled_from((causal_document, document, prefix_lm_document)))
    mask = make(sum(lengths), seed=(draw(st.integers(0, 5)), 0), lengths=Explicit(lengths))
    bounds, _ = documents(mask)
    order = draw(st.permutations(range(len(bounds) - 1)))
    cuts = sorted({0, len(order), *draw(st.lists(st.integers(0, len(order)), max_size=3))})
    parts = [list(order[a:b]) for a, b in pairwise(cuts)]
    tokens = [int(np.diff(bounds)[part].sum()) for part in parts]
    sizes = [draw(st.integers(1, min(5, max(1, each // 2)))) for each in tokens]
    ranks = sum(sizes) + draw(st.integers(0, 2))
    every, groups = draw(st.permutations(range(ranks))), []
    for part, seqlen, size in zip(parts, tokens, sizes, strict=True):
        tile = packed(mask, bounds, np.array(part))
        able = [each for each in SHARED if each.unsupported(problem_of(seqlen, Scale(1, size)), tile) is None]
        groups.append((draw(st.sampled_from(able)), [every.pop() for _ in range(size)], part))
    return mask, groups, ranks


@pytest.mark.slow
@settings(max_examples=150)
@given(compositions())
def test_sub_groups_side_by_side_are_proven_and_send_what_each_sends(made: tuple[BandMask, list[Placed], int]) -> None:
    mask, groups, ranks = made
    each = members(mask, groups)
    whole = problem_of(mask.num_q, Scale(1, ranks))
    schedule = beside([member for member, _, _ in each], ranks)
    report = verify(schedule, mask, whole)
    simulated = prepare(Modelled(schedule, mask, whole))
    for member, tile, problem in each:
        alone = verify(member.schedule, tile, problem)
        assert np.array_equal(report.rank_pairs[member.ranks], alone.rank_pairs)
        assert np.array_equal(report.forward_bytes[member.ranks], alone.forward_bytes)
        assert np.array_equal(report.backward_bytes[member.ranks], alone.backward_bytes)
        own = prepare(Modelled(member.schedule, tile, problem))
        for place, rank in enumerate(member.ranks.tolist()):
            mine, theirs = simulated.tiling.rank == rank, own.tiling.rank == place
            for name in ("pairs", "rows", "keys", "q_heads", "kv_heads"):
                of_both = getattr(simulated.tiling.tiles, name)[mine], getattr(own.tiling.tiles, name)[theirs]
                assert np.array_equal(*map(np.sort, of_both)), name
    for rank in set(range(ranks)) - {rank for _, own, _ in groups for rank in own}:
        assert (report.rank_pairs[rank], report.buffer_bytes(rank), len(schedule.q.tokens(rank))) == (0, 0, 0)
    assert str(schedule)


def sets_of(found: list[Collective | None]) -> set[tuple[str, tuple[int, ...]]]:
    return {(each.operation, ranks) for each in found if each is not None for ranks in each.sets}


def test_collectives_are_those_of_each_sub_group() -> None:
    lengths = [32, 48, 16, 64, 40, 24]
    mask = causal_document(sum(lengths), seed=(0, 0), lengths=Explicit(lengths))
    # Two of one kind, one of another size, one whose tokens its ranks cannot share evenly, a grid, and rings beside all of them.
    groups: list[Placed] = [
        (Ulysses(), [9, 0], [0, 2]), (Ulysses(), [3, 5], [1]), (USP(2, layout="contiguous"), [1, 4, 6, 8], [3]),
        (Ring(), [2, 7, 10], [4]), (Ring(), [11], [5]),
    ]  # fmt: skip
    each = members(mask, groups)
    problem = problem_of(mask.num_q, Scale(1, 12))
    schedule = beside([member for member, _, _ in each], 12)
    found = collectives(schedule, traffic(schedule, backward=True), problem, OPERATIONS["nccl"])
    pairs = [(0, 9), (3, 5), (1, 4), (6, 8)]
    assert sets_of(found) == {("all_to_all", pair) for pair in pairs}
    whole = sum(each is not None for each in found)
    assert whole == 2 * 6  # q, kv and final of forward, dout and both gradients of backward; the two alike go together


def test_a_rank_of_two_sub_groups_is_refused() -> None:
    mask = causal_document(32, seed=(0, 0), lengths=Explicit([16, 16]))
    each = members(mask, [(Ring(), [0, 1], [0]), (Ring(), [1, 2], [1])])
    with pytest.raises(ValueError, match="rank 1 2 times"):
        beside([member for member, _, _ in each], 3)
    with pytest.raises(ValueError, match="3 ranks has a schedule of 2"):
        beside([Member(each[0][0].schedule, np.arange(3), each[0][0].stretches)], 3)


def test_tokens_that_two_sub_groups_have_are_found() -> None:
    mask = causal_document(32, seed=(0, 0), lengths=Explicit([16, 16]))
    each = members(mask, [(Ring(), [0, 1], [0]), (Ring(), [2, 3], [0])])
    with pytest.raises(ScheduleError, match="exactly once"):
        verify(beside([member for member, _, _ in each], 4), mask, problem_of(32, Scale(1, 4)))


@given(compositions())
@pytest.mark.slow
def test_documents_are_packed_as_they_are_in_a_dense_mask(made: tuple[BandMask, list[Placed], int]) -> None:
    mask, groups, _ = made
    bounds, _ = documents(mask)
    numbers = groups[0][2]
    tokens = np.concatenate([np.arange(bounds[n], bounds[n + 1]) for n in numbers])
    dense = dense_mask(mask.num_q, mask.num_k, mask)
    found = packed(mask, bounds, np.array(numbers))
    assert np.array_equal(dense_mask(found.num_q, found.num_k, found), dense[np.ix_(tokens, tokens)])


# -- the strategy that has them in attention cells -----------------------------------------------------------------------


@pytest.mark.parametrize("within", [None, ["ring"], ["ulysses", "ring"], ["usp", "ulysses"]])
@pytest.mark.parametrize("ranks", [None, [5, 0, 3, 1, 4, 2]])
def test_hybrid_shares_documents_by_what_it_is_given(within: list[str] | None, ranks: list[int] | None) -> None:
    mask = causal_document(176, seed=(0, 0), lengths=Explicit([40, 16, 32, 24, 64]))
    hybrid = Hybrid([4, 1, 1], [0, 1, 0, 2, 0], ranks, within)
    problem = problem_of(176, Scale(1, 6))
    assert hybrid.unsupported(problem, mask) is None
    report = verify(hybrid.schedule(problem, mask), mask, problem)
    bounds, _ = documents(mask)
    alone = (ranks or list(range(6)))[4]
    assert np.array_equal(report.schedule.q.tokens(alone), np.arange(bounds[1], bounds[2]))
    assert (len(report.schedule.heads) > 1) == (within is not None and within[0] != "ring")


def test_hybrid_says_which_sub_group_cannot_share() -> None:
    mask = causal_document(176, seed=(0, 0), lengths=Explicit([40, 16, 32, 24, 64]))
    refused = Hybrid([3, 3], [0, 1, 0, 1, 0], within=["ulysses"]).unsupported(problem_of(176, Scale(1, 6)), mask)
    assert refused == "sub-group 0: ulysses: cannot split 8 query heads evenly over 3 ranks"
    wrong = Hybrid([3, 3], ranks=[0, 1, 2, 3, 4, 4]).unsupported(problem_of(176, Scale(1, 6)), mask)
    assert wrong == "ranks=[0, 1, 2, 3, 4, 4] are not each of the ranks 0 to 5 of scale=1x6 once"
    with pytest.raises(ValueError, match=r"cp.within=\['rign'\] is no list of some of ring, ulysses, usp"):
        Hybrid(within=["rign"])
