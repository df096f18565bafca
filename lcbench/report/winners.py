"""Which choice of kernel and strategy is fastest for each problem, by how much, and whether that is more than noise.

Of choices that are equal one is the fastest all the same. It is clearly so only if it differs from every other: the test that it is
the best at the level of a single pair, however many there are (Gutmann and Maymin 1987; Hung and Fithian 2019), and since a table
has many problems, after Holm's correction over them. What is no more than noise in another job, or matters to nobody, is close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, duration, size, times
from lcbench.report.frame import exact_rows
from lcbench.report.intervals import LEVEL, Median, Ratio, holm

if TYPE_CHECKING:
    import pandas as pd


Verdict = Literal["clear", "close", "only one ran"]
# A margin below this is close however sure it is: clusters differ by as much from day to day.
CLOSE = 0.02
# The same where run-to-run noise was not measured. Clusters have 1 to 3 %; this is 2.4 standard deviations of a difference at 3 %.
UNMEASURED = 0.1
BESIDE = "no rival"  # the column of what approximates, beside the winner


@dataclass(frozen=True)
class Winner:
    """The fastest choice for a problem, of those that are exact.

    Attributes:
        cell: id of its cell.
        seconds: its time of an iteration.
        margin: time of the next one over its own; None where nothing else ran.
        p: how probable it is to be as far ahead of all others where one of them is as fast, adjusted for the problems of the table.
        least_sure: that one, if it is not the next.
        known: whether run-to-run noise was measured.
        approximate: the fastest choice that approximates, which is no rival, in words; empty where there is none.
    """

    mask: str
    seqlen: int
    scale: str
    setting: str
    workload: str
    choice: str
    cell: str
    tflops_per_gpu: float
    seconds: float
    peak_bytes: float | None
    next_choice: str = ""
    margin: Ratio | None = None
    p: float = 1.0
    least_sure: str = ""
    known: bool = True
    approximate: str = ""

    @property
    def verdict(self) -> Verdict:
        """``clear``: it is ahead of all others by at least ``CLOSE`` and by more than the noise; ``close``: it is not."""
        if self.margin is None:
            return "only one ran"
        least = CLOSE if self.known else UNMEASURED
        return "clear" if self.p <= LEVEL and self.margin.value >= 1 + least else "close"

    @property
    def why(self) -> str:
        """What a verdict rests on, in words; empty where it needs none."""
        if self.margin is None:
            return ""
        unmeasured = "" if self.known else "run-to-run noise not measured"
        if self.p > LEVEL:
            within = f"within the noise of {self.least_sure}" if self.least_sure else "within the noise"
            return f"{within}; {unmeasured}" if unmeasured else within
        return unmeasured or (f"less than {CLOSE:.0%}" if self.verdict == "close" else "")

    @property
    def slower(self) -> str:
        """By how much the next one is slower, with the 95 % interval: ``+2.4 % (2.2 to 2.6)``; empty where nothing else ran."""
        if self.margin is None:
            return ""
        value, low, high = self.margin.value, self.margin.low, self.margin.high
        if value >= 2:
            return f"{times(value)} ({times(low)} to {times(high)})"
        return f"{100 * (value - 1):+.1f} % ({100 * (low - 1):.1f} to {100 * (high - 1):.1f})"

    def row(self) -> dict[str, str]:
        """For a table."""
        return {
            "mask": self.mask, "length": format_tokens(self.seqlen), "scale": self.scale, "setting": self.setting,
            "fastest": self.choice, "TFLOP/s per GPU": digits(self.tflops_per_gpu), "time": duration(self.seconds),
            "peak memory": size(self.peak_bytes) or "-", "next": self.next_choice or "-", "next is slower by": self.slower or "-",
            "verdict": f"{self.verdict}: {self.why}" if self.why else self.verdict, BESIDE: self.approximate or "-",
        }  # fmt: skip


def rows_of(found: Sequence[Winner]) -> list[dict[str, str]]:
    """For a table, without the column of what approximates where nothing does."""
    rows = [winner.row() for winner in found]
    return rows if any(w.approximate for w in found) else [{k: v for k, v in row.items() if k != BESIDE} for row in rows]


def winners(frame: pd.DataFrame) -> list[Winner]:
    """The winner of every problem of the good rows of ``frame.reported`` that has an exact one, in the order of the plan."""
    found = []
    for _, rows in frame.groupby("problem", sort=False) if not frame.empty else ():
        ranked = exact_rows(rows).sort_values("time/total/median_s")
        if ranked.empty:
            continue
        best = ranked.iloc[0]
        peak = best.get("memory/peak_bytes", float("nan"))
        made = Winner(
            best["what_mask"], int(best["seqlen"]), best["scale"], best["where"], best["workload"], best["choice"], best["cell"],
            float(best["compute/tflops_per_gpu"]), float(best["time/total/median_s"]), None if peak != peak else float(peak),
            approximate=_beside(rows, best),
        )  # fmt: skip
        if len(ranked) > 1:
            margin, p, place, known = lead(ranked["timed/total"].tolist())
            choices = ranked["choice"].tolist()
            made = replace(
                made, next_choice=choices[1], margin=margin, p=p, least_sure=choices[place] if place > 1 else "", known=known
            )  # fmt: skip
        found.append(made)
    adjusted = iter(holm([w.p for w in found if w.margin is not None]))
    return [w if w.margin is None else replace(w, p=next(adjusted)) for w in found]


def _beside(rows: pd.DataFrame, best: pd.Series[Any]) -> str:
    """Of the rows of a problem the fastest that approximates, and how many more there are, in words."""
    others = rows[rows["approximate"] != ""].sort_values("time/total/median_s")
    if others.empty:
        return ""
    first = others.iloc[0]
    ratio = times(float(first["time/total/median_s"] / best["time/total/median_s"]))
    more = f"; and {len(others) - 1} more" if len(others) > 1 else ""
    _, comma, distance = first["approximate"].partition(", ")  # of a prediction nobody knows it
    return f"{first['choice']} takes {ratio} the time{comma}{distance}{more}"


def lead(times: Sequence[Median]) -> tuple[Ratio, float, int, bool]:
    """Of times, the shortest first: the next one over it, the p value of the least sure of its differences from the others, the
    place of that other, and whether run-to-run noise is in all of them.
    """
    margins = [time.over(times[0]) for time in times[1:]]
    least = max(range(len(margins)), key=lambda i: margins[i].p)
    return margins[0], margins[least].p, least + 1, all(m.known for m in margins)
