"""What a page draws from: one JSON block of cells by column, and what is known of each, so short that 512 cells fit one page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.grid.axes import OF_WORKLOAD
from lcbench.measure.peak import entry_of
from lcbench.report import published
from lcbench.report.amounts import Unit
from lcbench.report.frame import PHASES, column_of, rate_column
from lcbench.report.intervals import Median
from lcbench.report.longest import ANSWERS, by_choice, longest_of
from lcbench.report.parts import least_bytes, only_attention, split
from lcbench.report.step import Step
from lcbench.runs.attempt import Attempt
from lcbench.runs.records import Look, Record
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

DIGITS = 4  # of what is drawn; tables/ has all
SAMPLES = 24  # of a cell's iterations, spread over its blocks
PART = 10_000  # samples and ranks' medians are whole numbers of this part of the cell's median
TIMELINE_RANKS = 16  # `python -m lcbench.cp --cell` draws those of more
TIMELINE_BYTES = 200_000  # of all timelines of a page
WORDS = {
    "id": "cell", "label": "label", "status": "status", "kind": "failure", "cause": "cause", "choice": "choice",
    "approximate": "approximate",
    "mask": "what_mask", "scale": "scale",
    "strategy": "what_cp", "kernel": "what_kernel", "where": "where", "setting": "setting", "problem": "problem",
    "device": "device", "dtype": "dtype", "slow": "no_speed", "workload": "workload",
    **{axis: column_of(axis) for axis in OF_WORKLOAD},
}  # fmt: skip
COUNTS = {"seqlen": "seqlen", "ranks": "world_size", "share": "tokens_per_rank", "attempt": "attempt"}
NUMBERS = {
    "noise": "time/noise", "band": "band", "mfu": "compute/mfu", "peak": "memory/peak_bytes", "sent": "comm/bytes",
    "blocks": "time/blocks", "distance": "check/distance",
}  # fmt: skip
REPEATED = (frozenset(WORDS) | {"place"}) - {"id", "label", "problem"}  # few words, many times
LEAST = ["tokens_per_rank", "num_heads_q", "num_heads_kv", "head_dim", "dtype", "direction"]
PARTS = {"even": "computing", "imbalance": "imbalance", "exposed": "exposed communication", "rest": "rest"}


def cells_of(frame: pd.DataFrame, rate: Unit) -> dict[str, list[Any]]:
    """Columns of all cells of ``frame.reported``: words, counts, and numbers of four digits, null where there is none.

    ``forward``, ``backward``, ``total`` are seconds, ``<phase>_rate`` and ``top`` in ``rate`` per GPU, ``<phase>_reach`` the
    half-width of the 95 % interval of the logarithm of time and rate; ``even``, ``imbalance``, ``exposed``, ``rest`` seconds;
    ``peak``, ``sent``, ``least`` bytes.
    """
    if frame.empty:
        return {name: [] for name in (*WORDS, *COUNTS)}
    found: dict[str, list[Any]] = {name: _words(frame, column) for name, column in WORDS.items()}
    found |= {name: [int(v) for v in frame[column]] for name, column in COUNTS.items()}
    found |= {name: _numbers(frame, column) for name, column in NUMBERS.items()}
    found["top"] = _numbers(frame, "compute/peak_tflops", rate.size)
    found["problem"] = _numbered(found["problem"])
    for phase in PHASES:
        timed: list[Median | None] = frame[f"timed/{phase}"].tolist()
        found[phase] = [None if t is None else short(t.value) for t in timed]
        found[f"{phase}_reach"] = [None if t is None else short(math.log(t.high / t.value)) for t in timed]
        found[f"{phase}_rate"] = _numbers(frame, rate_column(phase), rate.size)
        found[f"{phase}_bymean"] = _numbers(frame, f"{phase}_by_mean", rate.size)
    parts = split(frame)
    for name, column in PARTS.items():
        found[name] = [None] * len(frame) if parts is None else [short(v) for v in parts[column].reindex(frame.index)]
    found["least"] = [
        short(least_bytes(row)) if calls else None
        for row, calls in zip(frame[LEAST].to_dict("records"), only_attention(frame), strict=True)
    ]
    return found


def steps_data(steps: dict[str, Step]) -> dict[str, dict[str, Any]]:
    """By cell what a page draws of its training step: numbers of four digits, in the order of ``Step``."""
    return {
        cell: {
            "model": s.model, "layers": s.layers, "of": s.of, "rest": s.rest, "phases": _short(s.phases),
            "attention": short(s.attention), "memory": _short(s.memory), "host": short(s.host),
            "planned": short(s.planned), "tokens": short(s.tokens), "hfu": short(s.hfu),
            "whole": _short(s.whole), "wholeTime": short(s.whole_s), "wholeTokens": short(s.whole_tokens),
            "wholeMfu": short(s.whole_mfu),
        }
        for cell, s in steps.items()
    }  # fmt: skip


def searched_of(seen: Look, *, predicted: bool) -> dict[str, Any] | None:
    """The answers of a search for the longest length, with the ids of each choice's cells; None: the sweep is none."""
    if seen.search is None or seen.search.cap_bytes is None:
        return None
    choices = by_choice(seen.records.values()).values()
    rows = [
        {
            "cells": [record.entry.cell.id for record in records], "tokens": one.tokens, "needs": short(one.needs_bytes),
            "beyond": one.beyond, "why": one.why, "end": one.end, "open": one.end not in ANSWERS, "predicted": one.predicted,
        }
        for records, one in zip(choices, longest_of(seen, predicted=predicted), strict=True)
    ]  # fmt: skip
    return {"cap": seen.search.cap_bytes, "rows": rows}


def packed(columns: dict[str, list[Any]], repeated: Collection[str]) -> dict[str, Any]:
    """Columns, those of ``repeated`` as their values and, per cell, the place among them: they have few, many times."""
    found: dict[str, Any] = {}
    for name, column in columns.items():
        found[name] = [list(dict.fromkeys(column)), _numbered(column)] if name in repeated else column
    return found


def details_of(records: dict[str, Record]) -> dict[str, dict[str, Any]]:
    """By cell: its attempts, and of the newest good one samples of the total by block and ranks' medians (in parts of ``PART`` of
    the cell's median), check errors and bounds, overlap in seconds, and the timeline where it is small and there is room, else that
    there is one.
    """
    found, room = {}, TIMELINE_BYTES
    for cell_id, record in records.items():
        detail: dict[str, Any] = {"attempts": [_tried(a) for a in record.attempts]}
        last = record.last
        if last is not None and last.status == "ok":
            detail |= _measured(last)
            line = _timeline(last)
            size = len(json.dumps(line, separators=(",", ":"))) if line else 0
            if line and size <= room:
                detail["timeline"], room = line, room - size
            elif last.provenance.get("timeline"):
                detail["recorded"] = True
        found[cell_id] = detail
    return found


def _tried(attempt: Attempt) -> dict[str, Any]:
    failure = attempt.failure
    return {
        "n": attempt.number, "status": attempt.status, "kind": failure.kind if failure else "",
        "cause": failure.cause if failure else "", "at": round(attempt.finished_at or 0),
        "nodes": str(attempt.provenance.get("nodes") or ""), "job": str(attempt.provenance.get("slurm_job_id") or ""),
    }  # fmt: skip


def _measured(attempt: Attempt) -> dict[str, Any]:
    metrics, samples = attempt.metrics, attempt.samples
    found: dict[str, Any] = {"samples": _samples(attempt)}
    found["ranks"] = {
        phase: parts
        for phase in ("forward", "backward")
        if (parts := _parts(samples.get(f"rank_{phase}_median_s") or (), metrics.get(f"time/{phase}/median_s")))
    }
    errors, bounds = attempt.checks.get("errors") or {}, attempt.checks.get("bounds") or {}
    found["checks"] = [[name, short(error), short(bounds.get(name))] for name, error in errors.items()]
    found["overlap"] = {k.removeprefix("overlap/"): short(v) for k, v in metrics.items() if k.startswith("overlap/")}
    return found


def _samples(attempt: Attempt) -> list[list[int]]:
    """Per block at most ``SAMPLES`` over the number of blocks of its iterations, evenly spaced in time."""
    times = attempt.samples.get("total_s") or attempt.samples.get("forward_s") or []
    blocks = max(1, int(attempt.metrics.get("time/blocks", 1)))
    median = attempt.metrics.get("time/total/median_s")
    each = max(1, SAMPLES // blocks)
    return [_parts(part[np.unique(np.linspace(0, len(part) - 1, min(each, len(part))).astype(int))], median)
            for part in np.array_split(np.asarray(times, dtype=float), blocks) if len(part)]  # fmt: skip


def _parts(values: Iterable[float], whole: float | None) -> list[int]:
    return [round(PART * v / whole) for v in values if math.isfinite(v)] if whole else []


def _timeline(attempt: Attempt) -> list[list[list[int]]] | None:
    """Per rank its steps: number, begin, messages begun, computed, all there, in whole parts of the end of the last (``PART``)."""
    line = attempt.provenance.get("timeline")
    if not line or len(line) > TIMELINE_RANKS:
        return None
    end = max(step[-1] for rank in line for step in rank) or 1.0
    return [[[int(step[0]), *(round(PART * t / end) for t in step[1:])] for step in rank] for rank in line]


def published_for(good: pd.DataFrame) -> list[dict[str, Any]]:
    """Published figures of the same problem, to be drawn beside: name, mask, phase, ``seqlen`` (one GPU) or ``ranks``, rate."""
    rows: list[dict[str, Any]] = []
    good = good[only_attention(good)] if len(good) else good
    if good.empty or not published.comparable(good):
        return rows
    for table, name, x, key in (
        (published.kernels(), "kernel", "seqlen", "seqlen"), (published.strategies(), "cp", "world_size", "ranks")
    ):  # fmt: skip
        if name == "cp" and published.TOKENS_PER_GPU not in set(good["tokens_per_rank"]):
            continue
        if name == "kernel" and 1 not in set(good["world_size"]):
            continue
        shown = table[table["mask"].isin(set(good["mask"]))]
        rows += [
            {"name": str(r[name]), "mask": r["mask"], "phase": r["phase"], key: int(r[x]), "rate": float(r["tflops_per_gpu"])}
            for r in shown.to_dict("records")
        ]
    return rows


def devices_of(frame: pd.DataFrame, devices: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By name of a device that occurs: bytes of its memory and GB/s of it, where known."""
    names = [] if frame.empty or "device" not in frame else list(frame["device"].dropna().unique())
    known = {str(name): entry_of(devices, str(name)) for name in names}
    return {n: {"memory": e["memory_bytes"], "gbytes": e["memory_gbytes_per_s"]} for n, e in known.items() if e}


def commands_of(sweep: Sweep) -> dict[str, str]:
    """The commands about a cell, with ``CELL`` where its id goes."""
    cell = f"{sweep.name}/CELL"

    def about(name: str, *words: str) -> str:
        return shlex.join(["python", "-m", f"lcbench.{name}", *sweep.where, *words])

    return {
        "logs": about("logs", "--", cell),
        "rerun": about("rerun", "--", cell),
        "measure": about("rerun", "--launcher", "NAME", "--", cell),
        "explain": about("cp", f"--cell={cell}", "--grid"),
    }


def script_json(value: Any) -> str:
    """JSON that cannot end the script element which holds it, whatever results say, and that no browser reads as anything else."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def short(value: Any) -> float | int | None:
    """A number of ``DIGITS`` digits; None for none, and for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _short(values: dict[str, float]) -> dict[str, float | int | None]:
    return {name: short(value) for name, value in values.items()}


def _words(frame: pd.DataFrame, column: str) -> list[str]:
    return [v if isinstance(v, str) else "" for v in frame[column]] if column in frame else [""] * len(frame)


def _numbers(frame: pd.DataFrame, column: str, unit: float = 1.0) -> list[float | int | None]:
    return [short(v / unit) for v in frame[column].astype(float)] if column in frame else [None] * len(frame)


def _numbered(values: list[Any]) -> list[int]:
    """Each value as its place among the different ones."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return [places[value] for value in values]
