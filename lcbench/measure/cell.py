"""Measure one cell on all ranks: build, check, time, measure memory, and check that what was timed is what was checked.

A number without a check is none. What a phase computes is known to the workload alone (``measure.session``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lcbench.measure import progress
from lcbench.measure.blocks import short_warmup
from lcbench.measure.bounds import Check
from lcbench.measure.derived import derived
from lcbench.measure.limits import cannot_be, peak_tflops
from lcbench.measure.measured import Measured, over_draws, rate_key
from lcbench.measure.memory import in_use, peak_bytes
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.session import Cost, Gang, Measurable, Phases, Say
from lcbench.measure.stopping import Stopping, summary
from lcbench.measure.timing import Samples, measure


def measure_cell(work: Measurable, gang: Gang, say: Say) -> Measured:
    """Run a cell, once per draw of its mask. Collective; every rank returns the same metrics. ``say`` gets a line per phase."""
    return _every_draw(work, gang, say, _measure_draw)


def measure_again(work: Measurable, gang: Gang, say: Say) -> Measured:
    """Another block of timings of a cell that has a good result, later in its pack: every draw once more, built anew, checked by a
    probe, timed, and its last pass checked. Collective; every rank returns the same.

    ``samples`` hold the block's iterations (``<phase>_s``) and its time (``block_<phase>_s``: the median, over several draws the
    mean of their medians), one value each; ``check`` has failures if the run is not right any more.
    """
    return _every_draw(work, gang, say, _measure_block)


def _every_draw(work: Measurable, gang: Gang, say: Say, one: Callable[[Measurable, int, Gang, Say], Measured]) -> Measured:
    gang = work.arranged(gang)
    unavailable = first_refusal(EVERY.all_gather_object(work.unavailable(gang)))
    if unavailable:
        return Measured(unavailable=unavailable)
    measured: list[Measured] = []

    def enter(phase: str) -> None:
        progress.own.enter(phase)
        say(phase)

    for number in range(work.draws):
        if work.draws > 1:
            enter(f"draw {number} of {work.draws}")
        measured.append(one(work, number, gang, enter))
        if not measured[-1].stands:
            measured[-1].notes["draw"] = number
            return measured[-1]
    return measured[0] if len(measured) == 1 else over_draws(measured)


def _measure_draw(work: Measurable, number: int, gang: Gang, say: Say) -> Measured:
    draw = _Draw(work, number, gang, say)
    if not draw.measured.stands:
        return draw.measured
    draw.first_pass()
    draw.check_first()
    if not draw.checked():
        return draw.measured  # a wrong result has no speed
    begun = time.perf_counter()
    timed = draw.time()
    draw.memory()
    draw.rates(timed)
    draw.shares()
    draw.overlap()
    draw.slowdown()
    draw.timeline()
    draw.measured.metrics["time/measure_s"] = time.perf_counter() - begun
    say("checking the last pass")
    draw.check_last()
    draw.checked()
    return draw.measured


def _measure_block(work: Measurable, number: int, gang: Gang, say: Say) -> Measured:
    draw = _Draw(work, number, gang, say)
    if not draw.measured.stands:
        return draw.measured
    draw.check_again()
    if not draw.checked():
        return draw.measured
    timed = draw.time()
    draw.check_last()
    draw.judge(timed)
    for phase, seconds in _with_total(timed.slowest).items():
        draw.add_times(phase, seconds, float(np.median(seconds)))
    draw.checked()
    return draw.measured


class _Draw:
    """One draw of a cell under way on this rank. All methods but ``add_times`` are collective.

    Attributes:
        measured: what is known so far.
    """

    def __init__(self, work: Measurable, number: int, gang: Gang, say: Say) -> None:
        self._work, self._gang, self._say = work, gang, say
        self._before = in_use(gang.device)
        self._check_s = 0.0
        self._sent: dict[str, float] = {}
        self._session = session = work.start(number, gang)
        failures = [] if session.refused or not session.wrong else [f"owners: {session.wrong}"]
        check = None if session.refused else Check({}, {}, 0, 0, False, failures=failures)
        self.measured = Measured(check=check, unavailable=session.refused)

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """What is done in here is a part of the check's time."""
        begun = time.perf_counter()
        yield
        self._check_s += time.perf_counter() - begun

    def first_pass(self) -> None:
        metrics, device = self.measured.metrics, self._gang.device
        metrics["time/prepare_s"] = max(EVERY.all_gather_object(self._session.prepare_s))
        self._say("the first pass")
        begun = time.perf_counter()
        self._session.first_pass()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # What a kernel compiles at first use is in here, and no cost of the check.
        metrics["time/first_pass_s"] = max(EVERY.all_gather_object(time.perf_counter() - begun))

    def check_first(self) -> None:
        with self._checking():
            self._session.check_first(self._say)
            counted = self._session.counted()
        self.measured.metrics.update(counted.metrics)
        self.measured.notes.update(counted.notes)
        self._sent = counted.bytes_sent

    def check_again(self) -> None:
        progress.own.enter("checking by a probe")
        with self._checking():
            self._session.check_again()

    def check_last(self) -> None:
        with self._checking():
            self._session.check_last()

    def checked(self) -> bool:
        """Take over what the check has found so far; whether all is well."""
        metrics = self.measured.metrics
        self.measured.check = check = self._session.check()
        for name, error in check.errors.items():
            metrics[f"check/{name}_error"] = error
            metrics[f"check/{name}_bound"] = check.bounds[name]
        metrics["check/of_bound"] = check.of_bound
        metrics["time/check_s"] = max(EVERY.all_gather_object(self._check_s))
        return not check.failures

    def time(self) -> Samples:
        """Time the phases, and check what the last iteration gave."""
        self._say("timing")
        settings, session = self._work.settings, self._session
        timed, passed = measure(
            session.phases(), Stopping.from_config(settings), settings["warmup"], self._gang.device, session.vary
        )
        with self._checking():
            session.check_timed(passed)
        self.measured.notes["stopped_by"] = timed.stopped_by
        return timed

    def memory(self) -> None:
        self._say("measuring memory")
        session, device = self._session, self._gang.device
        kept = in_use(device) - self._before - session.input_bytes - session.held_bytes
        peak = peak_bytes(lambda: _once(session.phases()), device)
        # What was made ready and is kept was there before the pass, and is needed all the same.
        peaks = EVERY.all_gather_object(-1 if peak is None else peak + max(kept, 0))
        if min(peaks) >= 0:
            self.measured.metrics["memory/peak_bytes"] = float(max(peaks))
            self.measured.samples["rank_peak_bytes"] = [float(p) for p in peaks]

    def judge(self, timed: Samples) -> dict[str, Cost]:
        """The cost of each phase, and whether the times can be true."""
        costs = self._session.costs()
        self.measured.implausible = cannot_be(self._work.problem, self._gang, timed.slowest, costs, self._sent)
        return costs

    def rates(self, timed: Samples) -> None:
        """Times, and what they are of the peak."""
        metrics, slowest = self.measured.metrics, _with_total(timed.slowest)
        metrics["time/iterations"], metrics["time/noise"] = float(len(slowest["total"])), timed.noise
        metrics["time/blocks"] = 1.0
        flops = {phase: cost.flops for phase, cost in self.judge(timed).items()}
        flops["total"] = sum(flops.values())
        peak, self.measured.notes["peak_source"] = peak_tflops(self._work.problem, self._gang)
        metrics["compute/peak_tflops"] = peak
        for phase, seconds in slowest.items():
            metrics.update((f"time/{phase}/{name}_s", value) for name, value in summary(seconds).items())
            median = metrics[f"time/{phase}/median_s"]
            if flops[phase]:
                rate = flops[phase] / median / self._gang.world_size / 1e12
                metrics[rate_key(phase, "tflops_per_gpu")], metrics[rate_key(phase, "mfu")] = rate, rate / peak
            self.add_times(phase, seconds, median)
        metrics.update(derived(metrics))
        every = EVERY.all_gather_object({phase: float(np.median(own)) for phase, own in timed.own.items()})
        for phase in timed.own:
            self.measured.samples[f"rank_{phase}_median_s"] = [medians[phase] for medians in every]

    def add_times(self, phase: str, seconds: list[float], median: float) -> None:
        """The samples of a phase in this block."""
        self.measured.samples[f"{phase}_s"] = seconds
        self.measured.samples[f"block_{phase}_s"] = [median]

    def shares(self) -> None:
        """What the whole is made of."""
        self.measured.metrics.update(self._session.shares())
        self.measured.metrics.update(derived(self.measured.metrics))
        self.measured.samples.update(self._session.series())
        self.measured.notes.update(self._session.remarks())

    def overlap(self) -> None:
        """The same phases without messages, and without kernels: what of the communication is hidden."""
        variants = self._session.variants()
        if not variants:
            return
        self._say("timing computing and communicating apart")
        settings = self._work.settings
        stopping = Stopping.from_config(settings | {"budget_s": settings["budget_s"] / 4})
        alone: dict[str, dict[str, float]] = {}
        for name, phases in variants.items():
            timed, _ = measure(phases, stopping, short_warmup(settings), self._gang.device)
            alone[name] = {phase: float(np.median(seconds)) for phase, seconds in timed.slowest.items()}
        for phase, communication in alone["communication"].items():
            whole = self.measured.metrics[f"time/{phase}/median_s"]
            found = _overlap(whole, alone["compute"][phase], communication)
            self.measured.metrics.update((f"overlap/{phase}/{name}", value) for name, value in found.items())

    def slowdown(self) -> None:
        """The slowest context-parallel group alone, the others idle: what it loses to them."""
        gang = self._gang
        if gang.mesh.count == 1 or not (phases := self._session.alone()):
            return
        self._say("timing the slowest group alone")
        medians = [self.measured.samples[f"rank_{phase}_median_s"] for phase in phases]
        of_group = np.sum(medians, axis=0)[gang.grid].max(-1)
        if gang.dp_index * gang.mesh.tp + gang.tp_index != int(of_group.argmax()):
            phases = {phase: lambda _: None for phase in phases}
        settings = self._work.settings
        stopping = Stopping.from_config(settings | {"budget_s": settings["budget_s"] / 4})
        timed, _ = measure(phases, stopping, short_warmup(settings), gang.device)
        metrics = self.measured.metrics
        for phase, seconds in _with_total(timed.slowest).items():
            metrics[f"mesh/{phase}/alone_s"] = alone = float(np.median(seconds))
            metrics["mesh/slowdown" if phase == "total" else f"mesh/{phase}/slowdown"] = metrics[f"time/{phase}/median_s"] / alone

    def timeline(self) -> None:
        """When each step of one iteration began and ended, by rank."""
        if not self._work.settings["timeline"]:
            return
        EVERY.all_gather_object(None)  # ranks begin together
        own = self._session.timeline()
        if own is not None:
            self.measured.notes["timeline"] = EVERY.all_gather_object(own)


def _overlap(whole: float, compute: float, communication: float) -> dict[str, float]:
    """What of a phase's communication is hidden, from seconds of the whole and of each part alone."""
    hideable = min(compute, communication)
    hidden = (compute + communication - whole) / hideable if hideable else 0.0
    return {
        "compute_s": compute,
        "communication_s": communication,
        "exposed_s": max(0.0, whole - compute),
        "efficiency": min(1.0, max(0.0, hidden)),
    }


def _with_total(slowest: dict[str, list[float]]) -> dict[str, list[float]]:
    return {**slowest, "total": np.sum(list(slowest.values()), axis=0).tolist()}


def _once(phases: Phases) -> None:
    passed: Any = None
    for phase in phases.values():
        passed = phase(passed)
