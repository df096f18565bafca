"""States of linear attention as moves: schedules are proven, broken ones are found, bytes are the formulas, and backward,
collectives and simulation follow from the same rows."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.base import Scheduled
from lcbench.cp.lasp import LASP
from lcbench.cp.lasp2 import LASP2
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.zeco import ZeCO
from lcbench.masks.causal import causal
from lcbench.problem import RULES, Heads, Problem, Rule, Scale
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.fault import ScheduleError
from lcbench.schedule.layout import zigzag
from lcbench.schedule.lowering import OPERATIONS, collectives
from lcbench.schedule.machine import Link, Machine
from lcbench.schedule.schedule import Move, Schedule, Step, rows, singles
from lcbench.schedule.simulate import Modelled, simulate
from lcbench.schedule.states import Arrivals, backward_times
from lcbench.schedule.verify import ScheduleCost, verify

HEADS = Heads(16, 8, 64, 128)
STRATEGIES: list[Scheduled] = [LASP(), LASP2(), ZeCO(1), ZeCO(3), ZeCO(8)]
COUNTS = (1, 2, 3, 4, 5, 8, 16, 96)


def problem_of(ranks: int, seqlen: int = 1013, rule: Rule = "gla", dtype: str = "bfloat16", heads: Heads = HEADS) -> Problem:
    scale = Scale(2, ranks // 2) if ranks % 2 == 0 else Scale(1, ranks)
    return Problem(seqlen, heads, scale, dtype, "forward_backward", rule=rule)


def report_of(strategy: Scheduled, problem: Problem) -> ScheduleCost:
    mask = causal(problem.seqlen)
    assert strategy.unsupported(problem, mask) is None
    return verify(strategy.schedule(problem, mask), mask, problem)


def state_bytes(problem: Problem) -> int:
    """Hk Dk Dv numbers of the type of sums."""
    return problem.heads.kv * problem.heads.dim * problem.heads.v * max(4, problem.itemsize)


def summary_bytes(problem: Problem) -> int:
    """A state and a transition: Dk numbers of each head, or with the delta rule Dk x Dk."""
    dim = problem.heads.dim
    transition = dim if problem.rule == "gla" else dim * dim
    return state_bytes(problem) + problem.heads.kv * transition * max(4, problem.itemsize)


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_bytes_are_the_formulas_and_do_not_depend_on_length(ranks: int, rule: Rule) -> None:
    for seqlen in (1, 7, 1013, 1 << 20):
        for dtype in ("bfloat16", "float64"):
            problem = problem_of(ranks, seqlen, rule, dtype)
            for strategy in STRATEGIES:
                report = report_of(strategy, problem)
                assert report.step_pairs.sum() == seqlen * HEADS.q  # every token of every query head, once
                if isinstance(strategy, LASP2):
                    forward = backward = [(ranks - 1) * summary_bytes(problem)] * ranks
                else:
                    forward = [state_bytes(problem)] * (ranks - 1) + [0]
                    backward = forward[::-1]
                assert report.forward_bytes.tolist() == forward, strategy
                assert report.backward_bytes.tolist() == backward, strategy
                most = max(*forward, *backward) if ranks > 1 else 0
                assert max(report.buffer_bytes(rank) for rank in range(ranks)) == most


@pytest.mark.parametrize("rule", RULES)
def test_ulysses_takes_gates_along_and_depends_on_length(rule: Rule) -> None:
    """Each rank gives all others their heads' part of its tokens: q, k and v, and gates in the type of sums; and gets out back."""
    for seqlen in (64, 128):
        problem = problem_of(4, seqlen, rule)
        report = report_of(Ulysses(), problem)
        gates = HEADS.dim if rule == "gla" else 2
        operands = HEADS.q * HEADS.dim + HEADS.kv * (HEADS.dim + HEADS.v)
        each = 3 * seqlen // 4 // 4  # tokens times ranks that they go to, over the ranks that share the heads
        sums = each * 4 * HEADS.kv * gates
        forward = each * 2 * (operands + HEADS.q * HEADS.v) + sums
        assert report.forward_bytes.tolist() == [forward] * 4
        assert report.backward_bytes.tolist() == [forward] * 4  # dout goes, gradients come back
        found = collectives(report.schedule, report.traffic, problem, OPERATIONS["nccl"])
        assert {each.operation for each in found if each is not None} == {"all_to_all"}
        assert None not in found


def test_kv_heads_that_several_ranks_have_are_summed() -> None:
    problem = problem_of(4, 64, "gated_delta_rule", heads=Heads(8, 2, 16))
    kinds = [t.kind for t in report_of(Ulysses(), problem).traffic.transfers]
    assert {"kv", "gates", "dkv", "dgates"} <= set(kinds)
    assert "final_dgates" not in kinds


@pytest.mark.parametrize(("strategy", "hops"), [(LASP(), 1), (ZeCO(4), 4)], ids=["lasp", "zeco"])
def test_a_chain_has_as_many_steps_as_its_blocks_need(strategy: Scheduled, hops: int) -> None:
    """P - 1 + K - 1 steps with messages, in each of which a rank sends one K-th of a state at most."""
    for ranks in (2, 3, 8):
        problem = problem_of(ranks)
        report = report_of(strategy, problem)
        sends = [t for t in report.traffic.transfers if t.kind == "state"]
        assert [t.begin for t in sends] == list(range(ranks - 1 + hops - 1))
        assert {size for t in sends for size in t.bytes(report.schedule, problem).tolist()} == {state_bytes(problem) // hops}
        for transfer in sends:
            assert len(set(transfer.rows[:, 0].tolist())) == len(transfer.rows)


def test_summaries_of_all_are_an_all_gather_each_way() -> None:
    for ranks in (2, 5, 8):
        problem = problem_of(ranks, 3)  # some ranks have no token
        report = report_of(LASP2(), problem)
        found = collectives(report.schedule, report.traffic, problem, OPERATIONS["nccl"])
        assert [t.kind for t in report.traffic.transfers] == ["summary", "dsummary"]
        assert [(each.operation, each.sets) for each in found if each is not None] == [("all_gather", (tuple(range(ranks)),))] * 2
        assert collectives(report.schedule, report.traffic, problem, OPERATIONS["gloo"]) == [None, None]


def test_a_chain_is_no_collective() -> None:
    problem = problem_of(4)
    report = report_of(ZeCO(4), problem)
    assert set(collectives(report.schedule, report.traffic, problem, OPERATIONS["nccl"])) == {None}


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_backward_is_forward_from_the_last_shard_to_the_first(strategy: Scheduled) -> None:
    """Numbered from the last one, the gradients of a schedule's states come as its states do."""
    problem = problem_of(6)
    schedule, ranks = strategy.schedule(problem, causal(problem.seqlen)), 6
    moves = traffic(schedule, backward=True, gates=True)
    forward, backward = (Arrivals(schedule, moves, backward=each) for each in (False, True))
    group = len(schedule.heads) - 1
    for rank in range(ranks):
        for part in forward.parts(group):
            one = forward.before(rank, part, rank)
            assert one is not None
            assert backward.before(ranks - 1 - rank, part, rank) == one
    times = backward_times(schedule, moves)
    assert times.min() > moves.steps
    assert times.max() <= 2 * moves.steps
    tiles = [row for step in schedule.steps for row in step.tiles.tolist()]
    for time, (rank, group, _, bundle) in zip(times.tolist(), tiles, strict=True):
        for part in backward.parts(group):
            assert backward.before(rank, part, ranks - 1 - bundle, time) is not None  # it is there by then


# -- broken schedules --------------------------------------------------------------------------------------------------


def broken(schedule: Schedule, number: int, step: Step) -> Schedule:
    steps = list(schedule.steps)
    steps[number] = step
    return dataclasses.replace(schedule, steps=tuple(steps))


def fault_of(schedule: Schedule, problem: Problem) -> str:
    with pytest.raises(ScheduleError) as caught:
        verify(schedule, causal(problem.seqlen), problem)
    return caught.value.fault


BREAKS = ("lost", "late", "twice", "elsewhere", "other shard", "other heads", "early", "tile lost", "tile twice", "other tile")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([LASP(), ZeCO(3), LASP2()]), st.integers(3, 6), st.sampled_from(BREAKS), st.randoms(use_true_random=False)
)  # fmt: skip
@pytest.mark.slow
def test_whatever_is_broken_is_found(strategy: Scheduled, ranks: int, how: str, random: object) -> None:
    """One row of a move or of tiles is dropped, doubled, moved in time or to another rank, shard or head group."""
    choose = random.randrange  # type: ignore[attr-defined]
    problem = problem_of(ranks)
    schedule = strategy.schedule(problem, causal(problem.seqlen))
    wanted = [n for n, step in enumerate(schedule.steps) if (len(step.tiles) if "tile" in how else len(step.moves))]
    number = wanted[choose(len(wanted))]
    step = schedule.steps[number]
    if "tile" in how:
        row = choose(len(step.tiles))
        tiles = step.tiles.copy()
        if how == "tile lost":
            tiles = np.delete(tiles, row, axis=0)
        elif how == "tile twice":
            tiles = np.concatenate([tiles, tiles[row : row + 1]])
        else:
            tiles[row, 2:] = (tiles[row, 2] + 1) % ranks
        fault_of(broken(schedule, number, replace(step, tiles=tiles)), problem)
        return
    (move,) = step.moves
    # A summary that comes to a rank before its owner's shard is of no use there, and may be missing.
    useful = [i for i, (source, to, *_) in enumerate(move.rows.tolist()) if move.kind == "state" or source < to]
    row = useful[choose(len(useful))]
    moved = move.rows.copy()
    if how == "lost":
        moved = np.delete(moved, row, axis=0)
    elif how == "twice":
        moved = np.concatenate([moved, moved[row : row + 1]])
    elif how == "elsewhere":
        moved[row, 1] = moved[row, 0]
    elif how == "other shard":
        moved[row, 2] = (moved[row, 2] + 1) % ranks
    elif how == "other heads":
        if len(schedule.heads) == 1:
            return
        moved[row, 3] = (moved[row, 3] + 1) % len(schedule.heads)
    elif how in ("late", "early"):
        late = Move(move.kind, moved[row : row + 1])
        kept = replace(move, rows=np.delete(moved, row, axis=0))
        other = number + (1 if how == "late" else -1)
        if not 0 <= other < len(schedule.steps) or (how == "late" and move.kind == "state" and isinstance(strategy, ZeCO)):
            return  # a block that is passed on in the order of its steps may come later, where nobody waits for it
        if how == "early" and moved[row, 0] == 0:
            return  # the first rank's state is there from the begin
        steps = list(schedule.steps)
        steps[number] = replace(step, moves=(kept,) if len(kept.rows) else ())
        steps[other] = replace(steps[other], moves=(*steps[other].moves, late))
        fault_of(replace(schedule, steps=tuple(steps)), problem)
        return
    fault_of(broken(schedule, number, replace(step, moves=(replace(move, rows=moved),) if len(moved) else ())), problem)


def test_faults_name_step_and_rank() -> None:
    problem = problem_of(3)
    schedule = LASP().schedule(problem, causal(problem.seqlen))
    late = broken(schedule, 1, replace(schedule.steps[1], moves=()))
    assert fault_of(late, problem) == "step 2: rank 2 computes shard 2 before the state of shards 0 to 1, heads 0, is there"
    swapped = replace(schedule, steps=(schedule.steps[1], schedule.steps[0], schedule.steps[2]))
    assert "state of shard 1, heads 0, (rank 1 to 2) is sent by a rank that cannot put it together yet" in fault_of(
        swapped, problem
    )
    more = Step(schedule.steps[0].tiles, (*schedule.steps[0].moves, Move("state", rows(0, 2, 0, 0))))
    assert "state of shard 0, heads 0, is sent and never used (rank 0 to 2)" in fault_of(broken(schedule, 0, more), problem)
    assert "kinds are q, kv" in fault_of(schedule, replace(problem, rule=None))


def test_states_need_stretches_in_their_order() -> None:
    problem = problem_of(3)
    schedule = LASP().schedule(problem, causal(problem.seqlen))
    folded = Schedule.of(3, zigzag(problem.seqlen, 3), np.arange(3), schedule.heads, singles(3), schedule.steps)
    assert "not stretches of tokens in their order" in fault_of(folded, problem)
    steps = (*schedule.steps[:2], Step(rows(1, 0, 2, 2)))
    one = Schedule.of(3, schedule.k.shards, np.array([0, 1, 1]), schedule.heads, singles(3), steps)
    assert "some rank has no shard, or several" in fault_of(one, problem)


def test_what_cannot_be_turned_round_is_refused() -> None:
    """Rank 2 gets the state after shard 0 and the summary of shard 1; in backward shard 0 lacks what shard 1 does."""
    problem = problem_of(3)
    schedule = LASP().schedule(problem, causal(problem.seqlen))
    moves = (Move("state", rows([0, 0], [1, 2], 0, 0)), Move("summary", rows(1, 2, 1, 0)))
    tiles = rows([0, 1, 2], 0, [0, 1, 2], [0, 1, 2])
    mixed = replace(schedule, steps=(Step(rows([], [], [], []), moves), Step(tiles)))
    verify(mixed, causal(problem.seqlen), replace(problem, direction="forward"))
    assert "dstate of shard 0" in fault_of(mixed, problem)


def test_too_many_blocks_are_refused() -> None:
    problem = problem_of(2)
    assert "8 key/value heads into cp.blocks=9" in str(ZeCO(9).unsupported(problem, causal(problem.seqlen)))
    assert "workload=linear_attention" in str(LASP().unsupported(replace(problem, rule=None), causal(problem.seqlen)))
    with pytest.raises(ValueError, match=r"cp\.blocks=0"):
        ZeCO(0)


def test_a_grid_shows_states() -> None:
    problem = problem_of(2)
    assert "state0>1" in str(LASP().schedule(problem, causal(problem.seqlen)))
    assert "summary1>0" in str(LASP2().schedule(problem, causal(problem.seqlen)))


# -- simulation --------------------------------------------------------------------------------------------------------


class Even:
    """A kernel that takes a second per 1000 rows."""

    def seconds(self, tiles: object, problem: Problem, *, backward: bool) -> np.ndarray:
        return tiles.rows / 1000.0  # type: ignore[attr-defined, no-any-return]

    def calls(self, tiles: object) -> np.ndarray:
        return np.ones(len(tiles), dtype=np.int64)  # type: ignore[arg-type]

    def workspace_bytes(self, tiles: object, problem: Problem, *, backward: bool) -> np.ndarray:
        return np.zeros(len(tiles))  # type: ignore[arg-type]


def seconds_of(strategy: Scheduled, problem: Problem, rate: float = 1e6) -> float:
    machine = Machine("m", "gpu", Link(0.0, rate), Link(0.0, rate), 0, 1e18, 0.0, 0.0)
    mask = causal(problem.seqlen)
    return simulate(Modelled(strategy.schedule(problem, mask), mask, problem), machine, Even()).phases["forward"].seconds


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_simulated_latency_is_that_of_the_papers(ranks: int) -> None:
    """P - 1 hops of a whole state t, or P - 1 + K - 1 of a K-th: t (1 + (P - 2) / K) instead of t (P - 1)."""
    problem = replace(problem_of(ranks, 1000 * ranks), direction="forward", scale=Scale(1, ranks))
    alone = seconds_of(LASP(), problem, 1e18)  # messages take no time
    hop = state_bytes(problem) / 1e6
    assert seconds_of(LASP(), problem) - alone == pytest.approx((ranks - 1) * hop)
    for blocks in (2, 4, 8):
        assert seconds_of(ZeCO(blocks), problem) - alone == pytest.approx(hop * (1 + (ranks - 2) / blocks))
    gathered = (ranks - 1) * summary_bytes(problem) / 1e6
    assert seconds_of(LASP2(), problem) - alone == pytest.approx(gathered)
