"""Results of version 0.1 load, resume, report and compare.

``tests/data/results-0.1`` is a part of a results folder that 0.1 wrote, with its names (``transit``, ``cp.order``, ``mask.draws``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lcbench.grid.axes import RENAMED
from lcbench.grid.paths import REPOSITORY
from lcbench.results import load
from lcbench.runs.store import Sweep
from tests.commands import lcbench

STORED = REPOSITORY / "tests" / "data" / "results-0.1"
SAME = [
    "dtype=float32", "heads=4x2x32", "measure.budget_s=0.3", "measure.max_iterations=10", "measure.blocks=2", "seqlen=512",
    "mask=causal", "site=local", "site.device=cpu", "hydra/launcher=dry",
]  # fmt: skip
# What made the cells, by the names of now, and those of them that have a good result.
GRIDS = {
    ("cp=none", "scale=1x1"): ["f281b8671713"],
    ("cp=ring,usp,torch_cp,te_p2p", "scale=1x2"): ["679e662f64e8", "8866b08ded52", "5fad5e4c8301"],
    ("cp=ring", "mask=causal_document", "mask.samples=2", "lengths=uniform", "lengths.high=256", "seqlen=1k"): ["5460fd78e7d2"],
    ("cp=ring", "cp.layout=striped", "reduce_dtype=input", "dtype=bfloat16"): ["b9762b53b1f8"],
    ("cp=usp", "scale=2x2", "mask=full", "measure.timeline=true"): ["9257a6e7d130"],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(STORED, tmp_path / "results")


def said_by(command: str, *arguments: str) -> str:
    done = lcbench(command, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def names_of_before() -> set[str]:
    """The names that the stored sweep has and that are others now."""
    text = (STORED / "before" / "manifest.json").read_text()
    return {name.old for name in RENAMED if f'"{name.old.rpartition(".")[2]}"' in text}


def test_it_holds_names_of_before() -> None:
    assert names_of_before() == {"transit", "cp.order", "mask.draws"}


def test_cells_load_under_their_ids(root: Path) -> None:
    seen = Sweep(root, "before").look()
    assert not seen.damaged
    assert len(seen.records) == 8
    for cell_id, record in seen.records.items():
        assert record.entry.cell.id == cell_id
        assert record.last is not None
        assert record.status == ("skipped" if cell_id == "d83b08d1c76e" else "ok")
    frame = load(str(root), "before")
    assert {name.new for name in RENAMED if name.old in names_of_before()} <= set(frame.columns)
    assert not {name.old for name in RENAMED} & set(frame.columns)
    striped = frame[frame["cell"] == "b9762b53b1f8"].iloc[0]
    assert (striped["reduce_dtype"], striped["cp.layout"], striped["workload"]) == ("input", "striped", "attention")


@pytest.mark.parametrize("typed", GRIDS, ids=" ".join)
def test_a_sweep_of_the_same_finds_them_done(typed: tuple[str, ...], root: Path) -> None:
    said = said_by("sweep", "-m", *SAME, *typed, f"results={root}", "sweep=before")
    done = {line.split()[0] for line in said.splitlines() if "done before" in line}
    assert done == set(GRIDS[typed]), said


@pytest.mark.slow
def test_commands_show_them(root: Path, tmp_path: Path) -> None:
    assert "7 ok" in said_by("status", "before", "--results", str(root))
    said_by("results", "before", "--results", str(root), "--out", str(tmp_path / "cells.json"))
    assert len(json.loads((tmp_path / "cells.json").read_text())) == 8
    report = said_by("report", "before", "--results", str(root), "--out", str(tmp_path / "report"))
    assert (tmp_path / "report").is_dir(), report
    compared = json.loads(said_by("compare", "before", "before", "--results", str(root), "--json"))
    assert compared
