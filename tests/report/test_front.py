"""What nothing beats in time, memory and GPUs: the numbers, the figure as files, and the same in the page."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.report.drawing import Drawn
from lcbench.report.figures import all_figures
from lcbench.report.frame import reported
from lcbench.report.front import FAINT, front_of, pareto, unbeaten
from lcbench.report.page import write_report
from lcbench.report.palette import styles
from lcbench.report.parts import shown
from lcbench.runs.store import Sweep
from tests.browser import browser, needs_browser
from tests.report.made import MEMORY_FAILURE, foretell, made_sweep

GRID = ["cp=ring,allgather,ulysses,usp", "kernel=flash_attn3", "mask=full,causal", "heads=48x48x64", "site=plain"]
GIB = 2**30
Row = tuple[float, float, float]


def peak(cell: Cell) -> float:
    """Halves with twice the GPUs; a ring needs least and ulysses most."""
    least = {"ring": 1.0, "usp": 1.5, "allgather": 3.0, "ulysses": 4.0}
    return least[cell.config["cp"]["name"]] * 16 * GIB / cell.problem.scale.world_size


def factor(cell: Cell) -> float:
    """A ring gains nothing by more GPUs; ulysses is fastest."""
    name, ranks = cell.config["cp"]["name"], cell.problem.scale.world_size
    return {"ring": 2.0 * ranks / 8, "usp": 1.3, "allgather": 2.5, "ulysses": 0.5}[name]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three scales at two lengths; of 24 cells at 96k one failed."""
    return made_sweep(
        tmp_path_factory.mktemp("front"), "s", [*GRID, "seqlen=48k,96k", "scale=1x8,2x8,3x8"], factor_of=factor, peak_of=peak,
        failed={"allgather flash_attn3 causal 96k 2x8": MEMORY_FAILURE},
    )  # fmt: skip


@pytest.fixture(scope="module")
def frame(swept: Sweep) -> pd.DataFrame:
    return reported(swept)


def drawn_of(frame: pd.DataFrame) -> dict[str, Drawn]:
    return {figure.name: figure for figure in pareto(shown(frame, known_devices()))}


# -- numbers -----------------------------------------------------------------------------------------------------------


def beats(one: Row, other: Row) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(st.lists(st.tuples(*3 * [st.integers(1, 6).map(float)]), max_size=25))
def test_no_point_of_the_front_is_beaten_and_every_other_is_by_one_of_it(rows: list[Row]) -> None:
    kept = unbeaten(rows)
    front = [row for row, its in zip(rows, kept, strict=True) if its]
    assert bool(front) == bool(rows)
    for row, its in zip(rows, kept, strict=True):
        assert any(beats(other, row) for other in rows) != its
        assert its or any(beats(other, row) for other in front)


def test_the_front_by_hand() -> None:
    rows = [(8, 2.0, 5.0), (8, 1.0, 9.0), (16, 1.0, 9.0), (16, 0.5, 9.0), (16, 3.0, 5.0), (8, 2.0, 5.0)]
    assert unbeaten(rows) == [True, True, False, True, False, True]


@pytest.mark.slow
def test_a_mask_is_compared_with_itself_and_only_where_it_ran_on_several_numbers_of_gpus(frame: pd.DataFrame) -> None:
    good = shown(frame, known_devices()).good
    rows = front_of(good[good["seqlen"] == 96 * 1024])
    assert len(rows) == 23
    for _, mine in rows.groupby("what_mask"):
        assert set(mine["choice"][~mine["front"]]) >= {"allgather"}
        assert set(mine["choice"][mine["front"]]) == {"ring", "usp", "ulysses"}
    once = rows[(rows["what_mask"] == "full") | (rows["world_size"] == 8)]
    assert set(front_of(once)["what_mask"]) == {"full"}
    without = rows.assign(**{"memory/peak_bytes": rows["memory/peak_bytes"].where(rows["choice"] != "ring")})
    assert "ring" not in set(front_of(without)["choice"])
    assert front_of(rows.assign(**{"memory/peak_bytes": 0.0})).empty, "an allocator that saw nothing has no place on the axis"
    assert front_of(rows.drop(columns="memory/peak_bytes")).empty


# -- figures as files --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_figure_per_length_is_named_by_it_and_written(frame: pd.DataFrame, tmp_path: Path) -> None:
    figures = drawn_of(frame)
    assert list(figures) == ["pareto_48k", "pareto_96k"]
    paths = figures["pareto_96k"].save(tmp_path)
    assert [path.name for path in paths] == ["pareto_96k.png", "pareto_96k.pdf"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert "pareto_48k" in {figure.name for figure in all_figures(frame, known_devices(), {})}


def test_the_name_holds_the_setting_where_there_are_several(tmp_path: Path) -> None:
    words = ["cp=ring,usp", "kernel=flash_attn3", "mask=full", "seqlen=48k", "scale=1x8,2x8", "heads=24x24x64,48x24x64"]
    names = set(drawn_of(reported(made_sweep(tmp_path, "s", words))))
    assert names == {"pareto_48k_heads-24x24x64", "pareto_48k_heads-48x24x64"}


@pytest.mark.parametrize("words", [["seqlen=48k", "scale=1x8"], ["seqlen=48k", "scale=1x8,2x4"]])
def test_there_is_none_at_one_number_of_gpus(tmp_path: Path, words: list[str]) -> None:
    assert drawn_of(reported(made_sweep(tmp_path, "s", [*GRID, *words], peak_of=peak))) == {}


def test_there_is_none_of_problems_that_grow_with_the_gpus(tmp_path: Path) -> None:
    for words in (["seqlen=48k", "scale=1x8"], ["seqlen=96k", "scale=2x8"]):
        sweep = made_sweep(tmp_path, "s", [*GRID, *words], peak_of=peak)
    assert drawn_of(reported(sweep)) == {}


def test_what_is_beaten_is_faint_and_every_choice_has_its_look(frame: pd.DataFrame) -> None:
    known, figure = styles(frame), drawn_of(frame)["pareto_96k"]
    good = shown(frame, known_devices()).good
    rows = front_of(good[good["seqlen"] == 96 * 1024])
    for axes, (_, mine) in zip(figure.figure.axes[0::2], rows.groupby("what_mask", sort=False), strict=True):
        for line in axes.get_lines():
            label = str(line.get_label())
            choice, faint = label.removeprefix("_beaten "), label.startswith("_beaten ")
            if choice == "_front":
                continue
            assert line.get_alpha() == (FAINT if faint else None)
            assert (to_hex(line.get_color()), line.get_marker()) == (known[choice].color, known[choice].matplotlib["marker"])
            own = mine[(mine["choice"] == choice) & (mine["front"] != faint)]
            assert sorted(line.get_ydata()) == sorted(own["world_size"])
    assert [text.get_text() for text in figure.figure.legends[0].get_texts()] == list(known)


def test_words_say_what_nothing_beats_and_how_many_failed(frame: pd.DataFrame) -> None:
    figures = drawn_of(frame)
    assert figures["pareto_96k"].caption.endswith("Left out: 1 failed cell.")
    assert "failed" not in figures["pareto_48k"].caption
    alt = figures["pareto_96k"].alt
    assert re.search(r"^full: nothing beats ulysses on 8 GPUs \([\d.]+ m?s, 8\.00 GiB\), ", alt)
    assert "of 12 are beaten. causal: nothing beats " in alt
    assert alt.endswith("of 11 are beaten.")


@pytest.mark.slow
def test_predictions_are_hollow_and_beat_nothing(swept: Sweep, tmp_path: Path) -> None:
    words = [w for w in GRID if "cp=" not in w] + ["seqlen=48k", "scale=1x8,2x8"]
    sweep = foretell(made_sweep(tmp_path, "part", ["cp=allgather,ring", *words], factor_of=factor, peak_of=peak), swept)
    rows = reported(sweep)
    # A prediction of the simulator has a peak, that of the tests has none.
    rows["memory/peak_bytes"] = rows["memory/peak_bytes"].fillna(1.0)
    figure = drawn_of(rows)["pareto_48k"]
    assert "predicted" not in figure.alt
    assert "ring" in figure.alt
    assert figure.caption.endswith("Hollow: predicted, not measured. Beside measurements they beat nothing.")
    lines = {line.get_label(): line for line in figure.figure.axes[0].get_lines()}
    assert lines["ulysses (predicted)"].get_markerfacecolor() == "none"
    assert lines["ring"].get_markerfacecolor() != "none"
    alone = drawn_of(reported(sweep, predicted=True).assign(**{"memory/peak_bytes": 1.0}))["pareto_48k"]
    assert "(predicted) on 8 GPUs" in alone.alt
    assert alone.caption.endswith("Hollow: predicted, not measured.")


# -- the page ----------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.slow
def test_the_page_finds_the_same_front_and_obeys_the_facets(swept: Sweep, frame: pd.DataFrame, tmp_path: Path) -> None:
    good = shown(frame, known_devices()).good
    expected = front_of(good[good["seqlen"] == 96 * 1024])
    page = write_report(swept, tmp_path, known_devices()).page
    with browser(1440, 900) as b:
        b.page.goto(f"{page.as_uri()}#.fig=pareto&.seqlen={96 * 1024}")
        found = b.page.evaluate("frontOf(CELLS.filter(c => c.seqlen === 96 * 1024)).map(p => [p.cell.id, p.front])")
        assert dict(found) == dict(zip(expected["cell"], map(bool, expected["front"]), strict=True))
        # Without times, which a page has with four digits: rounded to three, the last may be another.
        said = [b.page.locator("figcaption b").inner_text(), drawn_of(frame)["pareto_96k"].alt]
        assert len({re.sub(r"[\d.]+ m?s,", "", text) for text in said}) == 1
        assert "Left out: 1 failed cell." in b.page.inner_text("figcaption")
        pictures = "[...document.querySelectorAll('#figure-pareto svg[role=img]')]"
        dots = f"{pictures}.map(picture => picture.querySelectorAll('[aria-label=dot] *').length)"
        assert b.page.evaluate(dots) == [12, 12, 11, 11]
        b.page.click("[data-chip='strategy=ring']")
        assert b.page.evaluate(dots) == [3, 3, 3, 3]
        b.page.click("[data-chip='scale=1x8']")
        assert b.page.locator("#tab-pareto").count() == 0
        assert b.complaints == []
