"""Passes of a server in what is made of results: words, tables, figures, the page with and without scripts."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.devices import known_devices
from lcbench.grid.values import parse_batch
from lcbench.problem import Batch
from lcbench.report.frame import reported
from lcbench.report.intervals import KNOWN, Ratio
from lcbench.report.page import write_report
from lcbench.report.parts import shown
from lcbench.report.serving import Pays, answers, base_of, context_of, kind_of, pays, series_of, served_rows, table, timed
from lcbench.report.serving_figures import page_panels, panels_of, serving_lines
from lcbench.runs.store import Sweep
from tests.browser import browser, needs_browser
from tests.report.made import made_sweep, serving_sweep

K = 1024


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return serving_sweep(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def frame(sweep: Sweep) -> pd.DataFrame:
    return reported(sweep)


@pytest.fixture(scope="module")
def rows(frame: pd.DataFrame) -> pd.DataFrame:
    return served_rows(frame, known_devices())


# -- batches -----------------------------------------------------------------------------------------------------------


def batch(text: str) -> Batch:
    found = parse_batch(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "kind", "series", "context"),
    [
        ("32q1s8k", "decode", "decode of 32 requests", 8 * K),
        ("q1s1m", "decode", "decode of 1 request", K * K),
        ("4q8k", "prefill", "prefill of 4 requests", 8 * K),
        ("q1", "prefill", "prefill of 1 request", 1),
        ("2q2ks64k", "chunk", "chunks of 2k of 2 requests", 64 * K),
        ("2q2k_32q1s8k", "mixed", "mixed of 2q2k_32q1s…", 8 * K),
        ("2q8k_32q1s4k", "mixed", "mixed of 2q…_32q1s4k", 8 * K),
        ("8q1s4k_q1s64k", "decode", "decode of 8q1s4k_q1s…", 64 * K),
    ],
)
def test_what_a_batch_is(text: str, kind: str, series: str, context: int) -> None:
    made = batch(text)
    assert (kind_of(made), series_of(made), context_of(made)) == (kind, series, context)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_time_of_a_new_token_is_that_of_the_pass_over_them(rows: pd.DataFrame) -> None:
    good = timed(rows)
    assert len(good) == 34, "35 cells, of which one failed"
    for row in good.to_dict("records"):
        assert row["token"].value == pytest.approx(row["time/forward/median_s"] / batch(row["batch"]).queries)
        assert 1e6 * row["token"].value == pytest.approx(row["serving/us_per_token"])
        assert row["peak_gb_s"] == 3350
        assert row["around"] == "heads 64x8x128"


def test_replicas_have_a_batch_each(frame: pd.DataFrame) -> None:
    once = served_rows(frame, ())
    twice = served_rows(frame.assign(**{"mesh.dp": 2}), ())
    for one, other in zip(timed(once)["token"], timed(twice)["token"], strict=True):
        assert other.value == pytest.approx(one.value / 2)
    assert once["peak_gb_s"].isna().all(), "of a device that nobody wrote down"


@pytest.mark.slow
def test_sweeps_without_batches_have_no_section(tmp_path: Path) -> None:
    other = made_sweep(tmp_path, "a", ["cp=ring,ulysses", "seqlen=64k,128k", "scale=1x8", "kernel=flash_attn3", "site=plain"])
    assert served_rows(reported(other), known_devices()).empty
    written = write_report(other, tmp_path / "report", known_devices())
    assert 'id="serving"' not in written.page.read_text(encoding="utf-8")
    assert not [path for path in written.files if path.stem in ("serving", "prefill")]


def test_context_parallelism_is_held_against_none_and_else_against_the_fewest_gpus(rows: pd.DataFrame) -> None:
    good = timed(rows)
    prompts = good[good["kind"] == "prefill"]
    scale, base = base_of(prompts)
    assert scale == "1x1"
    assert {at: row["choice"] for at, row in base.items()} == {8 * K: "none", 32 * K: "none", 128 * K: "none"}
    others = prompts[prompts["scale"] != "1x1"]
    assert base_of(others) == ("", {}), "one scale is held against nothing"
    more = pd.concat([others, others.assign(scale="4x8", world_size=32)])
    scale, base = base_of(more)
    assert scale == "2x8"
    for at, row in base.items():
        assert row["token"].value == min(time.value for time in others[others["context"] == at]["token"])


# -- from which length on ----------------------------------------------------------------------------------------------


def pay(ratios: dict[int, tuple[float, float, float]]) -> Pays:
    made = {at: Ratio(value, low, high, 0.0, 0.1, KNOWN, True) for at, (low, value, high) in ratios.items()}
    return Pays("prefill", "ring", "2x8", "none on 1x1", made, ())


def test_the_length_is_where_the_ratio_crosses_one_and_its_interval_where_the_ends_do() -> None:
    one = pay({8 * K: (1.5, 2.0, 2.5), 32 * K: (0.4, 0.5, 0.6)})
    assert one.crossing == pytest.approx(16 * K), "half of the way from 2 to 1/2"
    low, high = one.interval
    assert low == pytest.approx(8 * K * 4 ** (math.log(1.5) / math.log(1.5 / 0.4)))
    assert high == pytest.approx(8 * K * 4 ** (math.log(2.5) / math.log(2.5 / 0.6)))
    assert one.said == "from about 16k on"


@pytest.mark.parametrize(
    ("ratios", "said", "interval"),
    [
        ({8 * K: (0.4, 0.5, 0.6), 32 * K: (0.2, 0.3, 0.4)}, "at 8k already", "up to 8k"),
        ({8 * K: (0.8, 0.9, 1.1), 32 * K: (0.2, 0.3, 0.4)}, "at 8k already", "up to 8k to 9.1k"),
        ({8 * K: (1.8, 1.9, 2.0), 32 * K: (1.1, 1.2, 1.3)}, "not up to 32k", "beyond 32k"),
        ({8 * K: (1.8, 1.9, 2.0), 32 * K: (0.9, 1.1, 1.3)}, "not up to 32k", "26k to beyond 32k"),
        ({8 * K: (0.4, 0.5, 0.6), 32 * K: (1.1, 1.2, 1.3)}, "not up to 32k", "beyond 32k"),
        ({8 * K: (0.4, 0.5, 0.6)}, "at 8k already", "one length tells nothing"),
    ],
)
def test_what_is_said_of_a_length(ratios: dict[int, tuple[float, float, float]], said: str, interval: str) -> None:
    assert (pay(ratios).said, pay(ratios).said_interval) == (said, interval)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=6), st.floats(1.0, 3.0))
def test_ends_of_the_interval_lie_around_the_length(values: list[float], wide: float) -> None:
    one = pay({2**place * K: (value / wide, value, value * wide) for place, value in enumerate(values)})
    ends = [math.inf if end is None else end for end in (one.interval[0], one.crossing, one.interval[1])]
    assert ends == sorted(ends)
    longest = 2 ** (len(values) - 1) * K
    assert (ends[1] == math.inf) == (values[-1] >= 1)
    assert all(K <= end <= longest or end == math.inf for end in ends)


def test_a_choice_is_faster_from_the_length_that_its_times_say(rows: pd.DataFrame) -> None:
    found = {one.choice: one for one in pays(rows)}
    assert set(found) == {"ring", "kvp", "dcp", "pcp"}, "prompts on more GPUs than none had"
    good = timed(rows).set_index(["batch", "choice"])["token"]
    for choice, one in found.items():
        assert {at: r.value for at, r in one.ratios.items()} == pytest.approx(
            {n * K: good[f"q{n}k", choice].value / good[f"q{n}k", "none"].value for n in (8, 32, 128)}
        )
    assert found["pcp"].said == found["ring"].said == "at 8k already"
    crossing = found["dcp"].crossing
    assert crossing is not None
    assert 8 * K < crossing < 32 * K


# -- words and tables --------------------------------------------------------------------------------------------------


def test_an_approximation_is_fastest_of_nothing_and_pays_from_no_length(rows: pd.DataFrame) -> None:
    longest = timed(rows)[timed(rows)["batch"] == "32q1s128k"]
    fastest = min(longest.to_dict("records"), key=lambda row: row["token"].value)["choice"]
    marked = rows.assign(approximate=["approximate, distance 0.41" if choice == fastest else "" for choice in rows["choice"]])
    said = ["".join(text for _, text in answer.parts) for answer in answers(marked)]
    assert len(said) == 4
    assert not any(f"{fastest} on" in text for text in said), said
    assert any(each.choice == fastest for each in pays(rows))
    assert not any(each.choice == fastest for each in pays(marked))
    assert len(table(marked)) == len(table(rows))


def test_answers_name_what_is_fastest_and_what_it_is_worth(rows: pd.DataFrame) -> None:
    said = ["".join(text for _, text in answer.parts) for answer in answers(rows)]
    assert len(said) == 4
    decode, prefill, mixed, worth = said
    longest = timed(rows)[timed(rows)["batch"] == "32q1s128k"]
    fastest = min(longest.to_dict("records"), key=lambda row: row["token"].value)
    assert decode.startswith(f"decode of 32 requests, causal, heads 64x8x128: {fastest['choice']} on 2x8 takes least time")
    assert "of what its memory can" in decode
    assert "GB/s" not in prefill
    assert "none on 1x1 takes least time at 8k" in mixed
    assert "against none on 1x1: " in worth
    assert "dcp on 2x8 from about" in worth
    ids = set(rows["cell"])
    assert all(answer.cells and set(answer.cells) <= ids for answer in answers(rows))


@pytest.mark.slow
def test_the_table_has_a_row_of_every_batch_with_a_time(sweep: Sweep, rows: pd.DataFrame, tmp_path: Path) -> None:
    write_report(sweep, tmp_path, known_devices())
    with (tmp_path / "tables" / "serving.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [row["cell"] for row in read] == [row["cell"] for row in table(rows)] == list(timed(rows)["cell"])
    assert {row["sent per new token"] for row in read if row["choice"] == "none"} == {"0 B"}
    prefill = (tmp_path / "tables" / "prefill.csv").read_text(encoding="utf-8")
    assert len(prefill.splitlines()) == 1 + 4


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_panel_has_a_line_per_choice_and_the_one_without_context_parallelism(frame: pd.DataFrame, rows: pd.DataFrame) -> None:
    of = shown(frame, known_devices())
    panels = {panel.where: panel for panel in panels_of(of)}
    assert set(panels) == {f"{what}, causal, heads 64x8x128, 2x8" for what in rows["series"].unique()}
    names = {figure.name: figure for figure in serving_lines(of)}
    assert len(names) == 3
    decode = next(panel for where, panel in panels.items() if where.startswith("decode"))
    figure = names[decode.name]
    time, rate, sent = figure.figure.axes
    lines: dict[Any, Any] = {line.get_label(): line for line in time.get_lines() if not str(line.get_label()).startswith("_")}
    assert set(lines) == {"ring", "kvp", "dcp", "pcp", "none on 1x1"}
    good = timed(rows).set_index(["batch", "choice"])["token"]
    drawn = lines["kvp"].get_ydata()
    wanted = [good[f"32q1s{n}k", "kvp"].value for n in (8, 32, 128)]
    assert list(drawn / drawn[0]) == pytest.approx([value / wanted[0] for value in wanted])
    assert [text.get_text() for text in time.texts] == ["oom"], "the ring's longest context"
    peak: Any = rate.get_lines()[-1].get_ydata()
    assert max(peak) == 3350
    assert "none" not in {line.get_label() for line in sent.get_lines()}, "it sends nothing"


@pytest.mark.slow
def test_figures_of_a_page_have_its_ink_and_no_name_twice(frame: pd.DataFrame) -> None:
    panels = list(page_panels(shown(frame, known_devices())))
    text = "".join(figure["svg"] for panel in panels for figure in panel["figures"])
    assert "currentColor" in text
    assert "#010203" not in text
    ids = [found for found in re.findall(r' id="([^"]+)"', text) if not found.startswith("matplotlib.axis")]
    assert len(ids) == len(set(ids))
    assert all(figure["svg"].startswith('<svg role="img" aria-label="') for panel in panels for figure in panel["figures"])


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_report_of_predictions_says_so(tmp_path: Path) -> None:
    grid = ["cp=none,ring", "workload=serving", "direction=forward", "batch=q8k,q32k", "kernel=flash_attn3", "site=plain"]
    made = made_sweep(tmp_path, "s", grid, factor_of=lambda cell: 1.0)
    assert served_rows(reported(made), known_devices())["choice"].isin(["none", "ring"]).all()
    foretold = reported(made).assign(status="predicted", good=False, choice=lambda f: f["choice"] + " (predicted)")
    rows = served_rows(foretold, known_devices())
    assert answers(rows) == [], "predictions win nothing"
    assert pays(rows) == []
    assert {row["choice"] for row in table(rows)} == {"none (predicted)", "ring (predicted)"}


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [760, 1440])
def test_the_section_in_a_browser(sweep: Sweep, tmp_path: Path, width: int) -> None:
    page = write_report(sweep, tmp_path, known_devices()).page
    with browser(width, 900) as b:
        b.page.goto(page.as_uri())
        section = b.page.locator("#serving")
        assert section.locator("p.answer:visible").count() == 4
        assert section.locator("svg[role=img]:visible").count() == 8
        assert b.page.evaluate("document.documentElement.scrollWidth") <= width
        ends = b.page.evaluate("[...document.querySelectorAll('#serving svg')].map(s => s.getBoundingClientRect().right)")
        assert max(ends) <= width
        # A filter leaves what is about its cells.
        b.page.evaluate("view.facets.set('setting', new Set([CELLS.find(c => c.where.includes('batch q8k')).where])); draw()")
        assert section.locator("tbody tr:visible", has_text="decode").count() == 0
        assert section.locator("tbody tr:visible", has_text="q8k").count() > 0
        assert not b.complaints


@needs_browser
@pytest.mark.slow
def test_the_section_without_scripts_and_in_the_dark(sweep: Sweep, tmp_path: Path) -> None:
    page = write_report(sweep, tmp_path, known_devices()).page
    with browser(1100, 900) as b:
        context = b.page.context.browser.new_context(java_script_enabled=False, color_scheme="dark")
        plain = context.new_page()
        plain.goto(page.as_uri())
        assert plain.locator("#serving p.answer").count() == 4
        assert plain.locator("#serving svg[role=img]").count() == 8
        assert plain.locator("#batches tbody tr").count() == 34
        context.close()
