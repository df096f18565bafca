"""Results as a pandas frame, a row per cell, and the columns that reports need besides what was stored."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lcbench.grid.axes import ALWAYS_TOLD, AXES, CELL_GROUPS, CHOICE, PROBLEM, WITH_OPTIONS, value_of
from lcbench.grid.labels import labels
from lcbench.report.intervals import KNOWN, NORMAL_95, Median, Timing, medians
from lcbench.runs.attempt import Attempt
from lcbench.runs.files import Unreadable
from lcbench.runs.records import Look, Record
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

PHASES = ("forward", "backward", "total")
RANKS = re.compile(r"samples/rank_(\w+)_median_s")  # a value per rank of a phase that has no other in it
# Columns of groups that fold into a group: what such a value is called is told by them always, and without the option's name.
FOLDED = frozenset(f"{axis.folds_into}.{axis.name}" for axis in AXES.values() if axis.home and axis.folds_into)
APPROXIMATE = " (approximate)"  # behind a strategy whose results are not those of the mask
PREDICTED = " (predicted)"  # at the end of a choice that was not measured
ASSIGNED = ("assignment", "documents", "gantt")  # of provenance, of a batch that a planner shares out


def frame_of(sweeps: Iterable[Sweep], *, attempts: Literal["newest", "all"] = "newest", samples: bool = False) -> pd.DataFrame:
    """A row per cell of these sweeps; ``lcbench.results.load`` says what is in it."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for sweep in sweeps:
        try:
            seen = sweep.look()
        except Unreadable as error:
            warnings.warn(f"left out: {error}", stacklevel=3)
            continue
        for damaged in seen.damaged:
            warnings.warn(str(damaged), stacklevel=3)
        rows += _rows(sweep.name, seen, attempts, samples)
    return pd.DataFrame(rows)


def _rows(sweep: str, seen: Look, attempts: Literal["newest", "all"], samples: bool) -> Iterator[dict[str, Any]]:
    named = labels(record.entry.cell for record in seen.records.values())
    for cell_id, record in seen.records.items():
        every = (*filter(None, [record.prediction]), *record.attempts)
        tries: tuple[Attempt | None, ...] = every if attempts == "all" else (record.known,)
        yield from (_row(sweep, named[cell_id], record, attempt, samples) for attempt in tries or (None,))


def _row(sweep: str, label: str, record: Record, attempt: Attempt | None, samples: bool) -> dict[str, Any]:
    failure = attempt.failure if attempt else record.failure
    row: dict[str, Any] = {
        "sweep": sweep, "cell": record.entry.cell.id, "label": label,
        "status": attempt.status if attempt else record.status,
        "failure": failure.kind if failure else "", "cause": failure.cause if failure else "",
        "attempt": attempt.number if attempt else 0, "no_speed": attempt.no_speed if attempt else "",
        "band": attempt.band if attempt else None, "approximate": attempt.approximate if attempt else "",
        "started_at": attempt.started_at if attempt else None, "finished_at": attempt.finished_at if attempt else None,
        **record.entry.cell.flat,
    }  # fmt: skip
    provenance = attempt.provenance if attempt else {}
    # Text is empty where there is none: pandas makes of a None beside text a nan, which is true and reads "nan".
    row |= {key: str(provenance.get(key) or "") for key in ("device", "nodes", "host", "slurm_job_id")}
    row |= {"gpu": bool(provenance.get("cuda")), "commit": str((provenance.get("git") or {}).get("commit") or "")}
    if attempt is None:
        return row
    row |= attempt.metrics
    return row | ({f"samples/{key}": values for key, values in attempt.samples.items()} if samples else {})


def reported(sweep: Sweep, seen: Look | None = None, *, predicted: bool = False) -> pd.DataFrame:
    """Every cell of a sweep (``seen``: as a look at it showed them), with samples and with columns for reports:

    ``what_kernel``, ``what_cp``, ``what_mask`` and so on: the axis value with those of its options that differ between rows;
    ``choice``: strategy, kernel, reduce_dtype and recompute in one word, without what labels leave out (``Axis.unsaid``);
    ``problem``: all that a choice is an answer to, as one key; ``setting``: what of the problem is neither mask, length, scale nor
    seed; ``where``: that with the seed, if there are several; ``tokens_per_rank``; ``<phase>_by_mean``: TFLOP/s per GPU with the
    mean over ranks for a time, as others count, where ours is the slowest rank's; ``timed/<phase>``: its time as a ``Median``, with
    the noise that all good cells of the sweep tell together; of a prediction with its band; ``approximate``: of a result that is
    not exact, that, in words (``Attempt.approximate``), which its ``what_cp`` and ``choice`` say too: it is drawn and listed, and
    wins nothing; ``good``: whether it is one of the results that answers rest on; ``assigned/measured``, ``assigned/predicted``: of
    a batch that a planner shares out what provenance says of that (``ASSIGNED``), of the run and of its prediction; None of others.

    Where ranks shared a GPU (``no_speed``) there is neither a time nor a rate. A cell that was only predicted has the status
    ``predicted``, and says so in its ``choice``; it is not good, and so wins nothing.

    Args:
        predicted: report predictions, whatever was measured: these are the good results then.
    """
    import pandas as pd

    seen = seen or sweep.look()
    frame = pd.DataFrame(_rows(sweep.name, seen.foretold() if predicted else seen, "newest", samples=True))
    if frame.empty:
        return frame
    frame["good"] = frame["status"] == ("predicted" if predicted else "ok")
    records = [seen.records[cell] for cell in frame["cell"]]
    for what, tried in (("measured", [r.last for r in records]), ("predicted", [r.prediction for r in records])):
        frame[f"assigned/{what}"] = pd.Series([_assigned(attempt) for attempt in tried], dtype=object)
    speeds = [c for c in frame.columns if c.startswith(("time/", "compute/", "overlap/", "draws/", "mesh/"))]
    frame.loc[frame["no_speed"] != "", speeds] = np.nan
    for group in CELL_GROUPS:
        frame[f"what_{group}"] = named(frame, group)
    frame.loc[frame["approximate"] != "", "what_cp"] += APPROXIMATE
    for axis in WITH_OPTIONS:
        if axis in PROBLEM and axis not in CELL_GROUPS:
            frame[axis] = _options(frame, axis)
    differing = [axis for axis in CHOICE if axis == "cp" or _several(frame, axis)]
    told = [_told(frame, axis) for axis in sorted(differing, key=lambda axis: axis != "cp")]
    frame["choice"] = [" + ".join(filter(None, words)) for words in zip(*told, strict=True)]
    frame.loc[frame["status"] == "predicted", "choice"] += PREDICTED
    options = sorted(
        c for c in frame.columns if c.partition(".")[0] in PROBLEM and "." in c and c != "mask.file"
    )  # its digest is there
    rows = frame.to_dict("records")
    frame["problem"] = [json.dumps([_plain(row[c]) for c in (*PROBLEM, *options)]) for row in rows]
    rest = [axis for axis in PROBLEM if axis not in (*ALWAYS_TOLD, "seed") and (axis == "heads" or _several(frame, axis))]
    frame["setting"] = [", ".join(f"{axis} {row[column_of(axis)]}" for axis in rest) for row in rows]
    frame["where"] = frame["setting"] + (", seed " + frame["seed"].astype(str) if frame["seed"].nunique() > 1 else "")
    frame["tokens_per_rank"] = frame["seqlen"] * frame["mesh.tp"] * frame["mesh.dp"] // frame["world_size"]
    for phase in PHASES:
        frame[f"{phase}_by_mean"] = [_by_mean(row, phase) for row in rows]
        frame[f"timed/{phase}"] = _timed(rows, phase)
    return frame


def _assigned(attempt: Attempt | None) -> dict[str, Any] | None:
    """What an attempt has of ``ASSIGNED``, or None."""
    if attempt is None or attempt.status not in ("ok", "predicted") or not all(attempt.provenance.get(k) for k in ASSIGNED):
        return None
    return {key: attempt.provenance[key] for key in ASSIGNED}


def good_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Of ``reported`` the rows with a good result that has a time and a rate."""
    if frame.empty:
        return frame
    rate = frame.reindex(columns=[rate_column("total")])[rate_column("total")]
    return frame[frame["good"] & frame["timed/total"].notna() & rate.notna()]


def exact_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of ``reported`` those that may win: what a strategy that approximates gives is no equal answer."""
    return rows[rows["approximate"] == ""] if len(rows) else rows


def rank_of(seconds: float, distance: float | None, *, approximate: bool) -> tuple[float, float]:
    """A key by which answers to one problem are in order: exact ones by their time; then those that approximate, the closest first
    and by time only where they are as close, to the two digits that are shown: a choice that is further off is no better for being
    sooner done. One whose distance nobody knows is the last.
    """
    if not approximate:
        return 0.0, seconds
    return math.inf if distance is None or math.isnan(distance) else float(f"{distance:.2g}"), seconds


def ranked(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``reported`` in the order of ``rank_of``."""
    keys = _ranks(rows)
    return rows.iloc[sorted(range(len(rows)), key=keys.__getitem__)]


def closest(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Of rows of ``reported`` that share ``keys`` the exact ones; where none is, those that are closest by ``rank_of``."""
    off = rows.assign(off=[distance for distance, _ in _ranks(rows)], all=0)
    return rows[off.groupby([*keys, "all"])["off"].rank(method="min") == 1]


def _ranks(rows: pd.DataFrame) -> list[tuple[float, float]]:
    columns = rows.reindex(columns=["time/total/median_s", "check/distance", "approximate"]).to_numpy()
    return [rank_of(seconds, distance, approximate=said != "") for seconds, distance, said in columns]


def best_of(rows: pd.DataFrame, keys: list[str], column: str, how: Literal["min", "max"]) -> pd.Series[float]:
    """For each row the best value among the exact ones that share its keys; of all where none of them is exact."""
    groups, values = [rows[key] for key in keys], rows[column]
    best = values.where(rows["approximate"] == "").groupby(groups).transform(how)
    return best.fillna(values.groupby(groups).transform(how))


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Of cells that differ in nothing but their seed one: the median of those with a good result, else the first."""
    keys = ["choice", "what_mask", "seqlen", "scale", "setting"]
    number = frame.groupby(keys, sort=False).ngroup()
    good = frame["good"]
    # Good ones before the rest, the fastest first.
    by = ["group", "bad", *(c for c in ("time/total/median_s",) if c in frame)]
    order = frame.assign(group=number, bad=~good).sort_values(by, kind="stable")
    count = good.groupby(number).transform("sum").loc[order.index]
    return frame.loc[order.index[order.groupby("group").cumcount() == count // 2 * (count > 0)]]


def named(frame: pd.DataFrame, group: str) -> list[str]:
    """Values of a group, with those options in brackets that differ between rows of the same value, and what is folded into it with
    its own.
    """
    columns = [c for c in frame.columns if c.startswith(f"{group}.") and c.count(".") == 1]
    differ: dict[str, list[str]] = {}
    for name, rows in frame.groupby(group, sort=False):
        folded = [c for c in columns if c in FOLDED and rows[c].notna().any()]
        own = [c for c in columns if c not in folded and _differs(rows[c])]
        for inside in folded:
            parts = [alike for _, alike in rows.groupby(inside, sort=False)]
            own += [c for c in frame.columns if c.startswith(f"{inside}.") and any(_differs(alike[c]) for alike in parts)]
        differ[str(name)] = [*folded, *own]
    names = []
    for row in frame[list(dict.fromkeys([group, *chain.from_iterable(differ.values())]))].to_dict("records"):
        said = [_option(c, row[c]) for c in differ[str(row[group])] if _plain(row[c]) is not None]
        names.append(f"{row[group]}({', '.join(said)})" if said else str(row[group]))
    return names


def _option(column: str, value: Any) -> str:
    return str(value) if column in FOLDED else f"{column.partition('.')[2]}={_plain(value)}"


def _differs(values: pd.Series[Any]) -> bool:
    return bool(values.map(lambda value: json.dumps(_plain(value))).nunique() > 1)


def column_of(axis: str) -> str:
    """Where a frame of ``reported`` has an axis in words."""
    return f"what_{axis}" if axis in CELL_GROUPS else axis


def _several(frame: pd.DataFrame, axis: str) -> bool:
    return bool(frame[column_of(axis)].nunique() > 1)


def _told(frame: pd.DataFrame, axis: str) -> list[str]:
    """An axis in the words of a choice: with its name where labels do not always tell it, and empty at what they leave out."""
    if AXES[axis].unsaid is None:
        return [str(value) for value in frame[column_of(axis)]]
    unsaid = value_of({}, axis)
    return ["" if value == unsaid else f"{axis}={value}" for value in frame[column_of(axis)]]


def _options(frame: pd.DataFrame, axis: str) -> list[str]:
    """What a plain axis with options is, in one text a row."""
    columns = {c: c.partition(".")[2] for c in frame.columns if c.startswith(f"{axis}.")}
    rows = frame[[*columns]].to_dict("records")
    return [value_of({axis: {option: _plain(row[c]) for c, option in columns.items()}}, axis) for row in rows]


def _plain(value: Any) -> Any:
    """A value of a frame as JSON knows it: a column that some rows lack has turned integers into floats, and None into nan."""
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else int(value) if float(value).is_integer() else float(value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def _timed(rows: list[dict[str, Any]], phase: str) -> list[Median | None]:
    """The time of a phase of every row of a sweep; None where there is no good result, or not of this phase."""
    timings = []
    for row in rows:
        samples = {key: row.get(f"samples/{key}") for key in (f"{phase}_s", f"block_{phase}_s")}
        timings.append(Timing.of(row, samples, phase) if row["status"] == "ok" and not row["no_speed"] else None)
    found = iter(medians([t for t in timings if t is not None]))
    return [_foretold(row, phase) if t is None else next(found) for row, t in zip(rows, timings, strict=True)]


def _foretold(row: dict[str, Any], phase: str) -> Median | None:
    """The time of a phase of a row that was predicted, with its band; None of any other row."""
    seconds = row.get(f"time/{phase}/median_s")
    if row["status"] != "predicted" or seconds is None or np.isnan(seconds):
        return None
    return Median(float(seconds), float(np.log1p(row["band"])) / NORMAL_95, KNOWN, KNOWN, True)


def rate_of(row: Any, phase: str = "total") -> Median:
    """TFLOP/s per GPU of a phase of a good row of ``reported``, as sure as its time."""
    time: Median = row[f"timed/{phase}"]
    return replace(time, value=float(row[rate_column(phase)]))


def rate_column(phase: str) -> str:
    return "compute/tflops_per_gpu" if phase == "total" else f"compute/{phase}/tflops_per_gpu"


def _by_mean(row: Any, phase: str) -> float:
    phases = [found[1] for key in row if (found := RANKS.fullmatch(key))] if phase == "total" else [phase]
    ranks = [row.get(f"samples/rank_{p}_median_s") for p in phases]
    ranks = [r for r in ranks if isinstance(r, list)]
    if not ranks or np.isnan(row.get(rate_column(phase), np.nan)):
        return float("nan")
    mean = float(np.sum([np.mean(r) for r in ranks]))
    return float(row[rate_column(phase)] * row[f"time/{phase}/median_s"] / mean)
