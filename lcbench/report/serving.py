"""Passes of a server in a report: batches of requests, what a new token takes against the context, how fast the cache is read, what
is sent, and from which length on context parallelism pays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lcbench.grid.values import parse_batch
from lcbench.measure.peak import entry_of
from lcbench.problem import Batch, Requests, format_tokens
from lcbench.report.amounts import digits, duration, more, percent, size
from lcbench.report.frame import exact_rows, over_seeds
from lcbench.report.intervals import LEVEL, Median, Ratio
from lcbench.report.winners import CLOSE

if TYPE_CHECKING:
    import pandas as pd

GB_S = "serving/cache_gb_per_s"
SENT = "serving/bytes_sent_per_token"
DISTANCE = "check/distance"
WHERE = ["around", "what_mask", "series"]  # what the lines of a figure have in common


def kind_of(batch: Batch) -> str:
    """``decode``: a token each, behind others; ``prefill``: whole prompts; ``chunk``: several tokens each, behind others; else
    ``mixed``.
    """
    if batch.decodes:
        return "decode"
    if all(group.new == group.total for group in batch.groups):
        return "prefill"
    return "chunk" if all(1 < group.new < group.total for group in batch.groups) else "mixed"


def context_of(batch: Batch) -> int:
    """Tokens of its longest request."""
    return max(group.total for group in batch.groups)


def series_of(batch: Batch) -> str:
    """What batches have in common that differ in the length of their longest requests only."""
    kind, longest = kind_of(batch), context_of(batch)
    if len(batch.groups) == 1:
        new = format_tokens(batch.groups[0].new)
        requests = "1 request" if len(batch) == 1 else f"{len(batch)} requests"
        return f"chunks of {new} of {requests}" if kind == "chunk" else f"{kind} of {requests}"
    return f"{kind} of " + "_".join(_without_length(group) if group.total == longest else str(group) for group in batch.groups)


def _without_length(group: Requests) -> str:
    new = "…" if group.new == group.total else format_tokens(group.new)
    return f"{group.count if group.count > 1 else ''}q{new}{'' if group.new == group.total else 's…'}"


def served_rows(frame: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The cells of ``frame.reported`` that have a batch, one of those that differ in their seed only, with columns besides:

    ``kind``, ``series``, ``context`` (tokens of the longest request), ``around`` (the rest of the setting), ``token`` (seconds of
    ``forward`` a new token, a ``Median``; None where there is none), ``gb_s``, ``peak_gb_s`` (of the device's memory), ``sent``
    (bytes a new token), ``distance``; nan where a number is not known.
    """
    rows = over_seeds(frame) if len(frame) else frame
    rows = rows[rows["batch"] != "null"] if "batch" in rows else rows.iloc[:0]
    batches = [batch for text in rows["batch"] if (batch := parse_batch(text)) is not None] if len(rows) else []
    if not batches:
        return rows.iloc[:0]
    peaks = [(entry_of(devices, str(name)) or {}).get("memory_gbytes_per_s", math.nan) for name in rows["device"]]
    tokens = [batch.queries * dp for batch, dp in zip(batches, rows["mesh.dp"], strict=True)]
    return rows.assign(
        kind=[kind_of(b) for b in batches], series=[series_of(b) for b in batches], context=[context_of(b) for b in batches],
        around=[", ".join(word for word in text.split(", ") if not word.startswith("batch ")) for text in rows["setting"]],
        token=[_per(time, count) for time, count in zip(rows["timed/forward"], tokens, strict=True)], peak_gb_s=peaks,
        **{name: rows[key].astype(float) if key in rows else math.nan
           for name, key in (("gb_s", GB_S), ("sent", SENT), ("distance", DISTANCE))},
    )  # fmt: skip


def _per(time: Median | None, tokens: int) -> Median | None:
    return replace(time, value=time.value / tokens) if isinstance(time, Median) else None


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of ``served_rows`` that may win: exact, with a time of their own, measured or predicted in a report of predictions."""
    return exact_rows(rows[rows["good"] & rows["token"].notna()]) if len(rows) else rows


def on(row: dict[str, Any]) -> str:
    """A choice and where it ran."""
    return f"{row['choice']} on {row['scale']}"


# -- without context parallelism -----------------------------------------------------------------------------------------


def base_of(rows: pd.DataFrame) -> tuple[str, dict[int, dict[str, Any]]]:
    """What context parallelism is held against: by context the row of ``none`` where one ran, else the fastest on the fewest GPUs.

    Args:
        rows: of ``timed``, of one figure.

    Returns:
        the scale, and the rows; empty where all ran on one scale.
    """
    if rows.empty or rows["scale"].nunique() < 2:
        return "", {}
    fewest = rows[rows["world_size"] == rows["world_size"].min()]
    scale = str(fewest["scale"].iloc[0])
    fewest = fewest[fewest["scale"] == scale]
    alone = fewest[fewest["what_cp"] == "none"]
    mine = alone if len(alone) else fewest
    found: dict[int, dict[str, Any]] = {}
    for row in mine.to_dict("records"):
        known = found.get(row["context"])
        if known is None or row["token"].value < known["token"].value:
            found[row["context"]] = row
    return scale, dict(sorted(found.items()))


@dataclass(frozen=True)
class Pays:
    """From which length on a choice is faster than no context parallelism, or than the fewest GPUs.

    Attributes:
        where: mask, what the batch is and the rest of the problem, in words.
        base: what it is held against.
        ratios: its time over that of the base, by context.
        cells: ids of both.
    """

    where: str
    choice: str
    scale: str
    base: str
    ratios: dict[int, Ratio]
    cells: tuple[str, ...]

    @property
    def crossing(self) -> float | None:
        """The length, in tokens, from which on it is faster at all lengths that both ran; None: at the longest it is not."""
        return _crossing({at: math.log(ratio.value) for at, ratio in self.ratios.items()})

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """The length from which on it may be faster, and the one from which on it is beyond the noise; None: none of these."""
        return (
            _crossing({at: math.log(ratio.low) for at, ratio in self.ratios.items()}),
            _crossing({at: math.log(ratio.high) for at, ratio in self.ratios.items()}),
        )

    @property
    def said(self) -> str:
        shortest, longest = format_tokens(min(self.ratios)), format_tokens(max(self.ratios))
        found = self.crossing
        if found is None:
            return f"not up to {longest}"
        return f"at {shortest} already" if found <= min(self.ratios) else f"from about {_near(found)} on"

    @property
    def said_interval(self) -> str:
        if len(self.ratios) < 2:
            return "one length tells nothing"
        low, high = self.interval
        if low is None:
            return f"beyond {format_tokens(max(self.ratios))}"
        first = f"up to {format_tokens(min(self.ratios))}" if low <= min(self.ratios) else _near(low)
        last = f"beyond {format_tokens(max(self.ratios))}" if high is None else _near(high)
        return first if high is not None and high <= min(self.ratios) else f"{first} to {last}"

    def row(self) -> dict[str, str]:
        """For a table."""
        last = self.ratios[max(self.ratios)]
        at = f"{format_tokens(max(self.ratios))}: {more(last.value)} ({more(last.low)} to {more(last.high)})"
        return {
            "problem": self.where, "choice": self.choice, "scale": self.scale, "against": self.base, "faster": self.said,
            "95 % interval": self.said_interval, "time at the longest": at,
        }  # fmt: skip


def _near(tokens: float) -> str:
    """A length that was not measured, to two digits."""
    unit, name = (1 << 20, "m") if tokens >= 1 << 20 else (1 << 10, "k") if tokens >= 1 << 10 else (1, "")
    return f"{float(f'{tokens / unit:.2g}'):g}{name}"


def _crossing(logs: dict[int, float]) -> float | None:
    """The length where a line through logarithms of ratios goes below 0 for good, straight in the logarithm of the length; None: it
    does not.
    """
    points = sorted(logs.items())
    above = [place for place, (_, log) in enumerate(points) if log >= 0]
    if not above:
        return float(points[0][0])
    if above[-1] == len(points) - 1:
        return None
    (before, high), (after, low) = points[above[-1]], points[above[-1] + 1]
    return float(before * (after / before) ** (high / (high - low)))


def pays(rows: pd.DataFrame) -> list[Pays]:
    """Of prompts in ``served_rows``, of every choice on more GPUs than the fewest; in the order of the plan."""
    good = timed(rows)
    good = good[good["kind"] == "prefill"] if len(good) else good
    found = []
    for where, mine in good.groupby(WHERE, sort=False) if len(good) else ():
        scale, base = base_of(mine)
        for (choice, its), line in mine.groupby(["choice", "scale"], sort=False):
            if its == scale:
                continue
            both = {row["context"]: row for row in line.to_dict("records") if row["context"] in base}
            if both:
                against = dict.fromkeys(on(base[at]) for at in sorted(both))
                found.append(
                    Pays(
                        _words(where), str(choice), str(its), " or ".join(against),
                        {at: both[at]["token"].over(base[at]["token"]) for at in sorted(both)},
                        tuple(str(row["cell"]) for at in both for row in (both[at], base[at])),
                    )
                )  # fmt: skip
    return found


def _words(where: Any) -> str:
    around, mask, series = where
    return ", ".join(filter(None, [series, mask, around]))


# -- in words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What is fastest for batches that differ in their context only. ``parts``: in words, those that stand out marked; ``cells``:
    ids of what it is about.
    """

    parts: list[tuple[bool, str]]
    cells: tuple[str, ...]


def answers(rows: pd.DataFrame) -> list[Answer]:
    """An answer for every figure of ``served_rows``, and one of prompts on what context parallelism is worth."""
    good = timed(rows)
    found = [_fastest(where, mine) for where, mine in good.groupby(WHERE, sort=False)] if len(good) else []
    by_problem: dict[str, list[Pays]] = {}
    for one in pays(rows):
        by_problem.setdefault(one.where, []).append(one)
    return [*found, *(_worth(where, mine) for where, mine in by_problem.items())]


def _fastest(where: Any, rows: pd.DataFrame) -> Answer:
    ranked = {int(at): sorted(mine.to_dict("records"), key=lambda row: row["token"].value) for at, mine in rows.groupby("context")}
    spans: list[tuple[str, int, int]] = []
    for at, mine in ranked.items():
        name = on(mine[0])
        first = spans.pop()[1] if spans and spans[-1][0] == name else at
        spans.append((name, first, at))
    last = ranked[max(ranked)]
    best = last[0]
    parts: list[tuple[bool, str]] = [(False, f"{_words(where)}: ")]
    if len(rows.groupby(["choice", "scale"])) == 1:
        parts += [(True, spans[0][0]), (False, " ran alone")]
    else:
        for place, (name, first, at) in enumerate(spans):
            span = format_tokens(first) if first == at else f"{format_tokens(first)} to {format_tokens(at)}"
            parts += [(True, name), (False, f" takes least time at {span}" if not place else f" at {span}")]
            parts += [(False, ", ")] if place < len(spans) - 1 else []
    parts.append((False, f". At {format_tokens(best['context'])}: {_at_the_end(last)}."))
    return Answer(parts, tuple(str(cell) for cell in rows["cell"]))


def _at_the_end(ranked: list[dict[str, Any]]) -> str:
    best = ranked[0]
    said = [f"{duration(best['token'].value)} a new token"]
    if len(ranked) > 1:
        ratio = ranked[1]["token"].over(best["token"])
        unsure = "" if ratio.value - 1 >= CLOSE and ratio.p < LEVEL else ", and the order of the two is not known"
        said.append(f"next {on(ranked[1])}, {more(ratio.value)}{unsure}")
    if best["kind"] == "decode" and not math.isnan(best["gb_s"]):
        of = "" if math.isnan(best["peak_gb_s"]) else f", {percent(best['gb_s'] / best['peak_gb_s'], 0)} of what its memory can"
        said.append(f"a GPU reads {digits(best['gb_s'])} GB/s of cache{of}")
    several = [row for row in ranked if row["world_size"] > 1 and not math.isnan(row["sent"])]
    if len(several) > 1:
        least = min(row["sent"] for row in several)
        names = " and ".join(on(row) for row in several if row["sent"] == least)
        said.append(f"least is sent by {names}, {size(least)} a new token" if least else f"nothing is sent by {names}")
    return "; ".join(said)


def _worth(where: str, found: list[Pays]) -> Answer:
    ever = sorted((one for one in found if one.crossing is not None), key=lambda one: one.crossing or 0.0)
    cells = tuple(dict.fromkeys(cell for one in found for cell in one.cells))
    alike: dict[str, list[str]] = {}
    for one in ever:
        alike.setdefault(f"{one.said} (95 %: {one.said_interval})", []).append(f"{one.choice} on {one.scale}")
    never = [f"{one.choice} on {one.scale}" for one in found if one.crossing is None]
    if never:
        longest = format_tokens(max(max(one.ratios) for one in found))
        alike[f"at no length up to {longest}"] = never
    parts: list[tuple[bool, str]] = [(False, f"{where}, against {found[0].base}: ")]
    for place, (when, names) in enumerate(alike.items()):
        verb = f"{' is' if len(names) == 1 else ' are'} faster" if not place else ""
        parts += [(names is not never, ", ".join(names)), (False, f"{verb} {when}"), (False, "; ")]
    parts[-1] = (False, ".")
    return Answer(parts, cells)


# -- tables --------------------------------------------------------------------------------------------------------------


def table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Every batch of ``served_rows`` that has a time, measured or predicted, as text."""
    return [_row(row) for row in _drawn(rows).to_dict("records")]


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["token"].notna()] if len(rows) else rows


def _row(row: dict[str, Any]) -> dict[str, str]:
    time: Median = row["token"]
    known = {name: None if math.isnan(row[name]) else row[name] for name in ("gb_s", "peak_gb_s", "sent", "distance")}
    share = known["gb_s"] / known["peak_gb_s"] if known["gb_s"] and known["peak_gb_s"] else None
    return {
        "cell": str(row["cell"]), "batch": row["batch"], "what": row["series"], "mask": row["what_mask"], "setting": row["around"],
        "context": format_tokens(row["context"]), "scale": row["scale"], "choice": row["choice"],
        "per new token": duration(time.value), "95 % interval": f"{duration(time.low)} to {duration(time.high)}",
        "new tokens/s": digits(1 / time.value), "cache GB/s": digits(known["gb_s"]), "of the memory's": percent(share, 0),
        "sent per new token": size(known["sent"]), "distance": digits(known["distance"]),
    }  # fmt: skip


def lines(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Lines of a figure by choice, by increasing context."""
    for choice, mine in rows.sort_values("context", kind="stable").groupby("choice", sort=False):
        yield str(choice), mine
