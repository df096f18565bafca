"""Sizes by prediction: limits hold by intervals, break-even is where curves cross, the front is what nothing beats."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lcbench.advice.front import pareto, pareto_figure
from lcbench.advice.ranking import Candidate
from lcbench.advice.sizing import (
    GIB,
    AtLengths,
    BreakEven,
    Limits,
    break_even,
    break_evens,
    ladder,
    lengths,
    scales_table,
    smallest,
    without_cp,
)
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import CannotPredict, Prediction, Predictor
from lcbench.report.fitted import console
from lcbench.schedule.simulate import Phase
from lcbench.workloads.parts import Attend, Made


@dataclass(frozen=True)
class Straight(Predictor):
    """Seconds = start + each x tokens / ranks, by strategy; nothing is known of a strategy that has none, or below ``least``."""

    lines: dict[str, tuple[float, float]] = field(default_factory=dict)
    least: int = 0

    def predict(self, cell: Cell, *, memory: bool = True) -> Prediction:
        name, problem = cell.config["cp"]["name"], cell.problem
        if name not in self.lines or (name != "none" and problem.seqlen < self.least):
            raise CannotPredict("nothing is known")
        start, each = self.lines[name]
        time = start + each * problem.seqlen / problem.scale.world_size
        phases = {"forward": Phase(time, time, time, 0.0, 0.0)}
        peak = GIB * 16 // problem.scale.world_size
        made, interval = Made({"forward": (Attend("forward"),)}), (peak / 1.5, peak * 1.5)
        return Prediction(cell, self.machine, phases, phases, made, {}, {}, {}, 0, peak, interval, 0.25, "straight lines", ())


def straight(**lines: tuple[float, float]) -> Straight:
    return Straight(machine_of("b200"), lines=lines)


def candidates(predictor: Predictor, *words: str) -> list[Candidate]:
    grid = ["mask=full", "seqlen=24k", "heads=24x8x64", "kernel=cudnn", "site=plain", *words]
    return [Candidate(p.cell, predictor.predict(p.cell), "may win") for p in look(grid).cells if not p.skip]


def test_the_ladder_doubles_within_a_node_and_then_nodes() -> None:
    assert [str(s) for s in ladder(8)][:6] == ["1x1", "1x2", "1x4", "1x8", "2x8", "4x8"]
    assert [str(s) for s in ladder(6)][:5] == ["1x1", "1x2", "1x4", "1x6", "2x6"]
    assert ladder(8)[-1].world_size == 1024


def test_a_limit_holds_by_the_upper_end_of_the_interval() -> None:
    every = candidates(straight(ring=(0.0, 1e-6)), "cp=ring", "scale=1x2,1x4,1x8,2x8")
    times = [c.prediction.seconds for c in every if c.prediction]
    just = Limits(seconds=times[2] * 1.25 * 1.0001)
    found = smallest(every, just)
    assert found is not None
    assert found.cell.config["scale"] == "1x8"
    tighter = smallest(every, Limits(seconds=times[2] * 1.24))
    assert tighter is not None
    assert tighter.cell.config["scale"] == "2x8"
    assert smallest(every, Limits(seconds=times[3])) is None
    needs = [c.prediction.needs_interval[1] for c in every if c.prediction]
    for bytes_, scale in ((needs[1], "1x4"), (needs[1] - 1, "1x8")):
        by_memory = smallest(every, Limits(bytes=bytes_))
        assert by_memory is not None
        assert by_memory.cell.config["scale"] == scale


def test_what_does_not_fit_holds_nothing() -> None:
    every = candidates(straight(ring=(0.0, 1e-6)), "cp=ring", "scale=1x2")
    assert smallest([replace(every[0], fate="does not fit")], Limits(seconds=1e9)) is None


def test_break_even_is_where_the_lines_cross() -> None:
    predictor = straight(ring=(3e-3, 1e-6), none=(0.0, 1e-6))
    ring = candidates(predictor, "cp=ring", "scale=1x4")[0].cell
    alone = without_cp(ring, look(["cp=none", "scale=1x1"]).cells[0].cell.config["cp"])
    assert alone.config["scale"] == "1x1"
    tokens = break_even(ring, alone, AtLengths(predictor))
    assert tokens is not None
    crossing = 3e-3 / (1e-6 * 3 / 4)  # 4,000 tokens
    assert crossing <= tokens <= crossing * (1 + 1 / 16)
    assert break_even(alone, ring, AtLengths(predictor)) is None
    always = break_even(ring, alone, AtLengths(replace(predictor, lines={"ring": (0.0, 1e-6), "none": (0.0, 1e-6)})))
    assert BreakEven(ring, "", always, 1).said == "at most 1k"
    late = break_even(ring, alone, AtLengths(replace(predictor, least=9000)))
    assert late is not None
    assert 9000 <= late <= 9000 * (1 + 1 / 8)


def test_break_evens_name_the_next_strategy() -> None:
    predictor = straight(ring=(0.0, 2e-6), usp=(8e-3, 1e-6), none=(0.0, 1e-6))
    every = candidates(predictor, "cp=ring,usp", "scale=1x4")
    none = look(["cp=none", "scale=1x1"]).cells[0].cell.config["cp"]
    found = list(break_evens(every, none, predictor))
    assert [alone.cell.config["cp"]["name"] for alone, _ in found] == ["ring", "usp"]
    alone, after = found[0]
    assert after is not None
    assert (alone.said, after.other, after.tokens) == ("at most 1k", "usp", None)
    assert after.said == f"not up to {lengths(alone.cell)[-1] // 1024}k"
    assert found[1][1] is None


def test_the_front_holds_what_nothing_beats() -> None:
    predictor = straight(ring=(0.0, 1e-6), usp=(1e-3, 1e-6))
    every = candidates(predictor, "cp=ring,usp", "scale=1x2,1x4,1x8")
    assert {c.cell.config["cp"]["name"] for c in pareto(every)} == {"ring"}
    assert [c.cell.config["scale"] for c in pareto(every)] == ["1x2", "1x4", "1x8"]


@pytest.mark.slow
def test_the_figure_and_the_table_say_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = straight(ring=(0.0, 1e-6), usp=(1e-3, 1e-6))
    every = candidates(predictor, "cp=ring,usp", "scale=1x2,1x4,1x8")
    drawn = pareto_figure(every, predictor)
    assert "predicted, not measured" in drawn.title
    assert all("predicted" in axis.get_ylabel() for axis in drawn.figure.axes)
    assert [path.stat().st_size > 2000 for path in drawn.save(tmp_path)] == [True, True]
    console().print(scales_table(every, Limits(seconds=1e-2)))
    assert "predicted, not measured" in capsys.readouterr().out
