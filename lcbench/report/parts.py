"""What figures are made of: results grouped by the question of a figure, and numbers that no cell has by itself."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.grid.axes import value_of
from lcbench.problem import format_tokens, itemsize
from lcbench.report.frame import PHASES, good_rows, over_seeds, rate_column, rate_of
from lcbench.report.palette import Style, styles

if TYPE_CHECKING:
    import pandas as pd

# More lines than this cannot be told apart: the fastest are drawn, the rest are in the tables.
MOST_LINES = 12
# Numbers that differ by less than this share lie on each other in a figure.
SAME = 0.02
TIME, RATE, PEAK = "time/total/median_s", "compute/tflops_per_gpu", "memory/peak_bytes"


@dataclass(frozen=True)
class Shown:
    """What a report draws: ``cells`` of ``frame.reported``, one of those that differ in their seed only, and of these the ``good``
    ones, with ``<phase>_low`` and ``<phase>_high``, the 95 % interval of their rates.

    Attributes:
        styles: of every choice, whatever ran.
        source: sweep, device, commit and date in one line.
        devices: the ``conf/device`` entries.
        several: whether there are several settings, so that a figure has to name its own.
    """

    cells: pd.DataFrame
    good: pd.DataFrame
    styles: dict[str, Style]
    source: str
    devices: Sequence[dict[str, Any]]
    several: bool


@dataclass(frozen=True)
class Group:
    """The cells of one figure: ``rows`` that are good, ``failed`` ones, ``where`` in words, ``slug`` for a file's name, and those
    that were only ``foretold``, where others were measured.
    """

    rows: pd.DataFrame
    failed: pd.DataFrame
    where: str
    slug: str
    foretold: pd.DataFrame


def shown(frame: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> Shown:
    """From all cells of ``frame.reported``."""
    cells = over_seeds(frame)
    good = good_rows(cells)
    columns: dict[str, list[float]] = {}
    for phase in (phase for phase in PHASES if rate_column(phase) in good):
        timed = good[f"timed/{phase}"].notna() & good[rate_column(phase)].notna()
        rates = [rate_of(row, phase) if there else None for there, row in zip(timed, _columns(good, phase), strict=True)]
        columns[f"{phase}_low"] = [np.nan if r is None else r.low for r in rates]
        columns[f"{phase}_high"] = [np.nan if r is None else r.high for r in rates]
    return Shown(cells, good.assign(**columns), styles(frame), source_of(frame), devices, cells["setting"].nunique() > 1)


def _columns(good: pd.DataFrame, phase: str) -> Iterator[dict[str, Any]]:
    """The columns that ``rate_of`` needs, row by row: whole rows have a hundred."""
    names = [f"timed/{phase}", rate_column(phase)]
    return (dict(zip(names, row, strict=True)) for row in zip(*(good[name] for name in names), strict=True))


def source_of(frame: pd.DataFrame) -> str:
    """Where the numbers of a frame come from, in one line: sweep, devices, commits and the day of the newest result."""

    def every(column: str) -> list[str]:
        return [str(value) for value in dict.fromkeys(frame[column]) if value] if column in frame else []

    days = frame["finished_at"].dropna() if "finished_at" in frame else []
    day = [time.strftime("%Y-%m-%d", time.localtime(float(max(days))))] if len(days) else []
    commits = ", ".join(commit[:12] for commit in every("commit"))
    return " · ".join([*every("sweep"), ", ".join(every("device")), *([f"lcbench {commits}"] if commits else []), *day])


def groups(of: Shown, columns: list[str]) -> Iterator[Group]:
    """The good cells that share their values in these columns, with the failed ones that do; fewer GPUs first, then as planned."""
    found = []
    for key, cells in of.cells.groupby(columns, sort=False):
        rows = of.good.loc[of.good.index.intersection(cells.index)]
        if rows.empty:
            continue
        named = dict(zip(columns, key, strict=True))
        words = [str(value) for value in named.values() if str(value)]
        slugs = [slug(str(v)) for name, v in named.items() if str(v) and (name != "setting" or of.several)]
        foretold = cells[(cells["status"] == "predicted") & ~cells["good"]]
        found.append(Group(rows, cells[cells["status"] == "failed"], ", ".join(words), "_".join(slugs), foretold))
    yield from sorted(found, key=lambda g: g.rows["world_size"].min() if "scale" in columns else 0)


def slug(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def scalings(of: Shown) -> Iterator[tuple[str, Group]]:
    """(kind in words, cells) of every way in which these results scale over at least two numbers of GPUs: at constant tokens per
    GPU (weak) or in all (strong).
    """
    for kind, column, words in (("weak", "tokens_per_rank", "tokens per GPU"), ("strong", "seqlen", "tokens in all")):
        for group in groups(of, [column, "setting"]):
            if group.rows["world_size"].nunique() < 2:
                continue
            tokens = format_tokens(int(group.rows[column].iloc[0]))
            rest = group.where.partition(", ")[2]
            name = "_".join([f"{kind}-{tokens}", *([slug(rest)] if of.several else [])])
            yield f"{kind} scaling ({tokens} {words})", Group(group.rows, group.failed, rest, name, group.foretold)


def in_order(rows: pd.DataFrame, column: str) -> list[str]:
    """Values of a column as the plan has them."""
    return list(dict.fromkeys(rows[column]))


def fastest_choices(rows: pd.DataFrame) -> tuple[list[str], int]:
    """Choices to draw, in the order of the plan, and how many are left out."""
    choices = in_order(rows, "choice")
    best = rows.groupby("problem")[RATE].transform("max")
    score = (rows[RATE] / best).groupby(rows["choice"]).mean().sort_values(ascending=False)
    kept = set(score.index[:MOST_LINES])
    return [c for c in choices if c in kept], max(0, len(choices) - MOST_LINES)


def efficiency_of(lines: dict[str, pd.DataFrame]) -> dict[str, tuple[pd.Series, int | None]]:
    """TFLOP/s per GPU of every choice as percent of its own on the fewest GPUs of all; of a choice that has no result there, of its
    own fewest, with that number of GPUs; choices with a single point are left out.

    Args:
        lines: rows of each choice for one mask, by increasing ``world_size``.
    """
    lines = {choice: line for choice, line in lines.items() if len(line) > 1}
    fewest = min((int(line["world_size"].iloc[0]) for line in lines.values()), default=0)
    found = {}
    for choice, line in lines.items():
        own = int(line["world_size"].iloc[0])
        found[choice] = (100 * line[RATE] / line[RATE].iloc[0], None if own == fewest else own)
    return found


def alike(lines: dict[str, pd.DataFrame], x: str, y: str) -> list[list[str]]:
    """Choices whose lines lie on each other, within ``SAME`` at every x that both have, and they share one; each in one group."""
    found: list[list[str]] = []
    series = {choice: line.set_index(x)[y] for choice, line in lines.items()}
    for choice, mine in series.items():
        for group in found:
            both = (mine / series[group[0]]).dropna()
            if len(both) and (both.sub(1).abs() < SAME).all():
                group.append(choice)
                break
        else:
            found.append([choice])
    return found


def split(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Seconds of an iteration by what they went to, for cells whose parts were measured apart; None if there is none."""
    import pandas as pd

    if "overlap/forward/compute_s" not in frame:
        return None
    rows = frame[frame["overlap/forward/compute_s"].notna()]
    if rows.empty:
        return None
    phases = [p for p in ("forward", "backward") if f"overlap/{p}/compute_s" in rows]
    compute = sum(rows[f"overlap/{p}/compute_s"].fillna(0.0) for p in phases)
    exposed = sum(rows[f"overlap/{p}/exposed_s"].fillna(0.0) for p in phases)
    # A schedule without its messages may by chance be slower than the whole.
    compute = np.minimum(compute, rows[TIME])
    uneven = rows.reindex(columns=["balance/area_max_over_mean"])["balance/area_max_over_mean"]
    even = compute / uneven.fillna(1.0).clip(lower=1.0)
    rest = (rows[TIME] - compute - exposed).clip(lower=0.0)
    return pd.DataFrame({"computing": even, "imbalance": compute - even, "exposed communication": exposed, "rest": rest})


def only_attention(frame: pd.DataFrame) -> pd.Series[bool]:
    """Which rows of ``frame.reported`` are calls of attention and nothing else."""
    return frame["workload"] == value_of({}, "workload")


def least_bytes(row: Any) -> float:
    """Bytes that a rank has to read or write at least in a call of attention: its q, k, v, out; in backward those again, and dout,
    dq, dk, dv.
    """
    q, kv = (row["tokens_per_rank"] * row[f"num_heads_{of}"] * row["head_dim"] for of in ("q", "kv"))
    forward = 2 * q + 2 * kv
    return float(itemsize(row["dtype"]) * (forward + (forward + 2 * q + 2 * kv if row["direction"] != "forward" else 0)))
