"""Cells that differ in an option only: every table, page and name of a run tells them apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlflow
import pytest

from lcbench.commands.compare import main as compare_command
from lcbench.grid.command_line import look
from lcbench.grid.devices import known_devices
from lcbench.grid.labels import labels, words_of
from lcbench.report.comparison import compare, side_of
from lcbench.report.comparison_page import write_comparison
from lcbench.report.foretold import held, rows_of
from lcbench.report.frame import reported
from lcbench.report.page import write_report
from lcbench.report.table import Names
from lcbench.runs.jobs import Watch
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import publish
from tests.report.made import foretell, made_sweep

# Every kind of axis value that has options: what differs, and in which words it has to be told.
ALIKE = {
    "a strategy's": (
        ["cp=ring,usp", "cp.layout=zigzag,contiguous", "cp.lowering=auto,p2p", "kernel=flash_attn3", "mask=causal"],
        ("cp", {"ring(layout=zigzag)", "usp(layout=contiguous, lowering=p2p)"}),
    ),
    "a mask's": (
        ["cp=ring", "kernel=flash_attn3", "mask=sliding_window", "mask.left=1k,4k"],
        ("mask", {"sliding_window(left=1024)", "sliding_window(left=4096)"}),
    ),
    "a workload's": (
        ["workload=linear_attention", "workload.rule=gla,gated_delta_rule", "cp=lasp,zeco", "kernel=chunked", "mask=causal"],
        ("workload", {"linear_attention(rule=gla)", "linear_attention(rule=gated_delta_rule)"}),
    ),
    "a selector's": (
        ["workload=sparse_attention", "selector=dsv,random", "selector.density=0.1,0.2", "mask=causal", "cp=sparse_heads",
         "kernel=triton_block_sparse"],
        ("selector", {"dsv(density=0.1)", "random(density=0.2)"}),
    ),
    "a distribution's of lengths": (
        ["cp=ring", "kernel=flash_attn3", "mask=causal_document", "lengths=log_normal", "lengths.median=1k,2k"],
        ("mask", {"causal_document(log_normal, lengths.median=1024)", "causal_document(log_normal, lengths.median=2048)"}),
    ),
}  # fmt: skip
REST = ("seqlen=64k", "heads=8x8x64", "scale=1x8", "site=plain")


@pytest.fixture(scope="module", params=ALIKE)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, tuple[str, set[str]]]:
    grid, said = ALIKE[request.param]
    sweep = made_sweep(tmp_path_factory.mktemp("alike"), "a", [*grid, *REST])
    foretell(sweep, sweep)
    return sweep, said


@pytest.mark.slow
def test_every_cell_has_a_name_of_its_own_wherever_it_stands(
    case: tuple[Sweep, tuple[str, set[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, (axis, words) = case
    frame = reported(sweep)
    cells = [entry.cell for entry in sweep.entries().values()]
    assert len({cell.label for cell in cells}) < len(cells), "labels alone do not tell"
    found = compare(side_of(sweep), side_of(sweep))
    page = write_report(sweep, tmp_path / "report", known_devices()).page
    block = json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), flags=re.DOTALL)[0])
    both = write_comparison(found, sweep, sweep, tmp_path / "both.html", noise=[])
    compared = json.loads(re.findall(r'id="data">(.*?)</script>', both.read_text(), flags=re.DOTALL)[0])
    assert compare_command(["a", "a", "--results", str(sweep.root), "--json"]) == 0
    told = {
        "labels": labels(cells).values(), "a table": Names.of(cells).what.values(), "a frame": frame["label"],
        "a page": block["cells"]["label"], "a page of two": compared["cells"]["label"],
        "compare": [cell["label"] for cell in json.loads(capsys.readouterr().out)["cells"]],
        "status": [cell.label for cell in Watch(sweep).look().cells],
        "predicted and measured": [str({**row, "cell": "", "predicted": "", "measured": "", "error": ""}) for row in
                                   rows_of([h for h in held(sweep.look().records.values()) if h.phase == "total"])],
    }  # fmt: skip
    for where, names in told.items():
        assert len(names) == len(cells) == len(set(names)), where
    assert words <= set(words_of(cells, axis).values())
    assert words <= {share.value for share in found.by_axis() if share.axis == axis}
    assert len(set(zip(frame["choice"], frame["problem"], strict=True))) == len(cells)


@pytest.mark.slow
def test_runs_of_mlflow_are_told_apart(tmp_path: Path) -> None:
    grid, _ = ALIKE["a mask's"]
    sweep = made_sweep(tmp_path, "a", [*grid, *REST], blocks=1)
    foretell(sweep, sweep)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert publish(sweep, uri).published >= 2
    runs = mlflow.MlflowClient(tracking_uri=uri).search_runs(["1"])
    names = [run.info.run_name for run in runs if "mlflow.parentRunId" in run.data.tags]
    told = [f"ring flash_attn3 sliding_window 64k 1x8 mask.left={left}" for left in (1024, 4096)]
    assert sorted(names) == sorted([*told, *(f"{name} (predicted)" for name in told)])


def test_options_that_are_the_same_are_not_told() -> None:
    cells = [planned.cell for planned in look(["cp=ring,usp", "cp.layout=zigzag", "seqlen=64k", "scale=1x8"]).cells]
    assert set(words_of(cells, "cp").values()) == {"ring", "usp"}
    assert set(words_of(cells, "seqlen").values()) == {"64k"}
