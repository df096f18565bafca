"""Races on recorded results: how often the exhaustive winner is found, and for how much of its time. ``make bench`` prints it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from lcbench.advice.racing import Race, Recorded
from lcbench.runs.store import Attempt

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
