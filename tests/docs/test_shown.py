"""Docs show what commands print, and their drawings what the code has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Annotation, Text

from tests.docs import drawings
from tests.docs.shown import LEFT_OUT, ROOT, cut, make_sweeps, pages, prints, renewed


def test_a_long_output_is_cut_with_dots() -> None:
    lines = [f"line {i}" for i in range(9)]
    assert cut(lines, 2, 1).splitlines() == ["line 0", "line 1", LEFT_OUT, "line 8"]
    assert cut(lines, 2, 0).splitlines() == ["line 0", "line 1", LEFT_OUT]
    assert cut(lines, 5, 4).splitlines() == lines


def test_only_what_is_below_a_marker_is_written_again() -> None:
    page = "a\n\n<!-- prints: status x | head 3, tail 0 -->\n\n```text\nold\n```\n\n```text\nkept\n```\n"
    assert renewed(page, lambda told: [told, "1", "2", "3"]) == page.replace("old", "status x\n1\n2\n...")


def test_the_recipes_show_outputs() -> None:
    assert ROOT / "docs" / "recipes.md" in pages()


@pytest.mark.slow
def test_docs_show_what_commands_print_now(tmp_path: Path) -> None:
    """Where this fails a command's output has changed: ``make docs``, and read whether what stands around it is still true."""
    make_sweeps(tmp_path)
    for page in pages():
        assert renewed(page.read_text(), lambda told: prints(told, tmp_path)) == page.read_text(), page.name


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_drawn_and_the_docs_have_it(name: str, tmp_path: Path) -> None:
    drawings.DRAWINGS[name]().savefig(tmp_path / f"{name}.png")
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert (drawings.DOCS / f"{name}.png").exists()
    shown = [page for page in (ROOT / "README.md", *drawings.DOCS.glob("*.md")) if f"{name}.png)" in page.read_text()]
    assert shown, f"no page shows {name}.png"


def words(name: str) -> list[str]:
    return [text.get_text() for axes in drawings.DRAWINGS[name]().axes for text in axes.findobj(Text)]


def test_the_ring_is_drawn_as_every_rank_meets_every_key() -> None:
    for step, axes in enumerate(drawings.ring().axes):
        texts = [text.get_text() for text in axes.texts if not isinstance(text, Annotation) and text.get_text()]
        held = {texts[i].removeprefix("rank ")[0]: texts[i + 1][1] for i in range(1, 9, 2)}
        assert held == {str(rank): str((rank - step) % drawings.RANKS) for rank in range(drawings.RANKS)}


def test_the_tree_is_drawn_with_the_edges_that_adjoint_names() -> None:
    """The edges of the drawing, by where their arrows begin and end, are those of the module's own picture."""
    expected = [{(0, 1), (0, 2), (2, 3)}, {(0, 1), (0, 3), (3, 2)}, {(1, 0), (3, 2), (2, 0)}]
    places = {0: (3.0, 1.0), 1: (1.4, 2.7), 2: (4.6, 2.7), 3: (4.6, 4.4)}
    nearest = lambda at: min(places, key=lambda rank: np.hypot(places[rank][0] - at[0], places[rank][1] - at[1]))  # noqa: E731
    for axes, edges in zip(drawings.adjoint().axes, expected, strict=True):
        arrows = [text for text in axes.texts if isinstance(text, Annotation)]
        assert {(nearest(arrow.xyann), nearest(arrow.xy)) for arrow in arrows} == edges


def test_buffers_that_share_a_slot_are_drawn_apart() -> None:
    _, buffers, _ = drawings.program_buffers()
    for slot in {buffer.slot for _, buffer in buffers}:
        lives = sorted((b.birth, b.death) for _, b in buffers if b.slot == slot)
        assert all(before[1] < after[0] for before, after in pairwise(lives))


def test_the_overlap_example_says_itself_that_it_is_one() -> None:
    assert any("not a measurement" in text for text in words("overlap"))
