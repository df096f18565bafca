"""Which choice of kernel and strategy is fastest for each problem, by how much, and whether that is more than noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcbench.grid.cell import format_tokens
from lcbench.report.frame import row_time
from lcbench.report.intervals import Ratio

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Winner:
    """The fastest choice for a problem. ``margin``: time of the next one over its own; None where nothing else ran."""

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

    @property
    def verdict(self) -> str:
        """In words: whether the margin is larger than the noise."""
        if self.margin is None:
            return "nothing else ran"
        return "beyond the noise" if self.margin.low > 1.0 else "within the noise"

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
        others = ranked.iloc[1:]
        if not others.empty:
            second = others.iloc[0]
            made = replace(made, next_choice=second["choice"], margin=row_time(second).over(row_time(best)))
        found.append(made)
    return found
