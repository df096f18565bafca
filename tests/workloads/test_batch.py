"""A batch of documents as planners share it out: every gradient is one rank's, wrong runs are refused, what is counted is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcbench.cp.assigned import Assigned
from lcbench.cp.base import Strategy
from lcbench.cp.batch_run import BatchPass, BatchRun
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.ring import Ring
from lcbench.cp.star import Star
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_planner
from lcbench.inputs.drawing import draw
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Explicit
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Group, Infeasible, Planner, Say
from lcbench.planners.none import NoPlanner
from lcbench.problem import ALONE, PLAIN, Heads, Mesh, Problem, Requests, Scale, Softmax
from lcbench.problem import Batch as Requested
from lcbench.schedule.groups import Groups
from lcbench.schedule.layout import documents
from lcbench.testing.costs import Quadratic
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads import batching
from lcbench.workloads.base import Work
from lcbench.workloads.batch import Batch
from lcbench.workloads.batching import BatchSession, Gradients
from lcbench.workloads.planned import idle_share, padding
from tests.measure.faults import refused

CPU = torch.device("cpu")
HEADS = Heads(8, 4, 8)
LENGTHS = [36, 96, 12, 64, 20, 28]
SEQLEN = sum(LENGTHS)
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
MASKS: dict[str, Callable[..., BandMask]] = {"causal_document": causal_document, "document": document}
FEW = "oracle"  # which takes at most 8 documents and 4 ranks


def mask_of(name: str) -> BandMask:
    return MASKS[name](SEQLEN, seed=(0, 0), lengths=Explicit(LENGTHS))


def scale_of(ranks: int) -> Scale:
    return Scale(2, ranks // 2) if ranks > 2 else Scale(1, ranks)


def problem_of(ranks: int, dtype: str = "float64", mesh: Mesh = ALONE) -> Problem:
    return Problem(SEQLEN, mesh.heads(HEADS), mesh.group_scale(scale_of(ranks)), dtype, "forward_backward")


@dataclass(frozen=True)
class InTurn(Quadratic):
    """Every method in turn is the fastest, by the number of documents."""

    def group(self, documents: Documents, ranks: Any) -> tuple[float, str]:
        return super().group(documents, ranks)[0], self.methods[len(documents) % len(self.methods)]


def cost_of(strategy: Strategy, problem: Problem, mask: BandMask) -> Cost:
    """With the sizes of groups that some method takes; ``methods`` are those that take them all."""
    inside, ranks = strategy.inside, problem.scale.world_size

    def takes(name: str, degree: int) -> bool:
        return inside[name].unsupported(replace(problem, scale=Scale(1, degree)), mask) is None

    degrees = [degree for degree in range(1, ranks + 1) if any(takes(name, degree) for name in inside)]
    methods = [name for name in inside if all(takes(name, degree) for degree in degrees)]
    return InTurn(tuple(degrees), methods=tuple(methods), per_node=problem.scale.gpus_per_node)


def work_of(
    problem: Problem, mask: BandMask, planner: Planner, strategy: Strategy, *, batch: Batch, mesh: Mesh = ALONE, draws: int = 1
) -> Work:
    return Work(
        batch, problem, lambda draw: mask, SDPAFlash(), strategy, SETTINGS, 7, draws, mesh=mesh, planner=planner,
        scale=scale_of(problem.scale.world_size * mesh.count), cost=lambda: cost_of(strategy, problem, mask),
    )  # fmt: skip


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refusal(problem: Problem, mask: Any, strategy: Strategy, **options: int) -> str | None:
    return Batch(**options).unsupported(problem, mask, SDPAFlash(), strategy, None)


def test_what_cannot_run_says_why() -> None:
    problem, mask = problem_of(2), mask_of("causal_document")
    assert refusal(problem, mask, Ring()) is None
    assert "direction=forward_backward" in str(refusal(replace(problem, direction="forward"), mask, Ring()))
    requests = replace(problem, batch=Requested((Requests(1, SEQLEN, SEQLEN),)), direction="forward_backward")
    assert "lengths=" in str(refusal(requests, mask, Ring()))
    blocks = block_random(SEQLEN, heads=HEADS, seed=(0, 0), density=0.5, block_size=16, sizes="uniform", per="all_heads")
    assert "has no documents" in str(refusal(problem, blocks, Ring()))
    assert "this strategy has none" in str(refusal(problem, mask, Star()))
    told = "document 1 has 96 tokens, and 2 ranks with workload.capacity=47 each hold 94"
    assert refusal(problem, mask, Ring(), capacity=47) == told
    assert refusal(problem, mask, Ring(), capacity=48) is None
    assert "mesh.dp=2" in str(Batch().misfit(Mesh(dp=2)))
    assert Batch().misfit(Mesh(tp=2)) is None


def test_a_strategy_is_asked_for_sub_groups_and_not_for_all_ranks() -> None:
    """Eight heads are no 16 ranks' own, and sub-groups of up to eight can share documents all the same."""
    problem = replace(problem_of(2), scale=Scale(2, 8))
    mask = mask_of("causal_document")
    assert Ulysses().unsupported(problem, mask) is not None
    assert refusal(problem, mask, Ulysses()) is None
    stages = Ulysses(stages=16)
    assert "no sub-group of up to 16 ranks" in str(refusal(problem, mask, stages))


@pytest.mark.parametrize(("option", "value"), [("capacity", 0), ("capacity", True), ("gradient_bytes", -1), ("capacity", 1.5)])
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"workload.{option}={value} is no whole number"):
        Batch(**{option: value})


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_padding_is_what_the_fullest_rank_of_each_micro_batch_asks_of_the_others() -> None:
    assert padding(np.array([[4, 4], [6, 6]])) == 0
    assert padding(np.array([[4, 2], [0, 6]])) == pytest.approx(1 - 12 / 20)


def test_a_rank_is_idle_until_the_last_of_its_group_has_come_and_after_its_own_last_micro_batch() -> None:
    assignment = Assignment((
        (Group((0,), (0,), "ring"), Group((1,), (1,), "ring")),
        (Group((0, 1), (2,), "ring"),),
    ))  # fmt: skip
    # Rank 1 is done with its first at 1 s and waits in its second until rank 0 comes at 3 s.
    spans = [[[0, 0.0, 1.0, 3.0], [1, 3.0, 3.5, 4.0]], [[0, 0.0, 0.5, 1.0], [1, 1.0, 3.5, 4.0]], []]
    assert idle_share(assignment, spans[:2]) == pytest.approx(1 - (4 + 2) / 2 / 4)
    assert idle_share(assignment, spans) == pytest.approx(1 - (4 + 2) / 3 / 4)


# -- every planner -----------------------------------------------------------------------------------------------------


def exact(problem: Problem, mask: BandMask) -> dict[str, torch.Tensor]:
    """What one rank gives of the whole batch, by dense float64."""
    every = np.arange(SEQLEN)
    q, k, v, dout = (draw(name, every, problem, 7, CPU) for name in ("q", "k", "v", "dout"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, dense_mask(SEQLEN, SEQLEN, mask), problem.softmax_scale)
    return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True)) | {
        "out": out.detach(),
        "lse": lse.detach(),
    }


def equal_one_rank(rank: int, ranks: int, path: Path) -> None:
    gang, problem, told = Gang(rank, ranks, CPU, Groups(), []), problem_of(ranks), []
    for mask_name in MASKS:
        mask = mask_of(mask_name)
        want = exact(problem, mask)
        for strategy in (Ring(), Ulysses(), Hybrid()):
            for name in names("planner"):
                planner = build_planner({"workload": load("workload", "batch"), "planner": load("planner", name)})
                assert planner is not None
                batch = Batch(capacity=2 * max(LENGTHS) // ranks)
                session = batch.start(work_of(problem, mask, planner, strategy, batch=batch), 0, gang)
                assert isinstance(session, BatchSession)
                case = f"{name} {mask_name} {type(strategy).__name__}"
                if session.refused is not None:
                    told.append([name, case, session.refused, 0, 0])
                    continue
                assert session.wrong is None, f"{case}: {session.wrong}"
                found = session._one_pass(session.shard).named()
                errors = [float((found[x] - want[x][session.run.tokens]).abs().max()) for x in want if len(session.run.tokens)]
                assignment = session.planned.assignment
                told.append([name, case, None, max(errors, default=0.0), len(assignment.micro_batches)])
    every = gang.ranks.all_gather_object(told)
    if rank == 0:
        path.write_text(json.dumps(every))


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.slow
def test_every_planner_gives_the_gradients_of_one_rank(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, equal_one_rank, ranks, tmp_path / "told")
    every = json.loads((tmp_path / "told").read_text())
    assert {name for name, *_ in every[0]} == set(names("planner"))
    for told in every:
        for name, case, reason, error, _ in told:
            assert reason is None or (name == FEW and ranks > 4), f"{case}: {reason}"
            assert error < 1e-12, f"{case}: {error}"
    assert max(micro_batches for *_, micro_batches in every[0]) >= 2


# -- measured, and refused where it is wrong ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Planner):
    """An assignment that is known: two documents by all ranks, then one by each of the first two, then the rest by all but one.

    Attributes:
        twice: a document that is computed once more; ``without``: one of the last two that is left out.
        first: of the ranks that share the last two.
    """

    twice: int | None = None
    without: int | None = None
    first: int = 1

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        every, method = tuple(range(fleet.ranks)), cost.methods[0]
        last = tuple(number for number in (2, 5) if number != self.without)
        more = () if self.twice is None else ((Group((0,), (self.twice,), method),),)
        return Assignment((
            (Group(every[::-1], (1, 0), method),),
            (Group((0,), (4,), method), Group((1,), (3,), method)),
            (Group(every[self.first :], last, method),),
            *more,
        ))  # fmt: skip


@dataclass(frozen=True)
class OnFirst(Planner):
    """Rank 0 computes everything, a document at a time, and all other ranks nothing."""

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        return Assignment(tuple((Group((0,), (number,), cost.methods[0]),) for number in range(len(documents))))


@dataclass(frozen=True)
class Impossible(Planner):
    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Say = lambda line: None) -> Assignment:
        raise Infeasible("document 3 is too long for this test")


Patch = Callable[[pytest.MonkeyPatch, int], None]
Compute = Callable[..., BatchPass]


def other_assignment(change: Callable[[Assignment], Assignment]) -> Patch:
    """What runs is another assignment than what was planned."""

    def patch(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        monkeypatch.setattr(batching, "Assigned", lambda assignment, *others: Assigned(change(assignment), *others))

    return patch


def repeated(assignment: Assignment) -> Assignment:
    return Assignment((*assignment.micro_batches, (assignment.groups[1][1],)))


def without_the_last(assignment: Assignment) -> Assignment:
    return Assignment(assignment.micro_batches[:-1])


def exchanged(assignment: Assignment) -> Assignment:
    """Two ranks compute each other's documents."""
    first, (one, other), *rest = assignment.micro_batches
    return Assignment((first, (replace(one, ranks=other.ranks), replace(other, ranks=one.ranks)), *rest))


class Wrong:
    """Passes of a batch on this rank, counted from 1: 1 is compared with the reference, 2 and 3 are probes, 4 and 5 are timed."""

    def __init__(self, change: Callable[[Wrong, list[Any], Compute], BatchPass], since: int, faulty: bool) -> None:
        self._change, self._since, self._faulty, self._passes = change, since, faulty, 0
        self.before: BatchPass | None = None

    def __call__(self, inputs: list[Any], compute: Compute) -> BatchPass:
        self._passes += 1
        if self._faulty and self._passes >= self._since:
            return self._change(self, inputs, compute)
        self.before = compute(*inputs)
        return self.before


def other_keys(wrong: Wrong, inputs: list[Any], compute: Compute) -> BatchPass:
    """The keys and values of the first rows of a rank are those of its last ones, which are of another document."""
    q, k, v, dout, sink = inputs
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:4] = x[-4:]
    return compute(q, k, v, dout, sink)


def lost_gradients(wrong: Wrong, inputs: list[Any], compute: Compute) -> BatchPass:
    """Those of the last micro-batch are not there."""
    passed = compute(*inputs)
    *others, last = passed.gradients
    return replace(passed, gradients=(*others, tuple(torch.zeros_like(x) for x in last)))


def gradient_twice(wrong: Wrong, inputs: list[Any], compute: Compute) -> BatchPass:
    """A gradient of keys is added once more in the second micro-batch."""
    passed = compute(*inputs)
    first, (dq, dk, dv), *others = passed.gradients
    return replace(passed, gradients=(first, (dq, 2 * dk, dv), *others))


def skips_the_last(wrong: Wrong, inputs: list[Any], compute: Compute) -> BatchPass:
    """What a rank gives of its last micro-batch is of an earlier pass."""
    passed, before = compute(*inputs), wrong.before
    assert before is not None
    gradients = (*passed.gradients[:-1], before.gradients[-1])
    return replace(passed, outs=(*passed.outs[:-1], before.outs[-1]), gradients=gradients)


def of_passes(change: Callable[[Wrong, list[Any], Compute], BatchPass], who: int, since: int = 1) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        right, wrong = BatchRun.batch, Wrong(change, since, rank == who)

        def batch(run: BatchRun, *inputs: Any, **how: Any) -> BatchPass:
            return right(run, *inputs, **how) if how else wrong(list(inputs), lambda *given: right(run, *given))

        monkeypatch.setattr(BatchRun, "batch", batch)

    return patch


def no_sums(since: int) -> Patch:
    """Ranks keep their own gradients."""

    def patch(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        right, passes = Gradients.sum, []

        def wrong(gradients: Gradients, passed: Any) -> Any:
            passes.append(None)
            return passed if len(passes) >= since else right(gradients, passed)

        monkeypatch.setattr(Gradients, "sum", wrong)

    return patch


# By name: the planner, what is changed from outside, and words of the refusal.
FAULTS: dict[str, tuple[Planner, Patch | None, str]] = {
    "planned twice": (Given(twice=3), None, "the planner's assignment: document 3 is computed 2 times"),
    "planned never": (Given(without=5), None, "the planner's assignment: document 5 is computed 0 times"),
    "computed twice": (Given(), other_assignment(repeated), "not owned by exactly one rank"),
    "left out": (Given(), other_assignment(without_the_last), "not owned by exactly one rank"),
    "on other ranks than planned": (Given(), other_assignment(exchanged), "which the assignment gives to others"),
    "keys of another document": (Given(), of_passes(other_keys, 0), "(reference"),
    "gradients of a micro-batch lost": (Given(), of_passes(lost_gradients, 0), "(reference"),
    "gradients of keys twice": (Given(), of_passes(gradient_twice, 1), "(reference"),
    "gradients lost when it is timed": (Given(), of_passes(lost_gradients, 1, since=4), "(last timed pass"),
    "a rank skips its last micro-batch when it is timed": (Given(), of_passes(skips_the_last, 1, since=4), "(last timed pass"),
    "a rank skips it in the last timed pass": (Given(), of_passes(skips_the_last, 1, since=5), "(last timed pass"),
    "gradients are not summed": (Given(), no_sums(1), "gradients from 0 on"),
    "gradients are not summed when it is timed": (Given(), no_sums(2), "gradients from 0 on"),
}


def measured(rank: int, ranks: int, planner: Planner, patch: Patch | None = None, **how: Any) -> Measured:
    """A cell measured, and a later block of its timings unless something is ``patch``ed."""
    mesh, dtype, softmax = how.pop("mesh", ALONE), how.pop("dtype", "float32"), how.pop("softmax", PLAIN)
    batch, strategy = Batch(capacity=SEQLEN, gradient_bytes=4096), how.pop("strategy", Ring())
    problem = replace(problem_of(ranks, dtype, mesh), softmax=softmax)
    work = work_of(problem, mask_of("causal_document"), planner, strategy, batch=batch, mesh=mesh, **how)
    gang = Gang(rank, ranks, CPU, Groups(), [])
    with pytest.MonkeyPatch.context() as monkeypatch:
        if patch:
            patch(monkeypatch, rank)
        found = measure_cell(work, gang, lambda _: None)
        if not patch and found.stands:
            again = measure_again(replace(work, attempt=2), gang, lambda _: None)
            assert again.stands, again.check
            assert set(again.samples) >= {"batch_s", "reduce_s", "total_s"}
        return found


def faulty(rank: int, ranks: int, path: Path) -> None:
    dtypes = ("float32", "bfloat16", "float64")
    told = {}
    for number, (name, (planner, patch, _)) in enumerate(FAULTS.items()):
        told[name] = refused(measured(rank, ranks, planner, patch, dtype=dtypes[number % 3]))
    if rank == 0:
        path.write_text(json.dumps(told))


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.slow
def test_a_wrong_batch_is_refused(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, faulty, ranks, tmp_path / "told")
    told = json.loads((tmp_path / "told").read_text())
    assert {name: told[name] for name, (_, _, words) in FAULTS.items() if words not in str(told[name])} == {}


def sound(rank: int, ranks: int, path: Path) -> None:
    told: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "float64": {"dtype": "float64"}, "messages": {"dtype": "bfloat16", "strategy": Ring(lowering="p2p")},
        "draws": {"draws": 2, "softmax": Softmax(sink=True)}, "tensor-parallel": {"mesh": Mesh(tp=2), "planner": NoPlanner()},
        "all on one rank": {"planner": OnFirst()}, "heads": {"planner": Given(first=2), "strategy": Ulysses()},
    }  # fmt: skip
    for name, how in cases.items():
        found = measured(rank, ranks, **({"planner": Given()} | how))
        assert found.check is not None, found.unavailable
        told[name] = {
            "refused": refused(found), "metrics": found.metrics, "notes": found.notes, "checks": found.check.ratios,
        }  # fmt: skip
    told["impossible"] = measured(rank, ranks, Impossible()).unavailable
    if rank == 0:
        path.write_text(json.dumps(told))


@pytest.mark.gloo
@pytest.mark.slow
def test_a_sound_batch_is_counted(tmp_path: Path) -> None:
    ranks = 4
    run_ranks(ranks, sound, ranks, tmp_path / "told")
    told = json.loads((tmp_path / "told").read_text())
    assert told.pop("impossible") == "document 3 is too long for this test"
    assert {name: found["refused"] for name, found in told.items() if found["refused"]} == {}
    metrics, notes = told["float64"]["metrics"], told["float64"]["notes"]
    assert told["float64"]["checks"]["sums of gradients"] == {"first pass": 0, "last timed pass": 0, "last pass": 0}
    want = {
        "batch/tokens": SEQLEN, "batch/documents": 6, "batch/micro_batches": 3, "batch/groups": 4,
        "batch/degree": (4 * (96 + 36) + 64 + 20 + 3 * (12 + 28)) / SEQLEN, "batch/peak_tokens": 64,
        "comm/reduce/bytes": 4096 * 2 * 3 // 4,
        # Two thirds of what a rank of a sum sends goes to the other node.
        "comm/reduce/between_nodes_bytes": 4096,
    }  # fmt: skip
    assert {key: metrics[key] for key in want} == pytest.approx(want)
    fullest = [33, 64, 14]
    assert metrics["batch/padding"] == pytest.approx(1 - SEQLEN / (4 * sum(fullest)), abs=0.01)
    assert 0 <= metrics["batch/idle_share"] < 1
    total = metrics["time/total/median_s"]
    assert total >= metrics["time/batch/median_s"] > 0
    follows = {
        "batch/tokens_per_s": SEQLEN / total, "batch/with_plan_s": total + metrics["plan/seconds"],
        "batch/pipelined_s": max(total, metrics["plan/seconds"]), "plan/share": metrics["plan/seconds"] / total,
    }  # fmt: skip
    assert {key: metrics[key] for key in follows} == pytest.approx(follows)
    problem, mask = problem_of(ranks), mask_of("causal_document")
    bounds, pairs = documents(mask)
    every, cost = Documents(np.diff(bounds), pairs), cost_of(Ring(), problem, mask)
    planned = Given().plan(every, Fleet(ranks, 2, SEQLEN), cost)
    assert metrics["plan/predicted_s"] == planned.makespan_s(every, cost, ranks)
    assert Assignment.of_plain(notes["assignment"]) == planned
    assert notes["documents"] == LENGTHS
    assert notes["plan_cost"] == "a formula"
    # Every rank's micro-batches: rank 0 is not in the last, ranks 2 and 3 are not in the second.
    assert [[span[0] for span in own] for own in notes["gantt"]] == [[0, 1], [0, 1, 2], [0, 2], [0, 2]]
    for own in notes["gantt"]:
        moments = [moment for span in own for moment in span[1:]]
        assert moments == sorted(moments)
    assert metrics["overlap/batch/compute_s"] > 0
    assert metrics["comm/batch/bytes"] > 0
    # Two tensor-parallel ranks have half of the heads each, and groups of two share the documents.
    divided = told["tensor-parallel"]["metrics"]
    assert divided["batch/degree"] == 2
    assert divided["comm/reduce/bytes"] == 4096
    assert divided["mesh/batch/alone_s"] > 0
    assert told["draws"]["metrics"]["batch/tokens"] == SEQLEN
    one = told["all on one rank"]
    assert one["metrics"]["batch/padding"] == pytest.approx(0.75)
    assert 0.7 < one["metrics"]["batch/idle_share"] < 1
    assert one["metrics"]["balance/area_max_over_mean"] == 4
    assert one["notes"]["gantt"][1:] == [[], [], []]
    # By messages nothing needs a communicator besides that of all ranks; heads are exchanged by those of the sub-groups.
    assert told["messages"]["metrics"]["comm/communicators"] == 0
    assert told["heads"]["metrics"]["comm/communicators"] >= 1
    assert told["heads"]["metrics"]["time/communicators_s"] > 0
