"""Batches of documents on real gloo ranks, as assignments of every kind share them out, against dense float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lcbench.cp.assigned import Assigned
from lcbench.cp.base import Place, Scheduled
from lcbench.cp.batch_run import BatchRun
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.ring import Ring
from lcbench.cp.sub_groups import scale_of
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.inputs.drawing import draw
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.planners.base import Assignment, Documents, Fleet, Group
from lcbench.problem import Heads, Problem, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.schedule.layout import documents
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import small
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12
LENGTHS = (40, 7, 64, 16, 32, 9, 24, 16, 11)
HEADS = Heads(8, 2, 8)
OF_EIGHT = ("all kinds", "in turn", "idle")  # what eight ranks run; others run the rest


def methods(lowering: str) -> dict[str, Scheduled]:
    said = {"lowering": lowering}
    return {
        "ring": Ring("documents", **said), "ulysses": Ulysses(**said), "usp": USP(2, layout="documents", **said),
        "groupcast": GroupCast(**said), "tokenring": TokenRing(**said),
    }  # fmt: skip


def assignments(ranks: int) -> dict[str, Assignment]:
    """By name, each of all documents: one group of all, groups of one, and mixtures in several micro-batches."""
    every = tuple(range(ranks))

    def whole(method: str) -> tuple[Group, ...]:
        return (Group(every, tuple(range(len(LENGTHS))), method),)

    alone = [tuple(Group((rank,), (number,), "ring") for rank, number in enumerate(range(first, min(first + ranks, 9))))
             for first in range(0, 9, ranks)]  # fmt: skip
    found = {
        "all by ring": Assignment((whole("ring"),)),
        "all by ulysses": Assignment((whole("ulysses"),)),
        "each alone": Assignment(tuple(alone)),
        # The last rank has nothing in any of them.
        "idle": Assignment(tuple((Group((0,), (number,), "ring"),) for number in range(len(LENGTHS)))),
        "in turn": Assignment(((Group(every[::-1], (2, 0), "ring"), ), (Group(every, (4, 3, 7), "ulysses"), ),
                               (Group((ranks - 1,), (1, 5, 6, 8), "ulysses"), ))),
    }  # fmt: skip
    if ranks >= 4:
        odd, even = every[1::2], every[::2]
        found["apart"] = Assignment((
            (Group(odd, (2, 3), "ring"), Group(even, (4, 7), "ulysses")),
            (Group(even, (6,), "usp"), Group(odd[:1], (1,), "ring"), Group(odd[1:2], (5, 8), "ulysses")),
            (Group((ranks - 1, 0, 1), (0,), "ring"), ),
        ))  # fmt: skip
        found["uneven"] = Assignment((
            (Group(odd, (2, 8), "ulysses"), Group(even, (0, 1), "ulysses")),
            (Group(every, (3, 4, 5, 6, 7), "usp"), ),
        ))  # fmt: skip
    if ranks == 8:
        found["all kinds"] = Assignment((
            (Group((5, 0), (3, 7), "ulysses"), Group((1, 6), (4,), "ulysses"), Group((7, 2, 3), (2, 1), "ring")),
            (Group((0, 1, 2, 3), (0, 6), "usp"), Group((4, 6), (5,), "groupcast"), Group((7, 5), (8,), "tokenring")),
        ))  # fmt: skip
    return found


def check(rank: int, ranks: int) -> None:
    groups, device = Groups(), torch.device("cpu")
    seqlen = sum(LENGTHS)
    for name, mask in (("causal", causal_document(seqlen, seed=(0, 0), lengths=Explicit([*LENGTHS]))),
                       ("full", document(seqlen, seed=(0, 0), lengths=Explicit([*LENGTHS])))):  # fmt: skip
        softmax = Softmax(sink=name == "full")
        problem = Problem(seqlen, HEADS, Scale(1, ranks), "float64", "forward_backward", softmax=softmax)
        inputs = {kind: draw(kind, np.arange(seqlen), problem, 7, device) for kind in ("q", "k", "v", "dout")}
        sink = torch.linspace(-1, 1, HEADS.q, dtype=torch.float64) if softmax.sink else None
        expected = _expected(inputs, mask, problem, sink)
        bounds, pairs = documents(mask)
        for case, assignment in assignments(ranks).items():
            assert assignment.wrong(Documents(np.diff(bounds), pairs), Fleet(ranks, ranks, seqlen)) is None
            found = {}
            for lowering in ("p2p", "auto") if ranks < 8 or case in OF_EIGHT else ():
                strategy = Assigned(assignment, bounds, methods(lowering))
                run = strategy.start(problem, mask, SDPAFlash(), Place(rank, device, groups))
                found[lowering] = _run(run, inputs, sink)
                _near(f"{case} {name} {lowering} P={ranks} rank {rank}", run.tokens, found[lowering], expected)
                if case == "all by ulysses":  # also where ranks have other numbers of tokens
                    assert run.counters().collectives == (["all_to_all"] if lowering == "auto" else [])
                if case == "uneven":
                    assert run.counters().collectives == (["all_to_all"] if lowering == "auto" else [])
                    assert run.communicators == (4 if lowering == "auto" else 0)  # of two sub-groups, and of the rows of a grid
            if ranks == 8 and case == "all kinds":
                assert run.counters().collectives == ["all_to_all"]
                assert run.communicators == 4  # of two exchanges of heads, and of the two rows of a grid
            for one, other in zip(*found.values(), strict=True) if found else ():
                torch.testing.assert_close(one, other, rtol=0, atol=BOUND)

        if ranks == 4:  # the same in attention cells, whose sequence stays as it is
            hybrid = Hybrid([2, 1, 1], [0, 1, 0, 2, 0, 1, 0, 2, 1], ranks=[3, 1, 0, 2], within=["ulysses", "ring"])
            run = hybrid.start(problem, mask, SDPAFlash(), Place(rank, device, groups))
            q, k, v, dout = (inputs[kind][run.tokens] for kind in ("q", "k", "v", "dout"))
            out, saved = run.forward(q, k, v, sink)
            _near(f"hybrid {name} rank {rank}", run.tokens, [out, run.lse(saved), *run.backward(dout, saved)], expected)


def _expected(inputs: dict[str, torch.Tensor], mask: BandMask, problem: Problem, sink: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [inputs[kind].clone().requires_grad_() for kind in ("q", "k", "v")]
    leaves += [sink.clone().requires_grad_()] if sink is not None else []
    own = leaves[3] if sink is not None else None
    out, lse = dense_attention(*leaves[:3], dense_heads(mask, HEADS.q), problem.softmax_scale, sink=own)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs["dout"])]


def _run(run: BatchRun, inputs: dict[str, torch.Tensor], sink: torch.Tensor | None) -> list[torch.Tensor]:
    """Out, LSE and gradients by passes over all micro-batches, which those of a whole batch equal bit for bit."""
    q, k, v, dout = (inputs[kind][run.tokens] for kind in ("q", "k", "v", "dout"))
    out, saved = run.forward(q, k, v, sink)
    lse = run.lse(saved)
    sent = run.counters().bytes_sent
    gradients = run.backward(dout, saved)
    sent += run.counters().bytes_sent
    passed = run.batch(q, k, v, dout, sink)
    assert run.counters().bytes_sent == sent
    whole, kept, others = run.whole(passed)
    found = [out, lse, *gradients]
    for one, other in zip(found, [whole, run.lse(kept), *others], strict=True):
        assert torch.equal(one, other)
    times = run.gantt(q, k, v, dout, sink)
    assert all(0 <= begin <= middle <= end for _, begin, middle, end in times)
    assert [row[0] for row in times] == sorted(row[0] for row in times)
    return found


def _near(case: str, tokens: Ints, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    names = ("out", "lse", "dq", "dk", "dv")
    for name, got, want in zip(names, found, expected, strict=False):
        error = float((got - want[tokens]).abs().max()) if len(got) else 0.0
        assert error < BOUND, f"{case}: {name} is off by {error}"
    if len(expected) > len(names):
        total = found[-1].clone()
        torch.distributed.all_reduce(total)
        assert float((total - expected[-1]).abs().max()) < BOUND, f"{case}: dsink"


def test_each_strategy_inside_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"cp\.within=\['ring', 'ring'\] names a strategy twice"):
        Hybrid(within=["ring", "ring"])


def test_what_cannot_run_is_said_with_its_place(tmp_path: Path) -> None:
    mask = causal_document(sum(LENGTHS), seed=(0, 0), lengths=Explicit([*LENGTHS]))
    bounds, _ = documents(mask)
    problem = Problem(mask.num_q, HEADS, Scale(2, 2), "float64", "forward_backward")

    def refused(group: Group, mask: Mask = mask) -> str | None:
        return Assigned(Assignment(((), (group,))), bounds, methods("auto")).unsupported(problem, mask)

    assert refused(Group((0, 3), (1,), "ring")) is None
    assert refused(Group((0, 3, 1), (1,), "ulysses")) == (
        "micro-batch 1, ranks 0, 3, 1: ulysses: cannot split 8 query heads evenly over 3 ranks"
    )
    assert refused(Group((2,), (1,), "rign")) == (
        "micro-batch 1, rank 2: method rign is not one of ring, ulysses, usp, groupcast, tokenring"
    )
    assert "offload=0.5" in str(refused(Group((2,), (1,), "ring", 0.5)))
    assert "block map" in str(refused(Group((2,), (1,), "ring"), small("block_random", mask.num_q, HEADS, tmp_path)))
    with pytest.raises(ValueError, match="one lowering, not auto, p2p"):
        Assigned(Assignment(()), bounds, {"ring": Ring(), "ulysses": Ulysses(lowering="p2p")})


@pytest.mark.parametrize(("ranks", "scale"), [
    ([0, 1, 2, 3], Scale(1, 4)), ([2, 3, 4, 5], Scale(2, 2)), ([3, 4, 5, 6], Scale(4, 1)),
    ([0, 4, 8], Scale(3, 1)), ([7], Scale(1, 1)),
])  # fmt: skip
def test_ranks_of_a_group_have_a_scale_of_their_own(ranks: list[int], scale: Scale) -> None:
    assert scale_of(ranks, 4) == scale


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_batches_match_dense_attention(ranks: int) -> None:
    run_ranks(ranks, check, ranks)
