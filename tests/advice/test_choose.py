"""The command: what it refuses, what it prints without measuring, and a race with real ranks that an interruption does not lose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcbench.commands import cp as cp_command
from lcbench.commands.choose import main
from lcbench.predict.fitted import Coefficients, Fit, KernelFit
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT

PLAN = ["scale=2x4", "heads=16x8x64", "mask=causal", "seqlen=48k", "site=plain", "kernel=flash_attn3,sdpa_flash"]
PREDICT = [*PLAN, "machine=h100", "--predict-only"]
TINY = [
    "cp=ring,ulysses", "kernel=sdpa_math", "mask=causal", "seqlen=64", "scale=1x2", "heads=2x2x8", "dtype=float64",
    "measure.warmup=0", "measure.min_iterations=4", "measure.max_iterations=6", "measure.budget_s=0.2", "sweep=tiny",
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (PLAN, "budget is not set"),
        ([*PLAN, "budget=2gpuhours"], "budget=2gpuhours is no amount"),
        ([*PLAN, "budget=5000gpuh"], "budget=5000gpuh is more than budget.gpu_hours=2000 allows"),
        ([*PLAN, "machine=h101", "--predict-only"], "machine=h101 is none of a100, b200, h100, h200"),
        ([*PLAN, "machine=b200", "budget=1gpuh"], "machine=b200 is not what site=plain measures on (h100)"),
        ([*PREDICT, "cp=rign"], "cp=rign"),
        ([*PREDICT, "ring"], "'ring' is no override"),
        ([*PREDICT, "--max-ms", "fast"], "--max-ms=fast is no number above 0"),
        ([*PREDICT, "--max-gib", "0"], "--max-gib=0 is no number above 0"),
        ([*PREDICT, "seqlen=48k,64k", "--max-ms", "3"], "limits and figures are of one problem"),
        ([*PREDICT, "--fit", "nowhere.json"], "fit nowhere.json cannot be read"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_fit_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fit.json").write_text('{"machine": 3}')
    with pytest.raises(SystemExit) as ended:
        main([*PREDICT, "--fit", str(tmp_path / "fit.json")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_prediction_says_what_it_is_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "cp=ring,usp,ulysses", f"results={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "predicted for machine h100, not measured" in printed
    assert "within a factor 2 in 95 % of cases; no fit" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        (["cp=star,apb", "direction=forward"], True),
        (["workload=sparse_attention", "selector=oracle,sale", "kernel=naive", "cp=ring"], True),
        (["cp=none"], False),
        (["cp=ulysses", "heads=3x3x64"], False),
    ],
)
def test_where_no_choice_may_win_there_is_a_sentence_and_no_empty_table(
    words: list[str], advised: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = {word.partition("=")[0] for word in words}
    problem = [word for word in PREDICT if word.partition("=")[0] not in swept]
    assert main([*problem, *words, f"results={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert "vs best" not in printed
    assert "nothing to rank: " in printed
    assert "no exact choice fits and can run" in printed
    assert ("what only approximates is measured" in printed) == advised
    assert ("no rival, as it approximates" in printed) == advised


def test_a_fit_that_lcbench_has_of_the_machine_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "h100.fit.json"
    mine = KernelFit(
        kernel="flash_attn3", dtype="bfloat16", forward=Coefficients(flop_s=1e-14), backward=Coefficients(), sources=("mine",)
    )
    Fit(machine="h100", kernels=(mine,), error={"forward": 0.1, "backward": 0.2}).write(file)
    monkeypatch.setattr("lcbench.predict.predictor.fit_of", lambda name: file)
    assert main([*PREDICT, "cp=ring", "kernel=flash_attn3"]) == 0
    assert "predicted times are within 20 % in 95 % of cases; cp=ring was not fitted" in capsys.readouterr().out
    words = ["cp=ring", "mask=causal", "seqlen=4k", "scale=1x4", "kernel=flash_attn3", "--machine", "h100"]
    seen: list[str] = []
    monkeypatch.setattr("lcbench.commands.cp.save", lambda *args: seen.append(args[4].basis))
    assert cp_command.main([*words, "--out", str(tmp_path / "a.svg")]) == 0
    assert "mine" in seen[0]


def test_the_machine_of_a_site_is_one_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in PREDICT if not w.startswith("machine=")]
    with pytest.raises(SystemExit):
        main([*words, "cp=ring", "site.device=gb200"])
    assert "conf/machine has no gb200, which site=plain measures on; there are a100, b200" in capsys.readouterr().err
    assert main([*words, "cp=ring", "site.device=gb200", "machine=b200", "kernel=sdpa_flash"]) == 0


def test_json_marks_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PREDICT, "cp=ring,none", "output=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["candidates"]
    assert {row["fate"] for row in rows} == {"may win", "cannot run"}
    assert all({"low_s", "seconds", "high_s", "basis"} <= row["predicted"].keys() for row in rows if row["fate"] == "may win")


@pytest.mark.slow
def test_the_smallest_scale_is_named_with_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PREDICT, "cp=ring,ulysses", "kernel=flash_attn3", "--max-gib", "2", "--break-even", "output=json"]
    assert main([w for w in words if w != "scale=2x4"] + ["scale=1x4,2x4,4x4"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scale"] == "1x4"
    assert "smallest scale that holds 2.00 GiB a GPU with 95 % confidence, by prediction: 1x4" in captured.err
    assert re.search(r"MiB a rank, 95 %: \d+ MiB to 1\.\d+ GiB\)", captured.err)
    assert "lengths from which on a choice is faster, predicted, not measured" in captured.err
    assert main([*PREDICT, "cp=ring", "scale=1x2,1x4", "--max-ms", "0.0001"]) == 1
    assert "no scale that was looked at holds 0.000100 ms" in capsys.readouterr().out.replace("1.00e-04", "0.000100")


def test_the_plan_of_the_first_round_is_shown_by_the_dry_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PLAN, "cp=ring,usp", "budget=2gpuh", "hydra/launcher=dry", f"results={tmp_path}", "sweep=planned"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "nothing was submitted" in printed
    assert not (tmp_path / "planned" / "manifest.json").exists()


@pytest.mark.slow
def test_a_prediction_loads_neither_torch_nor_mlflow() -> None:
    program = (
        "import sys; from lcbench.commands.choose import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'mlflow', 'matplotlib') if m in sys.modules])"
    )
    words = [*PREDICT, "cp=usp", "kernel=flash_attn3"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.gloo
@pytest.mark.slow
def test_a_race_with_real_ranks_answers_and_the_same_command_measures_nothing_again(tmp_path: Path) -> None:
    stored = [f"results={tmp_path}", "tracking_uri=none"]
    command = [sys.executable, "-m", "lcbench.choose", *TINY, *stored]
    environment = {**os.environ, "LCBENCH_SHARE_MACHINE": "1"}

    def answer(*words: str) -> tuple[dict[str, Any], str]:
        done = subprocess.run([*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    found, said = answer("budget=20gpumin", "output=json")
    sweep = Sweep(tmp_path, "tiny")
    attempts = {cell: len(sweep.attempts(cell)) for cell in sweep.entries()}
    (only,) = found["answers"]
    assert only["cell"] in attempts
    assert {c["state"] for c in only["choices"]} <= {"running", "dropped"}
    assert "round 1: 2 choices, estimated" in said
    assert "what decided:" in said
    for choice in only["choices"]:
        assert len(choice["blocks_s"]) == 2 * attempts[choice["cell"]]
    again, said = answer("budget=20gpumin", "output=json")
    assert again["answers"] == found["answers"]
    assert f"{sum(attempts.values())} of their results were measured before, and count" in said
    assert attempts == {cell: len(sweep.attempts(cell)) for cell in sweep.entries()}
