"""Races on results that a program drew: who wins, what it costs, and what is said when it is not decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from lcbench.advice.racing import SHARE, Budget, Lap, Outcome, Race
from lcbench.runs.attempt import Attempt
from tests.advice.recorded import SHARE as SHARE_OF_ALL
from tests.advice.recorded import Recorded, attempts_by_mask, races
from tests.report.made import made_sweep

GRID = [
    "cp=ring,allgather,ulysses,usp,loongtrain,groupcast,lightseq,tokenring", "kernel=flash_attn2,flash_attn3,cudnn", "mask=causal",
    "seqlen=128k", "scale=2x8", "heads=64x8x128", "site=plain",
]  # fmt: skip
KERNELS = {"flash_attn2": 1.6, "flash_attn3": 1.0, "cudnn": 1.05}
AGAIN = {"again": [{"started_at": 0.0, "finished_at": 1.5}] * 11}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Attempt]:
    """24 choices with 12 blocks each, 1.5 % from block to block. Drawn, not measured."""
    sweep = made_sweep(
        tmp_path_factory.mktemp("results"), "drawn", GRID, blocks=12, run_to_run=0.015, provenance=AGAIN,
        factor_of=lambda cell: KERNELS[cell.config["kernel"]["name"]],
    )  # fmt: skip
    return [sweep.attempts(cell_id)[-1] for cell_id in sweep.entries()]


def raced(source: Recorded, budget: float, seed: int = 0) -> tuple[Race, Outcome]:
    """A race of all of a source, of which nothing is known before."""
    names = np.random.default_rng(1000 + seed).permutation(sorted(source.blocks)).tolist()
    race = Race({"problem": names}, source, budget)
    (outcome,) = race.run()
    return race, outcome


def test_the_exhaustive_winner_is_found_in_19_of_20_at_40_percent_of_the_time(drawn: list[Attempt]) -> None:
    right = 0
    for seed in range(20):
        source = Recorded.of(drawn, seed=seed)
        race, outcome = raced(source, 0.4 * source.exhaustive_cost, seed)
        assert race.spent <= 0.4 * source.exhaustive_cost
        right += outcome.winner == source.exhaustive_winner
    assert right >= 19


class Steady:
    """A source of choices with given times and a spread; a round of each costs 1."""

    def __init__(self, times: Mapping[str, float], spread: float = 0.01, failing: Mapping[str, str] | None = None) -> None:
        self.times, self.spread, self.failing, self.rounds = times, spread, failing or {}, list[list[str]]()
        self.random = np.random.default_rng(0)

    def expected(self, names: Sequence[str], number: int) -> float:
        return float(len(names))

    def measure(self, names: Sequence[str], number: int) -> Mapping[str, Lap]:
        self.rounds.append(list(names))
        return {name: Lap((), 1.0, self.failing[name]) if name in self.failing else self._lap(name) for name in names}

    def _lap(self, name: str) -> Lap:
        return Lap(tuple((self.times[name] * self.random.lognormal(0, self.spread, 2)).tolist()), 1.0)


SPREAD = {"a": 1.0, "b": 1.03, "c": 1.3, "d": 1.6, "e": 2.0, "f": 2.1}


def test_losers_are_dropped_and_the_last_two_go_on() -> None:
    source = Steady(SPREAD, 0.015)
    (outcome,) = Race({"p": list(reversed(SPREAD))}, source, 100.0).run()
    assert (outcome.winner, outcome.next, outcome.end) == ("a", "b", "decided")
    assert sorted(source.rounds[0]) == sorted(SPREAD)
    assert {name for names in source.rounds[1:] for name in names} == {"a", "b"}
    assert outcome.margin is not None
    assert outcome.margin.low < 1.03 < outcome.margin.high
    assert outcome.clear


def test_equal_choices_are_not_told_apart() -> None:
    (outcome,) = Race({"p": ["a", "b", "c"]}, Steady({"a": 1.0, "b": 1.0, "c": 1.5}), 100.0, rounds=3).run()
    assert outcome.end == "rounds"
    assert {outcome.winner, *(r.name for r in outcome.open)} == {"a", "b"}
    assert not outcome.clear


def test_a_budget_that_ends_leaves_the_slowest_behind_and_says_so() -> None:
    times = {name: 1 + 0.01 * place for place, name in enumerate("abcdefgh")}
    source = Steady(times, 0.05)
    race = Race({"p": list(times)}, source, 18.0)
    (outcome,) = race.run()
    assert race.spent <= 18.0
    assert len(source.rounds[0]) == 8
    assert len(source.rounds[1]) == int(SHARE * 10)
    assert any(r.state == "left behind" for r in outcome.open)


def test_a_first_round_takes_the_likeliest_that_the_budget_reaches() -> None:
    source = Steady(SPREAD, 0.005)
    (outcome,) = Race({"p": list(SPREAD)}, source, 6.0).run()
    assert source.rounds[0] == ["a", "b", "c"]
    assert {r.name for r in outcome.runners if not r.laps} == {"d", "e", "f"}
    assert {"d", "e", "f"} <= {r.name for r in outcome.open}


def test_a_budget_below_two_choices_of_each_problem_is_refused() -> None:
    with pytest.raises(ValueError, match=r"first round of the 4 likeliest choices is expected to take 1\.3 times it"):
        Race({"p": ["a", "b", "c"], "q": ["d", "e"]}, Steady(SPREAD), 3.0).run()


def test_what_fails_is_out_with_its_cause_and_the_rest_race() -> None:
    source = Steady(SPREAD, 0.005, failing={"a": "oom: out of memory"})
    (outcome,) = Race({"p": list(SPREAD)}, source, 100.0).run()
    assert outcome.winner == "b"
    assert next(r for r in outcome.runners if r.name == "a").why == "oom: out of memory"
    (none,) = Race({"p": ["a"]}, source, 100.0).run()
    assert (none.end, none.winner) == ("nothing ran", "")


def test_problems_share_rounds_and_end_by_themselves() -> None:
    source = Steady({"a": 1.0, "b": 3.0, "c": 1.0, "d": 1.004}, 0.01)
    first, second = Race({"p": ["a", "b"], "q": ["c", "d"]}, source, 100.0).run()
    assert sorted(source.rounds[0]) == ["a", "b", "c", "d"]
    assert first.winner == "a"
    assert not {"a", "b"} & {name for names in source.rounds[2:] for name in names}
    assert second.problem == "q"


def test_one_choice_alone_is_measured_once() -> None:
    source = Steady({"a": 1.0})
    (outcome,) = Race({"p": ["a"]}, source, 2.0).run()
    assert (outcome.winner, outcome.margin, source.rounds) == ("a", None, [["a"]])


@pytest.mark.parametrize(
    ("text", "seconds", "of_ranks"),
    [("2gpuh", 7200, True), ("0.5 GPUh", 1800, True), ("90gpumin", 5400, True), ("3min", 180, False)],
)
def test_a_budget_is_read(text: str, seconds: float, of_ranks: bool) -> None:
    found = Budget.parse(text)
    assert (found.seconds, found.of_ranks) == (seconds, of_ranks)
    assert found.cost(10.0, 16) == (160.0 if of_ranks else 10.0)


@pytest.mark.parametrize("text", ["2", "gpuh", "-1gpuh", "0min", "2parsecs", "", "1e3gpuh", "nangpuh"])
def test_a_bad_budget_names_what_is_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"2gpuh.*10min"):
        Budget.parse(text)


def test_recorded_blocks_are_handed_out_once(drawn: list[Attempt], tmp_path: Path) -> None:
    source = Recorded.of(drawn, seed=3)
    name = drawn[0].cell_id
    got = [block for number in range(1, 8) for lap in source.measure([name], number).values() for block in lap.blocks]
    assert sorted(got) == sorted(drawn[0].samples["block_total_s"])


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_recorded_results_are_raced_right_in_19_of_20_at_40_percent_of_the_time(mask: str) -> None:
    found = races(attempts_by_mask()[mask])
    assert found.right >= 19, str(found)
    assert max(found.shares) <= SHARE_OF_ALL, str(found)
