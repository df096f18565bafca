"""The longest length that fits, of each choice of a plan: rounds of cells, one of each choice that is not at its end.

A round goes to processes as any sweep's cells do, all choices together, and its results are in the store like any others. What
comes next is worked out from the store alone. So the same command goes on where it was, and what was measured before counts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from lcbench.advice.measuring import NothingMeasured, have_measured
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.expand import Plan, Planned
from lcbench.grid.refusals import skip_reason
from lcbench.grid.search import CELLS, GIB, Search, at
from lcbench.grid.site import predicts, runs_here
from lcbench.predict.machines import device_of_site, fit_of, machine_of, machine_of_site
from lcbench.predict.predictor import Predictor
from lcbench.problem import format_tokens
from lcbench.report.amounts import size
from lcbench.report.ending import BAD_INPUT, INTERRUPTED, OK, REFUSED, SOME_FAILED, bad_input
from lcbench.report.fitted import console
from lcbench.report.longest import ANSWERS, Choice, Longest, Probe, by_choice, choice_key, longest_table, probe_of
from lcbench.runs.budget import Cost
from lcbench.runs.launch import Launches, make_packs, missing, settings_of, sweep_of, write_cells
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Settings
from lcbench.runs.records import Record
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    from lcbench.runs.predictions import Source as Predictions

# Of this machine's memory: what ranks on its CPUs may be allowed together. The rest is for a cell that is the first not to fit, and
# for everybody else here.
SHARE = 0.5


def capped(plan: Plan) -> Search:
    """The plan's search with the cap that holds: what was typed, or what the device has.

    Raises:
        ValueError: there is none, or it is more than the device or this machine has; one line.
    """
    search = plan.search
    assert search is not None
    has, what = _device_bytes(plan)
    if search.cap_bytes is None:
        if not has:
            raise ValueError(f"search.gib is not set, which says what a rank may need: {what}; write it, such as search.gib=4")
        return replace(search, cap_bytes=float(has))
    if has and search.cap_bytes > has:
        raise ValueError(f"search.gib={search.cap_bytes / GIB:g} is more than the {has / GIB:.4g} GiB of {what}")
    if not has and runs_here(plan.launcher) and not predicts(plan.launcher):
        _check_here(plan, search.cap_bytes)
    return search


def _device_bytes(plan: Plan) -> tuple[int, str]:
    """Memory of what the plan runs on, 0 where it is not known, and what that is."""
    if predicts(plan.launcher):
        machine = machine_of(plan.options["machine"] or machine_of_site(plan.site))
        return machine.memory_bytes, f"machine={machine.name}" if machine.memory_bytes else "ranks of a CPU share its memory"
    device = device_of_site(plan.site)
    if device is None:
        return 0, f"site={plan.site['name']} names no GPU, and ranks of a CPU share its memory"
    entry = next((d for d in known_devices() if d["name"] == device), None)
    return (int(entry["memory_bytes"]), f"device {device}") if entry else (0, f"conf/device has no {device}")


def _check_here(plan: Plan, cap_bytes: float) -> None:
    """Raises:
    ValueError: ranks that all need the cap would fill this machine.
    """
    ranks = max((p.cell.scale.world_size for p in plan.cells), default=1)
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if ranks * cap_bytes > SHARE * has:
        most = math.floor(100 * SHARE * has / ranks / GIB) / 100
        raise ValueError(
            f"search.gib={cap_bytes / GIB:g} for each of {ranks} ranks is {size(ranks * cap_bytes)}, more than half of the "
            f"{size(has)} that this machine has, and what does not fit needs more still; write at most search.gib={most:g}"
        )


class Refused(Exception):
    """Why a round is not started, in one line, and the exit code of a command that ends so."""

    def __init__(self, why: str, code: int) -> None:
        super().__init__(why)
        self.code = code


class Source(Protocol):
    """How a round's cells come to be known."""

    def check(self, cells: list[Cell], number: int) -> str:
        """What a round will cost, in words.

        Raises:
            Refused: it is not to be started.
        """

    def take(self, cells: list[Cell]) -> None:
        """Have these known, as far as they can be.

        Raises:
            Refused: nobody takes them.
        """


@dataclass
class Measured:
    """Rounds as attempts at a sweep's cells, which a launcher brings to processes."""

    plan: Plan
    sweep: Sweep
    settings: Settings
    launcher: Launches
    _spent: Cost = field(default_factory=lambda: Cost.of([], here=True))

    def check(self, cells: list[Cell], number: int) -> str:
        packs = make_packs(self.sweep, cells, launcher=self.launcher.name, settings=self.settings)
        round_ = Cost.of(packs, here=runs_here(self.launcher.name))
        cost = round_.after(self._spent)
        started = "nothing was started" if number == 1 else f"round {number} was not started, and what was measured is kept"
        if refusal := cost.refusal(self.plan.options["budget"], self.settings.hang["max_s"], started):
            raise Refused(refusal, BAD_INPUT)
        self.sweep.check_writable([cell.id for cell in cells])
        self._spent = cost
        return f", estimated: {round_.gpu_hours}"

    def take(self, cells: list[Cell]) -> None:
        try:
            have_measured(
                self.launcher, self.sweep, lambda: missing(self.sweep, cells, force=self.plan.options["force"]), self.settings
            )
        except NothingMeasured as error:
            raise Refused(str(error), REFUSED) from error


@dataclass
class Foretold:
    """Rounds as predictions of a sweep's cells. ``source``: what predicts them."""

    plan: Plan
    sweep: Sweep
    source: Predictions

    def check(self, cells: list[Cell], number: int) -> str:
        self.sweep.check_writable([cell.id for cell in cells])
        return ""

    def take(self, cells: list[Cell]) -> None:
        for cell in cells:
            if self.plan.options["force"] or not self.source.has_made(self.sweep.prediction(cell.id)):
                self.sweep.finish(self.source.predict(cell, self.sweep.name))


@dataclass
class Guesses:
    """Which lengths a choice is expected to hold, by prediction of its memory: where its search begins, never an answer.

    ``predictor``: with a fit of the machine; None: nothing is expected.
    """

    predictor: Predictor | None
    cap_bytes: float
    _known: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, cap_bytes: float) -> Guesses:
        try:
            machine = machine_of_site(plan.site)
        except ValueError:  # a device whose links nobody has described
            return cls(None, cap_bytes)
        return cls(Predictor.of(machine) if fit_of(machine) is not None else None, cap_bytes)

    def expected(self, choice: Choice) -> tuple[int, int] | None:
        """The outcome of lengths that surely fit, and that of those that may; None where there is no prediction."""
        key = choice_key(choice.cell)
        if key not in self._known:
            self._known[key] = None if self.predictor is None else self._predicted(self.predictor, choice)
        return self._known[key]

    def _predicted(self, predictor: Predictor, choice: Choice) -> tuple[int, int] | None:
        @cache
        def needs(tokens: int) -> tuple[float, float]:
            return predictor.predict(at(choice.cell, tokens)).needs_interval

        try:
            sure = bisect_right(choice.lengths, self.cap_bytes, key=lambda tokens: needs(tokens)[1])
            possible = bisect_right(choice.lengths, self.cap_bytes, lo=sure, key=lambda tokens: needs(tokens)[0])
        except ValueError:  # CannotPredict, and a mask that does not exist at some length
            return None
        return sure, possible


@dataclass(frozen=True)
class Standing:
    """Where the search of a choice stands. ``stopped``: what gave no answer, and ``next``: the cell to come; neither of a choice
    that is at its end.
    """

    choice: Choice
    stopped: Probe | None = None
    next: Cell | None = None


@dataclass
class Searching:
    """The search of all choices of a plan, from round to round.

    Attributes:
        search: with its cap.
        predicted: whether predictions are what counts.
        guess: which outcomes of a choice are likely before anything is measured.
        tried: cells that this command has brought up: what of them gave no answer gives none.
    """

    plan: Plan
    search: Search
    sweep: Sweep
    predicted: bool = False
    guess: Callable[[Choice], tuple[int, int] | None] = lambda choice: None
    tried: set[str] = field(default_factory=set)

    def look(self) -> list[Standing]:
        """Every choice, by what the store holds now."""
        known = by_choice(self.sweep.look().records.values() if self.sweep.exists() else ())
        found = []
        for planned in self.plan.cells:
            records = [r for r in known.get(choice_key(planned.cell), ()) if self._counts(r)]
            probes = (probe_of(record, self._cap_bytes, predicted=self.predicted) for record in records)
            found.append(self._standing(Choice.of(self.search, planned.cell, filter(None, probes)), runs=not planned.skip))
        return found

    def due(self) -> list[Planned]:
        """The cells of the next round."""
        return [Planned(cell, skip_reason(cell)) for standing in self.look() if (cell := standing.next) is not None]

    def rounds(self, source: Source, write: Callable[[list[Planned], int], None], tell: Callable[[int, int, str], None]) -> None:
        """Round after round, until every choice is at its end.

        Args:
            write: puts the cells of a round into the sweep.
            tell: hears of a round before it begins: its number, its cells, and what they cost.

        Raises:
            Refused: a round was not started.
        """
        for number in itertools.count(1):
            due = self.due()
            cells = [planned.cell for planned in due if not planned.skip]
            if not due:
                break
            cost = source.check(cells, number)
            write(due, number)
            self.tried |= {planned.cell.id for planned in due}
            if cells:
                tell(number, len(cells), cost)
                source.take(cells)

    def answers(self) -> list[Longest]:
        return [Longest.of(self.search, s.choice, s.stopped, predicted=self.predicted) for s in self.look()]

    @property
    def _cap_bytes(self) -> float:
        assert self.search.cap_bytes is not None
        return self.search.cap_bytes

    def _counts(self, record: Record) -> bool:
        """Whether what is known of a cell is used, and not to be found anew."""
        return not self.plan.options["force"] or record.entry.cell.id in self.tried

    def _standing(self, choice: Choice, *, runs: bool) -> Standing:
        if choice.bracket.closed:
            return Standing(choice)
        likely = choice.expected(self._cap_bytes) or (self.guess(choice) if runs else None)
        cell = at(choice.cell, choice.bracket.next(choice.used, likely))
        if cell.id not in self.tried:
            return Standing(choice, next=cell)
        nothing = "it was not measured: it is under way elsewhere, or was given up because it killed its ranks twice"
        return Standing(choice, choice.probes.get(cell.problem.seqlen) or Probe(cell, "no answer", why=nothing))


def run(plan: Plan, launcher: Launches) -> int:
    """Search the lengths of a plan, and print the answers; the exit code of the command."""
    launcher.output = output = str(plan.options["output"])
    terminal = console(stderr=output == "json", quiet=output == "quiet")
    foretells = predicts(plan.launcher)
    with bad_input():
        search = capped(plan)
        sweep, settings = sweep_of(plan), settings_of(plan)
        assert search.cap_bytes is not None
        guess = Guesses.of(plan, search.cap_bytes).expected if not foretells else lambda choice: None
        source = _foretold(plan, sweep) if foretells else Measured(plan, sweep, settings, launcher)
    searching = Searching(plan, search, sweep, foretells, guess)

    def say(text: str) -> None:
        terminal.print(text, markup=False, soft_wrap=True)

    def write(due: list[Planned], number: int) -> None:
        entries = [Entry(p.cell, p.skip, predicted=foretells) for p in due]
        write_cells(sweep, entries, plan.overrides if number == 1 else [], launcher.name, settings, search)

    def tell(number: int, cells: int, cost: str) -> None:
        say(f"round {number}: {cells} of {len(plan.cells)} choices are looked at{cost}")

    begins = f"{format_tokens(search.shortest)} to {format_tokens(search.longest)}, {size(search.cap_bytes)} a rank"
    say(f"sweep {sweep.name}: the longest length of {len(plan.cells)} choices, {begins}, at most {CELLS} cells of each")
    if not launcher.measures and not foretells:
        say("the next round; what comes after it depends on what it finds:")
        return launcher.launch_plan(replace(plan, cells=tuple(searching.due())))
    code = OK
    try:
        searching.rounds(source, write, tell)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        if not sweep.exists():
            return refused.code
        code = refused.code
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found is kept, and the same command with sweep={sweep.name} goes on", file=sys.stderr)
        return INTERRUPTED
    return code or _answer(searching, settings, say, terminal, output)


def _foretold(plan: Plan, sweep: Sweep) -> Foretold:
    """Raises:
    ValueError: no such machine, or a file that is no fit of it; one line.
    """
    from lcbench.runs.predictions import Source as Predictions  # with SciPy, which nothing else here needs

    return Foretold(plan, sweep, Predictions.of(plan.options["machine"], plan.options["fit"], plan.site))


def _answer(searching: Searching, settings: Settings, say: Callable[[str], None], terminal: Console, output: str) -> int:
    from lcbench.report.publishing import publish_sweep
    from lcbench.runs.tracking.publish import publish_or_say

    sweep, found = searching.sweep, searching.answers()
    publish_or_say(sweep, settings.tracking_uri, publish_sweep)
    terminal.print(longest_table(found, searching.search, sweep.name))
    say(f"status:     {sweep.command('status')}")
    say(f"report:     {sweep.command('report', *(['--predicted'] if searching.predicted else []))}")
    if output == "quiet":
        print(sweep.name)
    if output == "json":
        answers = [one.as_dict() for one in found]
        print(
            json.dumps({"sweep": sweep.name, "results": str(sweep.root), **searching.search.note(), "answers": answers}, indent=1)
        )
    return OK if all(one.end in (*ANSWERS, "cannot run") for one in found) else SOME_FAILED
