"""Regret: what it costs to take one choice for everything, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lcbench.report.frame import good_rows, reported
from lcbench.report.regret import problem_labels, regrets, verdict
from lcbench.runs.attempt import Failure
from tests.report.made import made_sweep


def frame_of(times: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Good rows from seconds by choice and problem; a problem is called by its mask."""
    rows: list[dict[str, Any]] = []
    for choice, by_problem in times.items():
        for problem, seconds in by_problem.items():
            rows.append(
                {
                    "cell": f"{choice}-{problem}", "choice": choice, "problem": problem, "mask": problem, "what_mask": problem,
                    "seqlen": 65536, "scale": "1x8", "where": "heads 8x8x64", "time/total/median_s": seconds, "approximate": "",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


STEADY = {"steady": {"a": 1.1, "b": 1.1, "c": 1.1, "d": 1.1}, "champion": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 4.4}}


def test_the_choice_with_most_victories_is_not_the_one_to_use() -> None:
    steady, champion = regrets(frame_of(STEADY))
    assert (steady.choice, champion.choice) == ("steady", "champion")
    assert steady.mean == pytest.approx(1.1**0.75)
    assert steady.worst == pytest.approx(1.1)
    assert steady.fastest == 1
    assert champion.mean == pytest.approx(4.0**0.25)
    assert (champion.worst, champion.where, champion.worst_cell) == (pytest.approx(4.0), "d 64k 1x8", "champion-d")
    assert (champion.fastest, champion.ran, champion.problems, champion.compared) == (3, 4, 4, 4)
    said = verdict([steady, champion])
    assert said == (
        "Use steady. Over 4 problems it takes on average 1.07x the time of the best, at worst 1.10x (a 64k 1x8). "
        "champion is fastest most often (3 of 4) but takes up to 4.00x (d 64k 1x8)."
    )


def test_a_choice_that_ran_in_few_problems_ranks_after_those_that_ran_in_nearly_all() -> None:
    easy = {"easy": {"a": 0.5, "b": 0.5}}
    found = regrets(frame_of(STEADY | easy))
    assert [r.choice for r in found][-1] == "easy"
    assert found[-1].mean == 1.0
    assert (found[-1].ran, found[-1].problems, found[-1].everywhere) == (2, 4, False)
    said = verdict(found)
    assert said is not None
    assert said.startswith("Use steady.")
    assert said.endswith("easy is fastest wherever it ran (2 of 4).")


def test_a_choice_that_ran_nearly_everywhere_is_ranked_by_its_mean() -> None:
    many = {str(i): 1.0 for i in range(10)}
    nearly = {str(i): 0.9 for i in range(9)}
    first, second = regrets(frame_of({"all": many, "nearly": nearly}))
    assert (first.choice, first.ran, first.everywhere, second.choice) == ("nearly", 9, True, "all")
    said = verdict([first, second])
    assert said is not None
    assert "It has a result in 9 of 10." in said


def test_what_ran_alone_is_no_comparison() -> None:
    alone = {"a": {"x": 1.0, "y": 1.0, "z": 1.0}, "b": {"x": 2.0}, "c": {"w": 1.0}}
    first, second = regrets(frame_of(alone))  # c met nobody
    assert (first.choice, first.compared, first.fastest, first.ran, first.problems) == ("a", 1, 1, 3, 4)
    assert second.mean == 2.0
    assert verdict([first, second]) is None


@pytest.mark.parametrize(
    "times", [{}, {"one": {"a": 1.0, "b": 1.0, "c": 1.0}}, {"x": {"a": 1.0, "b": 1.0}, "y": {"a": 2.0, "b": 1.0}}]
)
def test_there_is_no_verdict_of_one_choice_or_two_problems(times: dict[str, dict[str, float]]) -> None:
    assert verdict(regrets(frame_of(times))) is None


def test_a_choice_as_good_as_the_best_is_named() -> None:
    said = verdict(
        regrets(
            frame_of({"p": {"a": 1.0, "b": 1.0, "c": 1.0}, "q": {"a": 1.01, "b": 1.01, "c": 1.01}, "r": dict.fromkeys("abc", 2.0)})
        )
    )
    assert said is not None
    assert said.endswith("Close to it on average: q (1.01x, at worst 1.01x).")


def test_regret_of_some_problems_is_of_these_only() -> None:
    found = regrets(frame_of(STEADY), problems={"a", "b"})
    assert [(r.choice, r.mean, r.problems) for r in found] == [("champion", 1.0, 2), ("steady", pytest.approx(1.1), 2)]


def test_cells_that_differ_only_in_how_they_were_measured_are_one_answer() -> None:
    frame = frame_of(STEADY)
    again = frame.assign(cell=frame["cell"] + "-again")
    slow = frame.assign(**{"cell": frame["cell"] + "-slow", "time/total/median_s": 3 * frame["time/total/median_s"]})
    assert [(r.mean, r.fastest, r.ran) for r in regrets(pd.concat([frame, again, slow], ignore_index=True))] == [
        (r.mean, r.fastest, r.ran) for r in regrets(frame)
    ]


def test_a_problem_is_called_by_what_differs() -> None:
    frame = frame_of({"a": {"x": 1.0}, "b": {"x": 1.0}})
    frame["what_mask"] = "x(long_text)"
    assert set(problem_labels(frame)) == {"x 64k 1x8"}
    frame["what_mask"] = ["x(long_text)", "x(short_text)"]
    frame = frame.assign(heads="8x8x64", seed=[1, 2])
    assert list(problem_labels(frame)) == ["x(long_text) 64k 1x8, seed 1", "x(short_text) 64k 1x8, seed 2"]
    assert set(problem_labels(frame[frame["seed"] == 1])) == {"x 64k 1x8"}, "what all share is not told"


@pytest.mark.slow
def test_regrets_of_a_sweep_are_those_of_its_own_times(big_frame: pd.DataFrame) -> None:
    good = good_rows(big_frame)
    found = {r.choice: r for r in regrets(good)}
    assert set(found) == set(good["choice"])
    best = good.groupby("problem")["time/total/median_s"].min()
    for choice, rows in good.groupby("choice"):
        ratios = [row["time/total/median_s"] / best[row["problem"]] for _, row in rows.iterrows()]
        assert found[choice].mean == pytest.approx(math.exp(sum(map(math.log, ratios)) / len(ratios)))
        assert found[choice].worst == pytest.approx(max(ratios))
        assert (found[choice].ran, found[choice].problems) == (len(rows), 64)
    assert sum(r.fastest for r in found.values()) == 64
    said = verdict(list(found.values()))
    assert said is not None
    assert said.startswith(f"Use {next(iter(found))}. Over ")


def test_a_sweep_without_results_has_no_regret(tmp_path: Path) -> None:
    broken = made_sweep(tmp_path, "s", ["seqlen=64k", "scale=1x8"], failed={"": Failure("crash", "it broke", 0)})
    assert regrets(good_rows(reported(broken))) == []
    assert verdict([]) is None
