"""Ranks that share a GPU: only where a site says so, and no number of theirs is taken for a GPU's."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lcbench.grid.command_line import look
from lcbench.grid.site import checked
from lcbench.measure import nodes
from lcbench.report.comparison import compare, side_of
from lcbench.report.frame import good_rows, reported
from lcbench.report.page import write_report
from lcbench.report.table import cells_table
from lcbench.report.winners import winners
from lcbench.runs.agent import _node_is_well
from lcbench.runs.estimate import Estimator
from lcbench.runs.pack import Pack
from tests.report.made import PROVENANCE, made_sweep
from tests.runs.test_corrupt import SETTINGS

GRID = ["cp=ring,ulysses", "mask=causal", "seqlen=8k", "scale=1x2", "site=local", "sweep=x"]


def pack(root: Path, **site: Any) -> Pack:
    return Pack("p", "s", str(root), "local", "1x2", (), {}, {}, 5, replace(SETTINGS, site={"launcher": "local", **site}))


@pytest.mark.parametrize(
    ("site", "here", "well"),
    [
        ({}, 2, True),
        ({}, 0, True),  # CPU ranks
        ({}, 1, False),
        ({"check": "warn"}, 1, True),
        ({"share_gpu": False}, 1, False),
        ({"share_gpu": True}, 1, True),
        ({"device": "cpu"}, 1, True),
        ({"device": "h200"}, 1, False),
        ({"device": "h200", "share_gpu": True}, 1, True),
    ],
)
def test_two_ranks_need_two_gpus_or_a_site_that_shares(
    site: dict[str, Any], here: int, well: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"index": "0", "name": "NVIDIA H200", "memory_used_mib": "4", "throttled": "0x0", "mig": "Disabled"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(nodes, "gpus_here", lambda: [gpu] * here)
    made = pack(tmp_path, **checked({"launcher": "local", **site}))
    made = replace(made, settings=replace(made.settings, devices=[{"name": "h200", "names": ["NVIDIA H200"]}]))
    assert _node_is_well(made, 0, 2) == well
    assert (made.folder / "end.json").exists() == (not well)
    if not well:
        assert "1 of 2 GPUs" in (made.folder / "end.json").read_text()


def test_share_gpu_is_true_or_false() -> None:
    with pytest.raises(ValueError, match=r"site.share_gpu=2 is neither true nor false"):
        checked({"launcher": "local", "share_gpu": 2})


@pytest.mark.slow
def test_times_of_a_shared_gpu_are_in_no_table_of_times(tmp_path: Path) -> None:
    shared_on = PROVENANCE | {"check": PROVENANCE["check"] | {"no_speed": "2 ranks shared a GPU"}}
    alone = made_sweep(tmp_path / "a", "alone", GRID)
    shared = made_sweep(tmp_path / "b", "shared", GRID, provenance=shared_on)
    assert len(winners(good_rows(reported(alone)))) == 1
    frame = reported(shared)
    assert list(frame["status"]) == ["ok", "ok"]
    assert good_rows(frame).empty
    compared = compare(side_of(alone), side_of(shared))
    assert not compared.cells
    assert set(compared.only_a.values()) == {"no speed: 2 ranks shared a GPU"}
    page = write_report(shared, tmp_path / "page", []).page.read_text()
    assert "2 ranks shared a GPU" in page
    assert {path.stem for path in (tmp_path / "page").rglob("*.md")} == {"cells"}  # no winners, no rates
    console = Console(width=80, file=io.StringIO(), record=True, force_terminal=False)
    console.print(cells_table(shared.look(), "shared"))
    shown = console.export_text()
    assert shown.count("no speed: 2 ranks shared a GPU") == 2
    assert "1.00x" not in shown
    assert Estimator.of(alone.root, {}, []).known
    assert not Estimator.of(shared.root, {}, []).known


@pytest.mark.slow
def test_the_cells_of_make_gpu_cells_can_all_run_on_ranks_that_share() -> None:
    plan = look(["+experiment=gpu_cells,gpu_cells_sparse,gpu_cells_ranks"])
    assert plan.site["share_gpu"]
    assert [p.skip for p in plan.cells] == [None] * 20
    assert {str(p.cell.scale) for p in plan.cells} == {"1x1", "1x2"}
