"""What packs cost: expected, at most, and what the two rest on; and who is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lcbench.grid.command_line import look
from lcbench.runs.budget import Cost
from lcbench.runs.launch import Todo, hand_over, settings_of, sweep_of
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.store import Sweep
from tests.runs.test_pack import cell

SETTINGS = Settings({}, [], None, {"max_cells": None, "max_minutes": None, "max_jobs": None},
                    {"factor": 5.0, "min_s": 60.0, "max_s": 1800.0}, {})  # fmt: skip


def pack(number: int, *, scale: str, seconds: dict[int, float], minutes: int, basis: str = "simulation", blocks: int = 3) -> Pack:
    """A pack of a cell per seed."""
    measure = {"warmup": 1, "min_iterations": 5, "max_iterations": 50, "budget_s": 10.0, "precision": 0.02, "timeline": False}
    cells = {seed: cell(scale=scale, seed=seed, measure={**measure, "blocks": blocks}) for seed in seconds}
    return Pack(
        id=f"p{number}", sweep="s", root="/r", launcher="slurm", scale=scale, cells=tuple(c.id for c in cells.values()),
        configs={c.id: c.config for c in cells.values()}, seconds={cells[seed].id: s for seed, s in seconds.items()},
        timeout_min=minutes, settings=SETTINGS, basis={c.id: basis for c in cells.values()},
    )  # fmt: skip


def test_jobs_of_an_array_have_one_limit_and_processes_here_none() -> None:
    packs = [
        pack(0, scale="2x8", seconds={0: 600.0, 1: 1200.0}, minutes=60),
        pack(1, scale="2x8", seconds={2: 1800.0}, minutes=90, basis="results of like cells"),
        pack(2, scale="1x4", seconds={3: 3600.0}, minutes=75, blocks=2),
    ]
    jobs = Cost.of(packs, here=False)
    assert (jobs.hours, jobs.rank_hours) == (2.0, 16 * 1.0 + 4 * 1.0)
    assert jobs.most_rank_hours == 16 * 2 * 1.5 + 4 * 1.25
    here = Cost.of(packs, here=True)
    assert here.rank_hours == jobs.rank_hours
    assert here.most_rank_hours == pytest.approx(0.5 * (16 * 3 * 3 + 4 * 2))  # half an hour a block
    lines = str(jobs).splitlines()
    assert lines[0].startswith(
        "estimated: about 20 GPU-hours, at most 53 (time limits); 2.0 h one after the other, the longest cell 1.0 h"
    )
    assert lines[1] == "estimated from: simulation (3 cells), results of like cells (1 cell)"
    assert "at most 76 (hang.max_s a block; there are no time limits here)" in str(here)


def test_what_estimates_rest_on_is_said_of_all_cells_and_named_for_the_most() -> None:
    packs = [pack(n, scale="1x2", seconds={10 * n + i: 1.0 for i in range(n)}, minutes=5, basis=f"b{n}") for n in range(1, 6)]
    assert Cost.of(packs, here=False).basis == "b5 (5 cells), b4 (4 cells), b3 (3 cells), and others (3 cells)"
    before = [replace(p, basis={}) for p in packs]  # packs of before do not say
    assert Cost.of(before, here=False).basis == ""


def test_a_refusal_goes_by_the_estimate_and_says_what_it_would_be_at_most() -> None:
    cost = Cost.of([pack(0, scale="2x8", seconds={0: 3600.0}, minutes=120)], here=False)
    assert cost.refusal({"gpu_hours": 20.0, "hours": 1.5}, 7200.0) is None  # 32 at most
    said = cost.refusal({"gpu_hours": 15.0, "hours": None}, 7200.0)
    assert said is not None
    assert "1.0 more than budget.gpu_hours=15 allows (about 16 GPU-hours, at most 32 (time limits)); nothing was started" in said
    assert said.endswith("write budget.gpu_hours=16")
    assert "\n" not in said
    assert "hang.max_s=1800" in str(cost.refusal({}, 1800.0))


def test_what_is_handed_over_is_told_before_it_is_submitted(tmp_path: Path) -> None:
    """By ``rerun`` as by a sweep, and nothing is told where nothing is submitted."""
    said: list[str] = []

    class Submits:
        name, queue, output = "local", None, "quiet"

        def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
            said.append(f"submitted {len(packs)}")

    plan = look(["cp=ring,ulysses", "mask=causal", "seqlen=2k", "scale=1x2", f"results={tmp_path}", "sweep=s"])
    sweep, cells = sweep_of(plan), [planned.cell for planned in plan.cells]
    sweep.add([Entry(c) for c in cells], command=[])

    def tell(packs: list[Pack]) -> None:
        said.append(str(Cost.of(packs, here=True)))

    for chosen in (cells, []):
        hand_over(Submits(), sweep, lambda todo=chosen: Todo(todo), settings_of(plan), tell)  # type: ignore[arg-type, misc]
    assert len(said) == 2
    assert said[0].startswith("estimated: about ")
    assert said[1] == "submitted 1"
