"""What measuring a cell gave, and one record of several draws of its mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lcbench.measure.bounds import Check
from lcbench.measure.derived import derived
from lcbench.measure.metrics import metric_of


@dataclass
class Measured:
    """What a cell gave; ``unavailable`` says why it could not run on this machine, ``check`` is None then; ``implausible`` why its
    numbers cannot be true."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    check: Check | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    implausible: str | None = None

    @property
    def stands(self) -> bool:
        """Whether nothing speaks against its numbers."""
        return self.check is not None and not self.check.failures and self.implausible is None


def rate_key(phase: str, name: str) -> str:
    """The key of a rate; those of the total have no phase."""
    return f"compute/{name}" if phase == "total" else f"compute/{phase}/{name}"


def over_draws(draws: list[Measured]) -> Measured:
    """One record of several draws of a mask, the spread over draws apart from the spread over iterations.

    ``Metric.over_draws`` says what each metric becomes: times, areas, bytes and balance are means, so that FLOPs over time is the
    rate of all the work done; errors, memory and noise are those of the worst draw. ``draws/...`` hold what differs between draws.
    """
    every = [m.metrics for m in draws]
    checks = [m.check for m in draws if m.check is not None]
    joined = Measured(
        metrics={key: _joined(key, [m[key] for m in every]) for key in every[0]},
        samples=_samples(draws),
        # Errors are judged against the bound of their own draw, so the worst is the one that comes nearest to it.
        check=max(checks, key=lambda c: c.of_bound),
        notes=_notes(draws),
    )
    phases = [key.split("/")[1] for key in every[0] if metric_of(key).key == "time/<phase>/median_s"]
    if phases:  # a later block has samples only
        joined.metrics["draws/count"] = float(len(draws))
    for phase in phases:
        _between(joined, phase, every)
    joined.metrics.update(derived(joined.metrics))
    return joined


def _joined(key: str, values: list[float]) -> float:
    return max(values) if metric_of(key).over_draws == "max" else float(np.mean(values))


def _between(joined: Measured, phase: str, every: list[dict[str, float]]) -> None:
    """Rates of all the work of a phase, and how far its draws are apart."""
    metrics = joined.metrics
    times = np.array([m[f"time/{phase}/median_s"] for m in every])
    if rate_key(phase, "mfu") in metrics:
        rates = np.array([m[rate_key(phase, "tflops_per_gpu")] for m in every])
        # Rate times time is the work of a draw, up to a factor that they share.
        metrics[rate_key(phase, "tflops_per_gpu")] = rate = float((rates @ times) / times.sum())
        metrics[rate_key(phase, "mfu")] = rate / metrics["compute/peak_tflops"]
    metrics[f"draws/{phase}/min_s"], metrics[f"draws/{phase}/max_s"] = float(times.min()), float(times.max())
    metrics[f"draws/{phase}/spread"] = float((times.max() - times.min()) / np.median(times))


def _samples(draws: list[Measured]) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for key in draws[0].metrics:
        if sample := metric_of(key).sample:
            name = sample.replace("<phase>", key.split("/")[1])
            samples[name] = [m.metrics[key] for m in draws]
    for key in draws[0].samples:
        every = [m.samples[key] for m in draws]
        if key.startswith("block_"):
            samples[key] = [float(np.mean(every))]
        elif key.startswith("rank_"):
            samples[key] = np.max(every, axis=0).tolist()
        else:
            samples[key] = [value for own in every for value in own]
    return samples


def _notes(draws: list[Measured]) -> dict[str, Any]:
    notes = dict(draws[0].notes)
    notes["stopped_by"] = ", ".join(sorted({m.notes["stopped_by"] for m in draws}))
    for key in {"kernel_calls", "timeline"} & set(notes):
        notes[key] = [m.notes[key] for m in draws]
    return notes
