"""The check on several ranks, of which some hold heads of all tokens, or the same queries: sound runs pass, and faults do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lcbench.cp.apb import APB
from lcbench.cp.base import Place, RankRun, Strategy
from lcbench.cp.compressors.key_norm import KeyNorm
from lcbench.cp.dcp import DCP
from lcbench.cp.helix import Helix
from lcbench.cp.ring import Ring
from lcbench.cp.star import Star
from lcbench.kernels.base import Kernel
from lcbench.kernels.merge import merge_into
from lcbench.kernels.reference import Reference
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import Batch, Problem, Requests
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.testing.masks import causal_batch
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.measure.faults import SETTINGS, refused
from tests.measure.sides import BATCHES, CPU, problem
from tests.measure.test_two_sides_faults import Around
from tests.turns import due

RANKS = 4
PROMPTS = Batch((Requests(2, 64, 64), Requests(1, 1, 40)))
SOUND: list[tuple[Strategy, Batch, str, str, str]] = [
    (Ring("zigzag"), BATCHES["mixed"], "GQA, sink", "float32", "forward_backward"),
    (Ring("striped"), BATCHES["chunk"], "latent, sink, softcap", "float64", "forward_backward"),
    (Ring("contiguous"), BATCHES["decode"], "MLA, own scale", "bfloat16", "forward_backward"),
    (DCP(), BATCHES["decode"], "GQA, sink", "float64", "forward"),
    (DCP(), BATCHES["mixed"], "latent", "float32", "forward"),
    (Helix(), BATCHES["decode"], "GQA, sink", "bfloat16", "forward"),
    (Helix(), BATCHES["mixed"], "softcap", "float64", "forward"),
    (Star(anchor=8), PROMPTS, "GQA, sink", "float64", "forward"),
    (Star(anchor=4), PROMPTS, "latent", "float32", "forward"),
    (APB(anchor=4, passing=3), PROMPTS, "GQA, sink", "float64", "forward"),
    (APB(anchor=4, passing=3, compressor=KeyNorm()), PROMPTS, "latent", "bfloat16", "forward"),
]


class OtherHeads(Around):
    """A rank's heads of out are in another order."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        out, saved = super().forward(q, k, v, sink)
        return out.flip(1), saved


class NotItsOwn(Around):
    """A rank says that it gives the heads of its neighbour."""

    @property
    def held(self) -> Held:
        held = self._run.held
        heads = held.out.heads
        assert heads is not None
        other = range(heads.start + len(heads), heads.stop + len(heads)) if heads.start == 0 else heads
        return replace(held, out=Part(held.out.tokens, other))


class SinkOnEveryRank(Around):
    """Its kernels' results have the sink in them before they are merged."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        assert sink is not None
        # As if each of four partial results had it: four sinks weigh as one that is log 4 larger.
        return super().forward(q, k, v, sink + torch.log(torch.tensor(4.0)))


def around(strategy: type[Strategy], kind: type[Around]) -> type[Strategy]:
    class Wrapped(strategy):  # type: ignore[misc,valid-type]
        def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
            return kind(super().start(problem, mask, kernel, place))

    return Wrapped


def averaged(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """A merge whose results weigh alike, where both have one."""
    both = (torch.isfinite(lse) & torch.isfinite(other_lse))[..., None]
    mean = (out + other.to(out.dtype)) / 2
    merge_into(out, lse, other, other_lse)
    out.copy_(torch.where(both, mean, out))


def measured(rank: int, strategy: Strategy, batch: Batch, shape: str, dtype: str, direction: str) -> Measured:
    of, mask = problem(batch, shape, dtype, direction, RANKS), causal_batch(batch)
    assert strategy.unsupported(of, mask) is None, strategy
    work = Work(Attention(), of, lambda _: mask, Reference(), strategy, SETTINGS, 1)
    return measure_cell(work, Gang(rank, RANKS, CPU, Groups(), []), lambda _: None)


def sound(rank: int) -> None:
    for case in due(SOUND):
        found = measured(rank, *case)
        assert refused(found) is None, (case, refused(found))
        assert found.unavailable is None, case
        assert ("check/distance" in found.metrics) == isinstance(case[0], Star | APB), case
        if isinstance(case[0], Star | APB):
            assert 0.01 < found.metrics["check/distance"] < 2, found.metrics["check/distance"]
        assert found.check is not None
        assert found.check.whole
        if case[3] != "bfloat16" and case[4] == "forward_backward":
            assert "conserved" in found.check.ratios, case


def wrong(rank: int) -> None:
    cases: list[tuple[type[Strategy], type[Around], str, str]] = [
        (DCP, OtherHeads, "decode", "GQA, sink"),
        (Helix, OtherHeads, "mixed", "GQA, sink"),
        (Helix, NotItsOwn, "decode", "GQA, sink"),
        (DCP, SinkOnEveryRank, "decode", "GQA, sink"),
        (Ring, SinkOnEveryRank, "mixed", "GQA, sink"),
    ]
    for strategy, kind, batch, shape in due(cases):
        found = measured(rank, around(strategy, kind)(), BATCHES[batch], shape, "float32", "forward")
        assert refused(found), (strategy, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lcbench.schedule.execute.merge_into", averaged)
        assert refused(measured(rank, Ring("zigzag"), BATCHES["chunk"], "latent", "float32", "forward_backward"))


@pytest.mark.slow
@pytest.mark.gloo
def test_sound_runs_pass_whatever_ranks_hold() -> None:
    run_ranks(RANKS, sound)


@pytest.mark.slow
@pytest.mark.gloo
def test_faults_among_ranks_are_refused() -> None:
    run_ranks(RANKS, wrong)
