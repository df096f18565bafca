"""A cell without warm-up has none where its parts are timed alone, either; one with warm-up has one iteration there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lcbench.measure import cell
from lcbench.measure.blocks import short_warmup
from lcbench.measure.measured import Measured
from lcbench.measure.timing import Samples

SETTINGS = {"min_iterations": 1, "max_iterations": 1, "budget_s": 1.0, "precision": 0.5}


@pytest.mark.parametrize(("warmup", "alone"), [(0, 0), (1, 1), (3, 1)])
def test_warm_up_of_what_is_timed_alone(warmup: int, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, asked = SETTINGS | {"warmup": warmup}, []

    def measured(phases: dict[str, Any], stopping: Any, warmup: int, device: torch.device) -> tuple[Samples, None]:
        asked.append(warmup)
        return Samples({phase: [1.0] for phase in phases}), None

    monkeypatch.setattr(cell, "measure", measured)
    phases = {"forward": lambda _: None}
    draw = object.__new__(cell._Draw)
    draw._work = SimpleNamespace(settings=settings)  # type: ignore[assignment]
    draw._session = SimpleNamespace(variants=lambda: dict.fromkeys(("compute", "communication"), phases), alone=lambda: phases)  # type: ignore[assignment]
    mesh, grid = SimpleNamespace(count=2, tp=1), np.arange(2).reshape(2, 1)
    draw._gang = SimpleNamespace(device=torch.device("cpu"), mesh=mesh, grid=grid, dp_index=0, tp_index=0)  # type: ignore[assignment]
    draw._say = lambda _: None
    times = {"time/forward/median_s": 1.0, "time/total/median_s": 1.0}
    draw.measured = Measured(metrics=times, samples={"rank_forward_median_s": [1.0, 2.0]})
    draw.overlap()
    draw.slowdown()
    assert asked == [alone] * 3
    assert short_warmup(settings) == alone
