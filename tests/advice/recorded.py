"""Races on recorded results: how often the exhaustive winner is found, and for how much of its time. ``make bench`` prints it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lcbench.advice.racing import Lap, Race
from lcbench.grid.values import parse_scale
from lcbench.runs.attempt import Attempt

DATA = Path(__file__).parent / "data" / "recorded.json"
SEEDS, SHARE = 20, 0.4


@dataclass(frozen=True)
class Races:
    """``right``: how many of ``SEEDS`` found the exhaustive winner; ``shares``: of its time, that each took."""

    choices: int
    right: int
    shares: list[float]

    def __str__(self) -> str:
        found = f"{self.right} of {len(self.shares)} races among {self.choices} choices find the exhaustive winner"
        return f"{found}, in {fmean(self.shares):.0%} of the time of measuring all ({max(self.shares):.0%} at most)"


class Recorded:
    """A source of what was measured before. Its costs are those of then.

    Args:
        blocks: seconds of the blocks of each choice, in the order in which a race gets them.
        block_cost: of a block, by choice; ``lap_cost``: of a round besides its blocks.
        per_lap: blocks of a round.
    """

    def __init__(
        self,
        blocks: Mapping[str, Sequence[float]],
        block_cost: Mapping[str, float],
        lap_cost: Mapping[str, float],
        per_lap: int = 2,
    ) -> None:
        self.blocks, self.block_cost, self.lap_cost, self.per_lap = blocks, block_cost, lap_cost, per_lap

    @classmethod
    def of(cls, attempts: Sequence[Attempt], *, seed: int, per_lap: int = 2) -> Recorded:
        """From good attempts with several blocks each, which a seed puts into an order; costs in seconds times ranks."""
        random = np.random.default_rng(seed)
        blocks, block_cost, lap_cost = {}, {}, {}
        for attempt in attempts:
            ranks = parse_scale(attempt.config["scale"]).world_size
            again, metrics = attempt.again, attempt.metrics
            blocks[attempt.cell_id] = random.permutation(attempt.samples["block_total_s"]).tolist()
            block_cost[attempt.cell_id] = ranks * fmean(b["finished_at"] - b["started_at"] for b in again)
            besides = sum(metrics.get(f"time/{part}_s", 0.0) for part in ("prepare", "first_pass", "check"))
            lap_cost[attempt.cell_id] = ranks * besides
        return cls(blocks, block_cost, lap_cost, per_lap)

    @property
    def exhaustive_cost(self) -> float:
        """Of measuring all that was recorded, round by round."""
        return sum(self._cost(name, math.ceil(len(blocks) / self.per_lap)) for name, blocks in self.blocks.items())

    @property
    def exhaustive_winner(self) -> str:
        """Who is the fastest over all that was recorded."""
        return min(self.blocks, key=lambda name: fmean(map(math.log, self.blocks[name])))

    def _cost(self, name: str, laps: int) -> float:
        return laps * (self.lap_cost[name] + self.per_lap * self.block_cost[name])

    def expected(self, names: Sequence[str], number: int) -> float:
        return sum(self._cost(name, 1) for name in names)

    def measure(self, names: Sequence[str], number: int) -> Mapping[str, Lap]:
        first = (number - 1) * self.per_lap
        found = {name: tuple(self.blocks[name][first : first + self.per_lap]) for name in names}
        return {name: Lap(blocks, self._cost(name, 1)) for name, blocks in found.items() if blocks}


def attempts_by_mask() -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = {}
    for entry in json.loads(DATA.read_text()):
        attempt = Attempt.from_json(entry)
        found.setdefault(attempt.config["mask"]["name"], []).append(attempt)
    return found


def races(attempts: list[Attempt]) -> Races:
    """A race for each seed, which decides the order of choices and of their blocks; nothing is known of them before."""
    right, shares = 0, []
    for seed in range(SEEDS):
        source = Recorded.of(attempts, seed=seed)
        names = np.random.default_rng(100 + seed).permutation(list(source.blocks)).tolist()
        race = Race({"all": names}, source, SHARE * source.exhaustive_cost)
        (outcome,) = race.run()
        right += outcome.winner == source.exhaustive_winner
        shares.append(race.spent / source.exhaustive_cost)
    return Races(len(attempts), right, shares)


def main() -> int:
    for mask, attempts in attempts_by_mask().items():
        print(f"choose, {mask}, recorded on two CPU cores: {races(attempts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
