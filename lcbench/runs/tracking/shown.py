"""What MLflow shows of an attempt: metrics in units for people, samples, tags, a description.

The store has SI units. Here seconds are milliseconds (``..._ms``), bytes are GiB (``..._gib``), shares of one are percent
(``..._percent``), and the numbers that tables show have short names too, since MLflow cuts long ones off. MLflow's page of a run
lists metrics as they came: those first, then by what they are about, and the check at the end.
"""

from __future__ import annotations

import json
import re
import shlex

from lcbench.grid.cell import Cell
from lcbench.measure.metrics import METRICS, Metric, metric_of
from lcbench.problem import format_tokens
from lcbench.runs.attempt import Attempt

HEADLINE = "compute/tflops_per_gpu"
SHORT = {
    "tflops": HEADLINE, "mfu_percent": "compute/mfu", "total_ms": "time/total/median_s", "fwd_ms": "time/forward/median_s",
    "bwd_ms": "time/backward/median_s", "peak_gib": "memory/peak_bytes", "noise_percent": "time/noise",
    # of a training step only
    "tokens_per_s": "step/tokens_per_s_per_gpu", "hfu_percent": "compute/hfu", "attention_percent": "attention/share",
    "model_step_ms_scaled": "model/step_s",
    # of a batch of documents only
    "batch_tokens_per_s": "batch/tokens_per_s", "padding_percent": "batch/padding", "idle_percent": "batch/idle_share",
    "planning_ms": "plan/seconds",
    # of attention that chooses its mask only
    "recall_percent": "select/recall", "density_percent": "select/density", "select_ms": "time/select/median_s",
    "replan_ms": "time/plan/median_s", "mean_step_ms": "select/amortised_s",
}  # fmt: skip
# (unit of the store at the end of a key, unit that is shown, factor); shares are known by their metric's unit.
UNITS = ((re.compile(r"(?<!per)_s$"), "_ms", 1e3), (re.compile(r"(?<=[_/])bytes$"), "gib", 2.0**-30))
PERCENT = 100.0
SAMPLE_STRIDE = 100_000
ITERATIONS = ("forward_s", "backward_s", "total_s")
CAUSE = "lcbench.cause"
# A prediction's run: no tag that a measured one is found by names its sweep, so that no view of these, of whatever version, has it.
PREDICTED, PREDICTIONS_OF = "lcbench.predicted", "lcbench.predictions_of"
FORETOLD_COLOR = "#9e9e9e"
BAND = "band_percent"  # times lie within a factor of 1 + it


def params(cell: Cell) -> dict[str, str]:
    """A cell's parameters, and its length as people write it, which charts take for a category: 64k."""
    flat = cell.flat
    return {key: str(value)[:6000] for key, value in {**flat, "length": format_tokens(cell.problem.seqlen)}.items()}


def values(attempt: Attempt) -> list[tuple[str, float]]:
    """(name, value) of an attempt's metrics, in the order in which a page lists them."""
    short = [(name, _short(name, attempt.metrics[key])) for name, key in SHORT.items() if key in attempt.metrics]
    ordered = sorted(attempt.metrics, key=lambda key: (key != HEADLINE, _place(key)))
    return [*short, *(in_units(key, attempt.metrics[key]) for key in ordered)]


def samples(attempt: Attempt, blocks: int) -> list[tuple[str, float, int]]:
    """(name, value, step) of an attempt's samples, but for those that it had with so many blocks."""
    first = SAMPLE_STRIDE * (attempt.number - 1)
    more = sum(later["iterations"] for later in attempt.again[max(blocks - 1, 0) :])
    found = []
    for key, series in attempt.samples.items():
        there = blocks if key.startswith("block_") else len(series) - more if key in ITERATIONS else len(series)
        for i in range(there if blocks else 0, len(series)):
            found.append((*in_units(f"samples/{key}", series[i]), first + i))
    return found


def in_units(key: str, value: float) -> tuple[str, float]:
    """The name and the value under which a metric or a sample of the store is shown."""
    for pattern, name, factor in UNITS:
        if pattern.search(key):
            return pattern.sub(name, key), value * factor
    if not key.startswith("samples/") and (metric := _metric(key)) and metric.unit == "0..1":
        return f"{key}_percent", value * PERCENT
    return key, value


def _metric(key: str) -> Metric | None:
    """None of one that another version measured."""
    try:
        return metric_of(key)
    except KeyError:
        return None


def _place(key: str) -> int:
    metric = _metric(key)
    return METRICS.index(metric) if metric else len(METRICS)


def _short(name: str, value: float) -> float:
    key = SHORT[name]
    return value * PERCENT if name.endswith("_percent") else in_units(key, value)[1]


def tags(attempts: list[Attempt]) -> dict[str, str]:
    """Tags of a cell's run, of which what says nothing is empty."""
    newest = attempts[-1]
    provenance = newest.provenance
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    history = [
        {"attempt": a.number, "status": a.status, "class": a.failure.kind if a.failure else None, "pack": a.pack} for a in attempts
    ]
    found = {
        "lcbench.status": newest.status,
        "lcbench.failure": newest.failure.kind if newest.failure else "",
        CAUSE: newest.failure.cause if newest.failure else "",
        "lcbench.attempt": newest.number,
        "lcbench.history": json.dumps(history),
        "lcbench.pack": newest.pack,
        "lcbench.slurm_job_id": provenance.get("slurm_job_id"),
        "lcbench.nodes": provenance.get("nodes"),
        "lcbench.device": provenance.get("device"),
        "lcbench.blocks": newest.blocks,
        "lcbench.no_speed": newest.no_speed,
        "lcbench.lost_blocks": json.dumps(newest.lost_blocks) if newest.lost_blocks else "",
        "lcbench.stopped_by": provenance.get("stopped_by"),
        "lcbench.peak_source": provenance.get("peak_source"),
        **{f"lcbench.version.{name}": version for name, version in versions.items()},
        "mlflow.source.git.commit": git.get("commit"),
        "lcbench.git_dirty": str(git.get("dirty", "")),
        "mlflow.note.content": note(newest),
    }
    return {key: str(value or "") for key, value in found.items()}


def prediction_tags(prediction: Attempt) -> dict[str, str]:
    """Tags of the run of a cell's prediction."""
    made = prediction.prediction
    rerun = shlex.join(["python", "-m", "lcbench.rerun", f"{prediction.sweep}/{prediction.cell_id}"])
    rate, factor = prediction.metrics.get(HEADLINE, 0.0), 1 + (prediction.band or 0.0)
    said = f"{rate:.4g} TFLOP/s per GPU on {made.get('machine')}, times within a factor of {factor:.3g}; {made.get('basis')}"
    return {
        PREDICTED: "true",
        "lcbench.status": prediction.status,
        "lcbench.machine": str(made.get("machine")),
        "lcbench.fit": str(made.get("fit") or "none"),
        "lcbench.basis": str(made.get("basis")),
        "lcbench.version.lcbench": str(made.get("lcbench")),
        "mlflow.runColor": FORETOLD_COLOR,
        "mlflow.note.content": f"**predicted, not measured**: {said}\n\nTo measure it:\n\n    {rerun} --launcher NAME\n",
    }


def prediction_values(prediction: Attempt) -> list[tuple[str, float]]:
    """(name, value) of a prediction's metrics, as of a measured cell, and its band."""
    return [*values(prediction), (BAND, PERCENT * (prediction.band or 0.0))]


def note(newest: Attempt) -> str:
    """A run's description: its number in a sentence, or why there is none, and how to run it again."""
    failure, metrics = newest.failure, newest.metrics
    if failure is not None:
        said = f"**{newest.status}: {failure.kind}**: {failure.cause}"
    else:
        said = f"no speed: {newest.no_speed}; " if newest.no_speed else ""
        if (tokens := metrics.get(SHORT["tokens_per_s"])) is not None:
            said += f"a training step in {1e3 * metrics.get('time/total/median_s', 0.0):.4g} ms, {tokens:.4g} tokens/s per GPU, "
        said += f"{metrics.get(HEADLINE, 0.0):.4g} TFLOP/s per GPU, noise {metrics.get('time/noise', 0.0):.1%}"
    return f"{said}\n\n    {shlex.join(['python', '-m', 'lcbench.rerun', f'{newest.sweep}/{newest.cell_id}'])}\n"


def written_ms(attempt: Attempt) -> int:
    """When an attempt got its last block of timings."""
    return int(1000 * max([attempt.finished_at, *(later["finished_at"] for later in attempt.again)]))


def gpu_hours(attempts: list[Attempt]) -> float:
    """What attempts took of GPUs, in hours: from the begin of each to its end, and of its later blocks, times its ranks."""
    spent = 0.0
    for attempt in attempts:
        if attempt.provenance.get("cuda") and attempt.config:
            blocks = [(attempt.started_at, attempt.finished_at), *((b["started_at"], b["finished_at"]) for b in attempt.again)]
            ranks = Cell.from_config(attempt.config).scale.world_size
            spent += ranks * sum(end - begin for begin, end in blocks)
    return spent / 3600
