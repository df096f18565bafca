"""Training steps in a report: what time and memory of a step are made of, what a step of the whole model comes to, and how long a
sequence each choice ran.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.problem import format_tokens
from lcbench.report.amounts import digits, duration, percent, size
from lcbench.report.frame import PREDICTED

if TYPE_CHECKING:
    import pandas as pd

MODEL = "workload.model"  # only a workload that trains has one
# What a bar is made of, from its begin on, and its colour. A phase that is none of these comes behind them.
PHASES = {
    "forward": "#56b4e9", "head": "#cc79a7", "backward": "#0072b2", "reduce": "#e69f00", "optimizer": "#999999",
}  # fmt: skip
OTHER = ("#009e73", "#d55e00", "#f0e442")
MEMORY = {
    "weights": "#0072b2", "gradients": "#56b4e9", "optimizer": "#999999", "activations": "#d55e00", "buffers": "#e69f00",
    "transient": "#c8c8c8",
}  # fmt: skip
KEYS = {"buffers": "memory/buffer_bytes"}  # of a class of memory; of the others ``memory/<class>_bytes``
TIME = re.compile(r"time/(\w+)/median_s")
SCALED = "scaled, not measured"


@dataclass(frozen=True)
class Step:
    """A training step of one cell, measured or predicted. Seconds, bytes, tokens a second and GPU, shares of 1; None: not known.

    Attributes:
        model: its name.
        layers: how many were run, ``of`` so many that the model has.
        recompute: the policy, as the frame has it.
        rest: the choice without it.
        phases: seconds of each phase, in their order.
        attention: share of the step's time.
        memory: bytes of the worst rank by class, each when it has most; ``transient``: what the peak has beyond all of them.
        host: bytes of the host's memory that a rank takes.
        planned: bytes of the peak that a plan of all tensors' places would have.
        tokens: a second and GPU, with the layers that were run.
        mfu, hfu: the latter counts what is computed again.
        whole: seconds of each phase for the whole model, scaled from the layers that were run.
        whole_tokens, whole_mfu: the same for the whole model.
    """

    model: str
    layers: int
    of: int
    recompute: str
    rest: str
    phases: dict[str, float]
    attention: float | None
    memory: dict[str, float]
    host: float | None
    planned: float | None
    tokens: float | None
    mfu: float | None
    hfu: float | None
    whole: dict[str, float]
    whole_tokens: float | None
    whole_mfu: float | None

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Step:
        """Of a row of ``frame.reported`` that has a model."""
        of = int(row["workload.model.layers"])
        layers = _known(row, "workload.layers")
        policy = f"recompute={row['what_recompute']}"
        rest = " + ".join(word for word in str(row["choice"]).removesuffix(PREDICTED).split(" + ") if word != policy)
        found = [match[1] for key in row if (match := TIME.fullmatch(key)) and match[1] != "total"]
        phases = [*(p for p in PHASES if p in found), *(p for p in found if p not in PHASES)]
        memory = _of_all({kind: _known(row, KEYS.get(kind, f"memory/{kind}_bytes")) for kind in MEMORY})
        peak = _known(row, "memory/peak_bytes")
        if memory and peak is not None:
            memory["transient"] = max(0.0, peak - sum(memory.values()))
        return cls(
            str(row[MODEL]), of if layers is None else int(layers), of, str(row["what_recompute"]), rest,
            _of_all({p: _known(row, f"time/{p}/median_s") for p in phases}), _known(row, "attention/share"), memory,
            _known(row, "memory/host_bytes"), _known(row, "memory/planned_peak_bytes"),
            _known(row, "step/tokens_per_s_per_gpu"), _known(row, "compute/mfu"), _known(row, "compute/hfu"),
            _of_all({p: _known(row, f"model/{p}/step_s") for p in phases}), _known(row, "model/tokens_per_s_per_gpu"),
            _known(row, "model/mfu"),
        )  # fmt: skip

    @property
    def whole_s(self) -> float | None:
        return sum(self.whole.values()) or None


def _known(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value is None or math.isnan(value) else float(value)


def _of_all(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def step_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``frame.reported`` that are training steps."""
    return frame[frame[MODEL].notna()] if MODEL in frame else frame.iloc[:0]


def steps_of(frame: pd.DataFrame) -> dict[str, Step]:
    """By cell, of all training steps of ``frame.reported``; one without a result has neither phases nor memory."""
    return {str(row["cell"]): Step.of_row(row) for row in step_rows(frame).to_dict("records")}


def colors_of(phases: Iterator[str]) -> dict[str, str]:
    """The colour of each of these phases, and of those that every step may have, in their order."""
    more = [phase for phase in dict.fromkeys(phases) if phase not in PHASES]
    return PHASES | {phase: OTHER[place % len(OTHER)] for place, phase in enumerate(more)}


def table(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Every training step that has a time, as text."""
    rows = step_rows(frame)
    found = []
    for row in rows[rows["timed/total"].notna()].to_dict("records") if len(rows) else ():
        step = Step.of_row(row)
        found.append({
            "cell": row["cell"], "model": step.model, "layers": f"{step.layers} of {step.of}", "mask": row["what_mask"],
            "length": format_tokens(int(row["seqlen"])), "scale": row["scale"], "choice": row["choice"],
            "recompute": step.recompute, "step": duration(row["time/total/median_s"]),
            **{phase: duration(seconds) for phase, seconds in step.phases.items()},
            "attention": percent(step.attention, 0), "tokens/s per GPU": digits(step.tokens), "MFU": percent(step.mfu),
            "HFU": percent(step.hfu), "peak memory": size(_known(row, "memory/peak_bytes")),
            **{kind: size(step.memory.get(kind)) for kind in MEMORY},
            "planned peak": size(step.planned), "on the host": size(step.host),
            f"whole model, {SCALED}: step": duration(step.whole_s), "its tokens/s per GPU": digits(step.whole_tokens),
            "its MFU": percent(step.whole_mfu),
        })  # fmt: skip
    return found


# -- the longest length ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """How far a choice came with one problem, but for its length, in a sweep that is no search of it (``report/longest.py``).

    Attributes:
        length: the longest that it ran, in tokens; None where none was.
        cell: of that, else of what failed.
        peak: its peak of memory, in bytes.
        beyond: the shortest longer one that was tried and has no result; None where nothing longer was.
        why: the class of its failure, or its status.
        beyond_cell: its id.
    """

    choice: str
    mask: str
    scale: str
    setting: str
    length: int | None
    cell: str
    peak: float | None
    beyond: int | None
    why: str
    beyond_cell: str

    def row(self) -> dict[str, str]:
        """For a table."""
        return {
            "mask": self.mask, "scale": self.scale, "setting": self.setting, "choice": self.choice,
            "longest that ran": "none" if self.length is None else format_tokens(self.length), "peak memory there": size(self.peak),
            "next that did not": "none was tried" if self.beyond is None else f"{format_tokens(self.beyond)}: {self.why}",
        }  # fmt: skip


def reached(frame: pd.DataFrame) -> list[Reached]:
    """Of every choice of the training steps of ``frame.reported`` that were tried at several lengths, in the order of the plan."""
    rows = step_rows(frame)
    rows = rows[rows["status"].isin(["ok", "failed"])] if len(rows) else rows
    found = []
    keys = ["what_mask", "scale", "where"]
    for (mask, scale, where), problem in rows.groupby(keys, sort=False) if len(rows) else ():
        if problem["seqlen"].nunique() < 2:
            continue
        for choice, mine in problem.groupby("choice", sort=False):
            ran = mine[mine["status"] == "ok"].sort_values("seqlen")
            best = ran.iloc[-1].to_dict() if len(ran) else {}
            length = int(best["seqlen"]) if best else None
            not_ran = mine[(mine["status"] == "failed") & (mine["seqlen"] > (length or 0))].sort_values("seqlen")
            first = not_ran.iloc[0].to_dict() if len(not_ran) else {}
            found.append(
                Reached(
                    str(choice), str(mask), str(scale), str(where), length, str((best or first)["cell"]),
                    _known(best, "memory/peak_bytes"), int(first["seqlen"]) if first else None,
                    str(first.get("failure") or ""), str(first.get("cell") or ""),
                )
            )  # fmt: skip
    return found
