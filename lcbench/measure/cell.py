"""Measure one cell on all ranks: build, check, time, measure memory, and check that what was timed is what was checked.

A number without a check is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lcbench.cp.base import Peer, RankRun, Strategy
from lcbench.kernels.base import Kernel, Platform, Unsupported, refusal
from lcbench.masks.mask import Mask
from lcbench.measure import progress
from lcbench.measure.bounds import Bounds, Check
from lcbench.measure.environment import device_name
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.inputs import draw
from lcbench.measure.least import least_traffic
from lcbench.measure.memory import in_use, peak_bytes
from lcbench.measure.numerics import Examination, Result, misowned, one_pass
from lcbench.measure.peak import configured_limit, configured_peak, entry_of, measured_limit
from lcbench.measure.plausible import implausible
from lcbench.measure.ranks import all_gather_object, first_refusal
from lcbench.measure.reference import Shard
from lcbench.measure.stopping import Stopping, summary
from lcbench.measure.timing import measure
from lcbench.problem import Problem
from lcbench.schedule.execute import Executor, Groups

# A peak that was measured is measured again so often before a rate above it is refused.
PEAK_TRIES = 3
INPUTS = ("q", "k", "v", "dout")


@dataclass
class Measured:
    """What a cell gave; ``unavailable`` says why it could not run on this machine, ``check`` is None then; ``implausible`` why its
    numbers cannot be true."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    check: Check | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    implausible: str | None = None

    @property
    def stands(self) -> bool:
        """Whether nothing speaks against its numbers."""
        return self.check is not None and not self.check.failures and self.implausible is None


@dataclass(frozen=True)
class Gang:
    """The ranks that measure together, as one of them sees it."""

    rank: int
    world_size: int
    device: torch.device
    groups: Groups
    devices: list[dict[str, Any]]  # conf/device entries


@dataclass(frozen=True)
class Work:
    """A cell as objects: what to run, how long to measure it (``measure`` of one block), and the seed of its inputs.

    ``make_mask`` gives draw 0, 1, ... ``draws - 1`` of the mask. ``attempt`` chooses where the check looks.
    """

    problem: Problem
    make_mask: Callable[[int], Mask]
    kernel: Kernel
    strategy: Strategy | Peer
    settings: dict[str, Any]
    seed: int
    draws: int = 1
    attempt: int = 1


def measure_cell(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
    """Run a cell, once per draw of its mask. Collective; every rank returns the same metrics. ``say`` gets a line per phase."""
    return _every_draw(work, gang, say, _measure_draw)


def measure_again(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
    """Another block of timings of a cell that has a good result, later in its pack: every draw once more, built anew, checked by a
    probe, timed, and its last pass checked. Collective; every rank returns the same.

    ``samples`` hold the block's iterations (``<phase>_s``) and its time (``block_<phase>_s``: the median, over several draws the
    mean of their medians), one value each; ``check`` has failures if the run is not right any more.
    """
    return _every_draw(work, gang, say, _measure_block)


def _every_draw(
    work: Work, gang: Gang, say: Callable[[str], None], one: Callable[[Work, int, Gang, Callable[[str], None]], Measured]
) -> Measured:
    peer = work.strategy if isinstance(work.strategy, Peer) else None
    reason = refusal(work.kernel, work.problem, gang.device) or (peer.unavailable(work.problem, gang.device) if peer else None)
    unavailable = first_refusal(all_gather_object(reason))
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


class Started:
    """One draw of a cell, built on this rank. Collective.

    Attributes:
        reason: why the ranks cannot run it; nothing else is there then.
        wrong: what is wrong with who owns which token.
    """

    def __init__(self, work: Work, number: int, gang: Gang) -> None:
        problem, self.device = work.problem, gang.device
        begun = time.perf_counter()
        self.mask = work.make_mask(number)
        self.executor: Executor | None = None
        self.run: RankRun
        reason = None
        try:
            if isinstance(work.strategy, Peer):
                self.tokens = work.strategy.tokens(problem, gang.rank)
                self.run = work.strategy.start(problem, self.mask, work.kernel, gang.rank, gang.device, gang.groups)
            else:
                schedule = work.strategy.schedule(problem, self.mask)
                self.tokens = schedule.layout.tokens(gang.rank)
                self.run = self.executor = Executor(
                    schedule, self.mask, work.kernel, problem, rank=gang.rank, device=gang.device, groups=gang.groups,
                    lowering=getattr(work.strategy, "lowering", "auto"),
                )  # fmt: skip
        except Unsupported as refused:
            reason = str(refused)
        # One rank's tile may be what its kernel cannot run while the others' are well.
        reasons, calls = zip(*all_gather_object((reason, self.executor.calls if self.executor else 1)), strict=True)
        self.reason = first_refusal(reasons)
        if self.reason:
            return
        self.prepare_s = time.perf_counter() - begun
        self.wrong = misowned(self.tokens, problem.seqlen, gang.device)
        self._problem, self._seed = problem, work.seed
        self.shard = Shard(self.tokens, *(self._drawn(name) for name in INPUTS[: 4 if problem.backward else 3]))
        self.negated = False
        # A library adds up gradients on their way between ranks in whatever type it likes.
        hops = gang.world_size if problem.reduce_dtype == "input" or self.executor is None else 0
        bounds = Bounds(problem, work.kernel.rounding(Platform.of(gang.device)), max(calls) * gang.world_size, hops)
        seed = [work.seed, work.attempt, number]
        own_lse = getattr(self.run, "own_lse", True)
        self.examination = Examination(self.run, self.mask, problem, self.tokens, bounds, seed, own_lse=own_lse)

    def _drawn(self, name: str) -> torch.Tensor:
        return draw(name, self.tokens, self._problem, self._seed, self.device)

    def draw(self) -> None:
        """Draw the inputs anew, into the memory that they are in."""
        for name in INPUTS:
            x = getattr(self.shard, name)
            if x is not None:
                x.copy_(self._drawn(name))
        self.negated = False

    def negate(self) -> None:
        """Change all inputs in place, so that the next pass gives the negative out, dq, dk and dv, and the same LSE."""
        for name in INPUTS:
            x = getattr(self.shard, name)
            if x is not None:
                x.neg_()
        self.negated = not self.negated

    @property
    def input_bytes(self) -> int:
        shard = self.shard
        return sum(x.numel() * x.element_size() for x in (shard.q, shard.k, shard.v, shard.dout) if x is not None)

    def phases(self) -> dict[str, Callable[[Any], Any]]:
        """What is timed: forward, then backward on what it gives; the last phase's result is that of the pass."""
        run, shard = self.run, self.shard
        phases: dict[str, Callable[[Any], Any]] = {"forward": lambda _: run.forward(shard.q, shard.k, shard.v)}
        if shard.dout is not None:
            dout = shard.dout
            phases["backward"] = lambda passed: (*passed, run.backward(dout, passed[1]))
        return phases

    def check_timed(self, passed: Any) -> None:
        """Check what the last timed iteration gave."""
        out, saved, *grads = passed
        self.examination.last("last timed pass", Result(out, self.run.lse(saved), *(grads[0] if grads else ())), self.negated)

    def check_last(self) -> None:
        """Check one more pass, on inputs that no pass before had in this order."""
        self.negate()
        self.examination.last("last pass", one_pass(self.run, self.shard), self.negated)


def _measure_draw(work: Work, number: int, gang: Gang, say: Callable[[str], None]) -> Measured:
    problem, device = work.problem, gang.device
    before = in_use(device)
    started = Started(work, number, gang)
    measured = _begun(started)
    if not measured.stands:
        return measured
    executor, examination, metrics = started.executor, started.examination, measured.metrics
    pairs = started.mask.pairs(problem.heads.q)
    metrics["time/prepare_s"] = max(all_gather_object(started.prepare_s))
    metrics["mask/area"], metrics["mask/density"] = pairs / problem.heads.q, started.mask.density

    say("the first pass")
    begun = time.perf_counter()
    out, saved = started.run.forward(started.shard.q, started.shard.k, started.shard.v)
    sent = {"forward": executor.bytes_sent if executor else None}
    lse, grads = started.run.lse(saved), ()
    if started.shard.dout is not None:
        grads = started.run.backward(started.shard.dout, saved)  # type: ignore[assignment]
        sent["backward"] = executor.bytes_sent if executor else None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # What a kernel compiles at first use is in here, and no cost of the check.
    metrics["time/first_pass_s"] = max(all_gather_object(time.perf_counter() - begun))
    say("checking the first pass against the float64 reference")
    begun = time.perf_counter()
    examination.first(started.shard, Result(out, lse, *grads))
    del out, saved, lse, grads
    say("checking every row and column by probes")
    for probe in examination.probes:
        examination.probe(probe, started.shard)
    started.draw()
    if executor is not None:
        _count(measured, executor, pairs, sent)
        if launch := work.kernel.launch(problem.heads, problem.dtype, Platform.of(device)):
            measured.notes["kernel_launch"] = launch
    check_s = time.perf_counter() - begun
    if not _checked(measured, examination, check_s):
        return measured  # a wrong result has no speed

    say("timing")
    begun = time.perf_counter()
    timed, passed = measure(started.phases(), Stopping.from_config(work.settings), work.settings["warmup"], device, started.negate)
    ended = time.perf_counter()
    started.check_timed(passed)
    del passed
    check_s += time.perf_counter() - ended

    say("measuring memory")
    kept = in_use(device) - before - started.input_bytes - examination.held_bytes
    peak = peak_bytes(lambda: _once(started.run, started.shard), device)
    # What was made ready and is kept was there before the pass, and is needed all the same.
    peaks = all_gather_object(-1 if peak is None else peak + max(kept, 0))
    if min(peaks) >= 0:
        metrics["memory/peak_bytes"] = float(max(peaks))
        measured.samples["rank_peak_bytes"] = [float(p) for p in peaks]

    metrics["time/iterations"], metrics["time/noise"] = float(len(timed.slowest["forward"])), timed.noise
    metrics["time/blocks"] = 1.0
    measured.notes["stopped_by"] = timed.stopped_by
    flops = _flops(problem, pairs)
    measured.implausible = _implausible(started, problem, gang, timed.slowest, flops, sent)
    peak_tflops, source = _peak(problem, gang)
    metrics["compute/peak_tflops"], measured.notes["peak_source"] = peak_tflops, source
    slowest = _with_total(timed.slowest)
    flops["total"] = sum(flops.values())
    for phase, seconds in slowest.items():
        for name, value in summary(seconds).items():
            metrics[f"time/{phase}/{name}_s"] = value
        rate = flops[phase] / metrics[f"time/{phase}/median_s"] / gang.world_size / 1e12
        metrics[_compute(phase, "tflops_per_gpu")] = rate
        metrics[_compute(phase, "mfu")] = rate / peak_tflops
        measured.samples[f"{phase}_s"] = seconds
        measured.samples[f"block_{phase}_s"] = [metrics[f"time/{phase}/median_s"]]
    for phase, medians in _by_phase({phase: float(np.median(own)) for phase, own in timed.own.items()}).items():
        measured.samples[f"rank_{phase}_median_s"] = medians
    if executor is not None and gang.world_size > 1:
        say("timing computing and communicating apart")
        _measure_overlap(measured, executor, started.shard, work.settings, device)
    if executor is not None and work.settings["timeline"]:
        all_gather_object(None)  # ranks begin together
        shard = started.shard
        measured.notes["timeline"] = all_gather_object(executor.timeline(shard.q, shard.k, shard.v, shard.dout))
    say("checking the last pass")
    ended = time.perf_counter()
    started.check_last()
    metrics["time/measure_s"] = ended - begun
    _checked(measured, examination, check_s + time.perf_counter() - ended)
    return measured


def _measure_block(work: Work, number: int, gang: Gang, say: Callable[[str], None]) -> Measured:
    started = Started(work, number, gang)
    measured = _begun(started)
    if not measured.stands:
        return measured
    progress.own.enter("checking by a probe")
    begun = time.perf_counter()
    started.examination.begin(one_pass(started.run, started.shard))
    started.examination.probe("level", started.shard)
    started.draw()
    check_s = time.perf_counter() - begun
    if not _checked(measured, started.examination, check_s):
        return measured
    say("timing")
    timed, passed = measure(
        started.phases(), Stopping.from_config(work.settings), work.settings["warmup"], gang.device, started.negate
    )
    started.check_timed(passed)
    del passed
    started.check_last()
    for phase, seconds in _with_total(timed.slowest).items():
        measured.samples[f"{phase}_s"] = seconds
        measured.samples[f"block_{phase}_s"] = [float(np.median(seconds))]
    measured.notes["stopped_by"] = timed.stopped_by
    flops = _flops(work.problem, started.mask.pairs(work.problem.heads.q))
    measured.implausible = _implausible(started, work.problem, gang, timed.slowest, flops, dict.fromkeys(flops))
    _checked(measured, started.examination, check_s)
    return measured


def _begun(started: Started) -> Measured:
    """An empty record, or why nothing can be measured."""
    failures = [f"owners: {started.wrong}"] if started.wrong and not started.reason else []
    check = None if started.reason else Check({}, {}, 0, 0, False, failures=failures)
    return Measured(check=check, unavailable=started.reason)


def _flops(problem: Problem, pairs: int) -> dict[str, float]:
    """FLOPs of a phase over all ranks."""
    flops = {"forward": forward_flops(pairs, problem.heads)}
    return flops | {"backward": backward_flops(pairs, problem.heads)} if problem.backward else flops


def _with_total(slowest: dict[str, list[float]]) -> dict[str, list[float]]:
    return {**slowest, "total": np.sum(list(slowest.values()), axis=0).tolist()}


def _checked(measured: Measured, examination: Examination, check_s: float) -> bool:
    """Take over what the check has found so far; whether all is well. Collective."""
    measured.check = check = examination.check()
    for name, error in check.errors.items():
        measured.metrics[f"check/{name}_error"] = error
        measured.metrics[f"check/{name}_bound"] = check.bounds[name]
    measured.metrics["check/of_bound"] = check.of_bound
    measured.metrics["time/check_s"] = max(all_gather_object(check_s))
    return not check.failures


def _count(measured: Measured, executor: Executor, pairs: int, sent: dict[str, int | None]) -> None:
    """What a schedule's run is made of. Collective."""
    metrics, own_sent = measured.metrics, {phase: n or 0 for phase, n in sent.items()}
    ranks = all_gather_object((executor.pairs, own_sent, executor.buffer_bytes, executor.calls))
    rank_pairs, rank_sent, rank_buffers, rank_calls = (list(x) for x in zip(*ranks, strict=True))
    if sum(rank_pairs) != pairs:
        raise AssertionError(f"the ranks compute {sum(rank_pairs)} pairs over all query heads, the mask has {pairs}")
    metrics["balance/area_max_over_mean"] = max(rank_pairs) * len(rank_pairs) / pairs if pairs else 1.0
    for phase in ("forward", "backward"):
        metrics[f"comm/{phase}/bytes"] = float(max(n.get(phase, 0) for n in rank_sent))
    metrics["comm/bytes"] = float(max(sum(n.values()) for n in rank_sent))
    metrics["memory/buffer_bytes"] = float(max(rank_buffers))
    measured.notes["kernel_calls"] = rank_calls
    measured.notes["collectives"] = executor.collectives
    metrics["kernel/calls"] = float(max(measured.notes["kernel_calls"]))


def _implausible(
    started: Started,
    problem: Problem,
    gang: Gang,
    slowest: dict[str, list[float]],
    flops: dict[str, float],
    sent: dict[str, int | None],
) -> str | None:
    """Why the numbers cannot be true. Collective.

    Args:
        slowest: seconds of every iteration by phase, of its slowest rank.
        sent: bytes that this rank sent; None where nobody counted.
    """
    name = device_name(gang.device)
    entry = entry_of(gang.devices, name) or {}
    least, moved = least_traffic(started.mask, problem, started.tokens, gang.device), _by_phase(sent)
    configured = configured_limit(gang.devices, name, problem.dtype)
    for attempt in range(PEAK_TRIES if configured is None else 1):
        limit, source = configured, f"conf/device entry for {name}"
        if limit is None:
            limit = _measured_limit(problem, gang, again=attempt > 0)
            source = f"matrix product measured on {name}"
        reasons = []
        for phase, seconds in slowest.items():
            reasons.append(
                implausible(
                    phase,
                    seconds=min(seconds),
                    flops=flops[phase] / gang.world_size,
                    peak_tflops=limit,
                    peak_source=source,
                    bytes_sent=None if sent[phase] is None else float(max(moved[phase])),
                    least_bytes_sent=least.sent,
                    link_gbytes_per_s=entry.get("link_gbytes_per_s"),
                    memory_bytes=least.memory[phase],
                    memory_gbytes_per_s=entry.get("memory_gbytes_per_s"),
                    cache_bytes=entry.get("cache_bytes"),
                )
            )
        reason = next((r for r in reasons if r), None)
        if reason is None:
            return None
    return reason


def _measure_overlap(measured: Measured, executor: Executor, shard: Shard, settings: dict[str, Any], device: torch.device) -> None:
    """The same schedule without its messages, and without its kernels: what of the communication is hidden."""
    stopping = Stopping.from_config(settings | {"budget_s": settings["budget_s"] / 4})
    _, saved = executor.forward(shard.q, shard.k, shard.v)
    dout = shard.dout
    alone: dict[str, dict[str, float]] = {}
    for name, switch in (("compute", {"communicate": False}), ("communication", {"compute": False})):
        # A bare pass has no result to go on with, so backward takes what the whole one saved.
        phases: dict[str, Callable[[Any], Any]] = {
            "forward": lambda _, switch=switch: executor.forward(shard.q, shard.k, shard.v, **switch)  # type: ignore[misc]
        }
        if dout is not None:
            phases["backward"] = lambda _, switch=switch: executor.backward(dout, saved, **switch)  # type: ignore[misc]
        timed, _ = measure(phases, stopping, 1, device)
        alone[name] = {phase: float(np.median(seconds)) for phase, seconds in timed.slowest.items()}
    for phase in alone["compute"]:
        whole = measured.metrics[f"time/{phase}/median_s"]
        compute, communication = alone["compute"][phase], alone["communication"][phase]
        measured.metrics[f"overlap/{phase}/compute_s"] = compute
        measured.metrics[f"overlap/{phase}/communication_s"] = communication
        measured.metrics[f"overlap/{phase}/exposed_s"] = max(0.0, whole - compute)
        hideable = min(compute, communication)
        hidden = (compute + communication - whole) / hideable if hideable else 0.0
        measured.metrics[f"overlap/{phase}/efficiency"] = min(1.0, max(0.0, hidden))


def over_draws(draws: list[Measured]) -> Measured:
    """One record of several draws of a mask, the spread over draws apart from the spread over iterations.

    Times, areas, bytes and balance are means over the draws, so that FLOPs over time is the rate of all the work done; errors,
    memory and noise are those of the worst draw. ``draws/...`` hold what differs between draws.
    """
    every = [m.metrics for m in draws]
    joined = Measured(metrics={key: float(np.mean([m[key] for m in every])) for key in every[0]}, notes=dict(draws[0].notes))
    metrics = joined.metrics
    for key in metrics:
        if key.startswith(("check/", "memory/")) or key == "time/noise":
            metrics[key] = max(m[key] for m in every)
    if "mask/area" in metrics:
        metrics["draws/count"] = float(len(draws))
        joined.samples["draw_area"] = [m["mask/area"] for m in every]
    for phase in ("forward", "backward", "total"):
        key = f"time/{phase}/median_s"
        if key not in metrics:  # a forward-only cell, or a later block, which has samples only
            continue
        times = np.array([m[key] for m in every])
        rates = np.array([m[_compute(phase, "tflops_per_gpu")] for m in every])
        # Rate times time is the work of a draw, up to a factor that they share.
        metrics[_compute(phase, "tflops_per_gpu")] = rate = float((rates @ times) / times.sum())
        metrics[_compute(phase, "mfu")] = rate / metrics["compute/peak_tflops"]
        metrics[f"draws/{phase}/min_s"], metrics[f"draws/{phase}/max_s"] = float(times.min()), float(times.max())
        metrics[f"draws/{phase}/spread"] = float((times.max() - times.min()) / np.median(times))
        joined.samples[f"draw_{phase}_median_s"] = times.tolist()
    for key in draws[0].samples:
        if key.startswith("block_"):
            joined.samples[key] = [float(np.mean([m.samples[key] for m in draws]))]
        elif key.startswith("rank_"):
            joined.samples[key] = np.max([m.samples[key] for m in draws], axis=0).tolist()
        else:
            joined.samples[key] = [value for m in draws for value in m.samples[key]]
    joined.notes["stopped_by"] = ", ".join(sorted({m.notes["stopped_by"] for m in draws}))
    for key in {"kernel_calls", "timeline"} & set(draws[0].notes):
        joined.notes[key] = [m.notes[key] for m in draws]
    checks = [m.check for m in draws if m.check is not None]
    # Errors are judged against the bound of their own draw, so the worst is the one that comes nearest to it.
    joined.check = max(checks, key=lambda c: c.of_bound)
    return joined


def _by_phase(own: dict[str, Any]) -> dict[str, list[Any]]:
    """Every rank's value of each phase. Collective."""
    every = all_gather_object(own)
    return {phase: [values[phase] for values in every] for phase in own}


def _compute(phase: str, name: str) -> str:
    return f"compute/{name}" if phase == "total" else f"compute/{phase}/{name}"


def _once(run: RankRun, shard: Shard) -> None:
    out, saved = run.forward(shard.q, shard.k, shard.v)
    if shard.dout is not None:
        run.backward(shard.dout, saved)
    del out, saved


def _peak(problem: Problem, gang: Gang) -> tuple[float, str]:
    """(dense TFLOP/s per device, where it comes from)."""
    name = device_name(gang.device)
    known = configured_peak(gang.devices, name, problem.dtype)
    if known is not None:
        return known, f"conf/device entry for {name}"
    return _measured_limit(problem, gang), f"matrix product measured on {name}"


def _measured_limit(problem: Problem, gang: Gang, *, again: bool = False) -> float:
    """Collective. Ranks of a node share its cores, so on a CPU one of each node measures."""
    measures = gang.device.type == "cuda" or gang.rank % problem.scale.gpus_per_node == 0
    return max(all_gather_object(measured_limit(getattr(torch, problem.dtype), gang.device, again=again) if measures else 0.0))
