"""Comparing two sweeps: what was changed is found and nothing else, and what cannot be compared says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.commands.compare import main
from lcbench.report.comparison import compare, side_of
from lcbench.runs.attempt import Failure
from tests.report.made import made_sweep
from tests.slurm.stage import ROOT

GRID = ["cp=ring,ulysses,usp", "mask=full,causal", "seqlen=64k,128k,256k", "scale=1x8"]


def test_a_slowed_strategy_is_found_and_nothing_else(tmp_path: Path) -> None:
    a = made_sweep(tmp_path, "a", GRID, seed=1)
    b = made_sweep(tmp_path, "b", GRID, seed=2, slower={"usp": 1.06})
    found = compare(side_of(a), side_of(b))
    assert {c.cell.config["cp"]["name"] for c in found.by("slower")} == {"usp"}
    assert len(found.by("slower")) == 6
    assert not found.by("faster")
    assert len(found.regressions(0.03)) == 6
    assert not found.regressions(0.10)
    back = compare(side_of(b), side_of(a))
    assert len(back.by("faster")) == 6
    assert not back.by("slower")


def test_what_two_runs_differ_by_anyway_is_not_a_regression(tmp_path: Path) -> None:
    a = made_sweep(tmp_path, "a", GRID, seed=1)
    words = [f"{cp} sdpa_flash {mask}" for cp in ("ring", "ulysses", "usp") for mask in ("full", "causal")]
    drift = dict(zip(words, (1.05, 0.96, 1.03, 0.95, 1.04, 0.97), strict=True))
    b = made_sweep(tmp_path, "b", GRID, seed=2, slower=drift)
    found = compare(side_of(a), side_of(b))
    assert found.run_to_run == pytest.approx(0.05, rel=0.5)
    assert len(found.by("same")) == len(GRID[0].split(",")) * 6
    assert found.known


def test_results_from_before_there_were_blocks_compare_by_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (made_sweep(tmp_path, name, GRID, seed=seed, blocks=1) for seed, name in enumerate("ab"))
    c = made_sweep(tmp_path, "c", GRID, seed=3, slower={"usp": 1.06})
    assert len(compare(side_of(a), side_of(b)).by("same")) == 18
    found = compare(side_of(a), side_of(c))
    assert len(found.by("slower")) == 6
    assert found.known
    assert main(["a", "b", "--results", str(tmp_path)]) == 0
    assert "18 cells have one block in a sweep: their run-to-run noise is not known from themselves" in capsys.readouterr().out


def test_the_command_says_what_differs_and_fails_on_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    made_sweep(mine, "a", GRID, seed=1)
    newer = {"versions": {"torch": "2.14.0", "nccl": "2.27"}}
    lost = {"ring sdpa_flash full 64k": Failure("oom", "no memory", 0)}
    made_sweep(theirs, "b", GRID, seed=2, slower={"usp": 1.2}, provenance=newer, failed=lost)
    arguments = ["a", str(theirs / "b"), "--results", str(mine)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.index("slower") < text.index("2.14.0") < text.index("by axis")
    assert "only in a: 1 cells" in text
    assert "ring sdpa_flash full 64k" in text
    assert "oom: no memory" in text
    assert main([*arguments, "--fail-on-regression", "5%"]) == 1
    assert main([*arguments, "--fail-on-regression", "0.3"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"] == {"torch": ["2.13.0", "2.14.0"]}
    assert sorted(c["label"].split()[0] for c in found["cells"] if c["verdict"] == "slower") == ["usp"] * 6
    assert all(c["low"] <= c["value"] <= c["high"] for c in found["cells"])
    assert all(0 <= c["p"] <= c["p_adjusted"] <= 1 for c in found["cells"])
    assert all((c["p_adjusted"] <= 0.05) == (c["verdict"] != "same") for c in found["cells"])
    assert all(c["sigma"] > 0 and c["dof"] > 1 and (c["a_blocks"], c["b_blocks"]) == (3, 3) for c in found["cells"])
    assert found["known"]
    assert found["median_ratio"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_command_says_what_two_sweeps_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str], blocks: int) -> None:
    for seed, name in enumerate("ab"):
        made_sweep(tmp_path, name, ["cp=ring,usp", "seqlen=64k", "scale=1x8"], seed=seed, blocks=blocks)
    made_sweep(tmp_path, "c", ["cp=ring,usp", "seqlen=64k", "scale=1x8"], seed=2, blocks=blocks, slower={"usp": 1.5})
    assert main(["a", "b", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "fewer than 4 cells" in text
    assert "such as a slower node, cannot be told from a change" in text
    assert ("run-to-run noise not measured" in text) == (blocks == 1)
    assert main(["a", "c", "--fail-on-regression", "5%", "--results", str(tmp_path)]) == 1
    assert ("run-to-run noise not measured" in capsys.readouterr().err) == (blocks == 1)


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_sweep(tmp_path, "a", ["seqlen=64k", "scale=1x8"])
    with pytest.raises(SystemExit, match="2"):
        main(["a", "b", "--results", str(tmp_path)])
    assert "no sweep 'b'" in capsys.readouterr().err
    made_sweep(tmp_path, "c", ["seqlen=128k", "scale=1x8"])
    assert main(["a", "c", "--results", str(tmp_path)]) == 2
    assert "no cell with a good result in both" in capsys.readouterr().err
    for share in ("much", "-1%", "nan"):
        with pytest.raises(SystemExit):
            main(["a", "a", f"--fail-on-regression={share}", "--results", str(tmp_path)])
        assert "is no share" in capsys.readouterr().err


def test_cells_are_the_same_across_an_axis_and_however_long_they_were_measured(tmp_path: Path) -> None:
    a = made_sweep(tmp_path, "a", ["kernel=sdpa_flash", "seqlen=64k,128k", "scale=1x8"], seed=1)
    b = made_sweep(tmp_path, "b", ["kernel=flex", "seqlen=64k,128k", "scale=1x8", "measure.budget_s=3"], seed=1)
    assert not compare(side_of(a), side_of(b)).cells
    assert len(compare(side_of(a, ["kernel"]), side_of(b, ["kernel"])).cells) == 2
    both = made_sweep(tmp_path, "both", ["kernel=sdpa_flash,flex", "seqlen=64k", "scale=1x8"])
    with pytest.raises(ValueError, match="differ in kernel only"):
        side_of(both, ["kernel"])
    with pytest.raises(ValueError, match="is not an axis"):
        side_of(both, ["kernels"])


@pytest.mark.gloo
@pytest.mark.slow
def test_two_real_sweeps_of_which_one_strategy_was_slowed(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    grid = [
        "--config-dir", str(ROOT / "tests" / "conf"), "-m", "cp=slowed_ring,ulysses,allgather", "mask=full,causal", "seqlen=512",
        "scale=1x2", "heads=4x4x32", "dtype=float32", "direction=forward", "measure.budget_s=0.5", "measure.min_iterations=12",
        "measure.precision=0.001", "output=quiet", f"results={tmp_path / 'results'}", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db",
        "site.publish=login",
    ]  # fmt: skip
    for name in ("before", "after"):
        done = subprocess.run(
            [sys.executable, "-m", "lcbench.sweep", *grid, f"sweep={name}"], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "LCBENCH_TEST_FAULT": str(fault)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == f"{name}\n"
        fault.touch()
    command = [sys.executable, "-m", "lcbench.compare", "before", "after", "--results", str(tmp_path / "results")]
    compared = subprocess.run([*command, "--json", "--fail-on-regression", "20%"], cwd=ROOT, capture_output=True, text=True)
    assert compared.returncode == 1, compared.stdout + compared.stderr
    found = json.loads(compared.stdout)
    slower = {c["cell"] for c in found["cells"] if c["verdict"] == "slower" and c["value"] > 1.2}
    assert slower == {c["cell"] for c in found["cells"] if c["label"].startswith("slowed_ring")}, compared.stdout
    assert len(slower) == 2
