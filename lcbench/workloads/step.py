"""A training step as ``measure_cell`` runs it: a session of ``workload=block``."""

from __future__ import annotations

import time
from functools import reduce
from typing import Any

import torch

from lcbench.cp.base import RankRun
from lcbench.kernels.base import Unsupported
from lcbench.measure.bounds import Check, of_groups
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.least import least_traffic
from lcbench.measure.numerics import Result
from lcbench.measure.ranks import EVERY
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.workloads.base import Work
from lcbench.workloads.loss import UNLABELLED
from lcbench.workloads.recorder import Recorder
from lcbench.workloads.reshard import BACK, PHASE
from lcbench.workloads.started import Sent, Started, distance, started
from lcbench.workloads.step_check import StepCheck
from lcbench.workloads.trained import Trained
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Attention

LAYERS, STEP = ("forward", "backward"), "step"


class BlockSession(Session):
    """One draw of a block cell on this rank.

    Attributes:
        mask: of this draw; ``pairs``: its unmasked pairs over all query heads.
        training: layers, head and inputs.
        checks: of the parts around attention, and of later passes.
        examinations: of the attention of one layer each, with inputs of either sign.
    """

    wrong: str | None = None

    def __init__(self, block: Trained, work: Work, number: int, gang: Gang) -> None:
        self._block, self._work, self._gang = block, work, gang
        begun = self._begun(number)
        self.refused = begun if isinstance(begun, str) else None
        if isinstance(begun, str):
            return
        self._started, before = begun, time.perf_counter()
        self.mask, self.pairs, self.wrong = begun.mask, begun.pairs, begun.owners.wrong
        self.run = CountedRun(begun.run)
        try:
            self.training = self._trained()
        except Unsupported as refused:  # by all ranks
            self.refused = str(refused)
            return
        self.prepare_s = begun.prepare_s + time.perf_counter() - before
        self.negated = False
        self.checks = StepCheck(self.training, block.model, begun.bounds, begun.seed, gang)
        self.examinations = {negated: begun.examination(negated) for negated in (False, True)}

    def _begun(self, number: int) -> Started | str:
        """A draw's attention, ready to run on this rank, or why the ranks cannot run it. Collective."""
        return started(self._work, number, self._gang, self._work.recompute.refuses)

    def _trained(self) -> Training:
        """The layers around it. Collective.

        Raises:
            Unsupported: on all ranks.
        """
        return Training(self._block, self._work, Attention(self.run), self._work.recompute, self._gang)

    def _passes(self) -> list[CountedRun]:
        """What the attention of a step goes through."""
        return [self.run]

    @property
    def input_bytes(self) -> int:
        """Of what the layers and the head get of the sequence; weights are no inputs."""
        images = [] if self.training.reshard is None else [self.training.images]
        return sum(x.numel() * x.element_size() for x in (self.training.x, self.training.labels, *images))

    @property
    def held_bytes(self) -> int:
        """Of the check, and what is in the host's memory where that is the device's too."""
        host = self.training.host_bytes if self._gang.device.type == "cpu" else 0
        return host + self.checks.held_bytes + sum(each.held_bytes for each in self.examinations.values())

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        return self.training.phases()

    def vary(self) -> None:
        """Negate x in place: queries and keys of the first layer are negative then, and all else is something else."""
        self.training.negate()
        self.negated = not self.negated

    def first_pass(self) -> None:
        self._recorded = self._record()

    def _record(self) -> Recorder:
        """A pass that is caught. Collective."""
        recorder = self.checks.recorder(self.negated)
        recorder.run()
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
        caught = {name: recorder.all_of(f"layer {recorder.layer} {name}").contiguous() for name in names}
        q, k, v, dout = (caught[name] for name in ("q", "k", "v", "dout"))
        shard = Shard(self._started.owners.held, q, k, v, dout)
        # A pass of its own has the LSE, which a step keeps to itself; where it is wrong there, so are the gradients.
        _, saved = self.run.forward(q, k, v)
        lse = self.run.lse(saved)
        self.examinations[self.negated].first(shard, Result(caught["out"], lse, caught["dq"], caught["dk"], caught["dv"]))
        return shard

    def check_timed(self, passed: Any) -> None:
        self.checks.last("last timed pass", passed, self.negated)

    def check_last(self) -> None:
        self.vary()
        self.checks.last("last pass", self.training.step(), self.negated)

    def check(self) -> Check:
        names = {False: "attention", True: "attention of negated inputs"}
        parts = {"step": self.checks.found()} | {names[negated]: each.check() for negated, each in self.examinations.items()}
        return of_groups(parts)

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        found = self._of_parts()
        return {phase: found.get(phase, Cost(0.0, 0.0, 0.0)) for phase in self.phases()}

    def _of_parts(self) -> dict[str, Cost]:
        """Cost by part of a step: 2 FLOPs per weight and token forward and 4 backward, attention by the mask's pairs; what is computed again
        is apart. Traffic is what every layer's attention needs, memory what weights take that are read, and their gradients."""
        problem, model, again = self._work.problem, self._block.model, self.training.again
        gang, layers, size = self._gang, len(self.training.stack.layers), problem.itemsize
        least = least_traffic(self.mask, problem, self._started.owners, gang.device, gang.ranks)
        pairs, tokens = sum(gang.of_groups(self.pairs)), float(problem.seqlen * gang.mesh.dp)
        labelled = sum(gang.of_groups(self.training.labelled)) / gang.mesh.tp
        forward, backward = (layers * flops(pairs, problem.heads) for flops in (forward_flops, backward_flops))
        weights, head = layers * model.layer_parameters(), model.head_parameters()
        dense, moved = 2.0 * weights * tokens, layers * least.sent
        # A rank reads its part of each weight, and writes as much of gradients.
        read, head_read = (size * each / gang.mesh.tp for each in (weights, head))
        recomputed = again.token_wise * dense + again.attention * forward
        return {
            "forward": Cost(dense + forward, moved, read),
            "head": Cost(6.0 * head * labelled, 0.0, 2 * head_read),
            "backward": Cost(2 * dense + backward, moved, 2 * read, recomputed),
        }

    def counted(self) -> Counted:
        sent, world = self._sent(), self._gang.world_size
        counted = self._started.counted(sent, list(sent))
        costs = self.costs()
        counted.metrics.update(distance(self.examinations[False], self._gang))
        counted.metrics.update({
            "step/layers": float(len(self.training.stack.layers)), "step/labelled_tokens": float(self.training.labelled),
            "step/tokens_per_gpu": self._work.problem.seqlen * self._gang.mesh.dp / world,
            "step/recomputed_flops_per_gpu": sum(cost.recomputed for cost in costs.values()) / world,
        })  # fmt: skip
        counted.metrics["step/labelled_max_over_mean"] = self._labelled_max_over_mean()
        if self.training.reshard is not None:
            counted.metrics.update(of_worst({"step/images_max_over_mean": self.training.reshard.max_over_mean}))
        counted.metrics.update((f"model/{phase}/repeats", repeats) for phase, repeats in self._block.repeats(self.phases()).items())
        counted.metrics.update(of_worst({f"memory/{name}_bytes": float(size) for name, size in self.training.memory().items()}))
        counted.metrics.update(of_worst(self.training.offloaded()))
        counted.notes.update(self.training.notes)
        if not self._block.sharded:  # which gathers and frees weights as it sees fit
            plan = self.training.planned()
            peak = self._held_between_steps() + (plan.peak if plan else 0)
            counted.metrics.update(of_worst({"memory/planned_peak_bytes": float(peak)}))
            counted.notes.update({"memory_plan": plan.notes()} if plan else {})
        return counted

    def _labelled_max_over_mean(self) -> float:
        """The most labelled tokens that a rank has, over the mean. Collective."""
        every = EVERY.all_gather_object(int((self.training.labels != UNLABELLED).sum()))
        return max(every) * len(every) / max(1, sum(every))

    def _held_between_steps(self) -> int:
        """This rank's weights, states of the optimizer and buffers between ranks."""
        counters = self.run.counters()
        return self.training.held_between_steps() + (counters.buffer_bytes if counters else 0)

    def _sent(self) -> dict[str, Sent]:
        """What this rank sends in a step, by phase: of attention and of weights. Runs one. Collective."""
        sharing, passed, found = self.training.sharing, None, {}
        meshes = {"tp": sharing.tp, "weights": sharing.same}
        outside = {kind: self._outside(mesh.mesh.flatten().tolist()) for kind, mesh in meshes.items() if mesh is not None}
        self._take()
        for phase, run in self.phases().items():
            with self.training.counting() as traffic:
                passed = run(passed)
            of_weights = (Sent(sent, round(sent * outside[kind])) for kind, sent in traffic.sent.items())
            found[phase] = reduce(Sent.plus, of_weights, self._take())
        if (reshard := self.training.reshard) is not None:
            found[PHASE], found[BACK] = self._of_rows(reshard.sent), self._of_rows(reshard.received)
        return found

    def _take(self) -> Sent:
        """What attention has sent since this was last asked."""
        return reduce(Sent.plus, (run.take() for run in self._passes()), Sent(0, 0))

    def _of_rows(self, counts: list[int]) -> Sent:
        """Rows of x to each rank of the context-parallel group, as bytes."""
        own, per_node = self._gang.cp_rank, self._work.problem.scale.gpus_per_node
        size = self.training.x.shape[1] * self.training.x.element_size()
        others = {rank: count * size for rank, count in enumerate(counts) if rank != own}
        return Sent(sum(others.values()), sum(sent for rank, sent in others.items() if rank // per_node != own // per_node))

    def _outside(self, ranks: list[int]) -> float:
        """The share of the other ranks of a set that are on other nodes."""
        per_node = (self._gang.scale or self._work.problem.scale).gpus_per_node
        others = [rank for rank in ranks if rank != self._gang.rank]
        return sum(rank // per_node != self._gang.rank // per_node for rank in others) / max(1, len(others))

    def variants(self) -> dict[str, Phases]:
        return {}

    def timeline(self) -> list[list[float]] | None:
        return None

    def shares(self) -> dict[str, float]:
        """What of a step is attention, by passes that are timed for it. Collective."""
        EVERY.all_gather_object(None)  # ranks begin together
        with self.training.stack.attention.watched(self._gang.device) as watch:
            begun = watch.now()
            self.training.step()
            watch.spans.append((STEP, begun, watch.now()))
        if watch.cuda:
            torch.cuda.synchronize(self._gang.device)
        every = EVERY.all_gather_object(watch.seconds())
        shares = [sum(own.get(phase, 0.0) for phase in LAYERS) / own[STEP] for own in every]
        return {"attention/share": sum(shares) / len(shares)}


def of_worst(own: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks' values, by name. Collective."""
    every = EVERY.all_gather_object(own)
    return {name: max(each[name] for each in every) for name in own}


class CountedRun:
    """A strategy's run as it is; what its passes send adds up until it is taken.

    Attributes:
        run: it.
    """

    def __init__(self, run: RankRun) -> None:
        self.run = run
        self._sent = Sent(0, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)

    def take(self) -> Sent:
        """What was sent since this was last asked."""
        sent, self._sent = self._sent, Sent(0, 0)
        return sent

    def _counted(self, result: Any) -> Any:
        if counters := self.run.counters():
            self._sent = self._sent.plus(Sent(counters.bytes_sent, counters.bytes_between_nodes))
        return result

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        return self._counted(self.run.forward(q, k, v, sink))

    def resume(self, *args: Any) -> Any:
        return self._counted(self.run.resume(*args))

    def begin_backward(self, dout: torch.Tensor, saved: Any) -> None:
        self.run.begin_backward(dout, saved)
        self._counted(None)

    def backward(self, dout: torch.Tensor, saved: Any) -> Any:
        return self._counted(self.run.backward(dout, saved))
