"""A training step of a batch of documents on real gloo ranks: loss, gradients of x and of all weights as those of an unsharded float64
model, whoever planned it; sound cells pass the check, and faults that are put in from outside are refused."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from lcbench.planners.base import Assignment, Cost, Documents, Fleet, Group, Infeasible, Planner
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
from tests.workloads import plain
from tests.workloads.test_batch import FEW, InTurn, cost_of

BOUND = 1e-11
CPU = torch.device("cpu")
MODEL = Model(4, 24, 8, 4, 4, 40, 30, 1e4, qk_norm=True)
LENGTHS = [17, 20, 60, 18, 16, 24]
SEQLEN, SEED, CAPACITY, LABELLED = sum(LENGTHS), 5, 32, 0.5
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
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
    kernel: Any = Reference()
    offloads: Offloads | None = None

    def work(self, ranks: int) -> Work:
        scale = Scale(2, ranks // 2) if ranks > 2 else Scale(1, ranks)
        mask, strategy = mask_of(self.mask, list(self.lengths)), build_strategy(load("cp", self.cp))
        problem = Problem(
            mask.num_q, self.mesh.heads(MODEL.heads()), self.mesh.group_scale(scale), self.dtype, "forward_backward"
        )
        recompute = build(load("recompute", self.recompute)) if isinstance(self.recompute, str) else self.recompute
        if self.recompute == "token_wise":
            recompute = replace(recompute, fraction=0.5)
        step = BatchStep(MODEL, 2, loss_chunk=7, capacity=self.capacity, **dict(self.options))

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
    found = {name: Cell(planner) for name, planner in planners.items()}
    found |= {f"{name}, document, ulysses": Cell(planner, "ulysses", "document") for name, planner in planners.items()}
    one = BytescaleHDP()
    found |= {recompute: Cell(one, recompute=recompute) for recompute in names("recompute")}
    some: tuple[tuple[str, Any], ...] = (("labelled", LABELLED),)
    found["some labels"] = Cell(one, options=some)
    found["masked logits"] = Cell(Fixed(), "ulysses", "document", options=(*some, ("masked_logits", True), ("optimizer", "adamw")))
    found["tensor parallel"] = Cell(one, mesh=Mesh(tp=2), capacity=2 * CAPACITY)
    found["offloaded"] = Cell(BytescaleHDP(offload=True), offloads=HOST)
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


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_step_of_a_batch_is_that_of_an_unsharded_model(ranks: int, tmp_path: Path) -> None:
    unsharded(tmp_path)
    run_ranks(ranks, check_all, ranks, tmp_path)
