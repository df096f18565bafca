"""Attention that chooses its mask in what is made of results: words, tables, figures, the page with and without scripts."""

from __future__ import annotations

import csv
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from lcbench.grid.devices import known_devices
from lcbench.report.amounts import digits
from lcbench.report.figures import all_figures
from lcbench.report.frame import ranked, reported
from lcbench.report.page import write_report
from lcbench.report.parts import shown
from lcbench.report.sparse import answers, asked, contests, seconds_of, selections, sparse_rows, table
from lcbench.report.sparse_figures import figures_of
from lcbench.report.table import cells_table, to_rows
from lcbench.report.winners import winners
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.dashboard import cell_views
from tests.browser import browser, needs_browser
from tests.report.made import made_sweep, sparse_sweep
from tests.report.test_dashboard import state_of


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sparse_sweep(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def frame(sweep: Sweep) -> pd.DataFrame:
    return reported(sweep)


def test_the_table_of_a_sweep_has_choosing_beside_what_is_computed(sweep: Sweep) -> None:
    seen, lines = sweep.look(), StringIO()
    Console(width=400, file=lines).print(cells_table(seen, "sparse"))
    assert "select," in lines.getvalue()
    rows = [row for row in to_rows(seen) if row["choosing_s"] is not None]
    assert rows
    for row in rows:
        assert row["choosing_s"] == pytest.approx(0.15 * row["total_s"])
        assert digits(1e3 * row["choosing_s"]) in lines.getvalue()


def drawn(frame: pd.DataFrame, kind: str) -> Any:
    (one,) = (each for each in all_figures(frame, known_devices(), {}) if each.kind == kind)
    return one.figure.axes[0]


def test_strategies_choose_the_same_so_a_selection_is_told_once(frame: pd.DataFrame) -> None:
    ((problem, rows),) = contests(sparse_rows(frame))
    found = selections(rows)
    assert problem["what_mask"] == "causal"
    assert len(rows) == 12
    assert [(one.selector, one.asked, round(one.recall, 6)) for one in found] == [
        ("oracle", 0.1, 0.8), ("oracle", 0.2, 0.9), ("dsv", 0.1, 0.7), ("dsv", 0.2, 0.8),
        ("random", 0.1, 0.1), ("random", 0.2, 0.2),
    ]  # fmt: skip
    assert sorted(cell for one in found for cell in one.cells) == sorted(rows["cell"])


def test_selectors_are_ranked_by_what_as_many_blocks_can_keep(frame: pd.DataFrame) -> None:
    ((_, rows),) = contests(sparse_rows(frame))
    found = asked(selections(rows))
    assert [(density, [one.selector for one in group]) for density, group in found] == [
        (0.1, ["dsv", "random"]), (0.2, ["dsv", "random"])
    ]  # fmt: skip
    assert found[0][1][0].of_best == pytest.approx(0.7 / 0.8)


def test_answers_say_what_keeps_most_and_what_a_step_takes(frame: pd.DataFrame) -> None:
    said = ["".join(text for _, text in answer.parts) for answer in answers(sparse_rows(frame))]
    assert len(said) == 3
    assert "10.0 %" not in said[0].partition(":")[0]
    assert ", 10 % of the blocks asked for: dsv(density=0.1) comes closest to the best choice" in said[0]
    assert "87.5 % of it (70.0 % of the softmax's mass in 10.0 % of the pairs); then random(density=0.1) 12.5 % of it" in said[0]
    assert (
        "where 4 steps share a choice, and keeps 90.0 % of the softmax's mass. Faster than full attention: 12 of 12 choices."
        in said[2]
    )


def test_the_table_has_the_phases_and_the_steps_that_share_a_choice(frame: pd.DataFrame) -> None:
    rows = sparse_rows(frame)
    for text, row in zip(table(rows), rows.to_dict("records"), strict=True):
        assert text["recall"] == f"{100 * row['select/recall']:.1f} %"
        assert text["distance"]
        assert row["select/amortised_s"] == pytest.approx(0.8875 * row["time/total/median_s"])
        assert set(seconds_of(row)) == {"select", "plan", "attention"}


def test_what_approximates_wins_nothing(frame: pd.DataFrame) -> None:
    assert set(frame["approximate"]) != {""}
    assert not winners(frame[frame["good"]])


@pytest.mark.slow
def test_recall_is_drawn_over_the_density_that_was_reached(frame: pd.DataFrame) -> None:
    axis = drawn(frame, "recall")
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines) == ["best possible", "oracle", "dsv", "random"]
    assert list(lines["dsv"].get_xdata()) == pytest.approx([10, 20])
    assert list(lines["dsv"].get_ydata()) == pytest.approx([70, 80])
    spread = axis.collections[1].get_segments()
    assert [list(end[:, 1]) for end in spread] == [pytest.approx([65, 75]), pytest.approx([75, 85])]


@pytest.mark.slow
def test_bars_are_what_a_pass_goes_to(frame: pd.DataFrame) -> None:
    axis = drawn(frame, "selecting")
    widths = [bar.get_width() for bar in axis.patches]
    its = sorted(sparse_rows(frame).to_dict("records"), key=lambda row: sum(seconds_of(row).values()))
    assert widths == pytest.approx([1e3 * part for row in its for part in seconds_of(row).values()])


def test_one_choice_without_full_attention_is_drawn(frame: pd.DataFrame) -> None:
    one = frame[frame["workload"] == "sparse_attention"].iloc[:1].assign(**{"time/dense_s": float("nan")})
    assert len(drawn(one, "selecting").patches) == 3


def test_findings_are_alternative_texts(frame: pd.DataFrame) -> None:
    found = {one.kind: one.finding for one in figures_of(shown(frame, known_devices()))}
    assert found["recall"].startswith(
        "oracle 80.0 % of the mass at 10.0 % of the pairs, 90.0 % of the mass at 20.0 % of the pairs;"
    )
    assert "sparse_heads (approximate) sends 2.86 MiB," in found["critical"]


def test_sweeps_of_other_kinds_have_no_section(tmp_path: Path) -> None:
    other = made_sweep(tmp_path, "a", ["cp=ring,ulysses", "seqlen=64k", "scale=1x8", "kernel=flash_attn3", "site=plain"])
    text = write_report(other, tmp_path / "report", known_devices()).page.read_text(encoding="utf-8")
    assert 'id="sparse"' not in text
    assert 'id="linear"' not in text


@pytest.fixture(scope="module")
def page(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sweep, tmp_path_factory.mktemp("page"), known_devices()).page


@pytest.mark.slow
def test_the_page_says_it_without_scripts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    section = text[text.index('<section id="sparse">') :]
    section = section[: section.index("</section>")]
    assert section.count('class="answer"') == 3
    assert section.count('<svg role="img" aria-label="') == section.count("<svg ") == 3
    assert "#010203" not in section, "text is that of the page, light or dark"
    with (page.parent / "tables" / "sparse.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 12


@needs_browser
@pytest.mark.slow
def test_a_ranking_of_what_approximates_begins_with_the_closest_and_has_no_best(page: Path, frame: pd.DataFrame) -> None:
    order = ["oracle(density=0.2)", "oracle(density=0.1)", "dsv(density=0.2)", "dsv(density=0.1)"]
    with browser() as b:
        b.page.goto(f"{page.as_uri()}#.fig=ranking")
        names = b.page.evaluate(
            "[...document.querySelectorAll('#figure-ranking svg [aria-label^=\"y-axis tick label\"] text')].map(t => t.textContent)"
        )
        found = [name.partition("selector=")[2] for name in names]
        assert set(found[:2]) == {order[0]}
        assert set(found[2:6]) == {order[1], order[2]}, "both are as far off, so that the fastest of them is first"
        assert found[-2:] == ["random(density=0.1)"] * 2
        assert list(ranked(frame)["choice"]) == names
        assert b.page.locator("#figure-ranking svg [aria-label=bar] rect").count() == len(names) == 12
        text = b.page.inner_text("#figure-ranking")
        assert "+" not in text.replace(" + selector", "")
        assert f"Nothing exact ran; {names[0]} is the closest" in b.page.inner_text("#figure")
        assert "vs best" not in b.page.inner_text("#rows thead")
        assert b.complaints == []


@needs_browser
@pytest.mark.slow
def test_a_filter_leaves_what_its_cells_are_in(page: Path) -> None:
    with browser() as b:
        b.page.goto(page.as_uri())
        assert b.page.locator("#sparse .answer:visible").count() == 3
        b.page.locator("#facets button", has_text=re.compile(r"^random\(density=0.1\)")).first.click()
        assert b.page.locator("#sparse-rows tbody tr:visible").count() == 2
        assert b.complaints == []


@pytest.mark.slow
def test_the_dashboard_has_columns_of_selections(sweep: Sweep) -> None:
    records = sweep.look().records
    for view in cell_views(sweep.name, "id", 0.0, {cell: record.entry for cell, record in records.items()}):
        columns = state_of(view.value)["selectedColumns"]
        assert "params.`selector`" in columns
        assert "metrics.`recall_percent`" in columns
