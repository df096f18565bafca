"""A cell of linear attention on one rank: its inputs, its passes, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from lcbench.inputs.base import Wanted
from lcbench.inputs.drawing import draw_rows
from lcbench.kernels.linear import LinearKernel, Tokens
from lcbench.measure.bounds import Check
from lcbench.measure.flops import linear_flops
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.problem import Heads
from lcbench.schedule.scan import Replayed, ScanRun
from lcbench.workloads.base import Work
from lcbench.workloads.linear_check import LinearCheck, Result
from lcbench.workloads.started import Sent, started

DECAY = 1 / 16  # of log(sigmoid(normal)): arXiv 2312.06635, section 4.4


class LinearSession(Session):
    """One draw of a cell of linear attention on this rank.

    Attributes:
        run: the strategy at work.
        x, dout: this rank's inputs; dout: None without backward.
    """

    wrong: str | None = None

    def __init__(self, work: Work, number: int, gang: Gang) -> None:
        self._work, self._gang = work, gang
        self._sent: dict[str, Sent] = {}
        self._first: Result | None = None
        kernel = cast(LinearKernel, work.kernel)
        begun = started(work, number, gang, begin=lambda *given: work.strategy.start_linear(given[0], given[1], kernel, given[3]))
        self.refused = begun if isinstance(begun, str) else None
        if isinstance(begun, str):
            return
        problem = work.problem
        # What a rank computes is counted in tokens.
        self._started = replace(begun, pairs=problem.seqlen * problem.heads.q)
        self.run, self.wrong, self.prepare_s = cast(ScanRun, begun.run), begun.owners.wrong, begun.prepare_s
        self._tokens = self.run.held.q.tokens
        self._check = LinearCheck(problem, self._tokens, begun.bounds, begun.seed, gang.ranks, gang.cp_rank)
        self.x = self._drawn()
        self.dout = self._rows("dout") if problem.backward else None
        self.negated = False

    def _rows(self, name: str) -> torch.Tensor:
        work, gang = self._work, self._gang
        place = (gang.dp_index, gang.tp_index)
        return work.inputs.draw(Wanted(name, self._tokens, work.problem, work.seed, gang.device, place))

    def _gates(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        work, gang = self._work, self._gang
        dtype = torch.float64 if work.problem.dtype == "float64" else torch.float32
        return draw_rows(name, self._tokens, shape, dtype, work.seed, gang.device, (gang.dp_index, gang.tp_index))

    def _drawn(self) -> Tokens:
        heads, delta = self._work.problem.heads, self._work.problem.rule == "gated_delta_rule"
        q, k, v = (self._rows(name) for name in "qkv")
        sigmoid = torch.nn.functional.logsigmoid(self._gates("decay", (heads.kv,) if delta else (heads.kv, heads.dim)))
        if not delta:
            return Tokens(q, k, v, DECAY * sigmoid)
        unit = torch.nn.functional.normalize(k.to(sigmoid.dtype), dim=-1).to(k.dtype)
        return Tokens(q, unit, v, DECAY * sigmoid, torch.sigmoid(self._gates("beta", (heads.kv,))))

    def vary(self) -> None:
        """Negate values and dout in place: states and out are then the negative ones, gradients of states and dv too. All others
        are products of one with the other, and stay."""
        for x in (self.x.v, self.dout):
            if x is not None:
                x.neg_()
        self.negated = not self.negated

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.x, self.dout) if x is not None)

    @property
    def held_bytes(self) -> int:
        return self._check.held_bytes

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        """Forward gives (out, saved), backward (out, saved, gradients)."""
        return self._phases_of(self.run, None)

    def _phases_of(self, run: ScanRun | Replayed, kept: Any) -> Phases:
        """``kept``: what a whole forward pass has saved, for passes whose own has no results; None: backward takes the pass's."""
        phases: dict[str, Callable[[Any], Any]] = {"forward": lambda _: run.forward(self.x)}
        if self.dout is not None:
            dout = self.dout
            phases["backward"] = lambda passed: (*passed[:2], run.backward(dout, kept or passed[1]))
        return phases

    def first_pass(self) -> None:
        passed: Any = None
        for phase, run in self.phases().items():
            passed = run(passed)
            counters = self.run.counters()
            self._sent[phase] = Sent(counters.bytes_sent, counters.bytes_between_nodes)
        self._first = _result(passed)

    def _pass(self) -> Result:
        passed: Any = None
        for run in self.phases().values():
            passed = run(passed)
        return _result(passed)

    def variants(self) -> dict[str, Phases]:
        alone = {
            "compute": self.run.replay(compute=True, communicate=False),
            "communication": self.run.replay(compute=False, communicate=True),
        }
        found = {name: run for name, run in alone.items() if run is not None}
        if not found:
            return {}
        _, kept = self.run.forward(self.x)
        return {name: self._phases_of(run, kept) for name, run in found.items()}

    def alone(self) -> Phases:
        return self.phases()

    def timeline(self) -> list[list[float]] | None:
        return self.run.timeline(self.x, self.dout)

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        say("checking the first pass against the float64 recurrence")
        assert self._first is not None
        self._check.first(self.x, self.dout, self._first, whole=True)
        self._first = None

    def check_again(self) -> None:
        self._check.first(self.x, self.dout, self._pass(), whole=False)

    def check_timed(self, passed: Any) -> None:
        self._check.last("last timed pass", _result(passed), negated=self.negated)

    def check_last(self) -> None:
        self.vary()
        self._check.last("last pass", self._pass(), negated=self.negated)

    def check(self) -> Check:
        return self._check.check()

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """FLOPs of the recurrence of all groups; traffic that it needs from who has which tokens. Collective."""
        problem, heads = self._work.problem, self._work.problem.heads
        assert problem.rule is not None
        flops = linear_flops(sum(self._gang.of_groups(problem.seqlen)), heads, problem.rule)
        given = sum(x.numel() * x.element_size() for x in self.x if x is not None)
        out = len(self._tokens) * heads.q * heads.v * problem.itemsize
        memory = {"forward": given + out, "backward": 2 * given + out}
        first, count = int(self._tokens.min(initial=problem.seqlen)), len(self._tokens)
        before, behind = (first, problem.seqlen - first - count) if count else (0, 0)
        group = heads.q // heads.kv
        received = {
            "forward": least_received(before, count * group, heads), "backward": least_received(behind * group, count, heads)
        }  # fmt: skip
        every: list[tuple[dict[str, float], dict[str, float]]] = EVERY.all_gather_object((received, memory))
        # What a rank gets another one sends, so the rank that sends most sends at least the mean.
        sent = {phase: problem.itemsize * float(np.mean([one[phase] for one, _ in every])) for phase in memory}
        return {
            phase: Cost(times * flops, sent[phase], float(max(one[phase] for _, one in every)))
            for phase, times in (("forward", 1), ("backward", 2)) if phase in self.phases()
        }  # fmt: skip

    def counted(self) -> Counted:
        counted = self._started.counted(self._sent, ("forward", "backward"))
        counted.metrics["mask/area"] = float(self._started.mask.pairs(1))
        return counted


def least_received(others: int, own: int, heads: Heads) -> float:
    """Numbers that a rank gets at the least of others' tokens, over all key/value heads.

    What ``others`` keys or queries leave in a state of a head is a matrix (Dk, Dv) of their rank n, at most, which n (Dk + Dv - n)
    numbers say; ``own`` queries or keys see no more of it than as many rows. Where a head is computed elsewhere, the results of
    these come back, or the others' keys and values, which are as many numbers or more.
    """
    rank = min(others, heads.dim, heads.v)
    return float(heads.kv * min(rank * (heads.dim + heads.v - rank), min(own, heads.dim) * heads.v))


def _result(passed: Any) -> Result:
    return Result(passed[0], passed[2] if len(passed) > 2 else None)
