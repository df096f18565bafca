"""A training step on real gloo ranks, every strategy and recompute policy: loss, gradients of x and of all weights as those of an
unsharded float64 model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lcbench.grid.build import build, build_strategy
from lcbench.kernels.reference import Reference
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.measure.session import Gang
from lcbench.problem import Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load, names, trained_by
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.none import NoRecompute
from lcbench.workloads.step import BlockSession
from lcbench.workloads.training import Training
from tests.workloads import plain

BOUND = 1e-11
SEQLEN, SEED = 48, 5
MODELS = {
    "gqa": Model(4, 24, 4, 2, 8, 40, 30, 1e4, qk_norm=True),
    "mha": Model(4, 24, 4, 4, 8, 40, 30, 5e5),
}


def masks(model: Model) -> dict[str, Mask]:
    return {
        "causal": causal(SEQLEN),
        "causal_document": causal_document(SEQLEN, seed=(0, 0), lengths=Explicit([7, 20, 1, 20])),
        "block_random": block_random(
            SEQLEN, heads=model.heads(), seed=(0, 0), density=0.6, block_size=8, sizes="variable", per="kv_head"
        ),
    }


def started(rank: int, ranks: int, model: Model, mask: Mask, strategy: Any, groups: Groups) -> BlockSession:
    problem = Problem(SEQLEN, model.heads(), Scale(1, ranks), "float64", "forward_backward")
    block = Block(model, 2, loss_chunk=28 // ranks)  # two chunks of a rank's tokens, of which the last is shorter
    work = Work(block, problem, lambda _: mask, Reference(), strategy, {}, SEED, recompute=NoRecompute())
    return BlockSession(work.workload, work, 0, Gang(rank, ranks, torch.device("cpu"), groups, []))


def one_step(training: Training, ranks: int) -> dict[str, torch.Tensor]:
    """Loss, dx of all tokens and the weights' gradients of a step, the same on every rank."""
    passed: Any = None
    for phase in training.phases().values():
        passed = phase(passed)
    own, loss = passed
    dx = torch.zeros((SEQLEN, own.shape[1]), dtype=own.dtype)
    dx[torch.from_numpy(training.stack.attention.run.tokens)] = own
    loss = loss.clone()
    if ranks > 1:
        dist.all_reduce(dx)
        dist.all_reduce(loss)
    return {"loss": loss, "dx": dx} | {name: weight.grad.clone() for name, weight in training.weights().items()}  # type: ignore[union-attr]


def unsharded(folder: Path) -> None:
    """Write what every model and mask must give, from the weights and inputs that a rank alone draws."""
    for name, model in MODELS.items():
        for mask_name, mask in masks(model).items():
            training = started(0, 1, model, mask, build_strategy(load("cp", "none")), Groups()).training
            weights = {key: weight.detach() for key, weight in training.weights().items()}
            want = plain.step(model, weights, training.x, training.labels, dense_heads(mask, model.heads_q))
            torch.save(want, folder / f"{name}-{mask_name}.pt")


def recomputes() -> dict[str, Any]:
    return {name: build(load("recompute", name)) for name in names("recompute")}


def check_policy(session: BlockSession, recompute: Any, ranks: int, want: dict[str, torch.Tensor], where: str) -> None:
    """Layers whose attention and weights are there go through a step by another policy, and through the same step again."""
    refused = recompute.refuses(session._started.run)
    assert refused is None, f"{where}: {refused}"
    for memory in session.run.buffers:
        memory.fill_(255)  # NaN in float64: nothing that an earlier policy has left there is taken for this one's
    training = session.training
    training.micro_batches = training._micro_batches(recompute)
    got = one_step(training, ranks)
    assert got.keys() == want.keys(), where
    for key, exact in want.items():
        error = float((got[key] - exact).abs().max() / exact.abs().max())
        assert error < BOUND, f"{where}: {key} is off by {error}"
    again = one_step(training, ranks)
    different = [key for key in want if not torch.equal(got[key], again[key])]
    assert not different, f"{where}: another pass gives another {different}"


def check_all(rank: int, ranks: int, folder: Path) -> None:
    groups, ran = Groups(), Counter[str]()
    strategies, policies = trained_by(), recomputes()
    for model_name, model in MODELS.items():
        for mask_name, mask in masks(model).items():
            want = torch.load(folder / f"{model_name}-{mask_name}.pt")
            for name, strategy in strategies.items():
                problem = Problem(SEQLEN, model.heads(), Scale(1, ranks), "float64", "forward_backward")
                if strategy.unsupported(problem, mask):
                    continue
                session = started(rank, ranks, model, mask, strategy, groups)
                where = f"{ranks} ranks, {model_name}, {mask_name}, {name}"
                assert session.refused is None, f"{where}: {session.refused}"
                for recompute_name, recompute in policies.items():
                    check_policy(session, recompute, ranks, want, f"{where}, {recompute_name}")
                    ran[name] += 1
    missing = sorted(strategies.keys() - ran.keys())
    assert ranks == 1 or missing == ["none"], f"{ranks} ranks never ran {missing}"
    assert ran.total() >= (100 if ranks > 1 else 20)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wanted")
    unsharded(folder)
    return folder


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_that_of_an_unsharded_model(ranks: int, wanted: Path) -> None:
    run_ranks(ranks, check_all, ranks, wanted)
