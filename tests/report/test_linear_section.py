"""Linear attention in what is made of results: words, tables, figures, the page with and without scripts."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from lcbench.grid.devices import known_devices
from lcbench.report.figures import all_figures
from lcbench.report.frame import reported
from lcbench.report.linear import answers, growths, linear_rows, table
from lcbench.report.linear_figures import figures_of
from lcbench.report.page import write_report
from lcbench.report.parts import shown
from lcbench.runs.store import Sweep
from tests.browser import browser, needs_browser
from tests.report.made import foretell, linear_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return linear_sweep(tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def frame(sweep: Sweep) -> pd.DataFrame:
    return reported(sweep)


def test_rates_and_states_follow_from_what_was_measured(frame: pd.DataFrame) -> None:
    rows = linear_rows(frame)
    assert len(rows) == 12
    for row in rows.to_dict("records"):
        assert row["tokens_per_s_per_gpu"] == pytest.approx(row["seqlen"] / row["time/total/median_s"] / row["world_size"])
        wanted = {"lasp": 1.0, "lasp2": row["world_size"] - 1.0, "ulysses": 512 * row["tokens_per_rank"] / 262144}
        assert row["states/forward"] == pytest.approx(wanted[row["cp"]])
    assert {text["states sent in forward"] for text in table(rows) if text["choice"] == "lasp"} == {"1.00"}


def test_bytes_that_do_not_grow_with_length_are_told_from_those_that_do(frame: pd.DataFrame) -> None:
    rows = linear_rows(frame)
    found = growths(rows[rows["scale"] == "1x4"])
    assert [(one.choice, one.flat, one.lengths) for one in found] == [
        ("lasp", True, (8192, 32768)), ("lasp2", True, (8192, 32768)), ("ulysses", False, (8192, 32768)),
    ]  # fmt: skip
    assert found[2].sent[1] == 4 * found[2].sent[0]


def test_answers_name_the_fastest_and_what_is_flat(frame: pd.DataFrame) -> None:
    said = ["".join(text for _, text in answer.parts) for answer in answers(linear_rows(frame))]
    assert len(said) == 4
    assert " is fastest, " in said[0]
    assert "At any length the same bytes are sent by lasp (512 KiB), lasp2 (512 KiB); ulysses sends 4.00x as much" in said[1]


@pytest.mark.slow
def test_lines_go_over_length_and_over_gpus(frame: pd.DataFrame) -> None:
    found = [one for one in all_figures(frame, known_devices(), {}) if one.kind in ("tokens-by-length", "states-by-gpus")]
    assert [one.kind for one in found].count("tokens-by-length") == 2
    assert [one.kind for one in found].count("states-by-gpus") == 2
    rows = linear_rows(frame)
    for one in found:
        for line in one.figure.axes[0].get_lines():
            own = rows[rows["choice"] == line.get_label()]
            column = "tokens_per_s_per_gpu" if one.kind == "tokens-by-length" else "comm/bytes"
            assert set(line.get_ydata()) <= set(own[column])
            assert len(line.get_xdata()) == 2


def test_what_was_predicted_wins_nothing_and_is_hollow(sweep: Sweep, tmp_path: Path) -> None:
    predicted = reported(foretell(Sweep(tmp_path, "foretold"), sweep))
    rows = linear_rows(predicted)
    assert len(rows) == 12
    assert not [answer for answer in answers(rows) if "fastest" in "".join(text for _, text in answer.parts)]
    of = shown(predicted, known_devices())
    assert all(of.styles[choice].hollow for one in figures_of(of) for choice in one.styles)


@pytest.fixture(scope="module")
def page(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sweep, tmp_path_factory.mktemp("page"), known_devices()).page


@pytest.mark.slow
def test_the_page_says_it_without_scripts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    section = text[text.index('<section id="linear">') :]
    section = section[: section.index("</section>")]
    assert section.count("<figure ") == 4, "two scales over length, two numbers of tokens over GPUs"
    assert section.count('<svg role="img" aria-label="') == section.count("<svg ") == 8
    assert "of linear attention those of its recurrence" in text, "what a rate counts"
    assert "#010203" not in section, "text is that of the page, light or dark"
    assert re.search(r"is fastest, [\d.]+M tokens/s per GPU", re.sub("<.*?>", "", section))
    assert not re.search(r"\de\+\d", re.sub(r"<(script|style).*?</\1>|<.*?>", "", text, flags=re.DOTALL)), "no exponent"


@pytest.mark.slow
@needs_browser
def test_a_filter_leaves_what_its_cells_are_in(page: Path) -> None:
    with browser() as b:
        b.page.goto(page.as_uri())
        b.page.locator("#facets button", has_text="lasp2").first.click()
        assert b.page.locator("#linear-rows tbody tr:visible").count() == 4
        assert b.complaints == []
