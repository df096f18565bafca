"""What it costs to take one choice for everything: its time over that of the best, problem by problem, for every choice.

Who counts victories chooses wrong: the choice that is fastest most often may be several times slower than the best elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcbench.grid.axes import ALWAYS_TOLD, PROBLEM
from lcbench.problem import format_tokens
from lcbench.report.amounts import times
from lcbench.report.frame import column_of, rank_of

if TYPE_CHECKING:
    import pandas as pd

# A choice that ran in fewer than this share of the problems that the most frequent one ran ranks after those that did: its mean is
# over other problems than theirs, and may leave out the hard ones.
NEARLY_ALL = 0.9
# No verdict from fewer problems or choices than these.
FEWEST_PROBLEMS = 3
FEWEST_CHOICES = 2
# Means that are closer than this are not told apart.
CLOSE = 0.02


@dataclass(frozen=True)
class Regret:
    """How a choice does over all problems.

    Attributes:
        choice: its name, as in the frame.
        mean: geometric mean of its time over that of the best, over ``compared`` problems; 1 is the best everywhere.
        worst: the largest of these ratios.
        where: what to call the problem of the worst, such as ``causal 128k 1x8``.
        worst_cell: id of its cell there.
        fastest: in how many of the ``compared`` problems none was faster.
        ran: in how many problems it has a good result.
        problems: in how many any choice has one.
        compared: in how many it and another have one.
        everywhere: whether it ran in nearly all problems, so that its mean can be set beside that of others.
        approximate: whether it approximates, and so wins over nothing: the best are exact.
        distance: the largest of its results from exact ones; None where it is not known, or is exact.
    """

    choice: str
    mean: float
    worst: float
    where: str
    worst_cell: str
    fastest: int
    ran: int
    problems: int
    compared: int
    everywhere: bool
    approximate: bool = False
    distance: float | None = None

    @property
    def named(self) -> str:
        """The choice, with how far off it is where it approximates."""
        return self.choice if self.distance is None else f"{self.choice}, distance up to {self.distance:.2g}"

    def row(self) -> dict[str, str]:
        """For a table."""
        return {
            "choice": self.named, "mean vs best": times(self.mean), "worst": times(self.worst), "where": self.where,
            "fastest in": f"{self.fastest} of {self.compared}", "ran in": f"{self.ran} of {self.problems}",
        }  # fmt: skip


def regrets(good: pd.DataFrame, problems: Collection[str] | None = None) -> list[Regret]:
    """Every choice of the good rows of ``frame.reported``, the best first.

    Those that ran in nearly all problems (at least ``NEARLY_ALL`` of the most that any choice ran) come first, by their mean; then
    the others, by theirs; then those that approximate, over the best of the exact ones, the closest first (``frame.rank_of``).
    What ran alone in a problem has nothing to be compared with there: such problems count in ``ran`` and ``problems`` only, and a
    choice that has no other has no place in the list.

    Args:
        problems: keys (the frame's ``problem``) of those to look at; None: all.
    """
    if problems is not None and len(good):
        good = good[good["problem"].isin(set(problems))]
    if good.empty:
        return []
    rows = _one_each(good)
    rows = rows.assign(label=problem_labels(rows))
    exact = rows["approximate"] == ""
    by_problem = rows["time/total/median_s"].where(exact).groupby(rows["problem"], sort=False)
    ratio, rivals = rows["time/total/median_s"] / by_problem.transform("min"), by_problem.transform("count") - exact
    rows = rows.assign(ratio=ratio, rivals=rivals, exact=exact)[ratio.notna()]  # where nothing exact ran there is no best
    count = rows["problem"].nunique()
    ran = rows.groupby("choice", sort=False).size()
    most = rows[rows["exact"]].groupby("choice").size().max()
    found = []
    for choice, mine in rows[rows["rivals"] > 0].groupby("choice", sort=False):
        ratios, approximate = mine["ratio"].to_numpy(dtype=float), not mine["exact"].all()
        worst = mine.iloc[int(ratios.argmax())]
        distance = float(mine["check/distance"].max()) if approximate and "check/distance" in mine else np.nan
        found.append(
            Regret(
                str(choice), float(np.exp(np.log(ratios).mean())), float(ratios.max()), worst["label"], worst["cell"],
                0 if approximate else int((ratios == 1.0).sum()), int(ran[choice]), count, len(ratios),
                bool(ran[choice] >= NEARLY_ALL * most), approximate, None if np.isnan(distance) else distance,
            )
        )  # fmt: skip
    return sorted(found, key=lambda r: (rank_of(r.mean, r.distance, approximate=r.approximate)[0], not r.everywhere, r.mean))


def contests(good: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The good rows of ``frame.reported`` by workload. A call of attention and a training step are no answers to one question: a
    choice has a verdict for each.
    """
    return {str(name): rows for name, rows in good.groupby("workload", sort=False)} if len(good) else {}


def _one_each(good: pd.DataFrame) -> pd.DataFrame:
    """One row of each choice and problem: cells that differ only in how they were measured are one answer, the median one."""
    ordered = good.sort_values("time/total/median_s", kind="stable")
    groups = ordered.groupby(["problem", "choice"], sort=False)
    median = groups.cumcount() == groups["cell"].transform("size") // 2
    return ordered[median].sort_index()


def problem_labels(frame: pd.DataFrame) -> pd.Series:
    """What to call the problem of every row of ``frame.reported``: mask, length and scale, and what else differs between rows.

    A mask's options are left out where it has the same in all rows.
    """
    short = frame.groupby("mask")["what_mask"].transform("nunique") == 1
    masks = frame["mask"].where(short, frame["what_mask"])
    labels = masks + " " + frame["seqlen"].map(lambda n: format_tokens(int(n))) + " " + frame["scale"].astype(str)
    for axis in PROBLEM:
        column = column_of(axis)
        if axis not in ALWAYS_TOLD and column in frame and frame[column].nunique() > 1:
            labels = labels + f", {axis} " + frame[column].astype(str)
    return labels


def verdict(found: Sequence[Regret]) -> str | None:
    """What to use, by how much, and over how many problems, in sentences; None of fewer than three problems or two choices
    that are exact.

    Args:
        found: what ``regrets`` gave.
    """
    beside, found = [r for r in found if r.approximate], [r for r in found if not r.approximate]
    if len(found) < FEWEST_CHOICES or found[0].compared < FEWEST_PROBLEMS:
        return None
    best, *others = found
    said = [
        f"Use {best.choice}. Over {best.compared} problems it takes on average {times(best.mean)} the time of the best, "
        f"at worst {times(best.worst)} ({best.where})."
    ]
    if best.ran < best.problems:
        said.append(f"It has a result in {best.ran} of {best.problems}.")
    most = max(found, key=lambda r: r.fastest)
    if most.fastest > best.fastest and most.fastest == most.compared:
        said.append(f"{most.choice} is fastest wherever it ran ({most.ran} of {most.problems}).")
    elif most.fastest > best.fastest:
        partly = "" if most.everywhere else f", has a result in {most.ran} of {most.problems} only"
        but = ", and" if partly else " but" if most.worst > best.worst else " and"
        victories = f"{most.choice} is fastest most often ({most.fastest} of {most.compared})"
        said.append(f"{victories}{partly}{but} takes up to {times(most.worst)} ({most.where}).")
    near = [r for r in others if r.everywhere and r.mean < best.mean * (1 + CLOSE) and r is not most]
    if near:
        close = ", ".join(f"{r.choice} ({times(r.mean)}, at worst {times(r.worst)})" for r in near)
        said.append(f"Close to it on average: {close}.")
    if beside:
        said.append(f"No rivals, as they approximate: {', '.join(f'{r.named} ({times(r.mean)})' for r in beside)}.")
    return " ".join(said)
