"""Predictions beside measurements: never taken for one another, held against each other row by row, an answer only when asked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lcbench.commands import compare as compare_command
from lcbench.commands import report as report_command
from lcbench.grid.devices import known_devices
from lcbench.report.figures import all_figures
from lcbench.report.foretold import Held, held, said
from lcbench.report.frame import PREDICTED, frame_of, good_rows, reported
from lcbench.report.page import write_report
from lcbench.report.palette import styles
from lcbench.report.publishing import summary_of
from lcbench.report.regret import regrets
from lcbench.report.table import cells_table, to_rows
from lcbench.report.winners import winners
from lcbench.runs.attempt import Attempt
from lcbench.runs.store import Sweep
from tests.browser import browser, needs_browser
from tests.report.made import foretell, made_sweep

GRID = [
    "-m",
    "cp=ring,ulysses",
    "kernel=flash_attn3",
    "mask=causal,full,sliding_window",
    "seqlen=48k,96k",
    "scale=1x8,3x8",
    "heads=48x24x64",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return made_sweep(tmp_path_factory.mktemp("foretold"), "measured", GRID)


@pytest.fixture(scope="module")
def foretold(measured: Sweep) -> Sweep:
    """Only predicted."""
    return foretell(Sweep(measured.root, "foretold"), measured)


@pytest.fixture(scope="module")
def mixed(measured: Sweep) -> Sweep:
    """Measured at one scale with predictions of these cells, and only predicted at the other."""
    sweep = made_sweep(measured.root, "mixed", [w for w in GRID if "scale" not in w] + ["scale=1x8"])
    return foretell(sweep, measured)


def test_answers_are_those_of_the_measured_cells_alone(mixed: Sweep) -> None:
    alone = good_rows(reported(mixed))
    assert set(alone["scale"]) == {"1x8"}
    assert {w.scale for w in winners(alone)} == {"1x8"}
    assert not [r.choice for r in regrets(alone) if "predicted" in r.choice]


def test_answers_from_predictions_say_so_in_every_choice(mixed: Sweep) -> None:
    asked = good_rows(reported(mixed, predicted=True))
    assert len(asked) == 24
    assert all(r.choice.endswith(PREDICTED) for r in regrets(asked))
    assert all(w.choice.endswith(PREDICTED) for w in winners(asked))


def test_a_band_is_the_interval_of_a_predicted_time(foretold: Sweep) -> None:
    row = good_rows(reported(foretold, predicted=True)).iloc[0]
    time = row["timed/total"]
    assert time.high / time.value == pytest.approx(1.25)
    assert time.value / time.low == pytest.approx(1.25)


def test_a_cell_has_a_row_of_what_was_measured_and_one_more_of_all_attempts(mixed: Sweep) -> None:
    newest = frame_of([mixed])
    assert newest.groupby("status").size().to_dict() == {"ok": 12, "predicted": 12}
    assert frame_of([mixed], attempts="all").groupby("status").size().to_dict() == {"ok": 12, "predicted": 24}


def test_the_table_ranks_what_was_measured_only(mixed: Sweep) -> None:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(cells_table(mixed.look(), mixed.name))
    lines = [line for line in shown.get().splitlines() if line.startswith(("ok", "predicted"))]
    assert len(lines) == 24
    for line in lines:
        ranked = bool(re.search(r"\d\.\d\dx|[+]\d+\.\d %", line.partition("within")[0]))
        assert ranked == line.startswith("ok"), line
        assert ("within 1.25x" in line) == line.startswith("predicted"), line


def test_rows_for_scripts_tell_predictions_by_status_and_band(mixed: Sweep) -> None:
    for row in to_rows(mixed.look()):
        assert (row["status"] == "predicted") == (row["band"] is not None)


def test_errors_are_shares_of_what_was_measured(measured: Sweep, mixed: Sweep) -> None:
    rows = held(mixed.look().records.values(), ["total"])
    assert len(rows) == 12
    slow = [row for row in rows if row.cell.words["mask"].startswith("sliding_window")]
    assert all(row.error == pytest.approx(0.4, abs=0.08) and not row.within for row in slow)
    assert all(row.error == pytest.approx(-0.05, abs=0.05) and row.within for row in rows if row not in slow)


def test_a_summary_counts_errors_without_their_sign(measured: Sweep) -> None:
    cell = next(iter(measured.entries().values())).cell
    rows = [Held(cell, "total", predicted, 1.0, 0.1) for predicted in (0.8, 1.0, 1.05, 1.4)]
    assert "median error 12.5 %" in said(rows)
    assert "2 of 4 times lie within their band" in said(rows)


def test_compare_holds_predictions_against_measurements(
    measured: Sweep, foretold: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [measured.name, foretold.name, "--results", str(measured.root)]
    assert compare_command.main([*names, "--predicted", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["cells"]) == 24
    errors = {row["cell"]: row["error"] for row in found["cells"]}
    for cell_id, record in measured.look().records.items():
        slow = "sliding_window" in record.entry.cell.label
        assert errors[cell_id] == pytest.approx(0.4 if slow else -0.05)
    assert compare_command.main([*names, "--predicted"]) == 0
    assert "in it" in capsys.readouterr().out


def test_compare_without_predicted_says_that_nothing_was_measured(
    measured: Sweep, foretold: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_command.main([measured.name, foretold.name, "--results", str(measured.root)]) == 2
    assert capsys.readouterr().err.strip().endswith("in foretold nothing was measured, only predicted (--predicted)")


def test_compare_of_what_has_no_predictions_is_one_line(measured: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_command.main([measured.name, measured.name, "--results", str(measured.root), "--predicted"])
    assert ended.value.code == 2
    assert "no cell is predicted in one of" in capsys.readouterr().err


def test_a_report_of_predictions_needs_some(measured: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report_command.main([measured.name, "--results", str(measured.root), "--predicted"])
    assert ended.value.code == 2
    assert "has no predictions" in capsys.readouterr().err


def block_of(page: Path) -> dict[str, Any]:
    text = page.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.slow
def test_a_page_marks_predictions_and_its_answers_leave_them_out(mixed: Sweep, tmp_path: Path) -> None:
    page = write_report(mixed, tmp_path, known_devices()).page
    text, block = page.read_text(), block_of(page)
    assert "12 cells were not measured but predicted" in text
    assert "<td>+4" in text, "a table of predictions against measurements"
    assert block["good"] == "ok"
    looks = block["styles"]
    assert {choice: look["hollow"] for choice, look in looks.items()} == {
        "ring": False, "ulysses": False, f"ring{PREDICTED}": True, f"ulysses{PREDICTED}": True,
    }  # fmt: skip
    assert looks["ring"]["color"] == looks[f"ring{PREDICTED}"]["color"]
    answers = text.partition('<section id="fastest">')[2].partition("</section>")[0]
    assert "predicted" not in answers
    assert (tmp_path / "tables" / "predicted-measured.csv").exists()


@pytest.mark.slow
def test_a_page_of_predictions_says_so_first(mixed: Sweep, tmp_path: Path) -> None:
    page = write_report(mixed, tmp_path, known_devices(), predicted=True).page
    text = page.read_text()
    assert "Every number on this page is a prediction" in text
    assert block_of(page)["good"] == "predicted"
    assert "float64 reference before it was timed" not in text


@pytest.mark.slow
def test_a_page_of_a_measured_sweep_is_as_ever(measured: Sweep, tmp_path: Path) -> None:
    text = write_report(measured, tmp_path, known_devices()).page.read_text()
    assert "not measured but predicted" not in text
    assert "Predicted and measured" not in text
    assert not any(look["hollow"] for look in block_of(tmp_path / "report.html")["styles"].values())


def test_a_sweep_s_run_says_that_its_verdict_is_predicted(foretold: Sweep, mixed: Sweep) -> None:
    assert summary_of(foretold, foretold.look()).tags["lcbench.verdict"].startswith("Predicted, nothing measured: Use ")
    assert "redicted" not in summary_of(mixed, mixed.look()).tags["lcbench.verdict"]


def test_figures_draw_predictions_hollow(mixed: Sweep) -> None:
    found = styles(reported(mixed))
    assert found[f"ring{PREDICTED}"].matplotlib["markerfacecolor"] == "none"
    assert "markerfacecolor" not in found["ring"].matplotlib


@pytest.mark.slow
def test_files_of_figures_show_predictions_beside_measurements(tmp_path: Path) -> None:
    grid = ["-m", "cp=ring,ulysses", "kernel=flash_attn3", "mask=causal", "scale=1x8", "heads=48x24x64"]
    longer = made_sweep(tmp_path, "longer", [*grid, "seqlen=48k,96k,192k"])
    sweep = foretell(made_sweep(tmp_path, "both", [*grid, "seqlen=48k,96k"]), longer)
    line = next(f for f in all_figures(reported(sweep), known_devices(), {}) if f.kind == "rate-by-length")
    assert line.caption.endswith("Dotted and hollow: predicted, not measured.")
    assert f"ring{PREDICTED}" in {text.get_text() for legend in line.figure.legends for text in legend.get_texts()}
    assert "predicted" not in line.alt, "who leads is said of what was measured"


@needs_browser
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.slow
def test_a_browser_shows_the_page_without_complaint(mixed: Sweep, tmp_path: Path, predicted: bool) -> None:
    page = write_report(mixed, tmp_path, known_devices(), predicted=predicted).page
    with browser() as seen:
        seen.page.goto(page.as_uri())
        chip = seen.page.locator('[data-chip="status=predicted"]')
        assert chip.count() == (not predicted)
        if not predicted:
            chip.click()
            assert seen.page.locator("#rows tr.row:visible").count() == 12
            assert "within 1.25x" in seen.page.locator("#rows tr.row:visible").first.inner_text()
        for tab in seen.page.locator("[role=tab]").all_inner_texts():
            seen.page.get_by_role("tab", name=tab, exact=True).click()
        assert not seen.complaints


@pytest.mark.slow
def test_a_prediction_is_no_attempt(mixed: Sweep) -> None:
    cell_id, record = next((i, r) for i, r in mixed.look().records.items() if r.prediction is not None)
    prediction = record.prediction
    assert prediction is not None
    with pytest.raises(AssertionError):
        mixed.finish(replace(prediction, number=7))
    with pytest.raises(ValueError, match="attempts are measured"):
        Attempt.from_json({**json.loads((mixed.folder / cell_id / "prediction.json").read_text()), "number": 7})
    assert math.isfinite(prediction.metrics["time/total/median_s"])
