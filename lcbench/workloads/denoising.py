"""A cell of denoising on one rank: its steps, and their check against float64 by what the strategy says that each row sees.

    who owns what      results of all ranks together are of tokens 0 ... S-1, each once
    reference          rows of every layer of every step against float64, with the keys of the steps that the strategy says
    between layers     what a layer begins with is what the one before it, or the step before it, gave
    level              of runs whose ranks share each attention: a probe of one synchronous layer, every row in closed form
    last passes        the last timed one, and one after all else: inputs negated in place must negate the latent after every step

A row's reference begins with the query that the run itself came to, so that roundings of earlier layers are no error of it, and the
second part shows where such a query comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lcbench.cp.steps import InSteps, Kept, Layer, OverSteps, StepRun, View
from lcbench.inputs.drawing import draw_rows
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import BlockMap
from lcbench.measure.bounds import Check, Judge, of_groups, verdict
from lcbench.measure.digests import SENT, digest, told
from lcbench.measure.flops import forward_flops
from lcbench.measure.least import least_traffic
from lcbench.measure.numerics import REFERENCE
from lcbench.measure.ranks import ALONE, EVERY, Ranks
from lcbench.measure.reference import Shard, owned, rows, sample
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.problem import Scale
from lcbench.schedule.held import Held, Part
from lcbench.workloads.base import Work
from lcbench.workloads.started import Sent, started

BETWEEN = "between layers"


NOT_BY_TOKENS = "its ranks do not give the results of the tokens that they are given, which the next layer begins with"


class DenoisingSession(Session):
    """One draw of a denoising cell on this rank.

    Args:
        steps, layers, drift: as of ``workload=denoise``.

    Attributes:
        run: the strategy at work.
        inputs: of each step and of each of the rank's layers.
        judge: what its check has found so far.
    """

    run: StepRun
    wrong: str | None = None

    def __init__(self, work: Work, number: int, gang: Gang, *, steps: int, layers: int, drift: float) -> None:
        self._work, self._gang, self.judge = work, gang, Judge()
        self._steps, self._layers, self._drift = steps, layers, drift
        self._kept: list[Kept] = []
        self._first: list[torch.Tensor] = []
        self._digest: list[torch.Tensor] = []
        self._sent: dict[str, Sent] = {}
        # Squares, of what stale keys change and of all, and how many views had some.
        self._apart = torch.zeros(3, dtype=torch.float64, device=gang.device)
        in_steps = replace(work, strategy=InSteps(work.strategy, steps, layers))
        begun = started(in_steps, number, gang)
        self.refused = begun if isinstance(begun, str) else None
        if isinstance(begun, str):
            return
        assert isinstance(begun.run, StepRun)
        self._started, self.run, self.wrong, self.prepare_s = begun, begun.run, begun.owners.wrong, begun.prepare_s
        if self.run.together and self.wrong is None and not begun.owners.by_tokens:
            self.refused = NOT_BY_TOKENS
            return
        assert isinstance(begun.mask, BandMask | BlockMap)  # no pass chooses another
        self._mask = begun.mask
        self._probes = begun.examination() if self.run.together else None
        heads = work.problem.heads.q
        self._rows = sample(self._mask, "q", begun.seed, heads)
        drawn = [list(self._drawn(layer)) for layer in self.run.layers]
        self.inputs = [[layer[step] for layer in drawn] for step in range(steps)]
        self.negated = False

    def _drawn(self, layer: int) -> Iterator[Layer]:
        """The inputs of a layer, step by step."""
        problem = self._work.problem
        dtype = torch.float64 if problem.dtype == "float64" else torch.float32
        shapes = [(heads, problem.heads.dim) for heads in (problem.heads.q, problem.heads.kv, problem.heads.kv)]
        series: list[torch.Tensor] = []
        for step in range(self._steps):
            new = [self._noise(f"{name}/{layer}/{step}", shape, dtype) for name, shape in zip("qkv", shapes, strict=True)]
            share = self._drift
            series = [math.sqrt(1 - share) * x + math.sqrt(share) * n for x, n in zip(series, new, strict=True)] if series else new
            yield Layer(*(x.to(getattr(torch, problem.dtype)) for x in series))

    def _noise(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        gang = self._gang
        return draw_rows(name, self.run.given, shape, dtype, self._work.seed, gang.device, (gang.dp_index, gang.tp_index))

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (x for layers in self.inputs for layer in layers for x in layer)

    def draw(self) -> None:
        """Draw the inputs anew, into the memory that they are in."""
        for place, layer in enumerate(self.run.layers):
            for step, drawn in enumerate(self._drawn(layer)):
                for into, x in zip(self.inputs[step][place], drawn, strict=True):
                    into.copy_(x)
        self.negated = False

    def vary(self) -> None:
        """Negate all inputs in place: the next pass gives the negative latents."""
        for x in self._tensors():
            x.neg_()
        self.negated = not self.negated

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._tensors())

    @property
    def held_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._digest)

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        """Each gives the latents after all steps so far."""
        return self._phases_of(self.run)

    def _phases_of(self, run: StepRun, keep: Callable[[Kept], None] | None = None) -> Phases:
        def phase(steps: range, passed: Any) -> list[torch.Tensor]:
            before = passed or []
            return [*before, *run.advance(steps, self.inputs, before, keep)]

        return {name: partial(phase, steps) for name, steps in run.phases().items()}

    def _pass(self, keep: Callable[[Kept], None] | None = None) -> list[torch.Tensor]:
        """All phases once; the bytes of each are counted."""
        passed: Any = None
        for name, phase in self._phases_of(self.run, keep).items():
            passed = phase(passed)
            if counters := self.run.counters():
                self._sent[name] = Sent(counters.bytes_sent, counters.bytes_between_nodes)
        found: list[torch.Tensor] = passed
        return found

    def first_pass(self) -> None:
        self._first = self._pass(self._kept.append)

    def variants(self) -> dict[str, Phases]:
        alone = {
            "compute": self.run.bare(compute=True, communicate=False),
            "communication": self.run.bare(compute=False, communicate=True),
        }
        return {name: self._phases_of(run) for name, run in alone.items() if run is not None}

    def alone(self) -> Phases:
        return self.phases()

    def timeline(self) -> None:
        return None

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        say("checking every layer of the first pass against the float64 reference")
        self._check_pass(range(self._steps))
        if self._probes is not None:
            say("checking every row of a layer by a probe")
            layer = self.inputs[0][0]
            self._probes.probe("level", Shard(self.run.held, *layer))
            self.draw()

    def check_again(self) -> None:
        self.first_pass()
        self._check_pass(range(self._steps - 1, self._steps))

    def _check_pass(self, steps: range) -> None:
        """Check the first pass, which is forgotten then but for a digest; ``steps``: those that are compared with the reference."""
        for kept in self._kept:
            latent = kept.before
            for place, out in enumerate(kept.outs):
                q = self._of_rows(kept, self.inputs[kept.step][place].q)
                if kept.step in steps:
                    self._compare(kept, place, q if latent is None else q + latent, out)
                latent = out if latent is None else latent + out
            assert latent is not None
            self._same(kept, "what it passes on", kept.after, latent[len(latent) - len(kept.after) :])
        self._chain()
        self._digest = [digest(x) for x in self._first]
        self._first, self._kept = [], []

    def _of_rows(self, kept: Kept, x: torch.Tensor) -> torch.Tensor:
        """The rows of an input that a rank has computed a part of a step on."""
        return x[_places(self.run.given, kept.rows).to(x.device)]

    def _compare(self, kept: Kept, place: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """Compare rows of a layer with the reference. Collective where ranks are together."""
        for view in self.run.views(kept.step, kept.part):
            exact, wanted = self._exact(kept, place, q, view)
            mine, at = owned(kept.rows, wanted)
            own = [x[at.to(x.device)] for x in (exact.value, exact.spread, exact.common, exact.floor)]
            got, bound = out[mine.to(out.device)].double(), self._started.bounds.element(*own[1:])
            self.judge.elements(REFERENCE, "out", got, own[0], bound, wanted[at.numpy()])
        if isinstance(self._work.strategy, OverSteps) and kept.step in list(self.run.phases().values())[-1]:
            keys = self.run.given
            stale = sum(view.ages.any() or len(view.keys) < len(keys) for view in self.run.views(kept.step, kept.part))
            exact, wanted = self._exact(kept, place, q, View(None if self.run.together else kept.rows, keys, np.zeros_like(keys)))
            mine, at = owned(kept.rows, wanted)
            whole = exact.value[at.to(out.device)]
            error = out[mine.to(out.device)].double() - whole
            self._apart += torch.stack([error.square().sum(), whole.square().sum(), error.new_tensor(float(stale))])

    def _exact(self, kept: Kept, place: int, q: torch.Tensor, view: View) -> tuple[Any, Ints]:
        """(the exact ``out`` of the sample's rows of a view, these rows)."""
        ranks, problem = self._ranks, self._work.problem
        if not self.run.together:
            problem = replace(problem, scale=Scale(1, 1))
        wanted = self._rows
        if view.rows is not None:
            wanted = np.union1d(np.intersect1d(wanted, view.rows), view.rows[[0, -1]])
        at = _places(self.run.given, view.keys).to(q.device)
        k, v = (self._aged(kept.step, place, which, at, view) for which in (1, 2))
        held = Part(kept.rows)
        shard = Shard(Held(held, Part(view.keys), held), q, k, v)
        return rows(self._mask, problem, shard, wanted, ranks, scores=self._started.bounds.rounding.scores)["out"], wanted

    def _aged(self, step: int, place: int, which: int, at: torch.Tensor, view: View) -> torch.Tensor:
        """Keys, or values, of a view, each of the step that it says."""
        found = self.inputs[step][place][which][at]
        for age in np.unique(view.ages[view.ages > 0]).tolist():
            old = torch.from_numpy(view.ages == age).to(found.device)
            found[old] = self.inputs[step - age][place][which][at[old]]
        return found

    @property
    def _ranks(self) -> Ranks:
        return self._gang.ranks if self.run.together else ALONE

    def _same(self, kept: Kept, what: str, got: torch.Tensor, want: torch.Tensor, bound: float = 0.0) -> None:
        error = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
        self.judge.number(BETWEEN, "latent", error, bound, f"{what}, step {kept.step}, part {kept.part}")

    def _as_sent(self, kept: Kept, what: str, got: torch.Tensor, sent: list[float]) -> None:
        """The same of what another rank has, which told a number of it per head."""
        want = torch.tensor(sent, dtype=torch.float64)
        self._same(kept, what, torch.tensor(told(got), dtype=torch.float64), want, SENT * float(got.double().abs().sum()))

    def _chain(self) -> None:
        """What every rank begins with, against what the rank or the step before it gave."""
        run, results = self.run, self._first
        own = {(kept.step, kept.part): told(kept.after) for kept in self._kept}
        ends = {run.layers.stop: own}
        if not run.together:
            ends = dict(self._gang.ranks.all_gather_object((run.layers.stop, own)))
        for kept in self._kept:
            key = kept.step, kept.part
            begun = kept.outs[0].new_zeros(kept.outs[0].shape) if kept.before is None else kept.before
            if run.layers.start == 0:
                wanted = run.begins(results, *key)
                self._same(kept, "what it begins with", begun, torch.zeros_like(begun) if wanted is None else wanted)
            else:
                self._as_sent(kept, "what it begins with", begun, ends[run.layers.start][key])
            if len(run.tokens):
                self._as_sent(kept, "what a step gives", run.gave(results, *key), ends[self._layers][key])

    def check_timed(self, passed: Any) -> None:
        self._compare_last("last timed pass", passed)

    def check_last(self) -> None:
        self.vary()
        self._compare_last("last pass", self._pass())

    def _compare_last(self, part: str, results: Sequence[torch.Tensor]) -> None:
        """A later pass on the inputs of the first, or on the negative of all of them."""
        half, sign = self._started.bounds.half, -1.0 if self.negated else 1.0
        for step, (x, first) in enumerate(zip(results, self._digest, strict=True)):
            norm = x.double().square().sum(-1).sqrt()
            square, count = self._gang.ranks.reduce(torch.stack([norm.square().sum(), norm.new_tensor(float(norm.numel()))]))
            # Sums in another order end up elsewhere, and every layer's queries come from those of the layers before.
            unit = (16 if half else 4) * self._started.bounds.unit * (step + 1) * self._layers
            bound = unit * (norm + 16 * (square / count).sqrt() * (2.0**-10 if half else 1.0))
            self.judge.elements(part, "latent", digest(x), sign * first, bound, self.run.tokens)

    def check(self) -> Check:
        whole = len(self._rows) == self._mask.num_q
        found: list[Any] = self._gang.ranks.all_gather_object(self.judge.found)
        own = verdict(found, REFERENCE, len(self._rows), 0, whole, {})
        if self._probes is not None:
            probed = self._probes.check()
            own = replace(own, ratios=own.ratios | probed.ratios, failures=[*own.failures, *probed.failures])
        checks: dict[str, Check] = dict(EVERY.all_gather_object((self._gang.ranks.name, own)))
        return of_groups(checks) if len(checks) > 1 else own

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """FLOPs of the pairs that the strategy's layers have. What it must send and read is known where every step is one of its
        own: keys of an earlier step were sent before."""
        problem, run, mask = self._work.problem, self.run, self._mask
        layers, heads = self._layers, problem.heads
        sent = memory = 0.0
        if run.together:
            least = least_traffic(mask, problem, self._started.owners, self._gang.device, self._gang.ranks)
            sent, memory = least.sent, least.memory["forward"]
        costs = {}
        for name, steps in run.phases().items():
            pairs = sum(sum(self._gang.of_groups(run.pairs(mask, heads.q, step))) for step in steps)
            # By what the strategy says: its own keys alone are of this step.
            own = sum(layers for step in steps if all(not view.ages.any() for view in run.views(step, 0)))
            costs[name] = Cost(layers * forward_flops(pairs, heads), own * sent, len(steps) * layers * memory)
        return costs

    def counted(self) -> Counted:
        """Metrics of bytes, and how far rows are from those of a synchronous step."""
        run = self.run
        times = 1 if run.together else self._steps * self._layers
        whole = self._started
        if not run.together:
            heads = self._work.problem.heads.q
            pairs = sum(run.pairs(self._mask, heads, step) for step in range(self._steps))
            whole = replace(whole, pairs=pairs * self._layers)
        counted = whole.counted(self._sent, tuple(run.phases()))
        counted.metrics["mask/area"] /= times
        counted.metrics.update({f"denoise/{name}/steps": float(len(steps)) for name, steps in run.phases().items()})
        if isinstance(self._work.strategy, OverSteps):
            error, size, stale = EVERY.reduce(self._apart.clone()).tolist()
            # Where no key was stale, what is between the two is rounding.
            counted.metrics["check/distance"] = math.sqrt(error / size) if stale and size else 0.0
        return counted


def _places(order: Ints, tokens: Ints) -> torch.Tensor:
    """Where tokens are among others that hold them, in any order."""
    sorting = np.argsort(order, kind="stable")
    return torch.from_numpy(sorting[np.searchsorted(order[sorting], tokens)])
