"""A batch of documents as planners share it out: every gradient is one rank's, wrong runs are refused, and what is counted is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcbench.cp.base import Strategy
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.ring import Ring
from lcbench.cp.star import Star
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_planner
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask
from lcbench.masks.block_causal import block_causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Explicit
from lcbench.measure.inputs import draw
from lcbench.measure.session import Gang
from lcbench.planners.base import Assignment, Cost, Documents, Group, Planner
from lcbench.problem import ALONE, Heads, Mesh, Problem, Requests, Scale
from lcbench.problem import Batch as Requested
from lcbench.schedule.groups import Groups
from lcbench.testing.costs import Quadratic
from lcbench.testing.dense import dense_attention, dense_mask
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.batch import Batch
from lcbench.workloads.batching import BatchSession
from lcbench.workloads.planned import idle_share, padding

CPU = torch.device("cpu")
HEADS = Heads(8, 4, 8)
LENGTHS = [37, 96, 11, 64, 20, 28]
SEQLEN = sum(LENGTHS)
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
MASKS: dict[str, Callable[..., BandMask]] = {"causal_document": causal_document, "document": document}
FEW = "oracle"  # which takes at most 8 documents and 4 ranks


def mask_of(name: str) -> BandMask:
    return MASKS[name](SEQLEN, seed=(0, 0), lengths=Explicit(LENGTHS))


def problem_of(ranks: int, dtype: str = "float64", *, direction: str = "forward_backward", mesh: Mesh = ALONE) -> Problem:
    scale = Scale(2, ranks // 2) if ranks > 2 else Scale(1, ranks)
    return Problem(SEQLEN, mesh.heads(HEADS), mesh.group_scale(scale), dtype, direction)


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
    problem: Problem,
    mask: BandMask,
    planner: Planner,
    strategy: Strategy,
    *,
    batch: Batch,
    mesh: Mesh = ALONE,
    scale: Scale | None = None,
) -> Work:
    return Work(
        batch, problem, lambda draw: mask, SDPAFlash(), strategy, SETTINGS, 7, mesh=mesh, scale=scale, planner=planner,
        cost=lambda: cost_of(strategy, problem, mask),
    )  # fmt: skip


# -- what it refuses ---------------------------------------------------------------------------------------------------


def refusal(problem: Problem, mask: Any, strategy: Strategy, **options: int) -> str | None:
    return Batch(**options).unsupported(problem, mask, SDPAFlash(), strategy, None)


def test_what_cannot_run_says_why() -> None:
    problem, mask = problem_of(2), mask_of("causal_document")
    assert refusal(problem, mask, Ring()) is None
    assert "write" not in str(refusal(problem, mask, Ring()))
    assert "direction=forward_backward" in str(refusal(replace(problem, direction="forward"), mask, Ring()))
    requests = replace(problem, batch=Requested((Requests(1, SEQLEN, SEQLEN),)), direction="forward_backward")
    assert "lengths=" in str(refusal(requests, mask, Ring()))
    blocks = block_causal(SEQLEN, block_size=16)
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
                session = BatchSession(batch, work_of(problem, mask, planner, strategy, batch=batch), 0, gang)
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
def test_every_planner_gives_the_gradients_of_one_rank(ranks: int, tmp_path: Path) -> None:
    run_ranks(ranks, equal_one_rank, ranks, tmp_path / "told")
    every = json.loads((tmp_path / "told").read_text())
    assert {name for name, *_ in every[0]} == set(names("planner"))
    for told in every:
        for name, case, reason, error, _ in told:
            assert reason is None or (name == FEW and ranks > 4), f"{case}: {reason}"
            assert error < 1e-12, f"{case}: {error}"
    assert max(micro_batches for *_, micro_batches in every[0]) >= 2
