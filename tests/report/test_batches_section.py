"""Batches of documents in what is made of results: words, tables, figures, the page with and without scripts."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from lcbench.grid.devices import known_devices
from lcbench.planners.base import Assignment, Group
from lcbench.report.batches import answers, batch_rows, gains, pictures_of, table, timed
from lcbench.report.batches_figures import MOST_RANKS, compared, gains_by_lengths, gantts, makespans, page_figures, pictured
from lcbench.report.figures import all_figures
from lcbench.report.frame import reported
from lcbench.report.page import write_report
from lcbench.report.parts import shown
from lcbench.report.table import cells_table
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.dashboard import cell_views
from tests.browser import browser, needs_browser
from tests.report.made import batches_sweep, made_sweep
from tests.report.test_dashboard import state_of


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return batches_sweep(tmp_path_factory.mktemp("batches"))


@pytest.fixture(scope="module")
def frame(sweep: Sweep) -> pd.DataFrame:
    return reported(sweep)


@pytest.fixture(scope="module")
def rows(frame: pd.DataFrame) -> pd.DataFrame:
    return batch_rows(frame)


def with_foretold(frame: pd.DataFrame, planner: str) -> pd.DataFrame:
    """The cells of a planner as if they had been predicted only, as ``reported`` has such."""
    found = frame.copy()
    mine = found["what_planner"] == planner
    found.loc[mine, "status"], found.loc[mine, "good"] = "predicted", False
    found.loc[mine, "choice"] += " (predicted)"
    found.loc[mine, "assigned/predicted"] = found.loc[mine, "assigned/measured"]
    found.loc[mine, "assigned/measured"] = None
    return found


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_makespan_is_the_time_of_the_whole_batch(rows: pd.DataFrame) -> None:
    good = timed(rows)
    assert len(good) == 7, "8 cells, of which one failed"
    for row in good.to_dict("records"):
        assert row["makespan"].value == pytest.approx(row["time/total/median_s"])
        assert row["rest"] == "hybrid"
    assert set(rows["planner"]) == {"none", "fixed", "megatron_hybrid", "flexsp"}


def test_gains_are_over_fixed_of_the_same_batch(rows: pd.DataFrame) -> None:
    found = gains(rows)
    assert [(g.problem["what_mask"].partition("(")[2][:-1], g.planner) for g in found] == [
        ("web_text", "none"), ("web_text", "megatron_hybrid"), ("web_text", "flexsp"), ("long_text_64k", "megatron_hybrid"),
        ("long_text_64k", "flexsp"),
    ]  # fmt: skip
    by_cell = {row["cell"]: row for row in rows.to_dict("records")}
    for gain in found:
        mine, base = (by_cell[cell] for cell in gain.cells)
        assert base["planner"] == "fixed"
        assert base["what_mask"] == mine["what_mask"] == gain.problem["what_mask"]
        assert gain.ratio.value == pytest.approx(base["time/total/median_s"] / mine["time/total/median_s"])
        assert gain.ratio.low < gain.ratio.value < gain.ratio.high
        assert gain.with_plan == pytest.approx(base["batch/with_plan_s"] / mine["batch/with_plan_s"])
    assert {g.planner: round(g.ratio.value, 1) for g in found[:3]} == {"none": 0.5, "megatron_hybrid": 1.2, "flexsp": 1.4}


def test_what_was_predicted_is_held_against_nothing_measured(frame: pd.DataFrame) -> None:
    rows = batch_rows(with_foretold(frame, "flexsp"))
    assert {g.planner for g in gains(rows)} == {"none", "megatron_hybrid"}
    assert all("flexsp" not in "".join(text for _, text in answer.parts) for answer in answers(rows))
    both = batch_rows(with_foretold(with_foretold(frame, "flexsp"), "fixed"))
    assert {(g.planner, g.foretold) for g in gains(both)} == {("flexsp", True)}


def test_the_fastest_fixed_is_the_base_whatever_its_degree(frame: pd.DataFrame) -> None:
    slow = frame[frame["what_planner"] == "none"].assign(what_planner="fixed(degree=8)", choice="hybrid + planner=fixed(degree=8)")
    named = frame.assign(
        what_planner=frame["what_planner"].replace("fixed", "fixed(degree=2)"),
        choice=frame["choice"].replace("hybrid + planner=fixed", "hybrid + planner=fixed(degree=2)"),
    )
    found = gains(batch_rows(pd.concat([named, slow], ignore_index=True)))
    assert {g.planner for g in found} == {"none", "megatron_hybrid", "flexsp"}
    base = named[named["what_planner"] == "fixed(degree=2)"]["cell"]
    assert {g.cells[1] for g in found} == set(base)


def test_answers_name_the_first_and_what_it_gains(rows: pd.DataFrame) -> None:
    said = ["".join(text for _, text in answer.parts) for answer in answers(rows)]
    assert len(said) == 2
    assert said[0].startswith("causal_document(web_text), 128k, 1x8, heads 32x8x128: hybrid + planner=flexsp is done first, in ")
    assert re.search(r"; next hybrid \+ planner=megatron_hybrid, \+2\d\.\d %; fixed takes \+4\d\.\d %", said[0])
    assert said[0].endswith(", less than a batch.")


def test_the_table_has_every_batch_with_planning_apart(rows: pd.DataFrame) -> None:
    said = table(rows)
    assert len(said) == 7
    for row, its in zip(said, timed(rows).to_dict("records"), strict=True):
        assert row["cell"] == its["cell"]
        assert row["padding"] == "25.0 %"
        assert row["idle"] == "12.5 %"
        assert row["mean degree"] == "4.50"
        assert row["planning"]
        assert row["with planning"]
        assert row["planned meanwhile"] == row["makespan"]


@pytest.mark.slow
def test_sweeps_without_batches_have_no_section(tmp_path: Path) -> None:
    other = made_sweep(tmp_path, "a", ["cp=ring,ulysses", "seqlen=64k,128k", "scale=1x8", "kernel=flash_attn3", "site=plain"])
    assert batch_rows(reported(other)).empty
    written = write_report(other, tmp_path / "report", known_devices())
    assert 'id="mixed"' not in written.page.read_text(encoding="utf-8")
    assert not [path for path in written.files if path.stem in ("batches", "gains")]


# -- pictures ----------------------------------------------------------------------------------------------------------


def noted() -> dict[str, Any]:
    """Four ranks: all share a long document, then 0 and 2 share one, 1 has one to itself, and 3 has nothing."""
    given = Assignment(((Group((0, 1, 2, 3), (0,), "ring"),), (Group((0, 2), (1,), "ring"), Group((1,), (2,), "ring"))))
    gantt = [
        [[0, 0.0, 1.0, 3.0], [1, 3.0, 4.0, 6.0]], [[0, 0.0, 1.0, 3.0], [1, 3.0, 3.5, 4.0]],
        [[0, 0.0, 1.0, 3.0], [1, 3.0, 4.0, 6.0]], [[0, 0.0, 1.0, 3.0]],
    ]  # fmt: skip
    return {"assignment": given.plain(), "documents": [900, 80, 20], "gantt": gantt}


def test_a_picture_has_sub_groups_with_their_ranks_and_times() -> None:
    (picture,) = pictures_of({"assigned/measured": noted(), "assigned/predicted": None})
    assert [(box.degree, sorted(box.spans), box.long) for box in picture.boxes] == [
        (4, [0, 1, 2, 3], True), (2, [0, 2], False), (1, [1], False),
    ]  # fmt: skip
    assert picture.boxes[1].spans[2] == (3.0, 4.0, 6.0)
    assert (picture.ranks, picture.end, picture.foretold) == (4, 6.0, False)
    assert picture.idle == pytest.approx(1 - (6 + 4 + 6 + 3) / 24)
    said = "4 ranks are at work on 3 sub-groups of 1 to 4 ranks, until 6.00 s (measured); they wait for 21 % of that"
    assert picture.words == said


def test_measured_and_predicted_are_side_by_side(frame: pd.DataFrame) -> None:
    both = frame.assign(**{"assigned/predicted": frame["assigned/measured"]})
    one = next(iter(pictured(batch_rows(both))))
    assert [name for name, _ in one.pictures[:2]] == ["hybrid", "hybrid, predicted"]
    assert [picture.foretold for _, picture in one.pictures[:2]] == [False, True]
    alone = next(iter(pictured(batch_rows(with_foretold(frame, "none")))))
    assert alone.pictures[0][0] == "hybrid (predicted)", "of what never ran the choice says it"


@pytest.mark.slow
def test_pictures_of_many_ranks_show_some_of_them(frame: pd.DataFrame) -> None:
    ranks = 4 * MOST_RANKS
    notes = {
        "assignment": Assignment(((Group(tuple(range(ranks)), (0, 1), "ring"),),)).plain(), "documents": [600, 400],
        "gantt": [[[0, 0.0, 1.0, 2.0]]] * ranks,
    }  # fmt: skip
    many = frame.assign(**{"assigned/measured": pd.Series([notes] * len(frame), dtype=object)})
    figure = next(iter(gantts(shown(many, known_devices()))))
    axis = figure.figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [str(rank) for rank in range(0, ranks, 4)]
    assert axis.get_ylabel() == "every 4th rank"
    assert {text.get_text() for text in axis.texts} == {str(ranks)}


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_figure_of_batches_is_among_those_of_the_report(frame: pd.DataFrame) -> None:
    names = [drawn.name for drawn in all_figures(frame, known_devices(), {})]
    assert len(set(names)) == len(names)
    assert [kind for kind in ("makespan", "gain", "gantt") for name in names if name.startswith(f"{kind}_")] == [
        "makespan", "makespan", "gain", "gantt", "gantt"
    ]  # fmt: skip


def test_bars_are_as_long_as_the_makespans(frame: pd.DataFrame) -> None:
    of = shown(frame, known_devices())
    drawn = next(iter(makespans(of)))
    patches: list[Any] = list(drawn.figure.axes[0].patches)
    first = batch_rows(frame)
    want = sorted(row["time/total/median_s"] for row in first[first["what_mask"].str.contains("web_text")].to_dict("records"))
    lengths = sorted(bar.get_width() for bar in patches if bar.get_height() > 0.5)
    assert np.array(lengths) == pytest.approx(1e3 * np.array(want))
    planning = sorted(bar.get_width() for bar in patches if bar.get_height() < 0.5)
    assert np.array(planning) == pytest.approx(0.3e3 * np.array(want))


def test_gains_are_drawn_where_they_are_and_predictions_hollow(frame: pd.DataFrame) -> None:
    of = shown(with_foretold(with_foretold(frame, "flexsp"), "fixed"), known_devices())
    assert of.styles["hybrid + planner=flexsp (predicted)"].hollow
    (one,) = compared(batch_rows(of.cells))
    assert one.choices == ["hybrid + planner=flexsp (predicted)"]
    (drawn,) = gains_by_lengths(of)
    marks = [line for line in drawn.figure.axes[0].get_lines() if line.get_marker() not in ("None", "", None)]
    assert [line.get_xdata()[0] for line in marks] == pytest.approx([100 * (gain.ratio.value - 1) for gain in one.gains])
    assert {line.get_markerfacecolor() for line in marks} == {"none"}


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sweep, tmp_path_factory.mktemp("page"), known_devices()).page


@pytest.mark.slow
def test_the_page_says_it_without_scripts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    section = text[text.index('<section id="mixed">') :]
    section = section[: section.index("</section>")]
    assert section.count('class="answer"') == 2
    assert section.count("<svg ") == 2 + 1 + 7, "makespans, gain, a picture of every batch that ran"
    assert section.count('role="img" aria-label="') == section.count("<svg ")
    assert "#010203" not in section, "text is that of the page, light or dark"
    assert "currentColor" in section
    assert not re.search(r' id="[a-zA-Z]+_\d+"', section)
    with (page.parent / "tables" / "gains.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 5
    for svg in re.findall(r"<svg .*?</svg>", section, flags=re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.slow
def test_nothing_in_the_page_refers_to_what_is_not_there(frame: pd.DataFrame) -> None:
    for panel in page_figures(shown(frame, known_devices())):
        for figure in panel["figures"]:
            ids = set(re.findall(r' id="([^"]+)"', figure["svg"]))
            assert set(re.findall(r"url\(#([^)]+)\)", figure["svg"])) <= ids
            assert set(re.findall(r'xlink:href="#([^"]+)"', figure["svg"])) <= ids


@needs_browser
@pytest.mark.slow
def test_a_filter_leaves_what_its_cells_are_in(page: Path) -> None:
    with browser() as b:
        b.page.goto(page.as_uri())
        answers_ = b.page.locator("#mixed .answer:visible")
        assert answers_.count() == 2
        b.page.locator("#facets button", has_text=re.compile("^flexsp")).first.click()
        assert b.page.locator("#mixed-rows tbody tr:visible").count() == 2
        assert b.complaints == []


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_terminal_shows_makespans_of_batches(sweep: Sweep) -> None:
    columns = [column.head for column in cells_table(sweep.look(), sweep.name).columns]
    assert [name for name in columns if name in ("makespan\nms", "tokens/s\nof all", "idle")] == [
        "makespan\nms", "tokens/s\nof all", "idle"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_dashboard_has_columns_of_batches(sweep: Sweep) -> None:
    records = sweep.look().records
    for view in cell_views(sweep.name, "id", 0.0, {cell: record.entry for cell, record in records.items()}):
        state = state_of(view.value)
        assert "params.`planner`" in state["selectedColumns"]
        assert "metrics.`idle_percent`" in state["selectedColumns"]
        assert "planner" in [group["groupByData"] for group in state["groupBy"]["groupByKeys"]]
