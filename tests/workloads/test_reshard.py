"""Tokens of images on their way between the ranks that have the images and those that own the tokens: exactly, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lcbench.inputs.drawing import draw_rows
from lcbench.measure.session import Gang
from lcbench.problem import ALONE, Mesh, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.spawn import run_ranks
from lcbench.workloads import spans
from lcbench.workloads.block import Block
from lcbench.workloads.reshard import BACK, PHASE
from tests.turns import due
from tests.workloads.test_sharing import CPU, MODEL, RANKS, SEED, session_of

SEQLEN, CHUNK, VISION = 1600, 150, 0.5  # four images, the last one of 32 tokens
CASES = [(ALONE, "ring"), (ALONE, "ulysses"), (Mesh(tp=2, dp=2), "none"), (Mesh(dp=2), "ring"), (Mesh(tp=2), "ring")]
ROW = MODEL.hidden * 8


@given(st.integers(1, 5000), st.floats(0.001, 1), st.integers(0, 9))
def test_images_are_the_share_that_was_asked_for(seqlen: int, share: float, seed: int) -> None:
    found = spans.images(seqlen, share, [seed])
    lengths = found[:, 1] - found[:, 0]
    assert lengths.sum() == max(1, round(share * seqlen))
    assert (lengths[:-1] == 256).all()
    assert 0 < lengths[-1] <= 256
    assert (found[1:, 0] >= found[:-1, 1]).all()


def step(training: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    passed, every = None, {}
    for name, phase in training.phases().items():
        every[name] = passed = phase(passed)
    assert passed is not None
    return every, {"dx": passed[0], "loss": passed[1]} | {name: weight.grad for name, weight in training.weights().items()}


def check(rank: int) -> None:
    gang, scale = Gang(rank, RANKS, CPU, Groups(), []), Scale(1, RANKS)
    for mesh, strategy in due(CASES):
        case = f"{mesh} {strategy}"
        plain = session_of(gang, mesh, scale, strategy, "none", seqlen=SEQLEN, loss_chunk=CHUNK).training
        session = session_of(gang, mesh, scale, strategy, "none", seqlen=SEQLEN, loss_chunk=CHUNK, vision=VISION)
        training, arranged = session.training, gang.arranged(mesh, scale)
        reshard, ranks = training.reshard, RANKS // mesh.count
        assert reshard is not None
        assert list(training.phases())[:5] == [PHASE, "forward", "head", "backward", BACK], case
        passed, got = step(training)
        _, want = step(plain)
        # What arrives is what was drawn for the tokens, bit by bit, and so is all that follows.
        assert torch.equal(passed[PHASE], draw_rows("x", training.stack.attention.run.tokens, (MODEL.hidden,), torch.float64, SEED,
                                                    CPU, (arranged.dp_index, 0))), case  # fmt: skip
        assert all(torch.equal(_own(got[name]), _own(one)) for name, one in want.items()), case
        # Gradients come back to the image that they are of.
        every = torch.zeros(SEQLEN, MODEL.hidden, dtype=torch.float64)
        every[torch.from_numpy(training.stack.attention.run.tokens)] = got["dx"]
        every = arranged.ranks.reduce(every)
        assert torch.equal(reshard.returned, every[torch.from_numpy(reshard.tokens)]), case
        # Every token of an image is on one rank at first, and whole images are.
        counts = arranged.ranks.reduce(torch.bincount(torch.from_numpy(reshard.tokens), minlength=SEQLEN))
        images = spans.images(SEQLEN, VISION, [SEED, arranged.dp_index, 0, 2])
        inside = torch.zeros(SEQLEN, dtype=counts.dtype)
        for begin, end in images.tolist():
            inside[begin:end] = 1
            own = sum(begin <= token < end for token in reshard.tokens.tolist())
            assert own in (0, end - begin), case
        assert torch.equal(counts, inside), case
        # Bytes: what this rank's images have elsewhere, and the reverse.
        sent, here = session._sent(), arranged.cp_rank
        assert sent[PHASE].bytes == ROW * (len(reshard.tokens) - reshard.sent[here]), case
        assert sent[BACK].bytes == ROW * (len(reshard.rows) - reshard.received[here]), case
        total = torch.tensor([sent[PHASE].bytes, sent[BACK].bytes])
        dist.all_reduce(total)
        assert total[0] == total[1], case
        assert (int(total[0]) > 100 * ROW) == (ranks > 1), (case, int(total[0]) / ROW)
        sizes = {1: [800], 2: [512, 288], 4: [256, 256, 256, 32]}[ranks]
        assert reshard.max_over_mean == max(sizes) * ranks / sum(sizes), case


def _own(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


@pytest.mark.slow
@pytest.mark.gloo
def test_rows_arrive_and_gradients_return() -> None:
    run_ranks(RANKS, check)


def check_session(rank: int) -> None:
    gang = Gang(rank, 2, CPU, Groups(), [])
    for fault in (False, True):
        session = session_of(gang, ALONE, Scale(1, 2), "ulysses", "none", seqlen=600, vision=VISION)
        reshard = session.training.reshard
        assert reshard is not None
        if fault:  # two rows of a rank are taken for each other
            reshard._index[:2] = reshard._index[:2].flip(0)
        session.first_pass()
        session.check_first(lambda text: None)
        failures = session.check().failures
        assert bool(failures) == fault, failures
        if not fault:
            metrics = session.counted().metrics
            assert metrics["step/images_max_over_mean"] == 256 / 150
            assert metrics[f"model/{PHASE}/repeats"] == 1


@pytest.mark.slow
@pytest.mark.gloo
def test_the_check_sees_rows_that_are_mistaken() -> None:
    run_ranks(2, check_session)


def test_refusals() -> None:
    for share in (-0.5, 1.5, True, float("nan"), "a"):
        with pytest.raises(ValueError, match=rf"workload\.vision={share} is no share"):
            Block(MODEL, vision=share)  # type: ignore[arg-type]
