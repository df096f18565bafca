"""Labels of some of the tokens: where answers lie, and a head that is computed only where a label is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.build import build_strategy
from lcbench.kernels.naive import Naive
from lcbench.masks.causal import causal
from lcbench.measure.session import Gang
from lcbench.problem import ALONE, Mesh, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.block import Block
from lcbench.workloads.loss import UNLABELLED
from lcbench.workloads.sharing import whole
from lcbench.workloads.spans import answers, scattered, within
from lcbench.workloads.training import Training
from tests.workloads import plain
from tests.workloads.test_sharing import CPU, MODEL, RANKS, SEQLEN, session_of, step

LABELLED = 0.2
CASES = [
    (ALONE, "ring", "none", False), (ALONE, "ulysses", "full", True), (Mesh(tp=2), "ring", "none", True),
    (Mesh(dp=2), "ulysses", "selective", False),
]  # fmt: skip


@given(st.integers(1, 20_000), st.floats(0.001, 1), st.integers(0, 9))
def test_answers_are_the_share_that_was_asked_for(seqlen: int, share: float, seed: int) -> None:
    spans = answers(seqlen, share, [seed])
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    assert spans[0, 0] >= 0
    assert spans[-1, 1] <= seqlen
    assert (spans[:, 1] - spans[:, 0]).sum() == max(1, round(share * seqlen))
    assert np.array_equal(spans, answers(seqlen, share, [seed]))


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 20), st.integers(0, 99))
def test_tokens_within_spans(lengths: list[int], free: int, seed: int) -> None:
    seqlen = sum(lengths) + free
    spans = scattered(np.array(lengths, dtype=np.int64), seqlen, [seed])
    dense = np.zeros(seqlen, dtype=bool)
    for begin, end in spans:
        dense[begin:end] = True
    assert dense.sum() == sum(lengths)
    order = np.random.default_rng(seed).permutation(seqlen)
    assert np.array_equal(within(order, spans), dense[order])


def rows_of_head(training: Training) -> list[int]:
    """Tokens of each call of the head from now on."""
    found: list[int] = []
    training.head.logits.register_forward_hook(lambda module, args, result: found.append(len(args[0])))
    return found


def check_masked(rank: int) -> None:
    gang, scale, none = Gang(rank, RANKS, CPU, Groups(), []), Scale(1, RANKS), 0
    for mesh, strategy, recompute, fsdp in CASES:
        case = f"{mesh} {strategy} {recompute} fsdp={fsdp}"
        found: dict[bool, dict[str, torch.Tensor]] = {}
        for masked in (False, True):
            session = session_of(
                gang, mesh, scale, strategy, recompute, fsdp=fsdp, labelled=LABELLED, masked_logits=masked
            )  # fmt: skip
            training, calls = session.training, rows_of_head(session.training)
            dx, loss, _ = step(training)
            dist.all_reduce(loss)
            grads = {name: whole(weight.grad) for name, weight in training.weights().items()}
            found[masked] = {"dx": dx, "loss": loss} | grads
            own = int((training.labels != UNLABELLED).sum())
            assert sum(calls) == (own if masked else len(training.labels)), case
            none += masked and own == 0
        for name, one in found[False].items():
            error = float((found[True][name] - one).abs().max() / one.abs().max().clamp_min(1e-30))
            assert error < 1e-11, f"{case}: {name} is off by {error}"
    empty = torch.tensor(none)
    dist.all_reduce(empty)
    assert empty > 0, "no rank was without a label"


@pytest.mark.slow
@pytest.mark.gloo
def test_a_head_only_where_a_label_is_gives_the_same_gradients() -> None:
    run_ranks(RANKS, check_masked)


def test_a_masked_step_is_that_of_plain_autograd() -> None:
    session = session_of(
        Gang(0, 1, CPU, Groups(), []), ALONE, Scale(1, 1), "none", "none", labelled=LABELLED, masked_logits=True
    )  # fmt: skip
    training = session.training
    assert training.labelled == round(LABELLED * SEQLEN) == int((training.labels >= 0).sum())
    weights = {name: weight.detach() for name, weight in training.weights().items()}
    want = plain.step(MODEL, weights, training.x, training.labels, dense_heads(causal(SEQLEN), MODEL.heads_q))
    dx, loss, _ = step(training)
    got = {"dx": dx, "loss": loss} | {name: weight.grad for name, weight in training.weights().items()}
    for name, exact in want.items():
        assert float((got[name] - exact).abs().max() / exact.abs().max()) < 1e-11, name


def check_session(rank: int) -> None:
    gang = Gang(rank, 2, CPU, Groups(), [])
    for masked in (True, False):
        session = session_of(gang, ALONE, Scale(1, 2), "ulysses", "none", labelled=LABELLED, masked_logits=masked)
        session.first_pass()
        session.check_first(lambda text: None)
        assert not session.check().failures, session.check()
        costs, metrics = session.costs(), session.counted().metrics
        assert costs["head"].flops == 6 * MODEL.head_parameters() * round(LABELLED * SEQLEN)
        own = int((session.training.labels != UNLABELLED).sum())
        every: list[Any] = [None, None]
        dist.all_gather_object(every, own)
        assert metrics["step/labelled_tokens"] == sum(every)
        assert metrics["step/labelled_max_over_mean"] == max(every) / (sum(every) / 2) > 1


@pytest.mark.slow
@pytest.mark.gloo
def test_the_check_and_the_counts_of_a_masked_step() -> None:
    run_ranks(2, check_session)


def test_refusals() -> None:
    for share in (0, 1.5, -0.1, True, float("nan"), "a"):
        with pytest.raises(ValueError, match=rf"workload\.labelled={share} is no share"):
            Block(MODEL, labelled=share)  # type: ignore[arg-type]
    problem = Problem(SEQLEN, MODEL.heads(), Scale(1, 1), "float64", "forward_backward")
    asked = (problem, causal(SEQLEN), Naive(), build_strategy(load("cp", "none")), None)
    assert "leaves nothing out" in (Block(MODEL, masked_logits=True).unsupported(*asked) or "")
    assert Block(MODEL, labelled=0.5, masked_logits=True).unsupported(*asked) is None
