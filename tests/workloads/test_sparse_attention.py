"""Sparse attention whose mask is chosen at run time: ranks choose what one rank does, whole cells with their own check on real gloo
ranks against dense float64, and faults that this check must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch

from lcbench.cp import selection
from lcbench.cp.base import Dealt, Place, Scheduled, Settled, Strategy
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.selection import Selection, lookers
from lcbench.cp.star import Star
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_selector, build_strategy
from lcbench.grid.command_line import look
from lcbench.grid.refusals import approximates, skip_reason
from lcbench.kernels.base import Kernel
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask
from lcbench.masks.block import BlockMap, Keep, chosen
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure import recall as recalls
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.problem import Batch, Heads, Mesh, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.schedule.schedule import Schedule
from lcbench.selectors.base import Features, Round, Rows, Selector, block_edges
from lcbench.selectors.none import NoSelector
from lcbench.selectors.oracle import Oracle
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads import sparse_session
from lcbench.workloads.base import Work
from lcbench.workloads.sparse_attention import SparseAttention
from lcbench.workloads.sparse_session import Passed, SparseSession

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 8)
BOUND = 1e-12
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
BLOCKS = {"q_block": 32, "k_block": 16}
ORACLE = Oracle(density=0.3, **BLOCKS)
ANY_RECALL, REFERENCE, RING = SparseAttention(), Reference(), Ring()


def problem_of(seqlen: int, ranks: int, dtype: str = "float64", *, backward: bool = True, heads: Heads = HEADS) -> Problem:
    return Problem(seqlen, heads, Scale(1, ranks), dtype, "forward_backward" if backward else "forward")


def work_of(
    problem: Problem,
    mask: BandMask,
    strategy: Strategy,
    selector: Selector = ORACLE,
    workload: SparseAttention = ANY_RECALL,
    kernel: Kernel = REFERENCE,
    **more: Any,
) -> Work:
    return Work(workload, problem, lambda _: mask, kernel, strategy, SETTINGS, 3, selector=selector, **more)


def gang_of(rank: int = 0, ranks: int = 1) -> Gang:
    return Gang(rank, ranks, CPU, Groups(), [])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(_: str) -> None:
    pass


def selectors() -> dict[str, Selector]:
    """Every selector of conf/ that chooses, with small blocks."""
    found = {name: build_selector_of({**load("selector", name), **BLOCKS}) for name in names("selector") if name != "none"}
    return found


def build_selector_of(config: dict[str, Any]) -> Selector:
    workload = {"_target_": "lcbench.workloads.sparse_attention.SparseAttention", "name": "sparse_attention"}
    selector = build_selector({"workload": workload, "selector": config})
    assert selector is not None
    return selector


def strategies(problem: Problem, mask: BandMask) -> dict[str, Scheduled]:
    """Those of conf/ that the workload takes."""
    found = {}
    for name in names("cp"):
        config = load("cp", name)
        if "compressor" in config:
            continue
        strategy = build_strategy(config)
        if (
            strategy.unsupported(problem, mask) is None
            and SparseAttention().unsupported(problem, mask, Reference(), strategy, None) is None
        ):
            assert isinstance(strategy, Scheduled)
            found[name] = strategy
    return found


# -- ranks choose what one rank does -----------------------------------------------------------------------------------


def drawn(seqlen: int, heads: Heads = HEADS, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and an LSE of all tokens."""
    generator = torch.Generator().manual_seed(5)
    sizes = (heads.q, heads.dim), (heads.kv, heads.dim), (heads.q,)
    q, k, lse = (torch.randn(seqlen, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, lse


def held_by(strategy: Strategy, problem: Problem, mask: BandMask) -> list[Held]:
    settled = strategy.settled(problem, mask)
    assert isinstance(settled, Scheduled)
    schedule = settled.schedule(problem, mask)
    return [schedule.held(rank) for rank in range(problem.scale.world_size)]


def chosen_by(
    selector: Selector, problem: Problem, mask: BandMask, every: list[Held], place: Place
) -> tuple[Keep, int]:  # fmt: skip
    held = every[place.rank]
    one = Selection(selector, problem, mask, held, every, place)
    q, k, lse = drawn(problem.seqlen, problem.heads, getattr(torch, problem.dtype))
    choice = one.choose(q[held.q.tokens], k[held.kv.tokens], lse[held.q.tokens] if selector.needs_lse else None)
    return choice.keeps(), one.bytes_sent


LAYOUTS: dict[str, Callable[[], Strategy]] = {
    "contiguous": lambda: Ring("contiguous"),
    "zigzag": lambda: Ring("zigzag"),
    "striped": lambda: Ring("striped"),
    "ulysses": Ulysses,
    "groupcast": lambda: GroupCast(chunks_per_rank=3),
}


def choose_on_ranks(rank: int, ranks: int) -> None:
    place, alone = Place(rank, CPU, Groups()), Place(0, CPU, Groups())
    for seqlen, dtype in ((256, "float32"), (211, "bfloat16")):
        for mask in (causal(seqlen), full(seqlen)):
            problem = problem_of(seqlen, ranks, dtype)
            single = replace(problem, scale=Scale(1, 1))
            whole_held = held_by(Local(), single, mask)
            shared = {layout: held_by(make(), problem, mask) for layout, make in LAYOUTS.items()}
            for name, selector in selectors().items():
                if selector.unsupported(problem) is not None:
                    continue
                want, sent = chosen_by(selector, single, mask, whole_held, alone)
                assert sent == 0
                assert want.any()
                for layout, every in shared.items():
                    got, _ = chosen_by(selector, problem, mask, every, place)
                    assert np.array_equal(got, want), (name, layout, seqlen)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_choose_bit_for_bit_what_one_rank_chooses(ranks: int) -> None:
    run_ranks(ranks, choose_on_ranks, ranks)


def bytes_on_ranks(rank: int) -> None:
    """P = 2, 256 tokens, blocks of 32 queries and 16 keys: contiguous shards are whole blocks, and of striped ones every block has
    half of its rows elsewhere."""
    place, mask, problem = Place(rank, CPU, Groups()), full(256), problem_of(256, 2)
    gathered = 128 * HEADS.kv * HEADS.dim * 8 + 4 * (4 * 16 // 8)  # keys, and a bit for each map and block
    _, sent = chosen_by(ORACLE, problem, mask, held_by(Ring("contiguous"), problem, mask), place)
    assert sent == gathered
    _, sent = chosen_by(ORACLE, problem, mask, held_by(Ring("striped"), problem, mask), place)
    rows = (
        64 * (HEADS.q + HEADS.kv) * HEADS.dim * 8
    )  # of q and of k: half of what a rank holds is of blocks that the other looks at
    assert sent == gathered + rows


@pytest.mark.slow
@pytest.mark.gloo
def test_ranks_send_rows_of_blocks_that_others_look_at_and_what_they_found() -> None:
    run_ranks(2, bytes_on_ranks)


def test_blocks_are_looked_at_by_who_has_most_of_them_and_as_many_by_each() -> None:
    edges = block_edges(12, 3)
    assert lookers([np.arange(0, 5), np.arange(5, 12)], edges).tolist() == [0, 0, 1, 1]
    assert lookers([np.arange(0, 12, 2), np.arange(1, 12, 2)], block_edges(12, 4)).tolist() == [0, 1, 0]
    assert lookers([np.arange(12)], edges).tolist() == [0, 0, 0, 0]


# -- strategies whose tokens lie before anything is chosen --------------------------------------------------------------


def test_a_settled_strategy_leaves_tokens_where_they_are_whatever_is_chosen() -> None:
    problem, mask = problem_of(240, 4), causal(240)
    edges = block_edges(240, 32), block_edges(240, 16)
    few = np.zeros((1, 8, 15), dtype=bool)
    few[:, :, 0] = True
    some = chosen(few, *edges, mask)
    taken = strategies(problem, mask)
    assert {"ring", "ulysses", "usp", "allgather", "loongtrain", "tokenring", "lightseq"} <= set(taken)
    for name, strategy in taken.items():
        settled = strategy.settled(problem, mask)
        schedules = [one.schedule(problem, part) for one in (settled,) for part in (mask, some)]
        for rank in range(4):
            held = [schedule.held(rank) for schedule in schedules]
            assert np.array_equal(held[0].q.tokens, held[1].q.tokens), name
    assert isinstance(Ring().settled(problem, mask), Settled)
    assert Ulysses().settled(problem, mask) == Ulysses()
    own = LightSeq().settled(problem, mask)
    assert len(own.schedule(problem, some).steps) == len(LightSeq().schedule(problem, mask).steps), "rounds are those of the mask"


@dataclass(frozen=True)
class Restless(Dealt):
    """A ring that deals tokens out by the mask that it is given, whatever that is, without saying so."""

    by_mask: ClassVar[bool] = False

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return Ring("zigzag" if isinstance(mask, BlockMap) else "contiguous").schedule(problem, mask)


def restless_on_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match="Restless deals tokens out by what is chosen, after inputs are there"):
        measure_cell(work_of(problem_of(128, 2), causal(128), Restless()), gang_of(rank, 2), silent)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_strategy_that_moves_tokens_when_something_is_chosen_is_found_out() -> None:
    run_ranks(2, restless_on_ranks)


# -- against dense float64 ---------------------------------------------------------------------------------------------


def whole(session: SparseSession, result: Any) -> dict[str, torch.Tensor]:
    """Results of all ranks in the order of tokens."""
    held, ranks = session._held, session._gang.ranks
    found = {}
    for name, x in result.named().items():
        tokens = (held.kv if name in ("dk", "dv") else held.q).tokens
        parts = ranks.all_gather_object((tokens, x))
        every = torch.zeros(session._problem.seqlen, *x.shape[1:], dtype=x.dtype)
        for at, part in parts:
            every[at] = part
        found[name] = every
    return found


def densely(session: SparseSession, choice: BlockMap) -> dict[str, torch.Tensor]:
    """What attention of the chosen mask is, by autograd."""
    problem = session._problem
    every = Held(*(whole_part(problem),) * 3)
    q, k, v, dout = (session._drawn(name, every) for name in ("q", "k", "v", "dout"))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, dense_heads(choice, problem.heads.q), problem.softmax_scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def whole_part(problem: Problem) -> Part:
    return Part(np.arange(problem.seqlen))


def dense_on_ranks(rank: int, ranks: int, seqlen: int) -> None:
    others = [full(seqlen), sliding_window(seqlen, left=40, right=0)] if ranks < 4 else []
    for mask in (causal(seqlen), *others):
        problem = problem_of(seqlen, ranks)
        for name, strategy in strategies(problem, mask).items():
            session = work_of(problem, mask, strategy).start(0, gang_of(rank, ranks))
            assert isinstance(session, SparseSession)
            assert session.refused is None, (name, session.refused)
            passed, result = session._whole_pass()
            got, want = whole(session, result), densely(session, passed.choice)
            assert passed.choice.density < mask.density
            for tensor in want:
                error = float((got[tensor] - want[tensor]).abs().max())
                assert error <= BOUND, (name, tensor, error)


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(("ranks", "seqlen"), [(1, 131), (2, 131), (4, 200)])
def test_results_are_those_of_dense_float64_of_the_chosen_mask(ranks: int, seqlen: int) -> None:
    run_ranks(ranks, dense_on_ranks, ranks, seqlen)


# -- whole cells -------------------------------------------------------------------------------------------------------


def sound(measured: Measured) -> Measured:
    assert measured.unavailable is None, measured.unavailable
    assert measured.check is not None
    assert not measured.check.failures, measured.check.failures
    assert measured.implausible is None
    for key in measured.metrics:
        assert metric_of(key) is not None
    return measured


def cells_on_ranks(rank: int, ranks: int) -> None:
    cells = [
        (problem_of(300, ranks), causal(300), Ring(), ORACLE, Reference()),
        (problem_of(300, ranks, "bfloat16"), causal(300), Ulysses(), replace(ORACLE, per="kv_head"), SDPAFlash()),
        (problem_of(256, ranks, "float32", backward=False), full(256), GroupCast(), replace(ORACLE, per="all_heads"), SDPAFlash()),
        (problem_of(260, ranks, "float32", heads=Heads(4, 1, 24, 16, latent=True)), causal(260), Ring(), ORACLE, Reference()),
    ]
    for problem, mask, strategy, selector, kernel in cells:
        work, gang = work_of(problem, mask, strategy, selector, kernel=kernel), gang_of(rank, ranks)
        found = sound(measure_cell(work, gang, silent)).metrics
        assert found["select/recall"] == pytest.approx(
            found["select/oracle_recall"], rel=1e-3 if problem.dtype == "bfloat16" else 1e-9
        )
        assert found["select/recall_min_head"] <= found["select/recall"] <= found["select/recall_max_head"]
        assert 0.2 < found["select/density"] < 0.45
        assert found["check/distance"] > 0.1
        assert found["time/dense_s"] > 0
        assert found["select/speedup"] == found["time/dense_s"] / found["time/total/median_s"]
        assert found["comm/select/bytes"] > 0
        assert {"time/select/median_s", "time/plan/median_s", "time/forward/median_s"} <= set(found)
        again = measure_again(work, gang, silent)
        assert again.check is not None
        assert again.check.failures == []
        assert {"select_s", "plan_s", "forward_s"} <= set(again.samples)


@pytest.mark.slow
@pytest.mark.gloo
def test_whole_cells_are_well_and_say_what_was_kept() -> None:
    run_ranks(2, cells_on_ranks, 2)


@pytest.mark.slow
def test_what_keeps_everything_is_exact_and_has_no_distance() -> None:
    work = work_of(problem_of(160, 1), causal(160), Local(), replace(ORACLE, density=1.0))
    found = sound(measure_cell(work, gang_of(), silent)).metrics
    assert "check/distance" not in found
    assert found["select/recall"] == pytest.approx(1.0, abs=1e-12)
    assert found["select/density"] == 1.0


def test_no_selector_is_full_attention_without_choosing_or_planning() -> None:
    found = sound(measure_cell(work_of(problem_of(160, 1), causal(160), Local(), NoSelector()), gang_of(), silent)).metrics
    assert not any(key.startswith(("select/", "time/select", "time/plan")) for key in found)
    assert found["mask/area"] == 160 * 161 / 2


def mesh_on_ranks(rank: int) -> None:
    for mesh in (Mesh(dp=2), Mesh(tp=2)):
        heads = HEADS if mesh.tp == 1 else Heads(2, 1, 8)
        problem = replace(problem_of(128, 2), heads=heads)
        work = work_of(problem, causal(128), Ring(), mesh=mesh, scale=Scale(1, 4))
        found = sound(measure_cell(work, gang_of(rank, 4), silent))
        assert len(found.notes["selection"]["recall"]) == 2 * heads.q  # of the heads of both groups


@pytest.mark.gloo
@pytest.mark.slow
def test_groups_of_a_mesh_choose_for_themselves() -> None:
    run_ranks(4, mesh_on_ranks)


def own_blocks(rows: Rows, edges: Any, size: int) -> Keep:
    """The blocks of keys with a block of queries' own tokens, bool (columns,)."""
    begin = rows.number * size
    found: Keep = (edges[:-1] < begin + len(rows.q)) & (edges[1:] > begin) & (rows.pairs > 0)
    return found


@dataclass(frozen=True)
class BySign(Selector):
    """Goes by the sign of queries, so that it chooses others where all inputs are negated, and by what an earlier step left."""

    needs_lse: ClassVar[bool] = True

    def rounds(self, problem: Problem) -> tuple[Round, ...]:
        def queries(rows: Rows, known: Features) -> Features:
            assert rows.lse is not None
            return {"level": rows.lse.double().sum()[None]}

        return (
            Round(queries=queries, all=lambda told, edges: {"mean": told["level"].mean()}, blocks=lambda n: np.arange(0, n, 2)),
        )

    def keep(self, rows: Rows, keys: Features, edges: Any, problem: Problem) -> Keep:
        assert rows.lse is not None
        seen, found = np.nonzero(rows.pairs)[0], np.repeat(own_blocks(rows, edges, self.q_block)[None], self.maps(problem.heads), 0)
        found[:, seen[0 if float(rows.q[0, 0, 0]) > 0 else len(seen) // 2]] = True
        found[0, seen[0 if float(rows.lse.double().sum()) > float(keys["mean"]) else len(seen) // 2]] = True
        return found


@contextmanager
def told(of: type, name: str) -> Iterator[list[Any]]:
    """What a method is called with, as it goes on."""
    calls: list[Any] = []
    method = getattr(of, name)

    def call(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(args)
        return method(self, *args, **more)

    with patch.object(of, name, call):
        yield calls


def by_sign_on_ranks(rank: int) -> None:
    settings = {**SETTINGS, "warmup": 0, "min_iterations": 3, "max_iterations": 3}  # the last one is of negated inputs
    work = replace(work_of(problem_of(256, 2), causal(256), Ring("striped"), BySign(**BLOCKS)), settings=settings)
    with told(SparseSession, "_examine") as examined:
        found = sound(measure_cell(work, gang_of(rank, 2), silent)).metrics
    assert len(examined) == 2, "the last timed pass and the last pass are compared with float64, each by what it chose"
    assert found["time/earlier_step_s"] > 0
    assert found["select/recall"] < found["select/oracle_recall"]


@pytest.mark.gloo
@pytest.mark.slow
def test_a_selector_that_goes_by_signs_and_by_an_earlier_step_is_checked_by_what_each_pass_chose() -> None:
    run_ranks(2, by_sign_on_ranks)


# -- recall ------------------------------------------------------------------------------------------------------------


def recall_on_ranks(rank: int) -> None:
    problem, mask = problem_of(150, 2), causal(150)
    session = work_of(problem, mask, Ring("striped"), replace(ORACLE, per="kv_head")).start(0, gang_of(rank, 2))
    assert isinstance(session, SparseSession)
    edges = session._selection.edges
    random = np.random.default_rng(2)
    keep = random.random((2, 5, 10)) < 0.4
    for number in range(5):
        keep[:, number, 2 * number : 2 * number + 2] = True
    choice = chosen(keep, *edges, mask)
    run = session._plan(choice)
    _, saved = run.forward(session.shard.q, session.shard.k, session.shard.v)
    found = recalls.recall(choice, mask, problem, session.shard, run.lse(saved), np.arange(5), session._gang.ranks)
    part = Held(*(whole_part(problem),) * 3)
    q, k = (session._drawn(name, part) for name in "qk")
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * problem.softmax_scale
    weights = torch.softmax(scores.masked_fill(~torch.from_numpy(dense_heads(mask, 4)), -torch.inf), -1)
    kept = (weights * torch.from_numpy(dense_heads(choice, 4))).sum(-1).mean(-1)
    assert np.abs(found.kept - kept.numpy()).max() < BOUND
    # The best by every set of as many blocks for the two heads of a map.
    masses = np.zeros((4, 5, 10))
    for i in range(5):
        for j in range(10):
            masses[:, i, j] = weights[:, edges[0][i] : edges[0][i + 1], edges[1][j] : edges[1][j + 1]].sum((1, 2)).numpy()
    together = masses.reshape(2, 2, 5, 10).sum(1)
    counts = np.stack([choice.keep(i) for i in range(2)]).sum(-1)
    best = sum(np.sort(together[m, i])[::-1][: counts[m, i]].sum() for m in range(2) for i in range(5)) / 150 / 4
    assert abs(found.best.mean() - best) < BOUND
    assert (found.kept.reshape(2, 2).mean(1) <= found.best.reshape(2, 2).mean(1)).all()
    assert float((found.apart[0] - found.apart[1]).abs().max()) < BOUND


@pytest.mark.gloo
@pytest.mark.slow
def test_recall_and_the_best_recall_are_those_of_dense_float64() -> None:
    run_ranks(2, recall_on_ranks)


def test_long_sequences_are_sampled_and_the_last_block_is_always_looked_at() -> None:
    numbers = recalls.sample(causal(1 << 20), 128, 8, [1, 2, 3])
    assert len(numbers) == recalls.BLOCKS
    assert numbers[-1] == (1 << 13) - 1
    assert (np.diff(numbers) > 0).all()
    assert not np.array_equal(numbers, recalls.sample(causal(1 << 20), 128, 8, [1, 2, 4]))


@pytest.mark.slow
def test_a_recall_below_the_bound_of_the_cell_is_a_failure_that_names_both() -> None:
    problem, mask = problem_of(160, 1), causal(160)
    found = measure_cell(work_of(problem, mask, Local(), workload=SparseAttention(min_recall=0.9)), gang_of(), silent)
    assert found.check is not None
    ((failure),) = found.check.failures
    recall = found.metrics["select/recall"]
    assert failure == f"recall: {recall:.4g} of the softmax's mass is kept, less than workload.min_recall=0.9"
    assert sound(measure_cell(work_of(problem, mask, Local(), workload=SparseAttention(min_recall=0.2)), gang_of(), silent))


# -- faults ------------------------------------------------------------------------------------------------------------


def failures_of(work: Work, rank: int = 0, ranks: int = 1) -> list[str]:
    """What speaks against a cell; that ranks compute other pairs than the mask has ends it."""
    try:
        found = measure_cell(work, gang_of(rank, ranks), silent)
    except AssertionError as error:
        return [str(error)]
    assert found.unavailable is None
    assert found.check is not None
    return found.check.failures


@dataclass(frozen=True)
class Moody(Oracle):
    """Chooses otherwise on rank 1 than on rank 0."""

    rank: ClassVar[int] = 0

    def of_all(self, features: Features, edges: Any, problem: Problem) -> Features:
        found = super().of_all(features, edges, problem)
        return {"k": found["k"].roll(64, 1)} if self.rank else found


def moody_on_ranks(rank: int) -> None:
    Moody.rank = rank
    failures = failures_of(work_of(problem_of(256, 2), full(256), Ring(), Moody(density=0.3, **BLOCKS)), rank, 2)
    assert any("one rank alone chooses others" in failure for failure in failures), failures


def torn_on_ranks(rank: int) -> None:
    """Rank 1 misses some of what rank 0 has chosen."""
    gathered = selection.Blocks.gathered

    def torn(self: Any, x: torch.Tensor, some: Any = None) -> torch.Tensor:
        found = gathered(self, x, some)
        if rank and found.dtype == torch.uint8:
            found = found.clone()
            found[0] |= 255
        return found

    problem, mask = problem_of(256, 2), full(256)
    session = work_of(problem, mask, RING).start(0, gang_of(rank, 2))
    assert isinstance(session, SparseSession)
    with patch.object(selection.Blocks, "gathered", torn):
        session._check_choice("a pass", session._choose())
    assert any("a pass: ranks with other maps" in failure for failure in session.check().failures)


def misplaced_on_ranks(rank: int) -> None:
    """Features arrive in the order of ranks and not of blocks."""
    taken = selection._taken

    def untaken(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return taken(x, index) if index is None or len(index) != len(x) else x

    with patch.object(selection, "_taken", untaken):
        failures = failures_of(work_of(problem_of(256, 2), causal(256), Ring("zigzag"), ORACLE), rank, 2)
    assert failures


@pytest.mark.gloo
@pytest.mark.slow
def test_ranks_that_do_not_choose_what_one_rank_does_are_found_out() -> None:
    run_ranks(2, moody_on_ranks)
    run_ranks(2, torn_on_ranks)
    run_ranks(2, misplaced_on_ranks)


def changed(choice: BlockMap, number: int = 2) -> BlockMap:
    """Another map: of one block of queries, the first block of keys that is kept is not."""
    keep = choice.keeps().copy()
    row = keep[0, number]
    row[np.nonzero(row)[0][0]] = False
    return chosen(keep, choice.q_edges, choice.k_edges, causal(choice.num_q))


def faulty_plan(fault: Callable[[int, Any], Any]) -> Callable[..., Any]:
    """``_plan`` with a fault: (passes so far, mask) to the mask that is planned for."""
    plan, passes = SparseSession._plan, [0]

    def planned(self: SparseSession, mask: Any) -> Any:
        passes[0] += 1
        return plan(self, fault(passes[0], mask))

    return planned


class Stale:
    """Chooses once, and gives that choice ever after; or from the pass with a number on."""

    def __init__(self, since: int) -> None:
        self._since, self._passes, self._kept = since, 0, None
        self._choose = Selection.choose

    def __get__(self, owner: Any, kind: Any) -> Any:
        def choose(*args: Any) -> Any:
            self._passes += 1
            if self._passes < self._since or self._kept is None:
                self._kept = self._choose(owner, *args)
            return self._kept

        return choose


@pytest.mark.slow
def test_a_choice_of_other_inputs_is_found_out() -> None:
    work = work_of(problem_of(160, 1), causal(160), Local())
    with patch.object(Selection, "choose", Stale(0)):
        assert any("choice, last pass: one rank alone chooses others" in failure for failure in failures_of(work))


@pytest.mark.parametrize("which", [2, 4])
def test_a_choice_that_changes_from_pass_to_pass_is_found_out(which: int) -> None:
    """In the first pass, and in the last that is timed."""
    choose, passes = Selection.choose, [0]

    def moved(self: Selection, *args: Any) -> BlockMap:
        passes[0] += 1
        found = choose(self, *args)
        return changed(found) if passes[0] == which else found

    work = work_of(problem_of(160, 1), causal(160), Local())
    with patch.object(Selection, "choose", moved):
        assert any("chosen otherwise" in failure for failure in failures_of(work))


@pytest.mark.parametrize("since", [1, 2, 4])
@pytest.mark.slow
def test_a_plan_that_forgets_a_block_is_found_out(since: int) -> None:
    """From the very first on, from the first pass on, and in timed passes only."""
    work = work_of(problem_of(160, 1), causal(160), Local())

    def fault(passes: int, mask: Any) -> Any:
        return changed(mask) if isinstance(mask, BlockMap) and passes >= since else mask

    with patch.object(SparseSession, "_plan", faulty_plan(fault)):
        failures = failures_of(work)
    found = "the ranks compute" if since == 1 else ("out", "lse")
    assert any(failure.startswith(found) for failure in failures), failures


def test_a_plan_for_all_of_the_mask_is_found_out() -> None:
    work = work_of(problem_of(160, 1), causal(160), Local())
    with patch.object(SparseSession, "_plan", faulty_plan(lambda passes, mask: causal(160) if passes > 1 else mask)):
        assert any(failure.startswith("out") for failure in failures_of(work))


def test_a_backward_of_another_mask_is_found_out() -> None:
    work, every = work_of(problem_of(160, 1), causal(160), Local()), SparseSession.phases

    def phases(self: SparseSession) -> Any:
        found = every(self)
        other = self._plan(changed(self.choice))

        def backward(passed: Passed) -> Passed:
            _, saved = other.forward(self.shard.q, self.shard.k, self.shard.v)
            return passed._replace(gradients=other.backward(self.shard.dout, saved))

        return {**found, "backward": backward}

    with patch.object(SparseSession, "phases", phases):
        assert any(failure.startswith(("dq", "dk", "dv")) for failure in failures_of(work))


def test_a_recall_that_is_not_the_passes_is_found_out() -> None:
    work, count = work_of(problem_of(160, 1), causal(160), Local()), recalls.recall

    def wrong(choice: BlockMap, *args: Any) -> Any:
        return count(changed(choice), *args)

    with patch.object(sparse_session, "recall", wrong):
        assert any("recall" in failure for failure in failures_of(work))


@dataclass(frozen=True)
class Blind(Oracle):
    """Leaves a query without a key."""

    def keep(self, rows: Rows, keys: Features, edges: Any, problem: Problem) -> Keep:
        found = super().keep(rows, keys, edges, problem)
        if rows.number == 1:
            found[0] = False
            found[0, np.nonzero(rows.pairs)[0][-1]] = True  # of the last queries alone
        return found


@dataclass(frozen=True)
class Greedy(Oracle):
    """Keeps a block that nobody sees."""

    def keep(self, rows: Rows, keys: Features, edges: Any, problem: Problem) -> Keep:
        return np.ones_like(super().keep(rows, keys, edges, problem))


@dataclass(frozen=True)
class Idle(Oracle):
    """Keeps nothing of a block."""

    def keep(self, rows: Rows, keys: Features, edges: Any, problem: Problem) -> Keep:
        return np.zeros_like(super().keep(rows, keys, edges, problem))


@dataclass(frozen=True)
class Vague(Oracle):
    """Keeps shares of blocks."""

    def keep(self, rows: Rows, keys: Features, edges: Any, problem: Problem) -> Any:
        return super().keep(rows, keys, edges, problem).astype(np.float32)


def test_queries_without_a_key_are_found_out() -> None:
    work = work_of(problem_of(160, 1), causal(160), Local(), Blind(density=0.3, **BLOCKS))
    assert any("queries that see none of the keys kept" in failure for failure in failures_of(work))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Greedy, "a block of keys that the mask has no pair of"),
        (Idle, "keeps no key for some head"),
        (Vague, "an array of float32"),
    ],
)
def test_what_is_no_choice_is_an_error_that_names_selector_and_block(kind: type[Oracle], says: str) -> None:
    work = work_of(problem_of(160, 1), causal(160), Local(), kind(density=0.3, **BLOCKS))
    with pytest.raises(ValueError, match=rf"{kind.__name__}, block \d of queries: .*{says}"):
        failures_of(work)


@pytest.mark.slow
def test_full_attention_that_is_wrong_is_no_number_to_compare_with() -> None:
    work = work_of(problem_of(160, 1), causal(160), Local())

    def fault(passes: int, mask: Any) -> Any:
        return sliding_window(160, left=100, right=0) if isinstance(mask, BandMask) else mask

    with patch.object(SparseSession, "_plan", faulty_plan(fault)):
        assert any(failure.startswith("out") for failure in failures_of(work))


# -- what cannot run ---------------------------------------------------------------------------------------------------


def test_what_the_workload_does_not_take_is_said() -> None:
    workload, mask, problem = SparseAttention(), causal(64), problem_of(64, 2)

    def reason(problem: Problem, mask: Any = mask, strategy: Strategy = RING) -> str:
        found = workload.unsupported(problem, mask, Reference(), strategy, None)
        assert found is not None
        return found

    blocks = block_random(64, heads=HEADS, seed=(0, 0), density=0.5, block_size=16, sizes="uniform", per="all_heads")
    assert "takes seqlen, no batch" in reason(replace(problem, batch=Batch((Requests(2, 16, 32),))))
    assert "this one is a block map itself" in reason(problem, blocks)
    assert "without a sink or a softcap" in reason(replace(problem, softmax=Softmax(softcap=10.0)))
    assert "cannot be started for a mask that is chosen" in reason(problem, strategy=Star())
    assert workload.unsupported(problem, mask, Reference(), Ring(), None) is None


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, True, "much"])
def test_a_bound_that_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"workload.min_recall={value} is no share above 0 and up to 1"):
        SparseAttention(min_recall=value)


WORDS = ("workload=sparse_attention", "selector=oracle", "seqlen=512", "scale=1x2", "heads=4x2x64", "kernel=sdpa_flash", "cp=ring")


def test_a_plan_says_what_kernels_do_not_take_of_blocks_that_may_be_chosen() -> None:
    def reasons(*words: str) -> list[str | None]:
        return [planned.skip for planned in look([*WORDS, *words]).cells]

    assert reasons("mask=causal") == [None]
    (cut,) = reasons("mask=causal", "kernel=triton_block_sparse", "selector.q_block=96")
    (whole,) = reasons("mask=full", "kernel=triton_block_sparse")
    (vsa,) = reasons("mask=full", "kernel=vsa", "selector.q_block=32")
    (dense,) = reasons("mask=full", "kernel=triton_block_sparse", "selector=none")
    assert whole is None
    assert vsa is not None
    assert vsa.startswith("kernel vsa: ")
    assert dense == "kernel triton_block_sparse: takes dynamic block masks only (mask=block_...); dense kernels run this one"
    (many,) = reasons("mask=causal", "seqlen=64m", "selector.q_block=16", "selector.k_block=16")
    assert many is not None
    assert "take larger blocks" in many
    assert cut is None or cut.startswith("kernel triton_block_sparse: ")


def test_cells_that_choose_approximate() -> None:
    (planned,) = look([*WORDS, "mask=causal"]).cells
    assert approximates(planned.cell)
    (planned,) = look([*WORDS, "mask=causal", "selector=none"]).cells
    assert not approximates(planned.cell)
    assert skip_reason(planned.cell) is None
