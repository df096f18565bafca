"""The viewer of strategies, as a person calls it, and what a sweep records for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.commands.cp import main
from lcbench.runs.store import Sweep

ROOT = Path(__file__).parents[2]


def test_strategies_are_counted_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["cp=ring,ulysses,torch_cp", "mask=causal", "seqlen=768k", "scale=12x8", "heads=64x8x128"]
    assert main([*asked, "--json"]) == 0
    ring, ulysses, peer = json.loads(capsys.readouterr().out)
    assert ring["forward_bytes"] == 95 * 2 * 8192 * 8 * 128 * 2
    assert ring["steps"] == 96
    assert ulysses["reason"] == "cannot split 64 query heads evenly over 96 ranks"
    assert "no schedule" in peer["reason"]


def test_one_schedule_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "lightseq.png"
    asked = ["cp=lightseq", "mask=causal", "seqlen=2k", "scale=1x5", "heads=5x5x16"]
    assert main([*asked, "--grid", "--out", str(picture)]) == 0
    assert "q4k0" in capsys.readouterr().out  # rank 0 helps the last one
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["cp=rung"], "did you mean ring"),
        (["cp=ring,usp", "scale=1x4", "--grid"], "show one strategy that can run"),
        (["cp=ulysses", "scale=1x7", "--out", "x.png"], "cannot split 32 query heads evenly over 7 ranks"),
        (["--cell", "0123456789ab", "--results", "nowhere"], "no cell '0123456789ab'"),
        (["cp=ring", "reduce_dtype=bfloat16"], "reduce_dtype=bfloat16 is not one of float32, input"),
        (["cp=hybrid", "cp.groups=[2,0]"], "cp.groups=[2, 0] is no list of integers of at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        error = capsys.readouterr().err
        assert words in error, error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.gloo
@pytest.mark.slow
def test_a_sweep_records_overlap_and_a_timeline_that_can_be_drawn(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "shown")
    done = subprocess.run(
        [
            sys.executable, "-m", "lcbench.sweep", "cp=groupcast,torch_cp,te_p2p", "mask=causal", "seqlen=256", "scale=1x2",
            "heads=4x2x16", "dtype=float32", "measure.budget_s=1", "measure.timeline=true", "sweep=shown",
            f"results={tmp_path}", "tracking_uri=none",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {entry.cell.config["cp"]["name"]: sweep.attempts(cell)[-1] for cell, entry in sweep.entries().items()}
    ours, peer, missing = (found[name] for name in ("groupcast", "torch_cp", "te_p2p"))
    assert ours.status == peer.status == "ok"
    assert missing.status == "skipped"
    assert missing.failure is not None
    assert "runs on CUDA devices only" in missing.failure.cause
    for phase in ("forward", "backward"):
        assert 0 <= ours.metrics[f"overlap/{phase}/efficiency"] <= 1
        assert ours.metrics[f"overlap/{phase}/compute_s"] > 0
        assert ours.metrics[f"overlap/{phase}/communication_s"] > 0
    assert ours.metrics["memory/buffer_bytes"] > 0
    assert "comm/bytes" not in peer.metrics  # what it sends is not ours to count
    timeline = ours.provenance["timeline"]
    assert len(timeline) == 2
    for moments in timeline:
        assert [m[0] for m in moments] == list(range(7))  # three steps, what is fetched first, three steps back
        marks = [mark for moment in moments for mark in moment[1:]]
        assert marks == sorted(marks)
    picture = tmp_path / "run.svg"
    assert main(["--cell", ours.cell_id, "--results", str(tmp_path), "--out", str(picture)]) == 0
    assert "<svg" in picture.read_text()
