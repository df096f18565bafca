"""Schedules without processes: every strategy that conf/ names is proven for many P, and a wrong schedule is caught."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast, dispatch
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.grid.build import build_strategy
from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.fault import ScheduleError
from lcbench.schedule.layout import contiguous, documents
from lcbench.schedule.schedule import HeadGroup, Move, Schedule, Step, rows
from lcbench.schedule.verify import ScheduleCost, verify
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import WITHIN, every_mask, load, names, small

SCALES = [Scale(1, p) for p in (1, 2, 3, 4, 5, 6, 7, 8)] + [Scale(2, 8), Scale(3, 4), Scale(12, 8)]
PER_RANK = 8192  # tokens, in the setting of LongCA-bench: 64:8 heads of 128, bfloat16
BLOCK = 2 * PER_RANK * 8 * 128 * 2  # bytes of a rank's keys and values there


HEADS = Heads(64, 8, 128)


def problem_of(ranks: int, seqlen: int, heads: Heads = HEADS, reduce_dtype: str = "float32", nodes: int = 1) -> Problem:
    return Problem(seqlen, heads, Scale(nodes, ranks // nodes), "bfloat16", "forward_backward", reduce_dtype)


def report_of(strategy: Scheduled, mask: Mask, problem: Problem) -> ScheduleCost:
    assert strategy.unsupported(problem, mask) is None
    return verify(strategy.schedule(problem, mask), mask, problem)


SEQLEN, MANY = 1013, Heads(96, 8, 64)  # a prime: no shard is even


@pytest.fixture(scope="module")
def mask_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Mask]:
    """Every mask once, for all strategies and scales."""
    folder = tmp_path_factory.mktemp("masks")
    return cache(lambda name: small(name, SEQLEN, MANY, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in names("cp") if isinstance(build_strategy(load("cp", n)), Scheduled)])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_schedule_covers_every_mask_once(name: str, scale: Scale, mask_of: Callable[[str], Mask]) -> None:
    strategy = build_strategy(load("cp", name))
    problem = Problem(SEQLEN, MANY, scale, "bfloat16", "forward_backward")
    # At many ranks a tile costs more than it shows: a few masks stand for all.
    chosen = every_mask() if scale.world_size <= 4 else ["full", "causal", "share_question", "dual_scope", "chosen_document"]
    for mask in map(mask_of, chosen):
        if strategy.unsupported(problem, mask):
            continue
        report = report_of(strategy, mask, problem)
        assert report.rank_pairs.sum() == mask.pairs(problem.heads.q)
        assert report.buffer_bytes(scale.world_size // 2) >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "direction"), [(512, "forward_backward"), (4096, "forward")])
@pytest.mark.parametrize(
    "strategy",
    [Ring(), USP(8), LoongTrain(8), LightSeq(), GroupCast(chunks_per_rank=1), TokenRing(), Hybrid(), AllGather()],
    ids=lambda strategy: type(strategy).__name__,
)
def test_thousands_of_ranks(strategy: Scheduled, ranks: int, direction: str) -> None:
    if ranks == 4096 and isinstance(strategy, AllGather | TokenRing | USP | LoongTrain):
        ranks = 1024  # of others' kind at 4096, or every pair of a rank and a shard by name
    if ranks == 4096 and isinstance(strategy, Ring):
        ranks = 2048  # a tile per step, rank and shard: four times less memory, and time
    seqlen = 6 * ranks + 1
    mask = causal_document(seqlen, seed=(0, 0), lengths=Explicit([*[6 * ranks // 8] * 8, 1]))
    if isinstance(strategy, Hybrid):
        strategy = Hybrid([ranks // 8] * 8)
    problem = dataclasses.replace(problem_of(ranks, seqlen, nodes=ranks // 8), direction=direction)
    assert report_of(strategy, mask, problem).rank_pairs.sum() == mask.pairs(64)


# -- a strategy of a user that is wrong ---------------------------------------------------------------------------------


def test_grid_says_who_sends_what_to_whom() -> None:
    problem = Problem(16, Heads(4, 2, 8), Scale(1, 3), "float32", "forward")
    ring = str(Ring("contiguous").schedule(problem, causal(16))).splitlines()
    assert ring[1].split() == ["0", "q0k0", "kv0>1", "q1k1", "kv1>2", "q2k2", "kv2>0", "kv", "x3"]
    assert ring[3].split() == ["2", "q0k1", "q1k2", "q2k0", "-"]
    gather = str(Ulysses(uneven_heads=True).schedule(problem, causal(16))).splitlines()
    assert "q1>0,2 kv1>0,2" in gather[1]
    assert "out1>1 out2>2" in gather[3]


WRONG = """
from dataclasses import dataclass, replace

import numpy as np

from lcbench.cp.ring import Ring
from lcbench.schedule.schedule import Step


@dataclass(frozen=True)
class Wrong(Ring):
    fault: str = "twice"

    def schedule(self, problem, mask):
        right = super().schedule(problem, mask)
        first, *others = right.steps
        if self.fault == "twice":
            others[-1] = replace(others[-1], tiles=np.concatenate([others[-1].tiles, first.tiles]))
        else:
            first = replace(first, tiles=first.tiles + np.array([0, 0, 0, 9]))
        return replace(right, steps=(first, *others))
"""


@pytest.mark.slow
def test_command_names_file_and_fault_of_a_wrong_schedule_and_shows_it(tmp_path: Path) -> None:
    (tmp_path / "wrong_cp.py").write_text(WRONG)
    (tmp_path / "cp").mkdir()
    for fault, said, shown in (("twice", "step 2: rank 0 computes q0k0", "<--"), ("number", "is out of range", "")):
        (tmp_path / "cp" / f"wrong_{fault}.yaml").write_text(f"_target_: wrong_cp.Wrong\nname: wrong_{fault}\nfault: {fault}\n")
        done = subprocess.run(
            [sys.executable, "-m", "lcbench.cp", f"cp=wrong_{fault}", "seqlen=32", "scale=1x3", "--config-dir", str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        line, *grid = done.stderr.splitlines()
        assert done.returncode == 2, done.stderr
        assert line.startswith(f"error: cp=wrong_{fault} (")
        assert "wrong_cp.py" in line
        assert said in line
        assert [row for row in grid if "<--" in row] == ([row for row in grid if row.startswith("2 ")] if shown else [])
        assert bool(grid) == bool(shown)


# -- bytes: the closed formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "forward_mb"), [(8, 235), (32, 1040)])
@pytest.mark.parametrize("strategy", [Ring(), AllGather(), AllGather(heads_per_step=2)], ids=str)
@pytest.mark.parametrize(("reduce_dtype", "backward"), [("float32", 3), ("input", 2)])
def test_ring_and_allgather_bytes(strategy: Scheduled, ranks: int, forward_mb: int, reduce_dtype: str, backward: int) -> None:
    """Forward (P-1) KV blocks; backward the same again for KV and, in the type of reduce_dtype, for its gradient."""
    seqlen = PER_RANK * ranks
    report = report_of(strategy, full(seqlen), problem_of(ranks, seqlen, reduce_dtype=reduce_dtype))
    assert set(report.forward_bytes.tolist()) == {(ranks - 1) * BLOCK}
    assert set(report.backward_bytes.tolist()) == {(ranks - 1) * BLOCK * backward}
    assert round(report.forward_bytes[0] / 1e6) == forward_mb


@pytest.mark.parametrize("stages", [1, 2])
def test_ulysses_bytes(stages: int) -> None:
    """(P-1)/P * s * D * b * (2 Hq + 2 Hk'), the same backward; replicated heads return gradients that are still to be summed."""
    for ranks, heads in ((8, Heads(64, 8, 128)), (8, Heads(64, 16, 128)), (4, Heads(64, 64, 128))):
        seqlen = PER_RANK * ranks
        report = report_of(Ulysses(stages=stages), full(seqlen), problem_of(ranks, seqlen, heads))
        copies = max(heads.kv, ranks * stages)
        assert set(report.forward_bytes.tolist()) == {(ranks - 1) * PER_RANK // ranks * 128 * 2 * (2 * 64 + 2 * copies)}
        if copies == heads.kv:
            assert (report.forward_bytes == report.backward_bytes).all()
        else:
            assert (report.forward_bytes < report.backward_bytes).all()


@pytest.mark.parametrize(("ranks", "degree"), [(8, 2), (32, 8), (64, 8)])
@pytest.mark.parametrize("kind", ["usp", "usp outside", "loongtrain", "context first"])
def test_usp_and_loongtrain_bytes(ranks: int, degree: int, kind: str) -> None:
    """(U-1)/U * s * D * b * (2 Hq + 2 Hk) for heads, (R-1) blocks around the ring."""
    seqlen = PER_RANK * ranks
    strategy: Scheduled = {
        "usp": USP(degree), "usp outside": USP(degree, ulysses="outside"),
        "loongtrain": LoongTrain(degree), "context first": LoongTrain(degree, placement="context_first"),
    }[kind]  # fmt: skip
    report = report_of(strategy, full(seqlen), problem_of(ranks, seqlen, nodes=ranks // 8))
    exchange = (degree - 1) * PER_RANK // degree * 128 * 2 * (2 * 64 + 2 * 8)
    # A lane's ring passes on 1/U of the heads of U times the tokens.
    assert set(report.forward_bytes.tolist()) == {exchange + (ranks // degree - 1) * BLOCK}
    assert set(report.backward_bytes.tolist()) == {exchange + (ranks // degree - 1) * BLOCK * 3}
    if kind == "usp" and degree == 8:  # the all-to-all stays in its node, the ring does not
        assert set(report.forward_bytes_out.tolist()) == {(ranks // degree - 1) * BLOCK}


def test_only_outer_hops_of_a_double_ring_cross_windows() -> None:
    ranks, windows = 24, 6
    seqlen = 64 * ranks
    strategy = LoongTrain(1, window=ranks // windows)
    schedule = strategy.schedule(problem_of(ranks, seqlen), full(seqlen))
    outer = [m for step in schedule.steps for m in step.moves if m.channel == "outer"]
    assert len(outer) == windows - 1
    assert all(m.steps == ranks // windows for m in outer)
    inner = [m for step in schedule.steps for m in step.moves if m.channel == "main"]
    assert len(inner) == ranks - windows
    assert all((m.rows[:, 0] // 4 == m.rows[:, 1] // 4).all() for m in inner)


@pytest.mark.parametrize(("reduce_dtype", "sums"), [("float32", 4), ("input", 2)])
def test_tokenring_bytes(reduce_dtype: str, sums: int) -> None:
    """Queries one way, out and its LSE the other; backward queries, dout and two floats, and the gradient of queries."""
    ranks = 8
    seqlen = PER_RANK * ranks
    report = report_of(TokenRing(), full(seqlen), problem_of(ranks, seqlen, reduce_dtype=reduce_dtype))
    rows = (ranks - 1) * PER_RANK * 64
    assert set(report.forward_bytes.tolist()) == {rows * (128 * 2 + 128 * sums + 4)}
    assert set(report.backward_bytes.tolist()) == {rows * (2 * 128 * 2 + 2 * 4 + 128 * sums)}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 96])
def test_lightseq_balance(ranks: int) -> None:
    """Of its P (P/2 + 1) slots an even number of ranks leaves P/2 idle, 1/(P+2); an odd one none."""
    seqlen = 64 * ranks
    schedule = LightSeq().schedule(problem_of(ranks, seqlen), causal(seqlen))
    computing = [len(step.tiles) for step in schedule.steps if len(step.tiles)]
    assert len(computing) == ranks // 2 + 1
    idle = 1 - sum(computing) / (ranks * len(computing))
    assert idle == pytest.approx(0 if ranks % 2 else 1 / (ranks + 2))


@pytest.mark.parametrize("options", [{}, {"stages": 4, "solver": "swap"}, {"stages": 1, "chunks_per_rank": 3}], ids=str)
@pytest.mark.parametrize("name", ["causal", "sliding_window", "causal_document", "share_question", "block_random", *WITHIN])
def test_groupcast_sends_what_is_needed_and_no_more(name: str, options: dict[str, int], tmp_path: Path) -> None:
    seqlen, ranks, heads = 211, 5, Heads(4, 2, 8)
    mask = small(name, seqlen, heads, tmp_path)
    problem = problem_of(ranks, seqlen, heads)
    report = report_of(GroupCast(**options), mask, problem)  # type: ignore[arg-type]
    seen = dense_heads(mask, heads.q).any(0)
    distinct = 0
    for rank in range(ranks):
        own = report.schedule.q.tokens(rank)
        needed = seen[own].any(axis=0)
        needed[own] = False
        distinct += int(needed.sum())
    token = 2 * heads.kv * heads.dim
    assert report.forward_bytes.sum() == distinct * token * 2
    assert report.backward_bytes.sum() == distinct * token * (2 + 4)


# -- balance, buffers ----------------------------------------------------------------------------------------------


def test_zigzag_balances_causal_steps() -> None:
    problem = problem_of(8, 4096)
    assert report_of(Ring(), causal(4096), problem).imbalance < 1.01
    assert report_of(Ring("contiguous"), causal(4096), problem).imbalance > 1.7


def test_dispatch_balances_by_area() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        areas = random.integers(0, 1000, 48)
        loads = [np.bincount(dispatch(areas, 8, swap=swap), weights=areas, minlength=8) for swap in (False, True)]
        counts = np.bincount(dispatch(areas, 8, swap=True), minlength=8)
        assert (counts == 6).all()
        assert areas.sum() / 8 <= loads[1].max() <= loads[0].max() <= areas.sum() / 8 + areas.max()


def test_ring_buffers_do_not_grow_with_ranks() -> None:
    found = {report_of(Ring(), causal(256 * p), problem_of(p, 256 * p)).buffer_bytes(0) for p in (4, 8, 32, 64)}
    assert len(found) == 1
    forward = dataclasses.replace(problem_of(16, 16 * 256), direction="forward")
    assert report_of(Ring(), causal(16 * 256), forward).buffer_bytes(3) == 2 * (2 * 256 * 8 * 128 * 2)  # two KV blocks


def test_hybrid_gives_every_document_to_its_sub_group() -> None:
    lengths = [40, 8, 30, 22]
    mask = causal_document(100, seed=(0, 0), lengths=Explicit(lengths))
    assert documents(mask)[0].tolist() == [0, 40, 48, 78, 100]
    strategy = Hybrid(groups=[3, 1, 2], documents=[0, 1, 2, 1])
    report = report_of(strategy, mask, problem_of(6, 100))
    side = report.schedule.q
    assert sorted(t for r in (0, 1, 2) for t in side.tokens(r).tolist()) == list(range(40))
    assert sorted(side.tokens(3).tolist()) == [*range(40, 48), *range(78, 100)]
    assert report.forward_bytes[3] == 0
    assert "rank 4" in str(Hybrid(groups=[4, 2]).unsupported(problem_of(6, 100), full(100)))
    assert strategy.unsupported(problem_of(8, 100), mask) == "groups=[3, 1, 2] are 6 ranks, scale=1x8 has 8"


# -- refusals and proofs -------------------------------------------------------------------------------------------


def test_refusals_name_the_numbers() -> None:
    problem = problem_of(96, 4096, nodes=12)
    mask = full(4096)
    assert Ulysses().unsupported(problem, mask) == "cannot split 64 query heads evenly over 96 ranks"
    assert Ulysses(uneven_heads=True).unsupported(problem, mask) == "cannot split 64 query heads into 96 parts"
    assert USP(5).unsupported(problem, mask) == "ulysses_degree=5 does not divide the 96 ranks of scale=12x8"
    assert LoongTrain(8, window=5).unsupported(problem, mask) == "window=5 does not divide the 12 positions of the ring"
    assert AllGather(heads_per_step=3).unsupported(problem, mask) == "heads_per_step=3 does not divide 8 key/value heads"
    assert Ring().unsupported(problem_of(8, 15), full(15)) == "needs at least two tokens per rank: seqlen=15 over 8 ranks"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("ulysses", "stages", 0), ("usp", "ulysses", "both"), ("loongtrain", "placement", "random"), ("hybrid", "groups", [2, 0]),
     ("hybrid", "documents", [0, 1]), ("groupcast", "solver", "best"), ("allgather", "layout", "striped"),
     ("ring", "layout", "up")],
)  # fmt: skip
def test_bad_options_name_themselves(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"cp\.{option}="):
        build_strategy({**load("cp", name), option: value})


def test_head_groups_read_the_right_heads() -> None:
    heads = Heads(8, 2, 16)
    assert HeadGroup.of(heads, range(0, 8)).kv == (0, 1)
    assert HeadGroup.of(heads, range(4, 8)).kv == (1,)
    assert HeadGroup.of(heads, range(2, 6)).kv == (0, 1)
    assert HeadGroup.of(heads, range(3, 6)).kv == (0, 1, 1)  # no two rows of one size: a head is held twice
    for begin, end in ((0, 3), (3, 5), (5, 8), (1, 8)):
        group = HeadGroup.of(heads, range(begin, end))
        each = len(group) // len(group.kv)
        assert [group.kv[i // each] for i in range(len(group))] == [h // 4 for h in range(begin, end)]


def ring_of_four() -> tuple[Schedule, BandMask, Problem]:
    problem = Problem(64, Heads(4, 4, 8), Scale(1, 4), "float64", "forward")
    return Ring().schedule(problem, full(64)), full(64), problem


def test_a_wrong_schedule_is_caught_and_shown() -> None:
    schedule, mask, problem = ring_of_four()
    first, second, third, last = schedule.steps
    assert "q0k3" in str(schedule).splitlines()[2]
    wrong = {
        "nobody computed q0k1": (first, second, dataclasses.replace(third, moves=())),
        "rank 0 computes before keys of shard 1, heads 0, are there": (first, second, Step(third.tiles), last),
        "keys of shard 0, heads 0, come a second time": (first, dataclasses.replace(second, moves=first.moves), third, last),
        "keys of shard 2, heads 0, are sent and never used": (first, second, third),
        "are sent by a rank that does not hold them yet": (
            dataclasses.replace(first, moves=second.moves),
            Step(second.tiles, first.moves),
            third,
            last,
        ),
        "a second time": (first, second, third, last, Step(last.tiles)),
        "which it does not owe": (first, second, third, dataclasses.replace(last, returns=rows([1], [0], [0], [0]))),
        "come to their owner": (first, second, third, Step(last.tiles, (Move("kv", rows([1], [0], [0], [0])),))),
    }
    for message, steps in wrong.items():
        with pytest.raises(ScheduleError, match=message):
            verify(dataclasses.replace(schedule, steps=steps), mask, problem)
    with pytest.raises(ScheduleError, match="do not hold each of 64 tokens"):
        verify(dataclasses.replace(schedule, q=dataclasses.replace(schedule.q, shards=contiguous(60, 4))), mask, problem)


def test_a_result_that_is_not_returned_or_too_early_is_caught() -> None:
    problem = Problem(64, Heads(4, 4, 8), Scale(1, 3), "float64", "forward")
    schedule = TokenRing().schedule(problem, full(64))
    *others, last = schedule.steps
    with pytest.raises(ScheduleError, match="never returns shard"):
        verify(dataclasses.replace(schedule, steps=tuple(others)), full(64), problem)
    early = dataclasses.replace(others[-1], returns=np.concatenate([others[-1].returns, last.returns]))
    with pytest.raises(ScheduleError, match="before it is computed"):
        verify(dataclasses.replace(schedule, steps=(*others[:-1], early)), full(64), problem)


def test_backward_of_a_ring_fetches_one_block_and_walks_back() -> None:
    """The last held block comes from its owner, P - 2 come back hop by hop, and every hop has its gradient."""
    ranks = 6
    report = report_of(Ring(), full(64 * ranks), problem_of(ranks, 64 * ranks))
    backward = [t for t in report.traffic.transfers if t.begin >= report.traffic.steps]
    values = [t for t in backward if t.kind == "kv"]
    assert [t.begin for t in values] == list(range(ranks, 2 * ranks - 1))
    assert all((t.rows[:, 0] == (t.rows[:, 1] + 1) % ranks).all() for t in values[1:])
    assert (values[0].rows[:, 0] == report.schedule.k.owner[values[0].rows[:, 2]]).all()
    gradients = [t for t in backward if t.kind == "dkv"]
    assert len(gradients) == ranks - 1
    assert (gradients[-1].rows[:, 1] == report.schedule.k.owner[gradients[-1].rows[:, 2]]).all()


def test_windows_leave_out_what_no_rank_needs() -> None:
    """A window of one shard's length reaches one neighbour: a ring moves everything all the same, a group-cast does not."""
    ranks, seqlen = 8, 8 * 64
    mask = sliding_window(seqlen, left=63, right=0)
    ring = report_of(Ring("contiguous"), mask, problem_of(ranks, seqlen))
    cast = report_of(GroupCast(chunks_per_rank=1), mask, problem_of(ranks, seqlen))
    assert cast.forward_bytes.max() < ring.forward_bytes.max() / (ranks - 2)
