"""Which choice of kernel and strategy is fastest for each problem, by how much, and whether that is more than noise.

Of choices that are equal one is the fastest all the same. It is called so only if it differs from every other: the test that it is
the best at the level of a single pair, however many there are (Gutmann and Maymin 1987; Hung and Fithian 2019), and since a table
has many problems, after Holm's correction over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcbench.grid.cell import format_tokens
from lcbench.report.intervals import LEVEL, Median, Ratio, holm

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Winner:
    """The fastest choice for a problem. ``margin``: time of the next one over its own; None where nothing else ran. ``p``: how
    probable it is to be as far ahead of all others where one of them is as fast, adjusted for the problems of the table;
    ``least_sure``: that one, if it is not the next; ``known``: whether run-to-run noise was measured.
    """

    mask: str
    seqlen: int
    scale: str
    setting: str
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

    @property
    def verdict(self) -> str:
        """In words: whether the margin is larger than the noise."""
        if self.margin is None:
            return "nothing else ran"
        if self.p > LEVEL:
            return f"within the noise of {self.least_sure}" if self.least_sure else "within the noise"
        return "beyond the noise" if self.known else "run-to-run noise not measured"

    def row(self) -> dict[str, str]:
        """For a table."""
        margin = f"{self.margin.value:.3f} [{self.margin.low:.3f}, {self.margin.high:.3f}]" if self.margin else "-"
        return {
            "mask": self.mask, "length": format_tokens(self.seqlen), "scale": self.scale, "setting": self.setting,
            "fastest": self.choice, "TFLOP/s per GPU": f"{self.tflops_per_gpu:.3g}", "ms": f"{self.seconds * 1e3:.3g}",
            "peak MiB": f"{self.peak_bytes / 2**20:.0f}" if self.peak_bytes is not None else "-",
            "next": self.next_choice or "-", "next takes times": margin, "margin": self.verdict,
        }  # fmt: skip


def winners(frame: pd.DataFrame) -> list[Winner]:
    """The winner of every problem of the good rows of ``frame.reported``, in the order of the plan."""
    found = []
    for _, rows in frame.groupby("problem", sort=False) if not frame.empty else ():
        ranked = rows.sort_values("time/total/median_s")
        best = ranked.iloc[0]
        peak = best.get("memory/peak_bytes", float("nan"))
        made = Winner(
            best["what_mask"], int(best["seqlen"]), best["scale"], best["where"], best["choice"], best["cell"],
            float(best["compute/tflops_per_gpu"]), float(best["time/total/median_s"]), None if peak != peak else float(peak),
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


def lead(times: Sequence[Median]) -> tuple[Ratio, float, int, bool]:
    """Of times, the shortest first: the next one over it, the p value of the least sure of its differences from the others, the
    place of that other, and whether run-to-run noise is in all of them.
    """
    margins = [time.over(times[0]) for time in times[1:]]
    least = max(range(len(margins)), key=lambda i: margins[i].p)
    return margins[0], margins[least].p, least + 1, all(m.known for m in margins)
