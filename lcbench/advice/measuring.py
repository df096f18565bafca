"""The rounds of a race as attempts of a sweep: one more good attempt of a cell is one more round.

So an interrupted race goes on where it was, and its results are what any sweep's are: status, report and tracking know them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lcbench.advice.racing import Budget, Lap
from lcbench.grid.cell import Cell
from lcbench.runs.attempt import Attempt
from lcbench.runs.jobs import Watch
from lcbench.runs.launch import Launches, Todo, hand_over, make_packs
from lcbench.runs.pack import Settings
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep


class NothingMeasured(Exception):
    """Why a round could not be handed over, in one line."""


@dataclass
class Rounds:
    """A source of measurements: cells of a sweep, by id.

    Attributes:
        cells: by id; all are in the sweep's manifest, or will be when the first round is measured.
        reused: attempts of these that an earlier command measured.
    """

    sweep: Sweep
    launcher: Launches
    settings: Settings
    budget: Budget
    cells: Mapping[str, Cell]
    reused: int = 0
    _known: dict[str, list[Lap]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sweep.exists():
            for cell_id in self.cells:
                self._learn(cell_id)
            self.reused = sum(map(len, self._known.values()))

    def _learn(self, cell_id: str) -> None:
        good = [a for a in self.sweep.attempts(cell_id) if a.status == "ok" and a.samples.get("total_s")]
        self._known[cell_id] = [self._lap(a, self.cells[cell_id]) for a in good]

    def _lap(self, attempt: Attempt, cell: Cell) -> Lap:
        blocks = attempt.samples.get("block_total_s") or [attempt.metrics["time/total/median_s"]]
        return Lap(tuple(blocks), self.budget.cost(seconds_of(attempt), cell.scale.world_size))

    def expected(self, names: Sequence[str], number: int) -> float:
        """What a round costs: what is measured already did, and what was measured before costs as much again; else an estimate."""
        known = {name: self._known.get(name, []) for name in names}
        new = [self.cells[name] for name in names if not known[name]]
        found = sum(laps[min(number, len(laps)) - 1].cost for laps in known.values() if laps)
        for pack in make_packs(self.sweep, new, launcher=self.launcher.name, settings=self.settings):
            found += sum(self.budget.cost(pack.seconds[c], self.cells[c].scale.world_size) for c in pack.cells)
        return found

    def measure(self, names: Sequence[str], number: int) -> Mapping[str, Lap]:
        """Raises:
        NothingMeasured: the launcher refused.
        """
        wanted = [name for name in names if len(self._known.get(name, [])) < number]
        if wanted:
            self._launch(wanted)
        found: dict[str, Lap] = {}
        for name in names:
            if name in wanted:
                self._learn(name)
            laps, last = self._known[name], next(reversed(self.sweep.attempts(name)), None)
            if len(laps) >= number:
                found[name] = laps[number - 1]
            elif last is not None and last.failure is not None:
                cost = self.budget.cost(seconds_of(last), self.cells[name].scale.world_size)
                found[name] = Lap((), cost, f"{last.failure.kind}: {last.failure.cause}")
        return found

    def _launch(self, wanted: Sequence[str]) -> None:
        """Raises: as ``have_measured``."""

        def choose() -> Todo:
            under_way = settled(Watch(self.sweep), as_mine=True).under_way
            return Todo(
                [self.cells[c] for c in wanted if c not in under_way], under_way=[self.cells[c] for c in wanted if c in under_way]
            )

        have_measured(self.launcher, self.sweep, choose, self.settings)


def have_measured(launcher: Launches, sweep: Sweep, choose: Callable[[], Todo], settings: Settings) -> Todo:
    """Hand over the cells that ``choose`` names, and wait until they are measured, or cannot be.

    Returns: what was chosen.

    Raises:
        NothingMeasured: the launcher refused.
    """
    todo, packs, refusal = hand_over(launcher, sweep, choose, settings)
    if refusal is not None:
        raise NothingMeasured(str(refusal))
    launcher.follow(sweep, packs)
    settled(Watch(sweep), as_mine=True)
    return todo


def seconds_of(attempt: Attempt) -> float:
    """How long an attempt kept its ranks: until its first block had its result, and its later blocks."""
    again = sum(block["finished_at"] - block["started_at"] for block in attempt.again)
    parts = ("prepare", "first_pass", "check", "measure")
    first = sum(attempt.metrics.get(f"time/{part}_s", 0.0) for part in parts)
    return first + again if attempt.again or first else attempt.finished_at - attempt.started_at
