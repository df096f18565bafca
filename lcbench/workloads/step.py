"""A training step as ``measure_cell`` runs it: a session of ``workload=block``."""

from __future__ import annotations

import time
from typing import Any

import torch

from lcbench.cp.base import RankRun
from lcbench.measure.bounds import Check
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.least import least_traffic
from lcbench.measure.numerics import Examination, Result
from lcbench.measure.ranks import all_gather_object
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.recorder import Recorder
from lcbench.workloads.started import Started, count, started
from lcbench.workloads.step_check import StepCheck, joined
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Attention

LAYERS, HEAD, REDUCE, STEP = ("forward", "backward"), "head", "reduce", "step"


class BlockSession(Session):
    """One draw of a block cell on this rank.

    Attributes:
        mask: of this draw; ``pairs``: its unmasked pairs over all query heads.
        training: layers, head and inputs.
        checks: of the parts around attention, and of later passes.
        examinations: of the attention of one layer each, with inputs of either sign.
    """

    wrong: str | None = None

    def __init__(self, block: Block, work: Work, number: int, gang: Gang) -> None:
        self._block, self._work, self._gang = block, work, gang
        self._sent: dict[str, int] = {}
        begun = started(work, number, gang, work.recompute.refuses)
        self.refused = begun if isinstance(begun, str) else None
        if isinstance(begun, str):
            return
        before = time.perf_counter()
        self.mask, self.wrong = begun.mask, begun.wrong
        self.pairs = self.mask.pairs(work.problem.heads.q)
        self.run = CountedRun(begun.run)
        self.training = Training(block, work, Attention(self.run), work.recompute, gang.device)
        self.prepare_s = begun.prepare_s + time.perf_counter() - before
        self.negated = False
        self._give_checks(begun, [work.seed, work.attempt, number])

    def _give_checks(self, begun: Started, seed: list[int]) -> None:
        work, gang = self._work, self._gang
        bounds = begun.bounds(work, gang)
        self.checks = StepCheck(self.training, self._block.model, bounds, seed, gang)
        self.examinations = {
            negated: Examination(
                begun.run, self.mask, work.problem, begun.run.tokens, bounds, [*seed, negated], own_lse=begun.run.own_lse
            )
            for negated in (False, True)
        }

    @property
    def input_bytes(self) -> int:
        """Of what the layers and the head get of the sequence; weights are no inputs."""
        return sum(x.numel() * x.element_size() for x in (self.training.x, self.training.labels))

    @property
    def held_bytes(self) -> int:
        return self.checks.held_bytes + sum(each.held_bytes for each in self.examinations.values())

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        return self.training.phases()

    def _step(self) -> Any:
        passed: Any = None
        for phase in self.phases().values():
            passed = phase(passed)
        return passed

    def vary(self) -> None:
        """Negate x in place: queries and keys of the first layer are negative then, and all else is something else."""
        self.training.x.neg_()
        self.negated = not self.negated

    def first_pass(self) -> None:
        self._recorded = self._record()

    def _record(self) -> Recorder:
        """A pass that is caught, and counted. Collective."""
        recorder = self.checks.recorder(self.negated)
        self.run.sent = 0

        def ended(phase: str) -> None:
            # What a sum over ranks sends nobody counts: it is taken for the least.
            self._sent[phase] = round(self._reduced) if phase == REDUCE else self.run.sent
            self.run.sent = 0

        recorder.run(ended)
        return recorder

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        say("checking the first pass against the float64 reference")
        shard = self._check_recorded(self._recorded)
        say("checking another pass on negated inputs")
        self.vary()
        self._check_recorded(self._record())
        self.vary()
        say("checking every row and column of the attention by probes")
        examination = self.examinations[False]
        for probe in examination.probes:
            examination.probe(probe, shard)
        del self._recorded

    def check_again(self) -> None:
        shard = self._check_recorded(self._record())
        self.vary()
        self._check_recorded(self._record())
        self.vary()
        self.examinations[False].probe("level", shard)

    def _check_recorded(self, recorder: Recorder) -> Shard:
        """Check a pass that was caught; gives the tensors of its attention."""
        self.checks.first(recorder, self.negated)
        names = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
        caught = {name: recorder.all_of(f"layer {recorder.whole} {name}").contiguous() for name in names}
        q, k, v, dout = (caught[name] for name in ("q", "k", "v", "dout"))
        shard = Shard(self.run.tokens, q, k, v, dout)
        # A pass of its own has the LSE, which a step keeps to itself; where it is wrong there, so are the gradients.
        _, saved = self.run.forward(q, k, v)
        lse = self.run.lse(saved)
        self.examinations[self.negated].first(shard, Result(caught["out"], lse, caught["dq"], caught["dk"], caught["dv"]))
        return shard

    def check_timed(self, passed: Any) -> None:
        self.checks.last("last timed pass", passed, self.negated)

    def check_last(self) -> None:
        self.vary()
        self.checks.last("last pass", self._step(), self.negated)

    def check(self) -> Check:
        return joined([self.checks.found(), *(each.check() for each in self.examinations.values())])

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """Cost by phase: 2 FLOPs per weight and token forward and 4 backward, attention by the mask's pairs; what is computed again
        is apart. Traffic is what every layer's attention needs, memory what weights take that are read, and their gradients."""
        problem, model, again = self._work.problem, self._block.model, self._work.recompute.again()
        layers, size = len(self.training.stack.layers), problem.itemsize
        least = least_traffic(self.mask, problem, self.run.tokens, self._gang.device)
        forward, backward = (layers * flops(self.pairs, problem.heads) for flops in (forward_flops, backward_flops))
        weights, head = layers * model.layer_parameters(), model.head_parameters()
        dense, moved = 2.0 * weights * problem.seqlen, layers * least.sent
        recomputed = again.token_wise * dense + again.attention * forward
        found = {
            "forward": Cost(dense + forward, moved, weights * size),
            HEAD: Cost(6.0 * head * self.checks.labelled, 0.0, 2.0 * head * size),
            "backward": Cost(2 * dense + backward, moved, 2.0 * weights * size, recomputed),
            REDUCE: Cost(0.0, float(round(self._reduced)), 2.0 * self._reduced),
        }
        return {phase: found[phase] for phase in self.phases()}

    @property
    def _reduced(self) -> float:
        """Bytes that a rank sends at the least where gradients are summed over all: each gradient to where it is summed and from
        there, but for a rank's own share."""
        size, ranks = self._work.problem.itemsize, self._gang.world_size
        return 2.0 * size * sum(weight.numel() for weight in self.training.weights().values()) * (ranks - 1) / ranks

    def _repeats(self) -> dict[str, float]:
        """How often the whole model has what each phase was measured with."""
        model, layers = self._block.model, len(self.training.stack.layers)
        weights = layers * model.layer_parameters(), model.layers * model.layer_parameters()
        measured, whole = (own + model.head_parameters() for own in weights)
        by_weight, by_layer = whole / measured, model.layers / layers
        return {phase: {HEAD: 1.0, REDUCE: by_weight}.get(phase, by_layer) for phase in self.phases()}

    def counted(self) -> Counted:
        layers = len(self.training.stack.layers)
        counted = Counted({"mask/area": self.pairs / self._work.problem.heads.q, "mask/density": self.mask.density})
        recomputed = sum(cost.recomputed for cost in self.costs().values())
        counted.metrics.update({
            "step/layers": float(layers), "step/labelled_tokens": float(self.checks.labelled),
            "step/tokens_per_gpu": self._work.problem.seqlen / self._gang.world_size,
            "step/recomputed_flops_per_gpu": recomputed / self._gang.world_size,
        })  # fmt: skip
        counted.metrics.update((f"model/{phase}/repeats", repeats) for phase, repeats in self._repeats().items())
        count(counted, self._work, self._gang, self.run, self.pairs, self._sent, list(self._sent))
        return counted

    def variants(self) -> dict[str, Phases]:
        return {}

    def timeline(self) -> list[list[float]] | None:
        return None

    def shares(self) -> dict[str, float]:
        """What of a step is attention, by passes that are timed for it. Collective."""
        all_gather_object(None)  # ranks begin together
        with self.training.stack.attention.watched() as watch:
            begun = watch.now()
            self._step()
            watch.spans.append((STEP, begun, watch.now()))
        if watch.cuda:
            torch.cuda.synchronize(self._gang.device)
        every = all_gather_object(watch.seconds())
        shares = [sum(own.get(phase, 0.0) for phase in LAYERS) / own[STEP] for own in every]
        return {"attention/share": sum(shares) / len(shares)}


class CountedRun:
    """A strategy's run as it is; what its passes send adds up in ``sent``."""

    def __init__(self, run: RankRun) -> None:
        self._run = run
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def _counted(self, result: Any) -> Any:
        if counters := self._run.counters():
            self.sent += counters.bytes_sent
        return result

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return self._counted(self._run.forward(q, k, v))

    def resume(self, *args: Any) -> Any:
        return self._counted(self._run.resume(*args))

    def backward(self, dout: torch.Tensor, saved: Any) -> Any:
        return self._counted(self._run.backward(dout, saved))
