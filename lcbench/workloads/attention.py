"""One attention call: forward of a sequence with a mask, and backward where the cell asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lcbench.cp.base import Passes, RankRun
from lcbench.inputs.base import Wanted
from lcbench.inputs.drawing import draw_sink
from lcbench.measure.bounds import Check
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.least import least_traffic
from lcbench.measure.numerics import Result, forward
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.problem import Problem
from lcbench.schedule.held import Held, Part
from lcbench.workloads.base import Work, Workload
from lcbench.workloads.started import Sent, Started, distance, started


@dataclass(frozen=True)
class Attention(Workload):
    """Attention alone; it has no options. Phases are ``forward`` and, unless direction=forward, ``backward``."""

    any_inputs: ClassVar[bool] = True

    def start(self, work: Work, draw: int, gang: Gang) -> AttentionSession:
        return AttentionSession(work, draw, gang)


class AttentionSession(Session):
    """One draw of an attention cell on this rank.

    Attributes:
        mask: that is computed, of this draw, for this rank's heads; ``pairs``: its unmasked pairs over all of these.
        run: the strategy at work.
        shard: this rank's inputs.
        examination: the check.
    """

    run: RankRun
    wrong: str | None = None
    _no_probe: str | None = None  # why inputs cannot be a probe's

    def __init__(self, work: Work, number: int, gang: Gang) -> None:
        self._work, self._gang = work, gang
        self._first: Result | None = None
        self._sent: dict[str, Sent] = {}
        begun = self._begun(work, number, gang)
        self.refused = begun if isinstance(begun, str) else None
        if isinstance(begun, str):
            return
        self.mask, self.pairs, self.run, self.wrong = begun.mask, begun.pairs, begun.run, begun.owners.wrong
        self.prepare_s, self._started = begun.prepare_s, begun
        self.examination = begun.examination(no_probe=self._no_probe, passed=self._one_pass)
        self._keys = begun.mask.density * begun.mask.num_k  # of a row, in the mean, before a pass chooses any
        held = begun.owners.held
        drawn = {name: self._drawn(name, held) for name in self._names()}
        self.shard = shard_of(held, drawn, work.problem)
        self.negated = False

    def _begun(self, work: Work, number: int, gang: Gang) -> Started | str:
        """A draw ready to run on this rank, or why the ranks cannot run it. Collective."""
        return started(work, number, gang)

    def _names(self) -> list[str]:
        """The inputs that are tensors of their own."""
        problem = self._work.problem
        kept = {"q": True, "k": True, "v": not problem.heads.latent, "dout": problem.backward, "sink": problem.softmax.sink}
        return [name for name, there in kept.items() if there]

    def _drawn(self, name: str, held: Held) -> torch.Tensor:
        gang, work = self._gang, self._work
        group = (gang.dp_index, gang.tp_index)
        if name == "sink":
            return draw_sink(work.problem, self._keys, work.seed, gang.device, group)
        part = {"q": held.q, "k": held.kv, "v": held.kv, "dout": held.out}[name]
        return work.inputs.draw(Wanted(name, part.tokens, work.problem, work.seed, gang.device, group, part.heads))

    def _by_tokens(self) -> Shard:
        """The inputs of as many adjacent queries, and keys, as each rank's, all heads of them: for the check of ranks that hold
        something else."""
        gang, problem = self._gang, self._work.problem
        own, ranks = gang.cp_rank, problem.scale.world_size
        queries, keys = (Part(np.arange(n * own // ranks, n * (own + 1) // ranks)) for n in (problem.queries, problem.seqlen))
        held = Held(queries, keys, queries)
        return shard_of(held, {name: self._drawn(name, held) for name in self._names()}, problem)

    def _inputs(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self.shard, name) for name in self._names()}

    def draw(self) -> None:
        """Draw the inputs anew, into the memory that they are in."""
        for name, x in self._inputs().items():
            x.copy_(self._drawn(name, self.shard.held))
        self.negated = False

    def vary(self) -> None:
        """Negate all inputs in place but sinks: the next pass gives the negative out, dq, dk and dv, and the same LSE and dsink.
        Where inputs choose what is computed, so that their negative chooses something else, they stay."""
        if not self.run.negates:
            return
        for name, x in self._inputs().items():
            if name != "sink":
                x.neg_()
        self.negated = not self.negated

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._inputs().values())

    @property
    def held_bytes(self) -> int:
        return self.examination.held_bytes

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        """Forward gives (out, saved), backward (out, saved, gradients)."""
        run, shard = self.run, self.shard
        phases: dict[str, Callable[[Any], Any]] = {"forward": lambda _: forward(run, shard)}
        if shard.dout is not None:
            dout = shard.dout
            phases["backward"] = lambda passed: (*passed, run.backward(dout, passed[1]))
        return phases

    def first_pass(self) -> None:
        passed: Any = None
        lse = None
        for phase, run in self.phases().items():
            passed = run(passed)
            if counters := self.run.counters():
                self._sent[phase] = Sent(counters.bytes_sent, counters.bytes_between_nodes)
            if lse is None:  # of forward, before backward takes its buffers
                lse = self.run.lse(passed[1])
        self._first = self._result(passed, lse)
        if self._first.chosen is not None:
            self._started = self._started.choosing(self._first.chosen)
            self.mask, self.pairs = self._started.mask, self._started.pairs

    def _result(self, passed: Any, lse: torch.Tensor | None = None) -> Result:
        return Result.of(self._work.problem, self.run, passed, lse)

    def _one_pass(self, shard: Shard) -> Result:
        """What all phases give of some inputs. Collective."""
        return self._started.passed(shard)

    def variants(self) -> dict[str, Phases]:
        alone = {
            "compute": self.run.replay(compute=True, communicate=False),
            "communication": self.run.replay(compute=False, communicate=True),
        }
        found = {name: passes for name, passes in alone.items() if passes is not None}
        if not found:
            return {}
        _, saved = forward(self.run, self.shard)
        return {name: self._alone(passes, saved) for name, passes in found.items()}

    def _alone(self, passes: Passes, saved: Any) -> Phases:
        """The phases of bare passes: forward has no result to go on with, so backward takes what a whole one saved."""
        shard = self.shard
        phases: dict[str, Callable[[Any], Any]] = {"forward": lambda _: forward(passes, shard)}
        if shard.dout is not None:
            dout = shard.dout
            phases["backward"] = lambda _: passes.backward(dout, saved)
        return phases

    def alone(self) -> Phases:
        return self.phases()

    def timeline(self) -> list[list[float]] | None:
        shard = self.shard
        return self.run.timeline(shard.q, shard.k, shard.v, shard.dout, shard.sink)

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        say("checking the first pass against the float64 reference")
        assert self._first is not None
        self._check(self._first)
        self._first = None
        say("checking every row and column by probes")
        for probe in self.examination.probes:
            self.examination.probe(probe, self.shard)
        self.draw()

    def check_again(self) -> None:
        result = self._one_pass(self.shard)
        if self.examination.probes:
            self.examination.begin(result)
            self.examination.probe("level", self.shard)
        else:
            self._check(result)
        self.draw()

    def _check(self, result: Result) -> None:
        """Against the reference."""
        self.examination.first(self.shard, result, None if self._started.owners.by_tokens else self._by_tokens())

    def check_timed(self, passed: Any) -> None:
        self.examination.last("last timed pass", self._result(passed), self.negated)

    def check_last(self) -> None:
        self.vary()
        self.examination.last("last pass", self._one_pass(self.shard), self.negated)

    def check(self) -> Check:
        return self.examination.check()

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """Cost by phase: FLOPs of the mask's pairs in all groups; traffic that the mask needs from who owns what."""
        passes = self._of_passes()
        return {phase: passes[phase] for phase in self.phases()}

    def _of_passes(self) -> dict[str, Cost]:
        """The cost of forward and of backward. Collective."""
        problem = self._work.problem
        least = least_traffic(self.mask, problem, self._started.owners, self._gang.device, self._gang.ranks)
        pairs = sum(self._gang.of_groups(self.pairs))
        flops = {"forward": forward_flops(pairs, problem.heads), "backward": backward_flops(pairs, problem.heads)}
        return {phase: Cost(flops[phase], least.sent, least.memory[phase]) for phase in flops}

    def counted(self) -> Counted:
        counted = self._started.counted(self._sent, ("forward", "backward"))
        counted.metrics.update(distance(self.examination, self._gang))
        counted.notes.update(self._work.stated(self._gang))
        return counted


def shard_of(held: Held, drawn: dict[str, torch.Tensor], problem: Problem) -> Shard:
    """What a rank is given, of inputs by name: values of latent heads are a part of their keys."""
    v = drawn["v"] if "v" in drawn else drawn["k"][..., : problem.heads.v]
    return Shard(held, drawn["q"], drawn["k"], v, drawn.get("dout"), drawn.get("sink"))
