"""A training step of a batch of documents on real gloo ranks: loss, gradients of x and of all weights as those of an unsharded
float64 model, whoever planned it; sound cells pass the check, and faults that are put in from outside are refused."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from lcbench.grid.build import build, build_strategy
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Explicit
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Group, Planner
from lcbench.planners.base import Offload as Offloads
from lcbench.planners.bytescale_hdp import BytescaleHDP
from lcbench.planners.fixed import Fixed
from lcbench.problem import ALONE, Mesh, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.costs import Quadratic
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.batch_step import BatchStep
from lcbench.workloads.batch_stepping import BatchStepSession
from lcbench.workloads.batch_training import BatchTraining
from lcbench.workloads.block import Block
from lcbench.workloads.loss import ChunkedLoss
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.none import NoRecompute
from lcbench.workloads.recompute.token_wise import TokenWise
from lcbench.workloads.sharing import Accumulation, Sharing, whole
from lcbench.workloads.step import BlockSession
from tests.turns import due
from tests.workloads import plain
from tests.workloads.refused import assert_refused
from tests.workloads.test_batch import FEW, cost_of

BOUND = 1e-12
SOUND = 0.8  # of a bound of the check that a sound run comes to at most
CPU = torch.device("cpu")
MODEL = Model(4, 24, 8, 4, 4, 40, 30, 1e4, qk_norm=True)
LENGTHS = [17, 20, 60, 18, 16, 24]
SEQLEN, SEED, CAPACITY, LABELLED = sum(LENGTHS), 5, 32, 0.5
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
EFFORT = 5_000  # of planners that improve plans for long: how good a plan is, is nothing to a step
MASKS: dict[str, Callable[..., BandMask]] = {"causal_document": causal_document, "document": document}
HOST = Offloads(layers=4, token_bytes=1.0, host_bytes_per_s=1e12, forward=0.4)


def mask_of(name: str, lengths: list[int] = LENGTHS) -> BandMask:
    return MASKS[name](sum(lengths), seed=(0, 0), lengths=Explicit(lengths))


@dataclass(frozen=True)
class Given(Planner):
    """An assignment that a test has made."""

    assignment: Assignment

    def plan(self, documents: Documents, fleet: Fleet, cost: Cost, say: Any = None) -> Assignment:
        return self.assignment


@dataclass(frozen=True)
class Cell:
    planner: Planner
    cp: str = "ring"
    mask: str = "causal_document"
    recompute: str | Any = "none"
    dtype: str = "float64"
    mesh: Mesh = ALONE
    capacity: int = CAPACITY
    options: tuple[tuple[str, Any], ...] = ()
    lengths: tuple[int, ...] = tuple(LENGTHS)
    kernel: Any = field(default_factory=Reference)
    model: Model = MODEL
    offloads: Offloads | None = None

    def work(self, ranks: int) -> Work:
        scale = Scale(2, ranks // 2) if ranks > 2 else Scale(1, ranks)
        mask, strategy = mask_of(self.mask, list(self.lengths)), build_strategy(load("cp", self.cp))
        problem = Problem(
            mask.num_q, self.mesh.heads(self.model.heads()), self.mesh.group_scale(scale), self.dtype, "forward_backward"
        )
        recompute = build(load("recompute", self.recompute)) if isinstance(self.recompute, str) else self.recompute
        if self.recompute == "token_wise":
            recompute = replace(recompute, fraction=0.5)
        step = BatchStep(self.model, 2, loss_chunk=7, capacity=self.capacity, **dict(self.options))

        def cost() -> Cost:
            found = cost_of(strategy, problem, mask)
            assert isinstance(found, Quadratic)
            object.__setattr__(found, "offloads", self.offloads)
            return found

        return Work(
            step, problem, lambda _: mask, self.kernel, strategy, SETTINGS, SEED, recompute=recompute, mesh=self.mesh, scale=scale,
            planner=self.planner, cost=cost,
        )  # fmt: skip


def gang_of(rank: int, ranks: int, groups: Groups) -> Gang:
    return Gang(rank, ranks, CPU, groups, [])


def started(cell: Cell, rank: int, ranks: int, groups: Groups) -> BatchStepSession:
    work = cell.work(ranks)
    refused = work.workload.unsupported(work.problem, work.make_mask(0), work.kernel, work.strategy, work.recompute)
    assert refused is None, refused
    found = work.start(0, work.arranged(gang_of(rank, ranks, groups)))
    assert isinstance(found, BatchStepSession)
    return found


def one_step(session: BatchStepSession, ranks: int) -> dict[str, torch.Tensor]:
    """Loss, dx of all tokens and the weights' gradients of a step, the same on every rank."""
    training, gang = session.training, session._gang
    own, loss = training.step()
    dx = torch.zeros((session.mask.num_q, own.shape[1]), dtype=own.dtype)
    dx[torch.from_numpy(training.stack.attention.run.tokens)] = own
    loss = loss.clone()
    dx, loss = gang.ranks.reduce(dx), gang.ranks.reduce(loss)
    return {"loss": loss, "dx": dx} | {name: whole(weight.grad) for name, weight in training.weights().items()}  # type: ignore[arg-type]


def unsharded(folder: Path) -> None:
    """Write what each mask must give, with labels everywhere and with some, from the weights and inputs that a rank alone draws."""
    for name in MASKS:
        for labelled in (1.0, LABELLED):
            mask, none = mask_of(name), build_strategy(load("cp", "none"))
            problem = Problem(SEQLEN, MODEL.heads(), Scale(1, 1), "float64", "forward_backward")
            block = Block(MODEL, 2, loss_chunk=7, labelled=labelled)
            work = Work(block, problem, lambda _, mask=mask: mask, Reference(), none, {}, SEED, recompute=NoRecompute())
            training = BlockSession(block, work, 0, gang_of(0, 1, Groups())).training
            weights = {key: weight.detach() for key, weight in training.weights().items()}
            want = plain.step(MODEL, weights, training.x, training.labels, dense_heads(mask, MODEL.heads_q))
            torch.save(want, folder / f"{name}-{labelled}.pt")


def cells(ranks: int) -> dict[str, Cell]:
    """Every planner, every recomputation, and what else may go wrong in its own way."""
    planners = {name: build(load("planner", name)) for name in names("planner")}
    planners = {name: replace(p, effort=EFFORT) if hasattr(p, "effort") else p for name, p in planners.items()}
    found = {name: Cell(planner) for name, planner in planners.items()}
    found |= {f"{name}, document, ulysses": Cell(planner, "ulysses", "document") for name, planner in planners.items()}
    one = BytescaleHDP()
    found |= {recompute: Cell(one, recompute=recompute) for recompute in names("recompute")}
    some: tuple[tuple[str, Any], ...] = (("labelled", LABELLED),)
    found["some labels"] = Cell(one, options=some)
    found["masked logits"] = Cell(Fixed(), "ulysses", "document", options=(*some, ("masked_logits", True), ("optimizer", "adamw")))
    found["tensor parallel"] = Cell(one, mesh=Mesh(tp=2), capacity=2 * CAPACITY)
    found["offloaded"] = Cell(BytescaleHDP(offload=True, fallback=False), offloads=HOST)
    # Ranks in no order, one that has nothing, offloading beside none.
    far = (ranks - 1, 0) if ranks > 2 else (1, 0)
    found["odd"] = Cell(
        Given(Assignment((
            (Group(far, (2, 5), "ring", 0.5),), (Group((0,), (0,), "ring"), Group((ranks - 1,), (1, 3, 4), "ring", 0.25)),
        ))), capacity=48,
    )  # fmt: skip
    found["one rank"] = Cell(Given(Assignment(((Group((0,), tuple(range(len(LENGTHS))), "ring"),),))), capacity=SEQLEN)
    return found


def check_all(rank: int, ranks: int, folder: Path) -> None:
    groups, worst, seen = Groups(), 0.0, Counter[str]()
    for where, cell in cells(ranks).items():
        session = started(cell, rank, ranks, groups)
        if session.refused is not None:
            assert where.split(",")[0] == FEW, f"{ranks} ranks, {where}: {session.refused}"
            continue
        assert session.wrong is None, f"{where}: {session.wrong}"
        labelled = dict(cell.options).get("labelled", 1.0)
        want = torch.load(folder / f"{cell.mask}-{labelled}.pt")
        got = one_step(session, ranks)
        assert got.keys() == want.keys()
        for key, exact in want.items():
            error = float((got[key] - exact).abs().max() / exact.abs().max())
            worst = max(worst, error)
            assert error < BOUND, f"{ranks} ranks, {where}: {key} is off by {error}"
        again = one_step(session, ranks)
        different = [key for key in want if not torch.equal(got[key], again[key])]
        assert not different, f"{ranks} ranks, {where}: another step gives another {different}"
        seen["several"] += len(session.planned.assignment.micro_batches) > 1
        seen["offloaded"] += session.training.moved.get("forward", 0) > 0
        seen["idle"] += not session.training.micro_batches
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, (seen, worst))
    total = sum((one for one, _ in every), Counter[str]())
    assert total["several"] > 5
    assert total["offloaded"] > 2
    assert total["idle"] > 0
    if rank == 0:
        print(f"{ranks} ranks: off by {max(worst for _, worst in every):.1e} at most")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wanted")
    unsharded(folder)
    return folder


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_step_of_a_batch_is_that_of_an_unsharded_model(ranks: int, wanted: Path) -> None:
    run_ranks(ranks, check_all, ranks, wanted)


# -- the check ---------------------------------------------------------------------------------------------------------

LONG = (130, 40, 20, 66)
WIDE = Model(6, 32, 4, 2, 8, 48, 40, 1e4, qk_norm=True)
ROOM = 96


def measured(cell: Cell, rank: int, ranks: int, groups: Groups, one: Any = measure_cell) -> Measured:
    found: Measured = one(cell.work(ranks), gang_of(rank, ranks, groups), lambda _: None)
    return found


def long(planner: Planner, **options: Any) -> Cell:
    return Cell(planner, **{"kernel": SDPAFlash(), "model": WIDE, "lengths": LONG, "capacity": ROOM, **options})


def check_sound(rank: int, ranks: int) -> None:
    groups = Groups()
    alone = Given(Assignment((
        (Group((0, 1), (0,), "ring"),), (Group((1,), (1, 2), "ring"),), (Group((1,), (3,), "ring"),)
    )))  # fmt: skip
    idle = Given(Assignment(((Group((1,), (0,), "ring"),), (Group((1,), (1, 2, 3), "ring"),))))
    cells = [long(Fixed(), dtype="float32"), long(Fixed(), dtype="bfloat16", cp="ulysses", mask="document")]
    cells += [
        long(alone, dtype="float64", options=(("optimizer", "adamw"),)),
        long(alone, dtype="bfloat16", recompute="token_wise"),
    ]
    cells += [long(idle, dtype="bfloat16", capacity=160, recompute="full")]
    for cell in due(cells):
        found = measured(cell, rank, ranks, groups)
        assert found.unavailable is None, f"{cell}: {found.unavailable}"
        assert found.implausible is None, f"{cell}: {found.implausible}"
        assert found.check is not None
        assert not found.check.failures, f"{cell}: {found.check.failures}"
        worst = {part: max(ratios.items(), key=lambda one: one[1]) for part, ratios in found.check.ratios.items() if ratios}
        assert found.check.of_bound < SOUND, f"{cell}: {worst}"
        assert set(found.check.ratios) >= {"layers", "head", "between layers", "weights", "last timed pass", "last pass", "level"}
        check_metrics(found, cell, ranks)
        again = measured(cell, rank, ranks, groups, measure_again)
        assert again.check is not None
        assert not again.check.failures, f"{cell}: {again.check.failures}"


def check_metrics(found: Measured, cell: Cell, ranks: int) -> None:
    """Every key is declared, and what follows from others does."""
    metrics, notes = found.metrics, found.notes
    assert [key for key in metrics if metric_of(key)]
    mask, model = mask_of(cell.mask, list(cell.lengths)), cell.model
    flops = 6 * (2 * model.layer_parameters() + model.head_parameters()) * mask.num_q
    flops += 2 * 3.5 * 4 * metrics["mask/area"] * model.heads_q * model.head_dim
    rate = metrics["compute/tflops_per_gpu"] * 1e12 * metrics["time/total/median_s"] * ranks
    assert rate == pytest.approx(flops)
    assert metrics["batch/tokens"] == mask.num_q
    assert metrics["batch/micro_batches"] == len(notes["assignment"])
    assert metrics["batch/peak_tokens"] <= cell.capacity
    assert 0 <= metrics["batch/idle_share"] < 1
    assert 0 < metrics["attention/share"] < 1
    assert not [key for key in metrics if key.startswith("model/")]
    elements = 2 * model.layer_parameters() + model.head_parameters()
    wide = 8 if cell.dtype == "float64" else 4
    assert metrics["comm/reduce/bytes"] == pytest.approx(2 * (ranks - 1) / ranks * elements * wide, abs=2)
    assert metrics["step/recomputed_flops_per_gpu"] > 0 or cell.recompute == "none"
    spans = notes["gantt"]
    for rank, own in enumerate(spans):
        numbers = [m for m, groups in enumerate(notes["assignment"]) if any(rank in group["ranks"] for group in groups)]
        assert [int(span[0]) for span in own] == numbers
        moments = [moment for span in own for moment in span[1:]]
        assert moments == sorted(moments)


@pytest.mark.gloo
@pytest.mark.slow
def test_sound_cells_are_far_from_their_bounds() -> None:
    run_ranks(2, check_sound, 2)


@contextmanager
def lost_micro_batch(rank: int) -> Iterator[None]:
    """Of rank 1 the weights' gradients lack those of its first micro-batch."""
    right = BatchTraining._one

    def wrong(self: BatchTraining, micro_batch: Any, done: Any) -> Any:
        found = right(self, micro_batch, done)
        if rank == 1 and micro_batch is self.micro_batches[0]:
            for weight in self.weights().values():
                weight.grad.zero_()  # type: ignore[union-attr]
        return found

    with patch.object(BatchTraining, "_one", wrong):
        yield


@contextmanager
def counted_twice(rank: int) -> Iterator[None]:
    """Rank 1 adds the gradients of its first micro-batch once more."""
    right = BatchTraining._one

    def wrong(self: BatchTraining, micro_batch: Any, done: Any) -> Any:
        found = right(self, micro_batch, done)
        if rank == 1 and micro_batch is self.micro_batches[0]:
            for weight in self.weights().values():
                weight.grad.mul_(2)  # type: ignore[union-attr]
        return found

    with patch.object(BatchTraining, "_one", wrong):
        yield


@contextmanager
def own_mean(rank: int) -> Iterator[None]:
    """The loss is a mean over the tokens of a micro-batch."""
    right = ChunkedLoss.__init__

    def wrong(self: ChunkedLoss, head: Any, labels: Any, chunk: int, share: float, sharing: Any, **options: Any) -> None:
        right(self, head, labels, chunk, 1 / len(labels), sharing, **options)

    with patch.object(ChunkedLoss, "__init__", wrong):
        yield


@contextmanager
def not_summed(rank: int) -> Iterator[None]:
    """Every rank keeps its own gradients."""
    with patch.object(Sharing, "sum_gradients", lambda self, weights: None):
        yield


@contextmanager
def narrow_sums(rank: int) -> Iterator[None]:
    """The gradients of all micro-batches but the last are forgotten, where they are added up apart."""
    right = Accumulation.end

    def wrong(self: Accumulation, *, last: bool) -> None:
        right(self, last=last)
        if not last and type(self._module).__name__ == "Whole":
            self._sums = []
            for weight in self._module.parameters():
                weight.grad = None

    with patch.object(Accumulation, "end", wrong):
        yield


@contextmanager
def other_rows(rank: int) -> Iterator[None]:
    """The second micro-batch of rank 1 has the positions of its first rows."""
    right = BatchTraining._micro_batches

    def wrong(self: BatchTraining, recompute: Any) -> Any:
        found = right(self, recompute)
        if rank == 1:
            for micro_batch in found[1:]:
                cos, sin = (x[: len(micro_batch.x)] for x in self.stack.rope)
                found[1] = replace(micro_batch, stack=replace(micro_batch.stack, rope=(cos, sin)))
                forward = recompute.start(found[1].stack, micro_batch.x, 4)
                found[1] = replace(found[1], recompute=forward)
                break
        return found

    with patch.object(BatchTraining, "_micro_batches", wrong):
        yield


FAULTS: dict[str, tuple[Any, str]] = {
    "a micro-batch's gradients left out": (lost_micro_batch, "weights"),
    "counted twice": (counted_twice, "weights"),
    "a mean of its own": (own_mean, "head"),
    "gradients not summed": (not_summed, "weights"),
    "only the last micro-batch": (narrow_sums, "weights"),
    "positions of other rows": (other_rows, "layers"),
}


def check_faults(rank: int, ranks: int) -> None:
    groups = Groups()
    alone = Given(Assignment((
        (Group((0, 1), (0,), "ring"),), (Group((0,), (1,), "ring"), Group((1,), (2,), "ring")), (Group((1,), (3,), "ring"),)
    )))  # fmt: skip
    for (name, (fault, part)), dtype in due(product(FAULTS.items(), ("bfloat16", "float64"))):
        where = f"{name}, {dtype}"
        with fault(rank):
            found = measured(long(alone, dtype=dtype), rank, ranks, groups)
        gc.collect()
        assert_refused(found, part, where)


@pytest.mark.gloo
@pytest.mark.slow
def test_faults_are_refused() -> None:
    run_ranks(2, check_faults, 2)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    cell = Cell(Fixed())
    work = cell.work(2)

    def refused(**options: Any) -> str:
        asked = {"problem": work.problem, "mask": work.make_mask(0), "recompute": NoRecompute(), **options}
        step = BatchStep(MODEL, 2, capacity=asked.pop("capacity", CAPACITY))
        return step.unsupported(asked["problem"], asked["mask"], work.kernel, work.strategy, asked["recompute"]) or ""

    assert refused() == ""
    assert "workload=batch_step has direction=forward_backward only" in refused(problem=replace(work.problem, direction="forward"))
    assert "recompute.fraction=null" in refused(recompute=TokenWise())
    assert refused(recompute=TokenWise(0.5)) == ""
    assert "float16" in refused(problem=replace(work.problem, dtype="float16"))
    assert "capacity=20" in refused(capacity=20)
    assert "mesh.dp=2" in str(work.workload.misfit(Mesh(dp=2)))
    with pytest.raises(ValueError, match=r"workload\.capacity=0 is no whole number"):
        BatchStep(MODEL, capacity=0)
    with pytest.raises(TypeError):
        BatchStep(MODEL, fsdp=True)  # type: ignore[call-arg]


def test_offloading_goes_without_recomputation_only() -> None:
    every = Given(Assignment(((Group((0,), tuple(range(len(LENGTHS))), "ring", 0.8),),)))
    told = {name: started(Cell(every, recompute=name, capacity=SEQLEN), 0, 1, Groups()).refused for name in ("none", "full")}
    assert told["none"] is None
    assert "the planner offloads 0.8" in str(told["full"])


def test_a_wrong_assignment_is_no_result() -> None:
    found = measured(Cell(Given(Assignment(((Group((0,), (0,), "ring"),),)))), 0, 1, Groups())
    assert found.check is not None
    assert "document 1 is computed 0 times" in found.check.failures[0]
