"""The figures of a report, as files: which there are, and in what order. Each kind gives figures where its question arises."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lcbench.report.bars import ranking, time_split
from lcbench.report.batches_figures import gains_by_lengths, gantts, makespans
from lcbench.report.drawing import Drawn
from lcbench.report.front import pareto
from lcbench.report.linear_figures import figures_of as linear_figures
from lcbench.report.lines import efficiency, memory_by_length, phases_by_gpus, phases_by_length, rate_by_gpus, rate_by_length
from lcbench.report.maps import kernel_by_strategy, mask_by_kernel, mask_by_strategy
from lcbench.report.panel import as_files
from lcbench.report.parts import shown
from lcbench.report.roofline import roofline
from lcbench.report.serving_figures import serving_lines
from lcbench.report.sparse_figures import figures_of as sparse_figures
from lcbench.report.step_figures import step_parts

if TYPE_CHECKING:
    import pandas as pd


def all_figures(frame: pd.DataFrame, devices: Sequence[dict[str, Any]], links: dict[str, float]) -> Iterator[Drawn]:
    """Every figure that these results call for, the first of every kind before the second of any; of cells that differ in their
    seed only, the median one is drawn.

    Args:
        frame: all cells of ``frame.reported``: what failed is marked, and what a choice looks like does not depend on what ran.
        devices: the ``conf/device`` entries.
        links: GB/s of a link class, as the check of the nodes measured it.
    """
    if frame.empty or not frame["good"].any():
        return
    of = shown(frame, devices)
    if of.good.empty:
        return
    kinds = [
        rate_by_length(of), ranking(of), rate_by_gpus(of), kernel_by_strategy(of), efficiency(of), mask_by_kernel(of),
        mask_by_strategy(of), memory_by_length(of), time_split(of), roofline(of, links), phases_by_length(of), phases_by_gpus(of),
        pareto(of), step_parts(of), serving_lines(of), makespans(of), gains_by_lengths(of), gantts(of),
        as_files(sparse_figures(of), of.source), as_files(linear_figures(of), of.source),
    ]  # fmt: skip
    for round_ in itertools.zip_longest(*kinds):
        yield from filter(None, round_)
