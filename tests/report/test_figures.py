"""Figures as files: a choice looks the same in all of them, what failed is seen, axes can be read, words say what is shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from lcbench.grid.devices import known_devices
from lcbench.report.drawing import Drawn
from lcbench.report.figures import all_figures
from lcbench.report.frame import good_rows, over_seeds, reported
from lcbench.report.palette import styles
from lcbench.report.parts import alike, efficiency_of, source_of
from lcbench.report.tables import rate_tables
from lcbench.report.winners import winners
from lcbench.runs.attempt import Failure
from tests.report.made import MEMORY_FAILURE, NODE_FAILURE, made_sweep

LINKS = {"between nodes": 45.0}
CHOOSE = [
    "cp=ring,ulysses,usp,loongtrain", "kernel=flash_attn3,flash_attn2,cudnn", "mask=causal", "seqlen=64k", "scale=1x8",
    "heads=32x8x128", "site=plain",
]  # fmt: skip
LENGTHS = ["cp=ring,usp", "mask=causal,full", "seqlen=64k,128k"]


def drawn_of(frame: pd.DataFrame) -> dict[str, Drawn]:
    return {figure.name: figure for figure in all_figures(frame, known_devices(), LINKS)}


@pytest.fixture(scope="module")
def figures(big_frame: pd.DataFrame) -> dict[str, Drawn]:
    """Of the large sweep, in their order."""
    return drawn_of(big_frame)


def shown_axes(figure: Drawn) -> list[Any]:
    return [axis for axis in figure.figure.axes if axis.get_visible()]


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def look(handle: Any) -> tuple[str, str]:
    """Colour and marker of what a legend shows; a scatter has its marker as a path, whose number of corners will do."""
    if hasattr(handle, "get_marker"):
        return to_hex(handle.get_color()), str(handle.get_marker())
    return to_hex(handle.get_facecolor()[0]), str(len(handle.get_paths()[0].vertices))


# -- one look per choice -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_choice_looks_the_same_in_every_figure_of_a_sweep_in_which_one_is_missing_at_one_scale(
    big_frame: pd.DataFrame, figures: dict[str, Drawn]
) -> None:
    known, seen = styles(big_frame), dict[tuple[str, bool], set[tuple[str, str]]]()
    for figure in figures.values():
        for axis in shown_axes(figure):
            for line in axis.get_lines():
                choice = line.get_label().removeprefix("_failed ").partition(" (from")[0]
                if choice in known and not line.get_label().startswith("_failed"):
                    assert look(line) == (known[choice].color, known[choice].matplotlib["marker"]), figure.name
        for legend in figure.figure.legends:
            for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
                choice = text.get_text().partition(" (from")[0]
                if choice in known:
                    seen.setdefault((choice, "roofline" in figure.name), set()).add(look(handle))
    assert {choice for choice, _ in seen} == set(big_frame["choice"])
    assert all(len(looks) == 1 for looks in seen.values())
    at_8x8 = [t.get_text() for t in figures["rate-by-length_8x8"].figure.legends[0].get_texts()]
    assert "ulysses" not in at_8x8  # 32 heads over 64 ranks
    assert "usp" in at_8x8


@pytest.mark.slow
def test_a_choice_that_failed_everywhere_keeps_its_place(tmp_path: Path) -> None:
    failed = made_sweep(tmp_path, "s", ["cp=ring,ulysses,usp", "seqlen=64k,128k", "scale=1x8"], failed={"ring": NODE_FAILURE})
    frame = reported(failed)
    known = styles(frame)
    assert list(known) == ["ring", "ulysses", "usp"]
    lines = {line.get_label(): line for line in shown_axes(drawn_of(frame)["rate-by-length_1x8"])[0].get_lines()}
    assert to_hex(lines["ulysses"].get_color()) == known["ulysses"].color != known["ring"].color


# -- what failed, and axes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_cell_leaves_a_mark_with_its_class_and_a_gap(figures: dict[str, Drawn]) -> None:
    full, causal, window, _ = shown_axes(figures["rate-by-length_4x8"])[:4]
    assert [text for axis in (full, causal, window) for text in texts(axis)] == [
        "node-fail",
        "node-fail",
        "nccl",
        "nccl",
        "node-fail",
    ]
    marks = {line.get_label(): int(line.get_xdata()[0]) for line in full.get_lines() if line.get_label().startswith("_failed")}
    assert marks == {"_failed groupcast": 64 * 1024, "_failed ring": 128 * 1024}
    ring = next(line for line in full.get_lines() if line.get_label() == "ring")
    assert list(np.isnan(ring.get_ydata())) == [False, True, False, False]
    assert "cross at the bottom" in figures["rate-by-length_4x8"].caption
    assert "cross" not in figures["rate-by-length_1x8"].caption or any(map(texts, shown_axes(figures["rate-by-length_1x8"])))


@pytest.mark.slow
def test_a_length_that_a_mask_was_not_asked_for_is_no_gap(tmp_path: Path) -> None:
    made_sweep(tmp_path, "s", ["cp=ring,usp", "mask=full", "seqlen=64k,256k", "scale=1x8"])
    both = made_sweep(tmp_path, "s", ["cp=ring,usp", "mask=causal", "seqlen=64k,128k,256k", "scale=1x8"])
    axes = shown_axes(drawn_of(reported(both))["rate-by-length_1x8"])
    assert [[len(line.get_ydata()) for line in axis.get_lines()] for axis in axes[:2]] == [[2, 2], [3, 3]]
    assert not any(np.isnan(line.get_ydata()).any() for axis in axes for line in axis.get_lines())


@pytest.mark.parametrize("name", ["rate-by-length_4x8", "rate-by-gpus_strong-64k", "efficiency_strong-64k", "phases-by-length_4x8"])
@pytest.mark.slow
def test_panels_of_a_row_share_their_y_limits(figures: dict[str, Drawn], name: str) -> None:
    rows: dict[int, set[Any]] = {}
    for axis in shown_axes(figures[name]):
        rows.setdefault(axis.get_subplotspec().rowspan.start, set()).add(axis.get_ylim())
    assert rows
    assert all(len(limits) == 1 for limits in rows.values())


@pytest.mark.slow
def test_intervals_of_choices_stand_beside_each_other(figures: dict[str, Drawn]) -> None:
    axis = shown_axes(figures["rate-by-length_2x8"])[0]
    starts = [float(line.get_xdata()[0]) for line in axis.get_lines() if not line.get_label().startswith("_")]
    assert len(set(starts)) == len(starts) == 8
    assert all(abs(np.log2(start / 65536)) < 0.2 for start in starts)


@pytest.mark.slow
def test_below_the_rates_are_shares_of_the_best(figures: dict[str, Drawn]) -> None:
    axes = shown_axes(figures["rate-by-length_1x8"])
    assert len(axes) == 8
    for axis in axes[4:]:
        assert axis.get_yscale() == "log"
        values = np.array([line.get_ydata() for line in axis.get_lines()])
        assert np.nanmax(values, axis=0) == pytest.approx(100)
        assert len(axis.get_yticklabels()) >= 3


@pytest.mark.slow
def test_every_memory_panel_has_three_labelled_ticks_the_devices_line_and_crosses(
    figures: dict[str, Drawn], tmp_path: Path
) -> None:
    axes = shown_axes(figures["memory-by-length_1x8"])
    for axis in axes:
        low, high = axis.get_ylim()
        ticks = [
            tick
            for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
            if label.get_text() and low <= tick <= high
        ]
        assert len(ticks) >= 3
        assert [line.get_ydata()[0] for line in axis.get_lines() if line.get_label() == "_capacity"] == [
            pytest.approx(80e9 / 2**30)
        ]
    crosses = [line for line in axes[3].get_lines() if line.get_label() == "_failed tokenring"]
    assert len(crosses) == 4
    assert any("= … (8)" in text for text in texts(axes[0]))  # 8 lines that lie on each other
    # Peaks within two percent of each other, and a device that nobody knows.
    flat = made_sweep(tmp_path, "s", ["cp=ring,usp", "seqlen=1k,2k", "scale=1x8"], provenance={"device": "a strange one"})
    (panel,) = shown_axes(drawn_of(reported(flat))["memory-by-length_1x8"])
    low, high = panel.get_ylim()
    assert sum(low <= tick <= high for tick in panel.get_yticks()) >= 3
    assert not any(line.get_label() == "_capacity" for line in panel.get_lines())


# -- efficiency --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_choice_without_the_smallest_scale_is_not_drawn_as_a_hundred_percent_of_it(figures: dict[str, Drawn]) -> None:
    figure = figures["efficiency_strong-64k"]
    panel = next(axis for axis in shown_axes(figure) if axis.get_title().startswith("causal_document"))
    lines = {line.get_label(): line for line in panel.get_lines()}
    assert "tokenring" not in lines  # out of memory on 8 GPUs
    hollow = lines["tokenring (from 16)"]
    assert hollow.get_markerfacecolor() == "none"
    first = int(np.flatnonzero(~np.isnan(hollow.get_ydata()))[0])
    assert (hollow.get_xdata()[first], hollow.get_ydata()[first]) == (16, 100)
    assert "tokenring (from 16)" in [text.get_text() for text in figure.figure.legends[0].get_texts()]
    assert "tokenring" not in figure.alt.partition("causal_document")[2]
    for choice in ("ring", "usp"):
        assert (lines[choice].get_xdata()[0], lines[choice].get_ydata()[0]) == (8, 100)


def line_of(rates: dict[int, float]) -> pd.DataFrame:
    return pd.DataFrame({"world_size": list(rates), "compute/tflops_per_gpu": list(rates.values())})


def test_efficiency_by_hand() -> None:
    found = efficiency_of({"a": line_of({8: 100, 16: 90}), "b": line_of({16: 50, 32: 40}), "c": line_of({8: 7})})
    assert {choice: (list(share), own) for choice, (share, own) in found.items()} == {
        "a": ([100, 90], None), "b": ([100, 80], 16)
    }  # fmt: skip
    # A panel in which no choice has the smallest scale of the others begins at its own.
    assert efficiency_of({"b": line_of({16: 50, 32: 40})})["b"][1] is None
    assert efficiency_of({}) == {}


def test_lines_that_lie_on_each_other() -> None:
    lines = {
        "a": line_of({8: 100, 16: 90}),
        "b": line_of({8: 101, 16: 90.5}),
        "c": line_of({8: 100, 16: 70}),
        "d": line_of({32: 1}),
    }
    assert alike(lines, "world_size", "compute/tflops_per_gpu") == [["a", "b"], ["c"], ["d"]]


# -- ranking, maps, time -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_of_a_ranking_is_the_winner_and_failures_stand_at_the_end_with_their_class(tmp_path: Path) -> None:
    out = Failure("oom", "out of memory", 0)
    sweep = made_sweep(tmp_path, "choose", CHOOSE, failed={"ring flash_attn3": out, "usp cudnn": NODE_FAILURE})
    frame = reported(sweep)
    figures = drawn_of(frame)
    (axis,) = shown_axes(figures["ranking_1x8"])
    names = [label.get_text() for label in axis.get_yticklabels()]
    (winner,) = winners(good_rows(frame))
    assert names[0] == winner.choice
    assert len(names) == 12
    assert set(names[-2:]) == {"ring + flash_attn3", "usp + cudnn"}
    assert texts(axis)[-2:] == ["oom", "node-fail"] or texts(axis)[-2:] == ["node-fail", "oom"]
    low, high = sorted(axis.get_ylim())
    assert low < 0 < 11 < high  # all bars and marks are inside
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == sorted(widths)
    assert axis.lines[-1].get_xdata()[0] == pytest.approx(widths[0])  # the line at the best
    assert figures["ranking_1x8"].alt.startswith(f"causal 64k: {winner.choice} is fastest with ")
    assert "1 oom" in figures["ranking_1x8"].alt
    (heat,) = shown_axes(figures["kernel-by-strategy_1x8"])
    assert sorted(text for text in texts(heat) if not text.isdecimal()) == ["node-fail", "oom"]
    assert len(texts(heat)) == 12


@pytest.mark.slow
def test_there_is_no_ranking_of_two(tmp_path: Path) -> None:
    assert not any("ranking" in name for name in drawn_of(reported(made_sweep(tmp_path, "s", [*LENGTHS, "scale=1x8"]))))


@pytest.mark.slow
def test_where_the_time_goes_shows_how_long_it_is(figures: dict[str, Drawn], big_frame: pd.DataFrame) -> None:
    (axis,) = shown_axes(figures["time-split_2x8"])
    names = [label.get_text().split() for label in axis.get_yticklabels()]
    ends = [sum(part[i].get_width() for part in axis.containers) for i in range(len(names))]
    good = good_rows(over_seeds(big_frame))
    best = good.groupby("problem")["time/total/median_s"].transform("min")
    for (mask, length, choice), end in zip(names, ends, strict=True):
        at = (
            (good["what_mask"] == mask)
            & (good["seqlen"] == int(length[:-1]) * 1024)
            & (good["scale"] == "2x8")
            & (good["choice"] == choice)
        )
        ratio = float((good["time/total/median_s"] / best)[at].iloc[0])
        assert end == pytest.approx(min(ratio, 4.0), rel=0.02)
    assert "rest" not in [text.get_text() for text in figures["time-split_2x8"].figure.legends[0].get_texts()]
    assert [name for name in figures if name.startswith("time-split")] == [f"time-split_{n}x8" for n in (1, 2, 4, 8)]


# -- names, words, order -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_name_of_a_figure_does_not_depend_on_other_scales(tmp_path: Path) -> None:
    one, two = (
        reported(made_sweep(tmp_path, scales.replace(",", "-"), [*LENGTHS, f"scale={scales}"])) for scales in ("4x8", "1x8,4x8")
    )
    alone, both = set(drawn_of(one)), set(drawn_of(two))
    assert {table.name for table in rate_tables(one)} < {table.name for table in rate_tables(two)}
    assert "rate-by-length_4x8" in alone < both
    assert "rate-by-length_1x8" in both
    heads = set(drawn_of(reported(made_sweep(tmp_path, "heads", [*LENGTHS, "scale=4x8", "heads=8x8x64,16x8x64"]))))
    assert {"rate-by-length_4x8_heads-8x8x64", "rate-by-length_4x8_heads-16x8x64"} <= heads
    assert all(re.fullmatch(r"[a-z-]+_[a-z0-9._-]+", name) for name in alone | both | heads)


@pytest.mark.slow
def test_a_figure_holds_its_title_and_where_it_comes_from(figures: dict[str, Drawn], big_frame: pd.DataFrame) -> None:
    for figure in figures.values():
        assert figure.figure.get_suptitle() == figure.title
        assert figure.figure.get_supxlabel() == source_of(big_frame)
    assert "4x8" in figures["rate-by-length_4x8"].title
    assert re.fullmatch(r"big · NVIDIA H100 80GB HBM3 · lcbench 0123456789ab · \d{4}-\d\d-\d\d", source_of(big_frame))


@pytest.mark.slow
def test_the_words_for_a_figure_say_what_is_found(figures: dict[str, Drawn], big_frame: pd.DataFrame) -> None:
    choices = set(big_frame["choice"])
    for figure in figures.values():
        assert figure.alt != figure.title
        assert any(choice in figure.alt for choice in choices) or figure.kind.startswith("mask-by") or "all need" in figure.alt
        assert re.search(r"\d", figure.alt)
        assert not re.search(r"\bnan\b|e\+\d", figure.alt)


@pytest.mark.slow
def test_the_first_of_every_kind_comes_before_the_second_of_any(figures: dict[str, Drawn]) -> None:
    kinds = [figure.kind for figure in figures.values()]
    count = len(set(kinds))
    assert count == 11
    assert len(set(kinds[:count])) == count
    assert len(figures) > 41


@pytest.mark.slow
def test_a_figure_is_written_as_png_and_pdf(tmp_path: Path) -> None:
    frame = reported(made_sweep(tmp_path, "s", [*LENGTHS, "scale=1x8"], failed={"usp sdpa_flash full 64k": MEMORY_FAILURE}))
    figure = next(all_figures(frame, known_devices(), LINKS))
    paths = figure.save(tmp_path / "made" / "here")
    assert [path.name for path in paths] == ["rate-by-length_1x8.png", "rate-by-length_1x8.pdf"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_there_are_none_where_nothing_ran(tmp_path: Path) -> None:
    broken = made_sweep(tmp_path, "s", [*LENGTHS, "scale=1x8"], failed={"": NODE_FAILURE})
    assert drawn_of(reported(broken)) == {}
    assert drawn_of(pd.DataFrame()) == {}
