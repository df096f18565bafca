"""Whole block cells on real gloo ranks: sound ones stay well below the bounds of the check, and faults that are put
into the parts of a step from outside are refused, each."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from lcbench.grid.build import build, build_strategy
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.problem import Mesh, Problem, Scale
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.loss import ChunkedLoss
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.base import recomputed
from lcbench.workloads.recompute.full import Full
from lcbench.workloads.sharing import Sharing
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import After, Attention, Before, Stack, rotations
from tests.turns import due
from tests.workloads.refused import assert_refused

SEQLEN = 128
MODEL = Model(6, 32, 4, 2, 8, 48, 40, 1e4, qk_norm=True)
SETTINGS = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
SOUND = 0.8  # of a bound that a sound run comes to at most


@dataclass(frozen=True)
class Cell:
    dtype: str = "float32"
    cp: str = "ring"
    recompute: Any = "none"
    mesh: Mesh = field(default_factory=Mesh)
    mask: Callable[[int], Mask] = causal
    block: dict[str, Any] = field(default_factory=dict)
    draws: int = 1

    def work(self, ranks: int) -> Work:
        scale = Scale(1, ranks)
        problem = Problem(SEQLEN, self.mesh.heads(MODEL.heads()), self.mesh.group_scale(scale), self.dtype, "forward_backward")
        recompute = build(load("recompute", self.recompute)) if isinstance(self.recompute, str) else self.recompute
        if self.recompute == "token_wise":
            recompute = replace(recompute, fraction=0.5)
        block = Block(MODEL, 2, loss_chunk=30, **self.block)
        strategy = build_strategy(load("cp", self.cp))
        return Work(
            block, problem, lambda _: self.mask(SEQLEN), SDPAFlash(), strategy, SETTINGS, 5, self.draws, recompute=recompute,
            mesh=self.mesh, scale=scale,
        )  # fmt: skip


def measured(cell: Cell, rank: int, ranks: int, groups: Groups, one: Any = measure_cell) -> Measured:
    found: Measured = one(cell.work(ranks), Gang(rank, ranks, torch.device("cpu"), groups, []), lambda _: None)
    return found


def documents(seqlen: int) -> Mask:
    return causal_document(seqlen, seed=(0, 0), lengths=Explicit([30, seqlen - 30]))


# -- sound cells -------------------------------------------------------------------------------------------------------


def check_sound(rank: int, ranks: int) -> None:
    groups = Groups()
    cells = [Cell(dtype, cp) for dtype in ("float64", "float32", "bfloat16") for cp in ("ring", "allgather")]
    cells += [Cell("bfloat16", "ulysses", name, mask=documents) for name in names("recompute")]
    cells += [Cell("bfloat16", "usp", "full", block={"fsdp": True}), Cell(block={"optimizer": "adamw"})]
    if ranks == 4:
        meshes = [Mesh(tp=2), Mesh(dp=2), Mesh(tp=2, dp=2)]
        cells = [
            Cell(dtype, "ring" if mesh.count < 4 else "none", "selective", mesh)
            for mesh in meshes
            for dtype in ("float64", "bfloat16")
        ]
        cells += [Cell("bfloat16", "ring", "full", Mesh(tp=2), block={"fsdp": True})]
    for cell in due(cells):
        found = measured(cell, rank, ranks, groups)
        assert found.unavailable is None, f"{cell}: {found.unavailable}"
        assert found.implausible is None, f"{cell}: {found.implausible}"
        assert found.check is not None
        assert not found.check.failures, f"{cell}: {found.check.failures}"
        assert found.check.of_bound < SOUND, f"{cell}: {found.check.ratios}"
        assert set(found.check.ratios) >= {"layers", "head", "between layers", "weights", "last timed pass", "last pass", "level"}
        check_metrics(found.metrics, cell, ranks)
        again = measured(cell, rank, ranks, groups, measure_again)
        assert again.check is not None
        assert not again.check.failures, f"{cell}: {again.check.failures}"


def check_metrics(metrics: dict[str, float], cell: Cell, ranks: int) -> None:
    """Every key is declared, and what follows from others does."""
    assert [key for key in metrics if metric_of(key)]
    step = sum(metrics[f"time/{phase}/median_s"] for phase in ("forward", "head", "backward"))
    assert metrics["time/total/median_s"] >= 0.2 * step
    assert metrics["step/tokens_per_gpu"] == SEQLEN * cell.mesh.dp / ranks
    assert metrics["model/forward/step_s"] == pytest.approx(3 * metrics["time/forward/median_s"])
    assert metrics["model/step_s"] > metrics["model/forward/step_s"] + metrics["model/backward/step_s"]
    assert 0 < metrics["attention/share"] < 1
    pairs = metrics["mask/area"] * 4 * cell.mesh.dp
    weights = 6 * (2 * MODEL.layer_parameters() + MODEL.head_parameters()) * SEQLEN * cell.mesh.dp
    flops = weights + 2 * 3.5 * 4 * pairs * 8
    rate = metrics["compute/tflops_per_gpu"] * 1e12 * metrics["time/total/median_s"] * ranks
    assert rate == pytest.approx(flops)
    again = metrics["step/recomputed_flops_per_gpu"]
    assert (again > 0) == (cell.recompute not in ("none", "offload"))
    assert metrics["compute/hfu"] >= metrics["compute/mfu"]
    assert ("compute/reduce/mfu" in metrics) is False
    if cell.mesh.count == 1 and not cell.block:
        elements = 2 * MODEL.layer_parameters() + MODEL.head_parameters()
        wide = 8 if cell.dtype == "float64" else 4
        assert metrics["comm/reduce/bytes"] == pytest.approx(2 * (ranks - 1) / ranks * elements * wide, abs=2)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sound_cells_are_far_from_their_bounds(ranks: int) -> None:
    run_ranks(ranks, check_sound, ranks)


# -- faults ------------------------------------------------------------------------------------------------------------


@contextmanager
def shifted_positions(rank: int) -> Iterator[None]:
    """Rank 1 takes its tokens for those one further."""
    name = "lcbench.workloads.training.rotations"
    with patch(name, lambda tokens, *args: rotations(tokens + (rank == 1), *args)):
        yield


@contextmanager
def forgotten_rank(rank: int) -> Iterator[None]:
    """Sums of gradients lack what rank 1 has."""
    right = Sharing.sum_gradients

    def wrong(self: Sharing, weights: Any) -> None:
        weights = list(weights)
        for weight in weights if rank == 1 else []:
            weight.grad.zero_()
        right(self, weights)

    with patch.object(Sharing, "sum_gradients", wrong):
        yield


@contextmanager
def averaged(rank: int) -> Iterator[None]:
    """Gradients are means over ranks, not sums."""
    right = Sharing.sum_gradients

    def wrong(self: Sharing, weights: Any) -> None:
        weights = list(weights)
        right(self, weights)
        for weight in weights:
            weight.grad /= 2

    with patch.object(Sharing, "sum_gradients", wrong):
        yield


@contextmanager
def overwritten_buffers(rank: int) -> Iterator[None]:
    """The next layer's forward overwrites what the last one has kept in buffers."""
    with patch.object(Executor, "hold", lambda self, saved: saved):
        yield


@contextmanager
def dropped_residual(rank: int) -> Iterator[None]:
    right = After.forward
    with patch.object(After, "forward", lambda self, x, out: right(self, x, out) - x):
        yield


@contextmanager
def local_mean(rank: int) -> Iterator[None]:
    """The loss is divided by the tokens of a rank."""
    right = ChunkedLoss.__init__

    def wrong(self: ChunkedLoss, head: Any, labels: Any, chunk: int, share: float, sharing: Any, **options: Any) -> None:
        right(self, head, labels, chunk, 1 / len(labels), sharing, **options)

    with patch.object(ChunkedLoss, "__init__", wrong):
        yield


@contextmanager
def lost_chunk(rank: int) -> Iterator[None]:
    """No gradient comes back from the last chunk of tokens, on rank 1."""
    right = ChunkedLoss.__call__

    def wrong(self: ChunkedLoss, y: torch.Tensor) -> Any:
        dy, loss = right(self, y)
        if rank == 1:
            dy[-len(y) % self.chunk :] = 0
        return dy, loss

    with patch.object(ChunkedLoss, "__call__", wrong):
        yield


@contextmanager
def one_key_gradient(rank: int) -> Iterator[None]:
    """Of the last rank's keys one has no gradient."""
    right = Executor.backward

    def wrong(self: Executor, *args: Any, **kwargs: Any) -> Any:
        dq, dk, dv = right(self, *args, **kwargs)
        if rank == 1:
            dk[3] = 0
        return dq, dk, dv

    with patch.object(Executor, "backward", wrong):
        yield


@contextmanager
def first_values(rank: int) -> Iterator[None]:
    """Queries, keys and values are those of the first pass for ever."""
    right, kept = Before.forward, {}

    def wrong(self: Before, x: torch.Tensor, rope: Any) -> Any:
        results = right(self, x, rope)
        old = kept.setdefault(id(self), [one.detach().clone() for one in results])
        return tuple(one + (first - one.detach()) for one, first in zip(results, old, strict=True))

    with patch.object(Before, "forward", wrong):
        yield


@contextmanager
def wrong_in_time(rank: int) -> Iterator[None]:
    """What the layers give is that of other tokens, from the last timed pass on."""
    right, passes = Training.forward, [0]

    def wrong(self: Training, *given: Any) -> Any:
        passes[0] += 1
        x, y = right(self, *given)
        return x, y.roll(1, 0) if passes[0] > 5 else y

    with patch.object(Training, "forward", wrong):
        yield


@contextmanager
def unmasked_scale(rank: int) -> Iterator[None]:
    """Attention's results are off by a part of a hundred."""
    right = Attention.__call__
    with patch.object(Attention, "__call__", lambda self, *args: right(self, *args) * 1.02):
        yield


@contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Stale(Full):
    """What is computed again is computed of other tokens' inputs."""

    def forward(self, stack: Stack, x: torch.Tensor) -> torch.Tensor:
        for layer in stack.layers:
            calls: list[int] = []

            def run(x: torch.Tensor, layer: Any = layer, calls: list[int] = calls) -> torch.Tensor:
                calls.append(1)
                found: torch.Tensor = layer(x if len(calls) == 1 else x.roll(1, 0), stack.rope)
                return found

            x = recomputed(run, x)
        return x


FAULTS: dict[str, tuple[Any, Cell, str]] = {
    "positions of one rank": (shifted_positions, Cell(), "layers"),
    "a rank forgotten in sums of gradients": (forgotten_rank, Cell(), "weights"),
    "means of gradients": (averaged, Cell(), "weights"),
    "kept buffers overwritten": (overwritten_buffers, Cell(cp="ulysses"), "reference"),
    "a residual dropped": (dropped_residual, Cell(), "layers"),
    "a loss of local tokens": (local_mean, Cell(), "head"),
    "a chunk without gradients": (lost_chunk, Cell(), "head"),
    "a key without gradient": (one_key_gradient, Cell(), "reference"),
    "values of the first pass": (first_values, Cell(), "layers"),
    "wrong while timed": (wrong_in_time, Cell(), "last timed pass"),
    "attention off by a fiftieth": (unmasked_scale, Cell(), "factor"),
    "stale inputs computed again": (nothing, Cell(recompute=Stale()), "weights"),
}


def check_faults(rank: int, ranks: int) -> None:
    groups = Groups()
    for (name, (fault, cell, part)), dtype in due(product(FAULTS.items(), ("bfloat16", "float64"))):
        where = f"{name}, {dtype}"
        with fault(rank):
            found = measured(replace(cell, dtype=dtype), rank, ranks, groups)
        gc.collect()
        assert_refused(found, part, where)
        assert found.check is not None
        assert not math.isnan(found.check.of_bound), where


@pytest.mark.gloo
@pytest.mark.slow
def test_faults_are_refused() -> None:
    run_ranks(2, check_faults, 2)
