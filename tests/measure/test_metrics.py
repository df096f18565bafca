"""The table of metrics: every key that an attempt holds is in it once, and docs/metrics.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.measure.blocks import with_block
from lcbench.measure.metrics import METRICS, metric_of, table
from tests.measure.test_cell import measured

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.mark.parametrize("draws", [1, 2])
def test_every_key_of_a_cell_is_in_the_table(tmp_path: Path, draws: int) -> None:
    first = measured("causal_document", 150, "float32", tmp_path, draws=draws)
    metrics, _ = with_block(first.metrics, first.samples, first)
    found = {metric_of(key).key for key in metrics}
    # What is in the table and not here needs several ranks, several groups of them, or several draws.
    absent = {metric.key for metric in METRICS} - found
    assert {key.split("/")[0] for key in absent} == {"overlap", "mesh", *(["draws"] if draws == 1 else [])}
    samples = {"draw_area", "draw_forward_median_s", "draw_backward_median_s", "draw_total_median_s"}
    assert {key for key in first.samples if key.startswith("draw_")} == (samples if draws > 1 else set())


def test_a_key_that_nobody_declared_is_an_error() -> None:
    with pytest.raises(KeyError, match="time/lunch_s is no metric"):
        metric_of("time/lunch_s")


def test_the_docs_show_the_table() -> None:
    """After a change: put what ``python -m lcbench.measure.metrics`` prints into docs/metrics.md."""
    assert table() in DOCS.read_text()
