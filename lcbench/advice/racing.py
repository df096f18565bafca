"""Races: choices for a problem are measured round by round, few iterations each, until it is clear which is the fastest.

After each round a choice is dropped if it is slower than the leader by more than the noise, as ``report.intervals`` tells it from
the blocks of all choices together. What is left is measured again, for as long as a budget lasts. Where measurements come from is
the source's affair: attempts of a sweep, or results that were recorded before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, Protocol

from lcbench.grid.values import shown
from lcbench.report.intervals import LEVEL, Median, Ratio, Timing, medians
from lcbench.report.winners import CLOSE

ROUNDS = 6  # at most
SHARE = 0.5  # of what is left of a budget: what a round may take, so that the next ones have the other half
# How improbable a difference from the leader has to be to drop a choice. It is looked at after each round, so each has its share.
DROPPED = LEVEL / ROUNDS
EQUAL = CLOSE / 4  # what differs by less for sure is not told apart any further
UNITS = {"gpuh": (3600.0, True), "gpumin": (60.0, True), "h": (3600.0, False), "min": (60.0, False), "s": (1.0, False)}

State = Literal["waiting", "running", "dropped", "left behind", "failed"]
End = Literal["decided", "equal", "rounds", "budget", "nothing ran"]


@dataclass(frozen=True)
class Budget:
    """What a race may take. ``seconds``: of GPUs (or CPU ranks) together if ``of_ranks``, else of the machine."""

    seconds: float
    of_ranks: bool
    text: str

    @classmethod
    def parse(cls, value: str) -> Budget:
        """``2gpuh``, ``30gpumin``, ``10min``.

        Raises:
            ValueError: it is none of these.
        """
        match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]+)", value.strip().lower())
        if match is None or match[2] not in UNITS or not 0 < float(match[1]) < math.inf:
            raise ValueError(
                f"budget={shown(value)} is no amount; write time of GPUs (2gpuh, 30gpumin) or of the machine (10min, 1h)"
            )
        unit, of_ranks = UNITS[match[2]]
        return cls(float(match[1]) * unit, of_ranks, value)

    def cost(self, seconds: float, ranks: int) -> float:
        """What of it a cell takes that keeps so many ranks busy for so long."""
        return seconds * ranks if self.of_ranks else seconds

    def said(self, cost: float) -> str:
        """An amount for people."""
        hours = cost >= 3600
        unit = f"{'GPU-' if self.of_ranks else ''}{'hours' if hours else 'minutes'}"
        return f"{cost / (3600 if hours else 60):.3g} {unit}"


@dataclass(frozen=True)
class Lap:
    """What a round found of a choice. ``blocks``: seconds of an iteration, a value per block; ``cost``: in the budget's unit;
    ``failure``: why there are none.
    """

    blocks: tuple[float, ...]
    cost: float
    failure: str = ""


class Source(Protocol):
    """Where measurements come from."""

    def expected(self, names: Sequence[str], number: int) -> float:
        """What round ``number`` (from 1) of these will cost, about."""
        ...

    def measure(self, names: Sequence[str], number: int) -> Mapping[str, Lap]:
        """Measure a round. Choices that it does not return were not measured, and wait."""
        ...


@dataclass
class Runner:
    """A choice in a race. ``why``: it is out, in words."""

    name: str
    laps: list[Lap] = field(default_factory=list)
    state: State = "waiting"
    why: str = ""

    @property
    def timing(self) -> Timing | None:
        """All of its blocks; None without any."""
        blocks = tuple(seconds for lap in self.laps for seconds in lap.blocks)
        return Timing(math.exp(fmean(map(math.log, blocks))), blocks, 0.0) if blocks else None


@dataclass(frozen=True)
class Outcome:
    """How the race for a problem came out.

    Attributes:
        winner, next: names; ``next`` is the fastest of the others, None if nothing else ran.
        seconds: of the winner.
        margin: time of the next one over the winner's, with its interval.
        least_sure: the other that is least surely slower, if it is not the next.
        p: how probable it is to be as far ahead of all others where one is as fast.
        end: why the race ended.
    """

    problem: str
    runners: tuple[Runner, ...]
    end: End
    winner: str = ""
    seconds: Median | None = None
    next: str = ""
    margin: Ratio | None = None
    least_sure: str = ""
    p: float = 1.0

    @property
    def open(self) -> list[Runner]:
        """Who may yet be as fast: neither dropped nor failed."""
        return [r for r in self.runners if r.name != self.winner and r.state in ("running", "left behind")]

    @property
    def clear(self) -> bool:
        """Of what was measured, as a report would call it: ahead by more than the noise, and more than days differ by."""
        return self.margin is not None and self.p <= LEVEL and self.margin.value >= 1 + CLOSE


@dataclass
class Race:
    """The race of several problems at once, whose rounds are shared.

    Attributes:
        problems: names of choices by problem, the one that is expected to win first. A name belongs to one problem.
        budget: in the unit of ``Lap.cost``.
        told: hears of each round before it begins: its number, who takes part, what it will cost, what is spent.
    """

    problems: Mapping[str, Sequence[str]]
    source: Source
    budget: float
    rounds: int = ROUNDS
    told: Callable[[int, Sequence[str], float, float], None] = lambda *_: None
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.runners = {key: [Runner(name) for name in names] for key, names in self.problems.items()}
        self.ends: dict[str, End] = {}

    def run(self) -> list[Outcome]:
        """Raises:
        ValueError: the budget is less than a first round of two choices for each problem.
        """
        # What a first round costs is known once some were measured: then more may have a place in it.
        while (entrants := self._first()) and self._measure(entrants, 1):
            pass
        for runner in (r for runners in self.runners.values() for r in runners if r.state == "waiting"):
            runner.state, runner.why = "left behind", "the budget does not reach it"
        self._judge()
        for number in range(2, self.rounds + 1):
            if not (entrants := self._affordable(number)):
                break
            if not self._measure(entrants, number):
                break
            self._judge()
        for key in self.runners:
            self.ends.setdefault(key, "rounds")
        return [self._outcome(key) for key in self.runners]

    def _measure(self, entrants: Sequence[Runner], number: int) -> bool:
        """Have a round measured; False if the source has nothing more."""
        names = [runner.name for runner in entrants]
        self.told(number, names, self.source.expected(names, number), self.spent)
        laps = self.source.measure(names, number)
        for runner in entrants if laps else ():
            runner.state = "running"
            self._note(runner, laps.get(runner.name))
        return bool(laps)

    def _running(self, key: str) -> list[Runner]:
        return [runner for runner in self.runners[key] if runner.state == "running"] if key not in self.ends else []

    def _first(self) -> list[Runner]:
        """Of those that wait, as many as half of the budget measures once, the likeliest of every problem first; at the start two
        of each at least.
        """
        places = max(len(runners) for runners in self.runners.values())
        every = [runners[place] for place in range(places) for runners in self.runners.values() if place < len(runners)]
        order = [runner for runner in every if runner.state == "waiting"]
        least = 0 if len(order) < len(every) else sum(min(2, len(runners)) for runners in self.runners.values())
        if (needed := self._cost(order[:least], 1)) > self.budget:
            raise ValueError(
                f"a first round of the {least} likeliest choices is expected to take {needed / self.budget:.2g} times it"
            )
        count = least
        while count < len(order) and self.spent + self._cost(order[: count + 1], 1) <= SHARE * self.budget:
            count += 1
        return order[:count]

    def _affordable(self, number: int) -> list[Runner]:
        """Who still runs, as far as this round's share of the budget goes: the slowest are left behind first. The last two of each
        problem run for as long as there is a budget at all.
        """
        fields = {key: sorted(self._running(key), key=_seconds) for key in self.runners if key not in self.ends}
        left = self.budget - self.spent
        while entrants := [r for f in fields.values() for r in f]:
            cost, finals = self._cost(entrants, number), all(len(f) <= 2 for f in fields.values())
            if cost <= (left if finals or number == self.rounds else SHARE * left):
                break
            key = max(fields, key=lambda k: _seconds(fields[k][-1]) / _seconds(fields[k][0]) if len(fields[k]) > 2 else 0.0)
            if len(fields[key]) > 2:
                runner = fields[key].pop()
                runner.state, runner.why = "left behind", f"the budget does not reach it in round {number}"
            else:  # the last problem is given up first
                key = list(fields)[-1]
                del fields[key]
                self.ends[key] = "budget"
        return entrants

    def _cost(self, runners: Sequence[Runner], number: int) -> float:
        return self.source.expected([runner.name for runner in runners], number)

    def _note(self, runner: Runner, lap: Lap | None) -> None:
        if lap is None:
            runner.state, runner.why = "failed", "it was not measured"
            return
        runner.laps.append(lap)
        self.spent += lap.cost
        if lap.failure:
            runner.state, runner.why = "failed", lap.failure

    def _judge(self) -> None:
        """Drop who is slower than the leader for sure, and end the race of problems that are decided."""
        times = self._medians()
        for key in [key for key in self.runners if key not in self.ends]:
            running = sorted(self._running(key), key=_seconds)
            if not running:
                self.ends[key] = "nothing ran"
                continue
            leader, others = running[0], running[1:]
            over = {r.name: times[r.name].over(times[leader.name]) for r in others}
            for runner in others:
                ratio = over[runner.name]
                if ratio.known and ratio.p <= DROPPED and ratio.value > 1:
                    runner.state, runner.why = "dropped", f"slower than {leader.name}"
            left = [r for r in others if r.state == "running"]
            if not left:
                self.ends[key] = "decided"
            elif all(over[r.name].known and over[r.name].high <= 1 + EQUAL for r in left):
                self.ends[key] = "equal"

    def _medians(self) -> dict[str, Median]:
        """Of all that was measured, whose blocks together tell the noise."""
        timed = [(r.name, timing) for runners in self.runners.values() for r in runners if (timing := r.timing) is not None]
        return dict(zip([name for name, _ in timed], medians([timing for _, timing in timed]), strict=True))

    def _outcome(self, key: str) -> Outcome:
        times, runners = self._medians(), tuple(self.runners[key])
        # Who is out was slower for sure, or is not known enough; the winner is among those that ran to the end.
        timed = [r for r in runners if r.name in times and r.state != "failed"]
        last = sorted((r for r in timed if r.state == "running"), key=_seconds)
        if not last:
            return Outcome(key, runners, "nothing ran")
        winner = last[0]
        others = sorted((r for r in timed if r is not winner), key=_seconds)
        made = Outcome(key, runners, self.ends[key], winner.name, times[winner.name])
        if not others:
            return made
        ahead = [times[r.name].over(times[winner.name]) for r in others]
        least = max(range(len(ahead)), key=lambda i: ahead[i].p if ahead[i].value > 1 else 1 + ahead[i].p)
        return Outcome(
            key, runners, self.ends[key], winner.name, times[winner.name], others[0].name, ahead[0],
            others[least].name if least else "", ahead[least].p,
        )  # fmt: skip


def _seconds(runner: Runner) -> float:
    timing = runner.timing
    return timing.value if timing is not None else math.inf
