"""What a trace takes with each choice: a sum of its cells' times, with an interval that holds it, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lcbench.commands.launchers import launcher_named
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.trace import Trace
from lcbench.report.fitted import console
from lcbench.report.intervals import KNOWN, Median, Timing, medians
from lcbench.report.page import write_report
from lcbench.report.trace import Served, rows_of, served, tables, weighted_sum
from lcbench.runs.attempt import Failure
from lcbench.runs.manifest import Entry, traces_of
from lcbench.runs.store import Sweep
from tests.report.made import made_sweep

LINES = [(8191, 1, 32)] * 90 + [(4095, 1, 16)] * 30 + [(0, 3072, 1)] * 7
GRID = ["cp=ring,ulysses", "kernel=flash_attn3", "scale=1x2", "heads=8x8x64", "direction=forward", "site=plain"]


def file_of(folder: Path, lines: Sequence[tuple[int, int, int]] = LINES) -> Path:
    file = folder / "day.jsonl"
    file.write_text("".join(json.dumps(dict(zip(("prefix", "new", "concurrency"), line, strict=True))) + "\n" for line in lines))
    return file


def grid_of(folder: Path, *words: str) -> list[str]:
    return [*GRID, *words, f"trace={file_of(folder)}"]


def answers(sweep: Sweep) -> list[Served]:
    return served(sweep, sweep.look())


def forward_s(sweep: Sweep, strategy: str, batch: str) -> float:
    """The time of a cell, from its own result."""
    (found,) = [
        record.attempts[-1].metrics["time/forward/median_s"] for record in sweep.look().records.values()
        if (record.entry.cell.config["cp"]["name"], record.entry.cell.config["batch"]) == (strategy, batch)
    ]  # fmt: skip
    return found


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_every_choice_has_a_cell_of_every_batch(tmp_path: Path) -> None:
    plan = look(grid_of(tmp_path))
    assert plan.trace is not None
    assert plan.trace.weights == pytest.approx({"q3k": 7, "16q1s4k": 30, "32q1s8k": 90})
    assert [(p.cell.config["cp"]["name"], p.cell.config["batch"]) for p in plan.cells] == [
        (name, batch) for name in ("ring", "ulysses") for batch in plan.trace.weights
    ]
    assert {p.cell.config["seqlen"] for p in plan.cells} == {3072, 16 * 4096, 32 * 8192}


def test_lengths_of_an_experiment_give_way(tmp_path: Path) -> None:
    words = ["+experiment=strategies", f"trace={file_of(tmp_path)}"]
    assert {p.cell.config["batch"] for p in look(words).cells} == {"q3k", "16q1s4k", "32q1s8k"}


def test_cells_of_a_trace_are_those_of_their_batches(tmp_path: Path) -> None:
    ids = [p.cell.id for p in look(grid_of(tmp_path)).cells]
    assert ids == [p.cell.id for p in look([*GRID, "batch=q3k,16q1s4k,32q1s8k"]).cells]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seqlen=1k"], "seqlen=1k says a length, and the batches of trace="),
        (["seqlen_per_rank=1k"], "seqlen_per_rank=1k says a length"),
        (["batch=q8,q16"], "batch=q8,q16 says a length"),
        (["search=max_seqlen"], "search=max_seqlen says a length"),
        (["trace.cells=1"], "trace.cells=1: too few batches for the totals of all lines within 1%; the least is 2"),
        (["trace.cells=0"], "trace.cells=0 is no whole number of at least 1"),
        (["trace.cells=3,4"], "trace.cells is not an axis and takes one value"),
        (["trace.cell=3"], "trace has no option 'cell' (trace.cell=3); it has file, cells"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"trace|length") as refused:
        look(grid_of(tmp_path, *words))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trace=nowhere.jsonl"], "trace=nowhere.jsonl cannot be read: No such file or directory"),
        (["trace="], "trace= names no file"),
        (["trace=a.jsonl,b.jsonl"], "trace.file is not an axis and takes one value"),
        (["trace.cells=4"], "trace.cells=4 says nothing without a trace; write trace=<file>"),
    ],
)
def test_a_trace_that_is_none_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"^trace") as refused:
        look([*GRID, *words])
    assert str(refused.value).startswith(said)


def test_without_a_trace_a_plan_has_none() -> None:
    assert look(GRID).trace is None


# -- the sum -----------------------------------------------------------------------------------------------------------


def test_the_time_of_a_trace_is_that_of_its_batches_as_often_as_they_stand_for_lines(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    found = answers(sweep)
    assert len(found) == 2
    for one in found:
        name = one.cell.config["cp"]["name"]
        exact = 7 * forward_s(sweep, name, "q3k") + 30 * forward_s(sweep, name, "16q1s4k") + 90 * forward_s(sweep, name, "32q1s8k")
        assert one.time is not None
        assert one.time.value == pytest.approx(exact)
        assert one.time.low < exact < one.time.high
        assert one.token_s == pytest.approx(exact / (7 * 3072 + 30 * 16 + 90 * 32))
        assert not one.why
    fast, slow = found
    assert fast.time is not None
    assert slow.time is not None
    assert fast.time.value < slow.time.value
    assert not fast.slower
    assert slow.slower.startswith(f"+{100 * (slow.time.value / fast.time.value - 1):.1f} % (")


def test_replicas_share_the_lines(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path, "cp=ring", "scale=1x4", "mesh.dp=2"))
    (one,) = answers(sweep)
    exact = sum(w * forward_s(sweep, "ring", batch) for w, batch in ((7, "q3k"), (30, "16q1s4k"), (90, "32q1s8k")))
    assert one.time is not None
    assert one.time.value == pytest.approx(exact / 2)


def test_where_a_batch_has_no_time_there_is_no_number_but_the_reason(tmp_path: Path) -> None:
    sweep = made_sweep(
        tmp_path, "served", grid_of(tmp_path),
        failure_of=lambda cell: Failure("oom", "no memory") if "ring" in cell.label and "s8k" in cell.label else None,
    )  # fmt: skip
    good, bad = answers(sweep)
    assert good.time is not None
    assert bad.time is None
    assert bad.token_s is None
    assert bad.why == "32q1s8k: oom: no memory"
    assert [row["why there is none"] for row in rows_of([good, bad])] == ["", bad.why]


def test_what_was_not_measured_yet_and_what_cannot_run_say_so(tmp_path: Path) -> None:
    plan = look(grid_of(tmp_path, "cp=ring,ulysses,none", "scale=1x2"))
    sweep = Sweep(tmp_path, "begun")
    sweep.add([Entry(p.cell, p.skip) for p in plan.cells], command=["words"], trace=plan.trace)
    said = {one.cell.config["cp"]["name"]: one.why for one in answers(sweep)}
    assert said["ring"] == "q3k: missing, not measured; and 2 more of 3 batches"
    assert said["none"].startswith("q3k: unsupported: cp none: ")


def test_a_batch_that_is_not_in_the_sweep_is_missed(tmp_path: Path) -> None:
    plan = look(grid_of(tmp_path, "cp=ring"))
    sweep = Sweep(tmp_path, "part")
    sweep.add([Entry(p.cell, p.skip) for p in plan.cells[:2]], command=["words"], trace=plan.trace)
    (one,) = answers(sweep)
    assert one.why == "q3k: missing, not measured; and 2 more of 3 batches"
    sweep = Sweep(tmp_path, "other part")
    sweep.add([Entry(p.cell, p.skip) for p in plan.cells[1:]], command=["words"], trace=plan.trace)
    assert answers(sweep)[0].why == "q3k: not in the sweep; and 2 more of 3 batches"


def test_cells_beside_a_trace_have_no_part_in_it(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    before = answers(sweep)
    sweep.add([Entry(p.cell, p.skip) for p in look([*GRID, "seqlen=1k"]).cells], command=["words"])
    assert [(one.cell, one.time) for one in answers(sweep)] == [(one.cell, one.time) for one in before]


def test_a_sweep_without_a_trace_has_no_answers(tmp_path: Path) -> None:
    assert answers(made_sweep(tmp_path, "plain", [*GRID, "seqlen=1k"])) == []


# -- the interval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [2, 16])
def test_the_interval_holds_the_truth_as_often_as_it_says(cells: int) -> None:
    random = np.random.default_rng(cells)
    truth, weights = random.lognormal(0, 1.5, cells), random.lognormal(0, 1.5, cells)
    held, runs = 0, 600
    for _ in range(runs):
        blocks = truth[:, None] * random.lognormal(0, 0.03, (cells, 3))
        one = weighted_sum(medians([Timing(float(np.median(b)), tuple(b.tolist()), 0.0) for b in blocks]), weights.tolist())
        held += one.low <= float(truth @ weights) <= one.high
    assert 0.92 <= held / runs <= 0.99


def test_what_is_off_together_is_not_averaged_out() -> None:
    """Predictions by one fit: a sum of them is as unsure as each."""
    times = [Median(seconds, 0.1, KNOWN, KNOWN, True) for seconds in (1.0, 2.0, 5.0)]
    assert weighted_sum(times, [3, 2, 1], together=True).sigma == pytest.approx(0.1)
    assert weighted_sum(times, [3, 2, 1]).sigma == pytest.approx(0.1 * np.sqrt(9 + 16 + 25) / 12)


def test_a_sum_is_as_well_known_as_its_least_known_time() -> None:
    sure, unsure = Median(1.0, 0.01, 12, 30, True), Median(1.0, 0.01, 2, 30, False)
    assert not weighted_sum([sure, unsure], [1, 1]).known
    assert weighted_sum([replace(sure, most_dof=3), sure], [1, 1]).most_dof == 3
    assert weighted_sum([sure], [5]) == replace(sure, value=5.0, most_dof=30)
    assert weighted_sum([Median(1.0, 0.0, KNOWN, KNOWN, False)], [2]).high == 2.0


# -- where it is kept and shown ------------------------------------------------------------------------------------------


def test_a_manifest_keeps_every_trace_once(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    first = look(grid_of(tmp_path)).trace
    (tmp_path / "other").mkdir()
    other = Trace.parse({"file": str(file_of(tmp_path / "other", LINES[:95])), "cells": 4})
    for trace in (first, other, None, first):
        sweep.add([], command=["words"], trace=trace)
    assert traces_of(sweep.manifest()) == (first, other)
    assert sweep.look().traces == (first, other)
    assert [one.trace.file for one in answers(sweep)] == [first.file] * 2 + [other.file] * 2  # type: ignore[union-attr]


def test_a_note_that_is_none_is_set_aside_with_its_manifest(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    sweep.manifest_path.write_text(json.dumps({**json.loads(sweep.manifest_path.read_text()), "traces": [{"file": "a"}]}))
    seen = sweep.look()
    assert seen.traces == ()
    assert seen.damaged


@pytest.mark.slow
def test_a_report_has_a_section_and_a_table(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    page = write_report(sweep, tmp_path / "out", known_devices()).page.read_text()
    assert '<section id="trace">' in page
    table = (tmp_path / "out" / "tables" / "trace.csv").read_text().splitlines()
    assert table[0] == "trace,what,time,95 % interval,per new token,than the fastest,why there is none"
    assert [line.split(",")[1] for line in table[1:]] == [one.cell.config["cp"]["name"] for one in answers(sweep)]
    assert f"trace {tmp_path}/day.jsonl: 127 lines as 3 batches with weights; totals off by: passes 0.00 %" in page
    assert "Its batches: q3k x 7, 16q1s4k x 30, 32q1s8k x 90." in page
    plain = made_sweep(tmp_path, "plain", [*GRID, "seqlen=1k"])
    assert 'id="trace"' not in write_report(plain, tmp_path / "plain-out", known_devices()).page.read_text()


def test_a_terminal_shows_a_table_for_each_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made_sweep(tmp_path, "served", grid_of(tmp_path))
    for table in tables(answers(sweep), "served"):
        console().print(table)
    lines = capsys.readouterr().out.splitlines()
    title = f"sweep served: the time of trace {tmp_path}/day.jsonl: kernel flash_attn3, mask causal, scale 1x2, heads 8x8x64"
    assert "".join(lines[:2]).startswith(title)
    assert {"ring", "ulysses"} <= {line.split()[0] for line in lines if line.strip()}


def test_one_choice_is_called_by_all_that_is_no_batch(tmp_path: Path) -> None:
    (row,) = rows_of(answers(made_sweep(tmp_path, "served", grid_of(tmp_path, "cp=ring"))))
    assert row["what"] == "ring flash_attn3 causal 1x2"


def test_a_command_predicts_a_trace_and_answers_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of prompts, which a machine that is described can be asked about."""
    monkeypatch.setattr("lcbench.runs.tracking.publish.publish_or_say", lambda *_, **__: None)
    file = file_of(tmp_path, [(0, 4096, 4)] * 5 + [(0, 8192, 1)] * 3)
    words = [f"trace={file}", "hydra/launcher=simulate", "machine=h100", "output=json", f"results={tmp_path}/results", "sweep=made"]
    assert launcher_named("simulate").launch_plan(look([*GRID, *words])) == 0
    said = capsys.readouterr()
    assert "8 lines as 2 batches with weights; totals off by: passes 0.00 %" in " ".join(said.err.split())
    assert "its batches: 4q4k x 5, q8k x 3\n" in said.err
    found = json.loads(said.out)["traces"]
    assert {one["choice"]["cp"] for one in found} == {"ring", "ulysses"}
    for one in found:
        assert one["predicted"]
        assert one["why"] is None
        assert 0 < one["low_s"] < one["time_s"] < one["high_s"]
        assert one["s_per_new_token"] == pytest.approx(one["time_s"] / (5 * 4 * 4096 + 3 * 8192))
