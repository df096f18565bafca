"""Blocks of timings: a cell is timed several times in its pack, so that drift and what a process does are in its samples.

A block has its share of the cell's budget and iterations. The time of a cell is the mean of its blocks' times.
"""

from __future__ import annotations

import math
import re
from statistics import fmean
from typing import Any, Protocol

from lcbench.measure.derived import derived

BLOCKS = 3
LEAST_ITERATIONS = 2  # of a block, where there are several
# What is not known of a run that gives wrong results, or times that cannot be; and what is all the same.
TIMES = ("time/", "compute/", "overlap/", "draws/", "mesh/", "layer/", "model/", "attention/share")
KEPT = ("time/prepare_s", "time/first_pass_s", "time/check_s")
BLOCK = re.compile(r"block_(\w+)_s")  # samples of a phase, a value per block


class Timed(Protocol):
    """What measuring a block gave."""

    samples: dict[str, list[float]]


def blocks_of(settings: dict[str, Any]) -> int:
    """How many blocks a cell's ``measure`` asks for; the key is absent at its default."""
    return int(settings.get("blocks", BLOCKS))


def short_warmup(settings: dict[str, Any]) -> int:
    """Iterations before those that count, of what has run in this process by then: one, of a cell that has any."""
    return min(1, int(settings["warmup"]))


def shared(settings: dict[str, Any], *, first: bool = True) -> dict[str, Any]:
    """The ``measure`` settings of one block; blocks after the first warm up once at most. What is shared stays as it is."""
    blocks = blocks_of(settings)
    own = {**settings, "blocks": 1} if first else {**settings, "blocks": 1, "warmup": short_warmup(settings)}
    if blocks == 1:
        return own
    return own | {
        "budget_s": settings["budget_s"] / blocks,
        "min_iterations": max(LEAST_ITERATIONS, math.ceil(settings["min_iterations"] / blocks)),
        "max_iterations": math.ceil(settings["max_iterations"] / blocks),
    }


def share(done: int, blocks: int) -> float:
    """About how much of a cell's time its first ``done`` blocks take: the first, with its check, as long as two later ones."""
    return (done + 1) / (blocks + 1)


def with_block(
    metrics: dict[str, float], samples: dict[str, list[float]], again: Timed
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and samples of a cell with one more block.

    Of several draws, p20 and p80 keep their distance from the median: over the iterations of all draws they would show what
    differs between these.
    """
    from lcbench.measure.stopping import summary  # with numpy, which commands that only look do without

    metrics, samples = dict(metrics), dict(samples)
    draws = metrics.get("draws/count", 1.0)
    for phase in [found[1] for key in samples if (found := BLOCK.fullmatch(key))]:
        for key in (f"{phase}_s", f"block_{phase}_s"):
            samples[key] = [*samples[key], *again.samples[key]]
        time, rates = f"time/{phase}", "compute" if phase == "total" else f"compute/{phase}"
        before, after = metrics[f"{time}/median_s"], fmean(samples[f"block_{phase}_s"])
        spread = summary(samples[f"{phase}_s"])
        metrics[f"{time}/median_s"] = after
        for name in ("p20", "p80"):
            metrics[f"{time}/{name}_s"] = metrics[f"{time}/{name}_s"] * after / before if draws > 1 else spread[name]
        for key in [f"{rates}/{name}" for name in ("tflops_per_gpu", "mfu") if f"{rates}/{name}" in metrics]:
            metrics[key] *= before / after
    metrics["time/iterations"] = len(samples["total_s"]) / draws
    metrics["time/blocks"] += 1.0
    metrics.update(derived(metrics))
    return metrics, samples


def without_times(metrics: dict[str, float], samples: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What is left of a cell that turned out to be wrong: it has no speed."""
    follows = derived(metrics) if "time/total/median_s" in metrics else {}
    return (
        {k: v for k, v in metrics.items() if k in KEPT or not (k.startswith(TIMES) or k in follows)},
        {k: v for k, v in samples.items() if not k.endswith("_s")},
    )
