"""Linear attention in a report: tokens per second and bytes by strategy, over length and number of GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, duration, more, percent, size, times
from lcbench.report.batches import known
from lcbench.report.frame import exact_rows, over_seeds
from lcbench.report.intervals import LEVEL, Median
from lcbench.report.serving import Answer
from lcbench.report.winners import CLOSE

if TYPE_CHECKING:
    import pandas as pd

WORKLOAD = "linear_attention"
RATE, SENT = "tokens_per_s_per_gpu", "comm/bytes"
# What a column of the table says, by metric.
SAYS = (
    ("forward", "time/forward/median_s", duration), ("backward", "time/backward/median_s", duration),
    ("sent in forward", "comm/forward/bytes", size), ("sent in backward", "comm/backward/bytes", size),
    ("states sent in forward", "states/forward", digits), ("states sent in backward", "states/backward", digits),
    ("exposed in forward", "overlap/forward/exposed_s", duration), ("exposed in backward", "overlap/backward/exposed_s", duration),
    ("peak memory", "memory/peak_bytes", size), ("MFU", "compute/mfu", percent),
)  # fmt: skip


def linear_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells of ``frame.reported`` that are linear attention and have a time, measured or predicted, one of those that differ in
    their seed only, with columns besides: ``tokens_per_s_per_gpu``; ``states/forward`` and ``states/backward``: what the rank that
    sends most sends in it, over the bytes of one state of all key/value heads, in the type of states.
    """
    if frame.empty or not (frame["workload"] == WORKLOAD).any():
        return frame.iloc[:0]
    rows = over_seeds(frame)
    rows = rows[(rows["workload"] == WORKLOAD) & rows["timed/total"].notna()]
    state = rows["num_heads_kv"] * rows["head_dim"] * rows["head_dim_v"] * rows["dtype"].map(lambda d: 8 if d == "float64" else 4)
    # What is the same of all of them is no part of what tells them apart.
    where = rows["where"].str.replace(f"workload {WORKLOAD}, ", "", regex=False)
    where = where.str.replace(rf"workload {WORKLOAD}\((.*?)\)", r"\1", regex=True)
    tokens = rows["seqlen"] * rows["mesh.dp"]
    phases = {f"states/{p}": rows[key] / state for p in ("forward", "backward") if (key := f"comm/{p}/bytes") in rows}
    seconds = [time.value for time in rows["timed/total"]]
    return rows.assign(where=where, **{RATE: tokens / seconds / rows["world_size"]}, **phases)


# -- how bytes grow ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """How the bytes of a choice depend on length, on one scale. ``lengths``: shortest and longest; ``sent``: there, in a pass."""

    choice: str
    lengths: tuple[int, int]
    sent: tuple[float, float]
    cells: tuple[str, ...]

    @property
    def flat(self) -> bool:
        return self.sent[0] == self.sent[1]


def growths(rows: pd.DataFrame) -> list[Growth]:
    """Of ``linear_rows`` of one problem and scale, of every choice whose bytes were counted at several lengths."""
    found = []
    for choice, mine in rows[rows[SENT] > 0].groupby("choice", sort=False) if SENT in rows else ():
        line = mine.sort_values("seqlen")
        if line["seqlen"].nunique() > 1:
            ends = line.iloc[[0, -1]]
            lengths, sent = ends["seqlen"].astype(int), ends[SENT].astype(float)
            found.append(Growth(str(choice), tuple(lengths), tuple(sent), tuple(line["cell"].astype(str))))
    return found


# -- in words ------------------------------------------------------------------------------------------------------------


def answers(rows: pd.DataFrame) -> list[Answer]:
    """Of ``linear_rows``, of every problem and scale: what is fastest at the longest length, and whether bytes grow with length."""
    found = []
    for (where, scale), mine in rows.groupby(["where", "scale"], sort=False) if len(rows) else ():
        good = exact_rows(mine[mine["good"]])
        if len(good):
            found.append(_fastest(f"{where}, {scale}", good[good["seqlen"] == good["seqlen"].max()]))
        grown = growths(mine)
        if grown:
            found.append(_grown(f"{where}, {scale}", grown))
    return found


def _fastest(where: str, rows: pd.DataFrame) -> Answer:
    ranked = sorted(rows.to_dict("records"), key=lambda row: row["timed/total"].value)
    best = ranked[0]
    said = (
        f" is fastest, {digits(best[RATE])} tokens/s per GPU"
        if len(ranked) > 1
        else f" ran alone, {digits(best[RATE])} tokens/s per GPU"
    )
    if len(ranked) > 1:
        ratio = ranked[1]["timed/total"].over(best["timed/total"])
        unsure = "" if ratio.value - 1 >= CLOSE and ratio.p < LEVEL else ", and the order of the two is not known"
        said += f"; next {ranked[1]['choice']}, {more(ratio.value)}{unsure}"
    parts = [(False, f"{where}, {format_tokens(int(best['seqlen']))}: "), (True, str(best["choice"])), (False, f"{said}.")]
    return Answer(parts, tuple(str(row["cell"]) for row in ranked))


def _grown(where: str, grown: list[Growth]) -> Answer:
    return Answer([(False, f"{where}: {bytes_in_words(grown)}")], tuple(cell for one in grown for cell in one.cells))


def bytes_in_words(grown: list[Growth]) -> str:
    """Which choices send as much at any length, and which send more as it grows."""
    said = []
    if flat := [one for one in grown if one.flat]:
        each = ", ".join(f"{one.choice} ({size(one.sent[0])})" for one in flat)
        said.append(f"At any length the same bytes are sent by {each}")
    said += [
        f"{one.choice} sends {times(one.sent[1] / one.sent[0])} as much at {format_tokens(one.lengths[1])} as at "
        f"{format_tokens(one.lengths[0])}, {size(one.sent[1])}"
        for one in grown if not one.flat
    ]  # fmt: skip
    return f"{'; '.join(said)}."


# -- tables --------------------------------------------------------------------------------------------------------------


def table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Every row of ``linear_rows`` as text."""
    return [_row(row) for row in rows.to_dict("records")]


def _row(row: dict[str, Any]) -> dict[str, str]:
    time: Median = row["timed/total"]
    return {
        "cell": str(row["cell"]), "length": format_tokens(int(row["seqlen"])), "scale": row["scale"], "setting": row["where"],
        "choice": row["choice"], "tokens/s per GPU": digits(row[RATE]), "time": duration(time.value),
        "95 % interval": f"{duration(time.low)} to {duration(time.high)}",
        **{name: form(known(row, key)) for name, key, form in SAYS},
    }  # fmt: skip
