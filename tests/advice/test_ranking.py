"""What may win is decided by intervals, memory and what runs: with predictions that are made up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lcbench.advice.answers import predicted_table, reasons
from lcbench.advice.ranking import MAY_WIN, Candidate, rank
from lcbench.advice.why import PARTS, decided, predicted_split
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import CannotPredict, Prediction, Predictor
from lcbench.problem import Heads, Problem, Scale
from lcbench.report.fitted import console
from lcbench.schedule.simulate import Phase
from lcbench.workloads.parts import Attend, Made

MS = 1e-3
GIB = 1 << 30


@dataclass(frozen=True)
class Told(Predictor):
    """Predicts what it is told: milliseconds, bytes and error by the name of a strategy."""

    ms: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    error: float = 0.1
    memory_error: float = 0.0

    def predict(self, cell: Cell, *, memory: bool = True) -> Prediction:
        name = cell.config["cp"]["name"]
        if name not in self.ms:
            raise CannotPredict("nobody knows")
        time = self.ms[name] * MS
        phase = Phase(time, 0.5 * time, 0.6 * time, 0.3 * time, 0.1 * time)
        peak = self.bytes.get(name, 1)
        interval = peak / (1 + self.memory_error), peak * (1 + self.memory_error)
        return Prediction(
            cell,
            self.machine,
            {"forward": phase},
            {"forward": phase},
            FORWARD,
            {},
            {},
            {},
            0,
            peak,
            interval,
            self.error,
            "made up",
            (),
        )


FORWARD = Made({"forward": (Attend("forward"),)})


def found(predictor: Predictor, *words: str) -> dict[str, Candidate]:
    grid = ["mask=causal", "seqlen=96k", "scale=2x8", "heads=48x16x64", "site=plain", "kernel=flash_attn3", *words]
    return {c.cell.config["cp"]["name"]: c for c in rank(look(grid).cells, predictor)}


def told(error: float = 0.1, **ms: float) -> Told:
    return Told(machine_of("h100"), ms=ms, error=error)


def test_what_is_surely_slower_is_left_out_and_no_more() -> None:
    ranked = found(told(ring=10, usp=12.0, ulysses=12.2, tokenring=30), "cp=ring,usp,ulysses,tokenring")
    assert {n: c.fate for n, c in ranked.items()} == {
        "ring": "may win", "usp": "may win", "ulysses": "cannot win", "tokenring": "cannot win",
    }  # fmt: skip
    assert list(ranked)[:2] == ["ring", "usp"]


def test_without_a_fit_a_factor_of_four_is_kept() -> None:
    ranked = found(told(1.0, ring=10, usp=39, tokenring=41), "cp=ring,usp,tokenring")
    assert {n for n, c in ranked.items() if c.fate == "may win"} == {"ring", "usp"}


def test_what_does_not_fit_is_no_bound_for_the_others() -> None:
    predictor = replace(told(ring=10, usp=100), bytes={"ring": 100 * GIB})
    ranked = found(predictor, "cp=ring,usp")
    assert ranked["ring"].fate == "does not fit"
    assert ranked["ring"].why.startswith("needs 100 GiB of 74.5 GiB, at best 100 GiB, predicted")
    assert ranked["usp"].fate == "may win"


def test_what_may_fit_is_kept_and_is_no_bound_for_what_surely_fits() -> None:
    predictor = replace(told(ring=10, usp=100, ulysses=1000), bytes={"ring": 80 * GIB, "usp": 40 * GIB}, memory_error=0.3)
    ranked = found(predictor, "cp=ring,usp,ulysses")
    assert {n: c.fate for n, c in ranked.items()} == {"ring": "may win", "usp": "may win", "ulysses": "cannot win"}
    surely = found(replace(predictor, memory_error=0.0), "cp=ring,usp,ulysses")
    assert surely["ring"].fate == "does not fit"
    may = found(replace(predictor, bytes={"ring": 60 * GIB}), "cp=ring,usp,ulysses")
    assert {n for n, c in may.items() if c.fate == "may win"} == {"ring", "usp"}
    assert {n for n, c in found(replace(predictor, bytes={}), "cp=ring,usp").items() if c.fate == "may win"} == {"ring"}


def test_no_prediction_is_no_reason_against() -> None:
    ranked = found(told(ring=10), "cp=ring,usp")
    assert (ranked["usp"].fate, ranked["usp"].why) == ("no prediction", "nobody knows")
    assert list(ranked) == ["ring", "usp"]


def test_reasons_of_plan_and_platform_are_kept() -> None:
    grid = ["mask=causal", "seqlen=96k", "scale=2x8", "heads=48x16x64", "site=plain", "cp=none,ring", "kernel=flash_attn3,vsa"]
    for machine, expected in (("h100", 1), ("a100", 0)):
        ranked = rank(look(grid).cells, replace(told(ring=10, none=1), machine=machine_of(machine)))
        assert sum(c.fate == "may win" for c in ranked) == expected
        assert all(c.why.startswith(("kernel ", "cp ")) for c in ranked if c.fate == "cannot run")
    refused = rank(look(grid).cells, told(ring=10), lambda cell: "kernel flash_attn3: not installed")
    assert {c.why for c in refused if "flash_attn3" in c.why} == {"kernel flash_attn3: not installed"}


def test_a_strategy_with_its_own_kernel_is_one_choice() -> None:
    grid = ["mask=causal", "seqlen=96k", "scale=2x8", "heads=48x16x64", "site=plain", "kernel=flash_attn3,cudnn,te_fused"]
    ranked = rank(look([*grid, "cp=te_p2p,ring"]).cells, told(ring=10, te_p2p=11))
    assert sorted(c.cell.config["cp"]["name"] for c in ranked) == ["ring", "ring", "ring", "te_p2p"]


def test_on_one_rank_there_is_no_strategy() -> None:
    ranked = found(told(ring=10, none=10), "cp=ring,none", "scale=1x1")
    assert {n: c.fate for n, c in ranked.items()} == {"none": "may win", "ring": "cannot run"}


@pytest.mark.parametrize(("direction", "rows"), [("forward", 48 + 32), ("forward_backward", 96 + 32)])
def test_bytes_of_inputs(direction: str, rows: int) -> None:
    problem = Problem(1 << 16, Heads(48, 16, 64), Scale(2, 8), "bfloat16", direction)
    assert problem.input_bytes == (1 << 12) * rows * 64 * 2


def test_a_split_adds_up_to_the_time() -> None:
    prediction = found(told(ring=10), "cp=ring")["ring"].prediction
    assert prediction is not None
    split = predicted_split(prediction)
    assert set(split.seconds) == set(PARTS)
    assert split.total == pytest.approx(prediction.seconds)
    assert split.seconds["imbalance"] == pytest.approx(MS)


def test_what_decided_is_the_part_that_the_slower_has_more_of() -> None:
    base: dict[str, Any] = {"computing": 5.0, "imbalance": 1.0, "exposed communication": 0.5, "rest": 0.0}
    prediction = found(told(ring=10), "cp=ring")["ring"].prediction
    assert prediction is not None
    fast = replace(predicted_split(prediction), seconds=base)
    slow = replace(fast, seconds={**base, "exposed communication": 4.0, "imbalance": 0.2})
    assert decided(fast, slow).startswith(
        "exposed communication: the next one has 3.50 s more of it, though it has 800 ms less imbal"
    )
    assert decided(fast, fast).startswith("no part")


def test_tables_say_that_they_are_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    predictor = told(1.0, ring=10, usp=39, tokenring=41)
    group = list(found(predictor, "cp=ring,usp,tokenring,none").values())
    console().print(predicted_table(group, predictor))
    printed = capsys.readouterr().out
    assert "predicted for machine h100, not measured" in printed
    assert "5.00 to 20.0" in printed
    said = reasons(group)
    assert said[0] == "predicted times are within a factor 2 in 95 % of cases; made up"
    assert any(line.startswith("cannot win, however far off predictions are: tokenring") for line in said)
    assert any(line == "cannot run: cp none: runs on one GPU, scale=2x8 has 16" for line in said)
    assert {c.fate for c in group if c.fate in MAY_WIN} == {"may win"}
