"""Cells that are asked for twice at once are measured once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lcbench.commands import rerun
from lcbench.grid.command_line import look
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.jobs import Watch
from lcbench.runs.launch import make_packs, missing, settings_of, write_down
from lcbench.runs.manifest import Entry
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT

GRID = [
    "cp=none",
    "seqlen=64",
    "heads=1x1x8",
    "dtype=float32",
    "measure.budget_s=0.1",
    "measure.max_iterations=3",
    "measure.blocks=1",
]


def failed_sweep(root: Path) -> Sweep:
    """Two cells, each with an attempt that failed."""
    plan = look([*GRID, "kernel=naive,reference"])
    sweep, settings = Sweep(root, "s"), settings_of(plan)
    settings = replace(settings, tracking_uri=None)
    launch = {"launcher": "local", "settings": asdict(settings)}
    sweep.add([Entry(p.cell) for p in plan.cells], command=["x"], launch=launch)
    for p in plan.cells:
        begun = sweep.begin(p.cell.id, "")
        sweep.finish(Attempt(p.cell.id, "s", begun.number, "failed", Failure("oom", "x"), config=p.cell.config))
    return sweep


def test_what_somebody_else_took_up_or_tried_meanwhile_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = failed_sweep(tmp_path)
    chosen = rerun._wanted(settled(Watch(sweep)), None)
    first, second = chosen
    assert [c.id for c in rerun._still_wanted(sweep, chosen).cells] == [first, second]
    begun = sweep.begin(first, "other")
    sweep.finish(Attempt(first, "s", begun.number, "failed", Failure("oom", "again")))
    assert [c.id for c in rerun._still_wanted(sweep, chosen).cells] == [second]
    launch = sweep.manifest()["launch"]
    settings = rerun._settings(sweep, launch)
    (pack,) = make_packs(sweep, [sweep.entries()[second].cell], launcher="local", settings=settings)
    write_down(pack)  # by a launcher that lives: this process
    assert not rerun._still_wanted(sweep, chosen).cells
    assert not missing(sweep, [sweep.entries()[second].cell], force=True).cells
    assert "1 of 2 cells: somebody else" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        rerun.main([second, "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "under way already" in capsys.readouterr().err


def test_a_launch_of_another_version_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = failed_sweep(tmp_path)
    launch = sweep.manifest()["launch"]
    sweep.add([], command=["x"], launch={**launch, "settings": {**launch["settings"], "newer": 1}})
    for said in ([], ["--config-dir", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit) as ended:
            rerun.main(["--failed", "s", *said, "--results", str(tmp_path)])
        assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_somebody_elses_cells_run_only_with_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = failed_sweep(tmp_path)
    launch = sweep.manifest()["launch"]
    launch["settings"]["site"]["setup"] = ["touch x"]
    sweep.add([], command=["x"], launch=launch)
    os.chown(sweep.manifest_path, 5, 60)
    with pytest.raises(SystemExit) as ended:
        rerun.main(["--failed", "s", "--results", str(tmp_path)])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "sweep s is, wholly or in part, of games; this runs cells again, in your name" in said
    assert "touch x" in said
    assert rerun.main(["--failed", "s", "--launcher", "dry", "--results", str(tmp_path)]) == 0
    capsys.readouterr()


@pytest.mark.gloo
@pytest.mark.slow
def test_two_reruns_at_once_measure_each_cell_once(tmp_path: Path) -> None:
    sweep = failed_sweep(tmp_path)
    command = [sys.executable, "-m", "lcbench.rerun", "--failed", "s", "--results", str(tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [[a.status for a in sweep.attempts(c)] for c in sweep.entries()] == [["failed", "ok"]] * 2, said
