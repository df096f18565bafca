"""Attention that chooses its mask in a report: what selectors keep of the softmax's mass, what they take, what strategies send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, duration, percent, size, times
from lcbench.report.batches import PROBLEM, known, words_of
from lcbench.report.frame import over_seeds
from lcbench.report.serving import Answer

if TYPE_CHECKING:
    import pandas as pd

WORKLOAD = "sparse_attention"
RECALL, BEST, DENSITY = "select/recall", "select/oracle_recall", "select/density"
DENSE, SPEEDUP = "time/dense_s", "select/amortised_speedup"
ORACLE = "oracle"  # the selector that knows the best choice
# What a column of the table says, by metric.
SAYS = (
    ("recall", RECALL, percent), ("best possible", BEST, percent), ("head with least", "select/recall_min_head", percent),
    ("head with most", "select/recall_max_head", percent), ("density", DENSITY, percent),
    ("densest head", "select/density_max_head", percent), ("distance", "check/distance", digits),
    ("select", "time/select/median_s", duration), ("plan", "time/plan/median_s", duration),
    ("forward", "time/forward/median_s", duration), ("backward", "time/backward/median_s", duration),
    ("total", "time/total/median_s", duration), ("mean step", "select/amortised_s", duration), ("full attention", DENSE, duration),
    ("full / total", "select/speedup", times), ("full / mean step", SPEEDUP, times),
    ("sent to select", "comm/select/bytes", size), ("sent", "comm/bytes", size),
    ("area max / mean", "balance/area_max_over_mean", digits),
)  # fmt: skip


def sparse_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of ``frame.reported`` that choose their mask and have a good result or a prediction, one of those that differ in
    their seed only, with a column ``by``: the selector with what of its options differs.
    """
    if frame.empty or not (frame["workload"] == WORKLOAD).any():
        return frame.iloc[:0]
    rows = over_seeds(frame)
    rows = rows[(rows["workload"] == WORKLOAD) & (rows["good"] | (rows["status"] == "predicted"))]
    return rows.assign(by=rows["what_selector"].astype(str))


def contests(rows: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Of ``sparse_rows`` those of one problem, in the order of the plan."""
    for key, mine in rows.groupby(PROBLEM, sort=False) if len(rows) else ():
        yield dict(zip(PROBLEM, key, strict=True)), mine


def seconds_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What a pass of a row went to, by part, in seconds: ``select``, ``plan``, ``attention``; without those that it has not."""
    parts = {part: known(row, f"time/{part}/median_s") for part in ("select", "plan")}
    attention = [known(row, f"time/{phase}/median_s") for phase in ("forward", "backward")]
    parts["attention"] = sum(filter(None, attention)) or None
    return {part: value for part, value in parts.items() if value is not None}


# -- selections ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What a selector chose for one problem; strategies and kernels choose the same.

    Attributes:
        selector: alone, and ``by``: with those of its options that differ.
        asked: share of the blocks that it was to keep, 0 to 1; None: it was asked otherwise.
        density: pairs that are kept over those of the mask, 0 to 1.
        recall: mass that is kept, 0 to 1, mean over heads; ``least``, ``most``: of the heads with least and most.
        best: the most that as many blocks can keep.
        cells: ids of the cells that say it.
    """

    selector: str
    by: str
    asked: float | None
    density: float
    recall: float
    least: float
    most: float
    best: float
    cells: tuple[str, ...]

    @property
    def of_best(self) -> float:
        """The mass that is kept over the most that as many blocks can keep."""
        return self.recall / self.best if self.best else 0.0

    @property
    def words(self) -> str:
        return (
            f"{percent(self.of_best)} of it ({percent(self.recall)} of the softmax's mass in {percent(self.density)} of the pairs)"
        )


def selections(rows: pd.DataFrame) -> list[Selection]:
    """Of the rows of one problem, a selection for every selector and its options."""
    if RECALL not in rows:
        return []
    found = []
    for by, mine in rows[rows[RECALL].notna()].groupby("by", sort=False):
        first = mine.iloc[0]
        found.append(
            Selection(
                str(first["selector"]), str(by), known(first, "selector.density"),
                density=float(first[DENSITY]), recall=float(first[RECALL]),
                least=float(first["select/recall_min_head"]), most=float(first["select/recall_max_head"]),
                best=float(first[BEST]), cells=tuple(mine["cell"].astype(str)),
            )
        )  # fmt: skip
    return found


def asked(found: list[Selection]) -> list[tuple[float | None, list[Selection]]]:
    """Selections by the density that was asked for, None where none was, without ``ORACLE``; the one that comes closest to the best
    choice of as many blocks is the first of each.
    """
    others = [one for one in found if one.selector != ORACLE]
    groups = {one.asked: [same for same in others if same.asked == one.asked] for one in others}
    return [(density, sorted(its, key=lambda one: -one.of_best)) for density, its in groups.items()]


# -- in words ------------------------------------------------------------------------------------------------------------


def answers(rows: pd.DataFrame) -> list[Answer]:
    """Of every problem in ``sparse_rows``: what comes closest to the best choice for each density that was asked for, and what a
    step takes against full attention.
    """
    found = []
    for problem, mine in contests(rows):
        for density, group in asked(selections(mine)):
            what = "no share asked for" if density is None else f"{percent(density, 0)} of the blocks asked for"
            first = f" comes closest to the best choice of as many blocks, with {group[0].words}"
            rest = f"; then {', '.join(f'{one.by} {one.words}' for one in group[1:])}" if group[1:] else ""
            parts = [(False, f"{words_of(problem)}, {what}: "), (True, group[0].by), (False, f"{first}{rest}.")]
            found.append(Answer(parts, tuple(cell for one in group for cell in one.cells)))
        if (one := _against_full(problem, mine)) is not None:
            found.append(one)
    return found


def _against_full(problem: dict[str, Any], rows: pd.DataFrame) -> Answer | None:
    its = [row for row in rows.to_dict("records") if row["good"] and known(row, SPEEDUP) is not None]
    if not its:
        return None
    best = max(its, key=lambda row: float(row[SPEEDUP]))
    amortised, full = float(best["select/amortised_s"]), float(best[DENSE])
    every = int(best["select/every"])
    shared = "" if every == 1 else f", where {every} steps share a choice"
    tail = (
        f" has the shortest step beside full attention by the same strategy: {duration(amortised)} against {duration(full)}{shared}"
    )
    tail += f", and keeps {percent(recall)} of the softmax's mass" if (recall := known(best, RECALL)) is not None else ""
    faster = sum(float(row[SPEEDUP]) > 1 for row in its)
    parts = [
        (False, f"{words_of(problem)}: "), (True, str(best["choice"])),
        (False, f"{tail}. Faster than full attention: {faster} of {len(its)} choices."),
    ]  # fmt: skip
    return Answer(parts, tuple(str(row["cell"]) for row in its))


# -- tables --------------------------------------------------------------------------------------------------------------


def table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Every row of ``sparse_rows`` as text."""
    return [
        {
            "cell": str(row["cell"]), "mask": row["what_mask"], "length": format_tokens(int(row["seqlen"])), "scale": row["scale"],
            "setting": row["where"], "choice": row["choice"], **{name: form(known(row, key)) for name, key, form in SAYS},
        }
        for row in rows.to_dict("records")
    ]  # fmt: skip
