"""A choice has one style in a whole report, and styles can be told apart, by people with two kinds of cones too."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from lcbench.report.palette import COLORS, MARKERS, style, styles

Array = NDArray[np.float64]
# Machado, Oliveira, Fernandes (2009), severity 1.0, on linear RGB.
SEEN = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}  # fmt: skip
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def lab(color: str, seen: Array) -> Array:
    """CIE L*a*b* of #rrggbb."""
    srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.clip(seen @ np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4), 0, 1)
    x, y, z = np.cbrt(np.maximum(XYZ @ linear / XYZ.sum(axis=1), 1e-12))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN)
def test_colours_can_be_told_apart(seen: str) -> None:
    labs = [lab(color, SEEN[seen]) for color in COLORS]
    distances = (float(np.linalg.norm(a - b)) for a, b in itertools.combinations(labs, 2))
    assert min(distances) > 12  # CIE76; below 10 thin lines cannot be told apart


def test_styles_follow_the_plan_whatever_ran() -> None:
    rows = [("a", "failed"), ("b", "ok"), ("c", "skipped"), ("d", "ok"), ("b", "ok"), ("e", "missing")]
    found = styles(pd.DataFrame(rows, columns=["choice", "status"]))
    assert list(found) == ["a", "b", "c", "d", "e"]
    assert found == {choice: style(number) for number, choice in enumerate("abcde")}
    assert styles(pd.DataFrame()) == {}


def test_more_than_eight_choices_differ_in_marker_and_dash_too() -> None:
    many = [style(number) for number in range(320)]
    assert len(set(many)) == 320
    assert len({(s.color, s.marker) for s in many[:64]}) == 64  # points have no dash
    assert not any(s.dash for s in many[:8])
    assert all(s.dash for s in many[8:16])


def test_a_style_is_known_to_both_that_draw() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    for number in (0, 9, 18):
        line = axis.plot([0, 1], **style(number).matplotlib)[0]
        assert line.get_marker() in MARKERS.values()
    assert style(0).strokes == ""
    assert style(8).strokes == "5 2"
