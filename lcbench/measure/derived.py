"""Metrics that follow from others: they are worked out anew whenever a later block of timings, or another draw, changes a time.

Of a training step: tokens per second, what recomputation adds to the rate, a layer's time, and what a whole model's step would
take. Of denoising: what a step takes. Of sparse attention: what a step takes where several share a choice, and how that compares
with full attention. Of serving: what a token takes, and how fast the cache is read. Of a batch of documents: its tokens per second,
and what planning adds to its time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LAYERS = ("forward", "backward")  # phases that are a layer's, as often as there are layers
REPEATS = re.compile(r"model/(\w+)/repeats")
STEPS = re.compile(r"denoise/(\w+)/steps")


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """What follows from an attempt's metrics; nothing for a cell of attention alone, and no share of a peak that is not known, as
    that of a CPU whose step was predicted."""
    found = {
        f"denoise/{of[1]}/step_s": metrics[f"time/{of[1]}/median_s"] / metrics[key]
        for key in metrics
        if (of := STEPS.fullmatch(key))
    }
    if "serving/new_tokens" in metrics:
        found |= _of_serving(metrics)
    if "batch/tokens" in metrics:
        found |= _of_batch(metrics)
    if "recurrent/tokens" in metrics:
        found["recurrent/tokens_per_s"] = metrics["recurrent/tokens"] / metrics["time/total/median_s"]
    if "select/every" in metrics:
        found |= _of_selection(metrics)
    if "step/tokens_per_gpu" not in metrics:
        return found
    tokens, total, peak = metrics["step/tokens_per_gpu"], metrics["time/total/median_s"], metrics.get("compute/peak_tflops")
    found["step/tokens_per_s_per_gpu"] = tokens / total
    if peak:
        found["compute/hfu"] = metrics["compute/mfu"] + metrics["step/recomputed_flops_per_gpu"] / total / peak / 1e12
    for phase in LAYERS:
        if (seconds := metrics.get(f"time/{phase}/median_s")) is not None:
            found[f"layer/{phase}/median_s"] = seconds / metrics["step/layers"]
    repeated = [(key, of[1]) for key in metrics if (of := REPEATS.fullmatch(key))]
    if not repeated:
        return found  # layers and head are timed together
    step, tflop = 0.0, 0.0
    for key, phase in repeated:
        found[f"model/{phase}/step_s"] = seconds = metrics[key] * metrics[f"time/{phase}/median_s"]
        step += seconds
        tflop += seconds * metrics.get(f"compute/{phase}/tflops_per_gpu", 0.0)
    found["model/step_s"], found["model/tokens_per_s_per_gpu"] = step, tokens / step
    if peak:
        found["model/mfu"] = tflop / step / peak
    return found


def _of_serving(metrics: Mapping[str, float]) -> dict[str, float]:
    tokens, seconds = metrics["serving/new_tokens"], metrics["time/forward/median_s"]
    return {
        "serving/us_per_token": 1e6 * seconds / tokens,
        "serving/tokens_per_s": tokens / seconds,
        "serving/tokens_per_s_per_gpu": metrics["serving/tokens_per_gpu"] / seconds,
        "serving/cache_gb_per_s": metrics["serving/cache_bytes"] / seconds / 1e9,
    }


def _of_batch(metrics: Mapping[str, float]) -> dict[str, float]:
    total = metrics["time/total/median_s"]
    found = {"batch/tokens_per_s": metrics["batch/tokens"] / total}
    if (planning := metrics.get("plan/seconds")) is not None:  # a prediction takes no time for it
        found |= {"plan/share": planning / total, "batch/with_plan_s": total + planning, "batch/pipelined_s": max(total, planning)}
    return found


def _of_selection(metrics: Mapping[str, float]) -> dict[str, float]:
    total = metrics["time/total/median_s"]
    choosing = metrics["time/select/median_s"] + metrics["time/plan/median_s"]
    own = choosing / metrics["select/every"]
    amortised = max(0.0, total - choosing) + own
    found = {"select/amortised_s": amortised, "select/share": min(1.0, own / amortised)}
    if (dense := metrics.get("time/dense_s")) is not None:
        found |= {"select/speedup": dense / total, "select/amortised_speedup": dense / amortised}
    return found
