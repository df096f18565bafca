"""Training steps in what is made of results: the frame, tables, the page, MLflow; beside calls of attention, which they are not
ranked against.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from lcbench.grid.axes import value_of
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.search import Search
from lcbench.report.figures import all_figures
from lcbench.report.frame import good_rows, reported
from lcbench.report.page import write_report
from lcbench.report.page_data import searched_of
from lcbench.report.parts import TIME, only_attention, shown
from lcbench.report.publishing import summary_of
from lcbench.report.regret import contests, regrets
from lcbench.report.roofline import roofline
from lcbench.report.step import MEMORY, SCALED, Step, colors_of, reached, steps_of, table
from lcbench.report.step_figures import step_parts
from lcbench.report.table import cells_table, summary, to_rows
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.dashboard import cell_views
from lcbench.runs.tracking.shown import note, values
from tests.browser import browser, needs_browser
from tests.report.made import MEMORY_FAILURE, made_sweep
from tests.report.test_dashboard import state_of

CALLS = ["cp=ring,ulysses", "kernel=flash_attn3", "mask=causal", "seqlen=32k,64k,128k", "scale=2x8", "site=plain"]
BLOCKS = [*CALLS, "workload=block", "model=llama3_8b", "workload.optimizer=adamw", "recompute=none,full"]
GIB = 2.0**30
# With recomputation 128k does not fit, and with a ring 64k neither.
STEP = "{} flash_attn3 causal {} 2x8 workload=block(llama3_8b, layers=2) recompute=full"
FAILED = {
    STEP.format(cp, length): MEMORY_FAILURE for cp, length in (("ulysses", "128k"), ("ring", "64k"), ("ring", "128k"))
}  # fmt: skip


def factor(cell: Cell) -> float:
    """A ring is slower, but of calls of attention it is faster."""
    ring = cell.config["cp"]["name"] == "ring"
    return (1.5 if ring else 1.0) if "workload" in cell.config else (0.4 if ring else 1.0)


def peak(cell: Cell) -> float:
    return (10.0 if value_of(cell.config, "recompute") == "full" else 40.0) * GIB * cell.problem.seqlen / 131072


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    root = tmp_path_factory.mktemp("steps")
    for grid in (BLOCKS, CALLS):
        sweep = made_sweep(root, "s", grid, factor_of=factor, peak_of=peak, failed=FAILED)
    return sweep


@pytest.fixture(scope="module")
def frame(mixed: Sweep) -> pd.DataFrame:
    return reported(mixed)


# -- the frame ---------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_where_its_label_says(frame: pd.DataFrame) -> None:
    assert sorted(frame["choice"][frame["status"] == "failed"]) == [
        "ring + recompute=full",
        "ring + recompute=full",
        "ulysses + recompute=full",
    ]


def test_choices_tell_recompute_where_it_is_not_none(frame: pd.DataFrame) -> None:
    both = {"ring", "ulysses"}
    assert set(frame["choice"][only_attention(frame)]) == both
    assert set(frame["choice"][~only_attention(frame)]) == both | {f"{cp} + recompute=full" for cp in both}


def test_a_step_and_a_call_of_attention_are_never_one_problem_or_one_contest(frame: pd.DataFrame) -> None:
    assert (frame.groupby("problem")["workload"].nunique() == 1).all()
    assert (frame.groupby("setting")["workload"].nunique() == 1).all()
    found = {name: regrets(rows) for name, rows in contests(good_rows(frame)).items()}
    assert list(found) == ["block", "attention"]
    assert [ranked[0].choice for ranked in found.values()] == ["ulysses", "ring"], "each has its own best"
    assert {r.choice for r in found["attention"]} == {"ring", "ulysses"}
    assert {r.problems for ranked in found.values() for r in ranked} == {3}


def test_what_only_attention_has_is_not_drawn_of_steps(frame: pd.DataFrame) -> None:
    blocks = frame[~only_attention(frame)]
    assert list(roofline(shown(blocks, known_devices()), {})) == []
    (figure,) = roofline(shown(frame, known_devices()), {})
    points = sum(len(drawn.get_offsets()) for drawn in figure.figure.axes[0].collections)
    assert points == len(good_rows(frame[only_attention(frame)]))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_step_is_made_of_its_phases_and_the_whole_model_of_them_as_often_as_it_has_them(frame: pd.DataFrame) -> None:
    steps, rows = steps_of(frame), frame.set_index("cell")
    assert set(steps) == set(frame["cell"][~only_attention(frame)])
    for cell, step in steps.items():
        row = rows.loc[cell]
        assert (step.model, step.layers, step.of, step.rest) == ("llama3_8b", 2, 32, row["what_cp"])
        if row["status"] != "ok":
            assert step.phases == step.memory == step.whole == {}
            continue
        assert list(step.phases) == ["forward", "head", "backward", "reduce", "optimizer"]
        assert sum(step.phases.values()) == pytest.approx(row["time/total/median_s"], rel=0.05)
        repeats = {"forward": 16, "head": 1, "backward": 16, "reduce": 1.5, "optimizer": 1.5}
        assert step.whole == pytest.approx({phase: repeats[phase] * seconds for phase, seconds in step.phases.items()})
        assert step.whole_s == pytest.approx(sum(step.whole.values()))
        assert list(step.memory) == list(MEMORY)
        held = sum(bytes_ for kind, bytes_ in step.memory.items() if kind != "transient")
        assert step.memory["transient"] == pytest.approx(max(0.0, row["memory/peak_bytes"] - held))
        assert step.mfu is not None
        assert step.hfu is not None
        assert (step.hfu > step.mfu) == (step.recompute == "full")


def test_classes_that_are_more_than_the_peak_leave_nothing_transient(frame: pd.DataFrame) -> None:
    row = frame[~only_attention(frame)].iloc[0].to_dict()
    assert Step.of_row(row | {"memory/peak_bytes": 1.0}).memory["transient"] == 0.0
    assert Step.of_row({k: v for k, v in row.items() if not k.startswith("memory/")}).memory == {}


def test_all_layers_of_a_model_are_all_layers(frame: pd.DataFrame) -> None:
    row = frame[~only_attention(frame)].iloc[0].to_dict()
    assert Step.of_row(row | {"workload.layers": float("nan")}).layers == 32


def test_a_phase_of_a_workload_of_ones_own_has_a_place_and_a_colour(frame: pd.DataFrame) -> None:
    row = frame[~only_attention(frame)].iloc[0].to_dict() | {"time/reshard/median_s": 1.0}
    phases = Step.of_row(row).phases
    assert list(phases)[-1] == "reshard"
    colors = colors_of(phases)
    assert list(colors) == list(phases)
    assert len(set(colors.values())) == len(colors)


def test_how_far_each_choice_came(frame: pd.DataFrame) -> None:
    found = {r.choice: (r.length, r.beyond, r.why) for r in reached(frame)}
    k = 1024
    assert found == {
        "ring": (128 * k, None, ""), "ulysses": (128 * k, None, ""), "ring + recompute=full": (32 * k, 64 * k, "oom"),
        "ulysses + recompute=full": (64 * k, 128 * k, "oom"),
    }  # fmt: skip
    assert reached(frame[frame["seqlen"] == 32 * k]) == [], "one length tells nothing"
    assert reached(frame[only_attention(frame)]) == []


def test_a_choice_that_ran_nowhere_says_so(frame: pd.DataFrame) -> None:
    (none,) = [r for r in reached(frame[frame["seqlen"] > 32 * 1024]) if r.choice == "ring + recompute=full"]
    assert (none.length, none.beyond, none.peak) == (None, 64 * 1024, None)
    assert none.row()["longest that ran"] == "none"


# -- figures as files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_figure_per_problem_has_a_bar_per_choice_and_says_what_failed(frame: pd.DataFrame, tmp_path: Path) -> None:
    figures = {figure.name: figure for figure in step_parts(shown(frame, known_devices()))}
    assert len(figures) == 3
    (name,) = [name for name in figures if "64k" in name]
    figure = figures[name]
    time, memory = figure.figure.axes
    rows = frame[(frame["seqlen"] == 64 * 1024) & (frame["status"] == "ok") & ~only_attention(frame)].sort_values(TIME)
    names = [*rows["choice"], "ring + recompute=full"]
    assert sorted(names) == ["ring", "ring + recompute=full", "ulysses", "ulysses + recompute=full"]
    assert [tick.get_text() for tick in time.get_yticklabels()] == names
    assert [tick.get_text() for tick in memory.get_yticklabels()] == names
    for axis in (time, memory):
        assert [text.get_text() for text in axis.texts if "✕" in text.get_text()] == ["✕ oom"]
    drawn = {container.get_label(): [bar.get_width() for bar in container] for container in time.containers}
    steps = [Step.of_row(row) for row in rows.to_dict("records")]
    unit = steps[0].phases["forward"] / drawn["forward"][0]
    for phase in steps[0].phases:
        assert [width * unit for width in drawn[phase]] == pytest.approx([step.phases[phase] for step in steps])
    assert SCALED in figure.caption
    assert figure.alt.startswith("ulysses takes least time")
    assert all(path.stat().st_size > 5000 for path in figure.save(tmp_path))
    assert name in {one.name for one in all_figures(frame, known_devices(), {})}
    assert list(step_parts(shown(frame[only_attention(frame)], known_devices()))) == []


# -- terminal ----------------------------------------------------------------------------------------------------------


def printed(part: object, width: int = 160) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as caught:
        console.print(part)
    return caught.get()


def test_the_table_of_a_sweep_has_the_steps_time_and_tokens(mixed: Sweep) -> None:
    seen = mixed.look()
    blocks = [cell for cell, r in seen.records.items() if "workload" in r.entry.cell.config]
    rows = {row["cell"]: row for row in to_rows(seen)}
    wide, narrow = (printed(cells_table(seen, "s", blocks), width) for width in (180, 90))
    for head in ("step ms", "tokens/s", "MFU", "peak"):
        assert head in wide
        assert head in narrow
    assert "fwd ms" in wide
    assert "fwd ms" not in narrow
    for cell in blocks:
        (line,) = [line for line in wide.splitlines() if cell in line]
        assert ("recompute=full" in line) == (rows[cell]["recompute"] == "full")
        if rows[cell]["status"] == "ok":
            assert f"{1e3 * rows[cell]['total_s']:.3g}" in line.replace(",", "")
    calls = [cell for cell in seen.records if cell not in blocks]
    assert "step ms" not in printed(cells_table(seen, "s", calls), 180)
    assert {rows[cell]["recompute"] for cell in calls} == {None}


def test_the_summary_has_a_verdict_for_each_workload(mixed: Sweep) -> None:
    seen = mixed.look()
    text = " ".join(printed(summary(mixed, seen, seen.records), 200).split())
    assert "block: Use ulysses." in text
    assert "attention: Use ring." in text
    alone = [cell for cell, r in seen.records.items() if "workload" not in r.entry.cell.config]
    assert "attention:" not in printed(summary(mixed, seen, alone), 200)


# -- MLflow ------------------------------------------------------------------------------------------------------------


def test_mlflow_has_short_names_of_a_step_and_says_what_is_scaled(mixed: Sweep) -> None:
    seen = mixed.look()
    good = [r.last for r in seen.records.values() if r.last is not None and r.last.status == "ok"]
    step = next(a for a in good if "step/layers" in a.metrics)
    names = dict(values(step))
    m = step.metrics
    assert names["tokens_per_s"] == m["step/tokens_per_s_per_gpu"]
    assert names["hfu_percent"] == pytest.approx(100 * m["compute/hfu"])
    assert names["attention_percent"] == pytest.approx(40)
    assert names["model_step_ms_scaled"] == pytest.approx(1e3 * m["model/step_s"])
    assert names["memory/activations_gib"] == pytest.approx(m["memory/activations_bytes"] / GIB)
    assert names["model/forward/step_ms"] == pytest.approx(1e3 * m["model/forward/step_s"])
    assert "a training step in " in note(step)
    call = next(a for a in good if "step/layers" not in a.metrics)
    assert not {"tokens_per_s", "hfu_percent", "model_step_ms_scaled"} & {name for name, _ in values(call)}
    assert "training step" not in note(call)


def test_views_of_mlflow_keep_workloads_apart_and_have_columns_of_steps() -> None:
    planned = [*look(BLOCKS).cells, *look(CALLS).cells]
    entries = {p.cell.id: Entry(p.cell, p.skip) for p in planned}
    views = cell_views("s", "0123456789abcdef", 1e9, entries)
    parts = {view.short: state_of(view.value) for view in views if not view.short.startswith("all")}
    assert sorted(parts) == ["attention, 6 cells", "block, 12 cells"]
    wheres = {name: re.findall(r"params\.`workload` = '(\w+)'", state["searchFilter"]) for name, state in parts.items()}
    assert wheres == {"attention, 6 cells": ["attention"], "block, 12 cells": ["block"]}
    columns = {name: state["selectedColumns"] for name, state in parts.items()}
    assert "metrics.`tokens_per_s`" in columns["block, 12 cells"]
    assert "metrics.`tokens_per_s`" not in columns["attention, 6 cells"]
    bars = [chart["metricKey"] for chart in parts["block, 12 cells"]["compareRunCharts"] if chart["type"] == "BAR"]
    assert "tokens_per_s" in bars


def test_a_sweeps_run_has_a_verdict_and_a_table_for_each_workload(mixed: Sweep) -> None:
    told = summary_of(mixed, mixed.look())
    assert told.verdict.startswith("**block: Use ulysses.")
    assert "**attention: Use ring." in told.verdict
    assert told.body.count("### If it has to be one") == 2


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pages_and_tables_have_steps_only_where_there_are_some(mixed: Sweep, frame: pd.DataFrame, tmp_path: Path) -> None:
    page = write_report(mixed, tmp_path / "mixed", known_devices()).page
    text = page.read_text(encoding="utf-8")
    assert '<section id="step">' in text
    assert '<section id="longest">' in text
    steps = (tmp_path / "mixed" / "tables" / "steps.csv").read_text(encoding="utf-8")
    assert SCALED in steps.splitlines()[0]
    assert len(steps.splitlines()) == 1 + len(table(frame)) == 1 + 9
    regret = (tmp_path / "mixed" / "tables" / "regret.csv").read_text(encoding="utf-8").splitlines()
    assert regret[0].startswith("workload,choice")
    assert {line.partition(",")[0] for line in regret[1:]} == {"block", "attention"}
    attention = made_sweep(tmp_path, "a", ["cp=ring,ulysses", "seqlen=64k,128k", "scale=1x8", "kernel=flash_attn3", "site=plain"])
    other = write_report(attention, tmp_path / "a-report", known_devices())
    assert not re.search(r'id="(step|longest|lengths)"', other.page.read_text(encoding="utf-8"))
    assert not [path.name for path in other.files if path.stem in ("steps", "longest")]
    assert "workload" not in (tmp_path / "a-report" / "tables" / "regret.csv").read_text(encoding="utf-8")


@needs_browser
@pytest.mark.slow
def test_the_section_of_steps_in_a_browser(mixed: Sweep, frame: pd.DataFrame, tmp_path: Path) -> None:
    page = write_report(mixed, tmp_path, known_devices()).page
    with browser(1440, 900) as b:
        b.page.goto(page.as_uri())
        # A verdict each, and the same under a filter that leaves all.
        assert b.page.inner_text("#verdict").startswith("block: Use ulysses.")
        assert b.page.inner_text("#verdict-attention").startswith("attention: Use ring.")
        assert b.page.locator("#regret-attention tbody tr").count() == 2
        # The longest of the lengths that most choices ran: 3 ran 64k.
        assert "llama3_8b, 2 of 32 layers, causal 32k 2x8" in b.page.inner_text("#step")
        b.page.select_option("[data-pick='step-seqlen']", str(64 * 1024))
        assert "ulysses takes least time" in b.page.inner_text("#step-finding")
        assert "1 failed" in b.page.inner_text("#step-finding")
        rows = b.page.locator("#step-table tbody tr")
        assert rows.count() == 4
        assert "✕ oom" in rows.nth(3).inner_text()
        for name in ("step-time", "step-memory"):
            picture = b.page.locator(f"#{name} svg[role=img]")
            assert "ulysses" in str(picture.get_attribute("aria-label"))
            assert picture.locator("[aria-label='failed: ring + recompute=full oom']").count() == 1
        # Bars end where the phases do.
        times = b.page.evaluate("[...CELLS].filter(c => stepOf(c) && isGood(c)).map(c => [c.id, stepOf(c).phases])")
        for cell, phases in times:
            assert phases == pytest.approx(steps_of(frame)[cell].phases, rel=1e-3)
        # Marks are those of the choice everywhere.
        symbols = b.page.evaluate(
            "[...document.querySelectorAll('#step-trade .legend [data-choice]')].map(e => [e.dataset.choice, e.dataset.color])"
        )
        assert dict(symbols) == {c: b.page.evaluate("c => styleOf(c).color", c) for c, _ in symbols}
        # The whole model is marked wherever it is shown.
        assert SCALED not in b.page.inner_text("#step-time")
        b.page.select_option("[data-pick='step-of']", index=1)
        assert b.page.locator("#step-time .scaled").inner_text() == SCALED
        assert b.page.locator("#step-time svg[role=img]").get_attribute("aria-label").endswith(f"{SCALED}.")
        assert b.page.locator("#step-table thead tr").first.inner_text().endswith(f"whole model: {SCALED}")
        # How far choices came, as Python has it, and under a filter.
        found = b.page.evaluate(
            "reachedBy(CELLS.filter(stepOf)).map(f => [f.choice, f.best?.seqlen ?? null, f.beyond?.seqlen ?? null])"
        )
        assert [tuple(row) for row in found] == [(r.choice, r.length, r.beyond) for r in reached(frame)]
        assert b.page.locator("#longest-table tbody tr").count() == 4
        b.page.click("[data-chip='recompute=full']")
        assert b.page.locator("#longest-table tbody tr").count() == 2
        assert b.page.locator("#step-table tbody tr").count() == 2
        assert not b.page.is_visible("#verdict-attention")
        b.page.click("[data-chip='recompute=full']")
        b.page.click("[data-chip='workload=attention']")
        assert "Nothing of this view is a training step." in b.page.inner_text("#step")
        assert b.page.inner_text("#verdict-attention").startswith("attention: Use ring.")
        assert b.complaints == []


@needs_browser
@pytest.mark.slow
def test_a_narrow_page_has_one_figure_below_the_other(mixed: Sweep, tmp_path: Path) -> None:
    page = write_report(mixed, tmp_path, known_devices()).page
    for width, beside in ((1440, True), (700, False)):
        with browser(width, 900) as b:
            b.page.goto(page.as_uri())
            time, memory = (b.page.locator(f"#step-{name}").bounding_box() for name in ("time", "memory"))
            assert (abs(time["y"] - memory["y"]) < 5) == beside
            assert b.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert b.complaints == []


@pytest.mark.slow
def test_a_search_has_its_answers_in_the_page_of_attention_too(tmp_path: Path) -> None:
    """Of 32k to 128k at 60 GiB: a ring, which needs 40 at 128k, and ulysses, which runs out of memory there."""
    failed = {"ulysses flash_attn3 causal 128k 2x8": MEMORY_FAILURE}
    sweep = made_sweep(tmp_path, "s", CALLS, peak_of=peak, failed=failed)
    sweep.add([], command=["search=max_seqlen"], search=Search("max_seqlen", 32 * 1024, 128 * 1024, 60 * GIB))
    seen = sweep.look()
    found = searched_of(seen, predicted=False)
    assert found is not None
    assert found["cap"] == 60 * GIB
    cells = {cell: r.entry.cell for cell, r in seen.records.items()}
    rows = {cells[row["cells"][0]].config["cp"]["name"]: row for row in found["rows"]}
    assert rows["ring"]["tokens"] == 128 * 1024
    assert (rows["ulysses"]["tokens"], rows["ulysses"]["beyond"]) == (64 * 1024, 128 * 1024)
    assert rows["ulysses"]["why"].startswith("oom: ")
    assert all(len(row["cells"]) == 3 for row in found["rows"])
    report = write_report(sweep, tmp_path / "report", known_devices())
    assert '<section id="longest">' in report.page.read_text(encoding="utf-8")
    lines = (tmp_path / "report" / "tables" / "longest.md").read_text(encoding="utf-8").splitlines()
    assert [line.count("128k") for line in lines if "ulysses" in line or "ring" in line] == [1, 1]
    assert searched_of(made_sweep(tmp_path, "t", CALLS).look(), predicted=False) is None
