"""Predicted cells: the same command and cells, records that are marked, and nothing that was measured touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcbench.commands import rerun as rerun_command
from lcbench.commands.launchers import launcher_named
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look, read_flags
from lcbench.grid.devices import known_devices
from lcbench.grid.paths import CONF
from lcbench.predict.fitted import Fit
from lcbench.predict.predictor import CannotPredict, Predictor
from lcbench.report.ending import bad_input
from lcbench.report.frame import good_rows, reported
from lcbench.runs.attempt import FORETOLD, Attempt, Failure
from lcbench.runs.launch import todo_of
from lcbench.runs.passes import passes_on
from lcbench.runs.predictions import Source
from lcbench.runs.store import Sweep
from tests.commands import lcbench
from tests.databases import database

GRID = ["cp=ring,ulysses", "kernel=flash_attn3", "mask=causal,full", "seqlen=96k", "scale=3x8", "heads=48x24x64"]
SIMULATE = ["hydra/launcher=simulate", "machine=h200", *GRID]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in a folder of its own."""
    return lcbench("sweep", f"results={folder}/results", "sweep=foretold", f"tracking_uri={database(folder)}", *words)


def here(folder: Path, *words: str) -> int:
    """The same in this process, without a tracking server; its exit code."""
    with bad_input():
        flags = read_flags([f"results={folder}/results", "sweep=foretold", *words])
        plan = look(flags.overrides)
        return launcher_named(plan.launcher).launch_plan(plan)


Predicted = tuple[Sweep, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Predicted:
    folder = tmp_path_factory.mktemp("simulate")
    return Sweep(folder / "results", "foretold"), sweep(folder, *SIMULATE)


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcbench.runs.tracking.publish.publish_or_say", lambda *_, **__: None)


@pytest.mark.slow
def test_the_same_cells_are_predicted_and_marked(predicted: Predicted) -> None:
    found, ran = predicted
    assert ran.returncode == 0, ran.stderr
    records = found.look().records
    assert list(records) == [p.cell.id for p in look(GRID).cells], "the ids of the cells that a measuring launcher would run"
    for record in records.values():
        known = record.known
        assert record.status == "predicted"
        assert known is not None
        assert known.number == 0
        assert not record.attempts
        assert known.prediction["machine"] == "h200"
        assert known.band is not None
        low, high = known.prediction["peak_interval"]
        assert 0 < low < known.metrics["memory/peak_bytes"] < high
        assert known.metrics["time/total/median_s"] > 0
        assert not known.samples


def test_the_command_says_predicted_beside_every_number_and_how_far_off_it_may_be(predicted: Predicted) -> None:
    rows = [line for line in predicted[1].stdout.splitlines() if "causal" in line and "%" in line]
    assert len(rows) == 2
    assert all(line.startswith("predicted") and "within 2.00x" in line for line in rows)
    assert "no fit" in predicted[1].stdout


def test_predictions_win_nothing_unless_they_are_asked_for(predicted: Predicted) -> None:
    found = predicted[0]
    assert good_rows(reported(found)).empty
    asked = good_rows(reported(found, predicted=True))
    assert len(asked) == 4
    assert all(choice.endswith(" (predicted)") for choice in asked["choice"])


@pytest.mark.slow
@pytest.mark.usefixtures("unpublished")
def test_the_same_command_predicts_nothing_again_and_another_fit_everything(
    predicted: Predicted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicted[0]
    folder = found.root.parent
    before = {cell: found.written_ns(cell, FORETOLD) for cell in found.entries()}
    assert here(folder, *SIMULATE) == 0
    assert "4 predicted before, 0 to predict" in capsys.readouterr().out
    assert {cell: found.written_ns(cell, FORETOLD) for cell in found.entries()} == before
    fit = tmp_path / "h200.json"
    Fit(machine="h200", sources=("a test",)).write(fit)
    assert here(folder, *SIMULATE, "--fit", str(fit)) == 0
    assert "0 predicted before, 4 to predict on h200, fitted by" in capsys.readouterr().out
    assert all(found.written_ns(cell, FORETOLD) > at for cell, at in before.items())
    assert {r.prediction.prediction["fit"] for r in found.look().records.values() if r.prediction} == {"h200.json"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["machine=h300"], "machine=h300 is not one of a100, b200"),
        (["--fit", "/no/such.json"], "fit /no/such.json cannot be read: No such file"),
        (["fit=README.md"], "README.md is no fit"),
        (["fit=a.json", "--fit", "b.json"], "several fits"),
        (["machine.launch_s=1"], "its file in conf/machine says"),
        (["hydra/launcher=local", "machine=h200"], "hydra/launcher=local makes none"),
        (["hydra/launcher=dry", "fit=a.json"], "hydra/launcher=dry makes none"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {word.partition("=")[0] for word in words}
    rest = [word for word in SIMULATE if word.partition("=")[0] not in typed]
    with pytest.raises(SystemExit) as ended:
        here(tmp_path, *[w for w in rest if "hydra/launcher" not in typed or not w.startswith("machine=")], *words)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_fit_of_another_machine_is_refused(tmp_path: Path) -> None:
    fit = tmp_path / "mine.json"
    Fit(machine="a100").write(fit)
    with pytest.raises(ValueError, match=r"is a fit of machine=a100, not of machine=b200"):
        Source.of("b200", str(fit), {})


@pytest.mark.parametrize(("device", "machine"), [("h100", "h100"), ("cpu", "this"), (None, "this")])
def test_the_machine_is_that_of_the_site_unless_it_is_named(device: str | None, machine: str) -> None:
    assert Source.of(None, None, {"device": device}).machine == machine


def test_a_site_of_a_machine_that_nobody_wrote_down_is_refused_and_gpus_that_are_here_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"^conf/machine has no gb200, which site=far measures on; there are a100, b200"):
        Source.of(None, None, {"name": "far", "device": "gb200"})
    monkeypatch.setattr("lcbench.predict.machines.gpus_here", lambda: [{"name": "NVIDIA H200"}])
    assert Source.of(None, None, {"device": None}).machine == "h200"
    assert Source.of(None, None, {"device": "cpu"}).machine == "this"


@pytest.mark.usefixtures("unpublished")
def test_what_a_machine_cannot_run_is_not_predicted(tmp_path: Path) -> None:
    here(tmp_path, "hydra/launcher=simulate", "machine=a100", "cp=ring", "kernel=flash_attn3,flash_attn2", "scale=1x8")
    records = Sweep(tmp_path / "results", "foretold").look().records.values()
    told = {r.entry.cell.config["kernel"]["name"]: r.prediction for r in records}
    assert told["flash_attn2"] is not None
    assert told["flash_attn2"].status == "predicted"
    refused = told["flash_attn3"]
    assert refused is not None
    assert refused.status == "skipped"
    assert refused.failure is not None
    assert refused.failure.cause.startswith("kernel flash_attn3: ")


def test_a_measured_result_stays_beside_a_prediction_and_counts(predicted: Predicted, made: Callable[..., Any]) -> None:
    found = predicted[0]
    cell = next(iter(found.entries()))
    found.finish(made(found, cell, "ok"))
    record = found.look().records[cell]
    assert record.status == "ok"
    assert record.prediction is not None
    frame = reported(found).set_index("cell")
    assert frame.loc[cell, "status"] == "ok"
    assert frame.loc[cell, "good"]


@pytest.fixture
def made() -> Callable[..., Attempt]:
    def attempt(found: Sweep, cell: str, status: Any) -> Attempt:
        entry = found.entries()[cell].cell
        metrics = {"time/total/median_s": 0.5, "time/forward/median_s": 0.5, "compute/tflops_per_gpu": 3.0}
        failure = None if status == "ok" else Failure("oom", "too big")
        number = found.begin(cell, "p").number
        return Attempt(
            cell, found.name, number, status, failure, metrics, {"forward_s": [0.5], "total_s": [0.5]}, config=entry.config
        )

    return attempt


@pytest.mark.slow
@pytest.mark.usefixtures("unpublished")
def test_a_kill_loses_nothing_that_was_predicted_and_the_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["hydra/launcher=simulate", "machine=h200", "cp=ring", "seqlen=1m", "scale=8x8", "kernel=sdpa_flash", "seed=range(0,40)"]
    found = Sweep(tmp_path / "results", "foretold")
    command = [sys.executable, "-m", "lcbench.sweep", f"results={found.root}", "sweep=foretold", "-m", *many]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        while not list(found.folder.glob("*/prediction.json")):
            assert running.poll() is None
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
    kept = list(found.folder.glob("*/prediction.json"))
    assert 0 < len(kept) < 40, "it was killed in the middle"
    for path in kept:
        assert json.loads(path.read_text())["status"] == "predicted"
    assert here(tmp_path, *many) == 0
    assert f"{len(kept)} predicted before" in capsys.readouterr().out
    assert len(list(found.folder.glob("*/prediction.json"))) == 40


def test_ctrl_c_keeps_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict, made = Source.predict, list[str]()

    def interrupted(source: Source, cell: Cell, name: str) -> Attempt:
        if made:
            raise KeyboardInterrupt
        made.append(cell.id)
        return predict(source, cell, name)

    monkeypatch.setattr(Source, "predict", interrupted)
    assert here(tmp_path, *SIMULATE, "output=quiet") == 130
    assert "what was predicted is kept" in capsys.readouterr().err
    assert [i for i, record in Sweep(tmp_path / "results", "foretold").look().records.items() if record.prediction] == made


@pytest.mark.slow
def test_predicting_loads_neither_torch_nor_a_kernel_s_library(tmp_path: Path) -> None:
    code = (
        "import sys; from lcbench.grid.command_line import look; from lcbench.runs.predictions import Source;"
        f"plan = look({SIMULATE!r}); source = Source.of('h200', None, plan.site);"
        "assert source.predict(plan.cells[0].cell, 's').status == 'predicted';"
        "print([m for m in ('torch', 'mlflow', 'submitit', 'flash_attn_interface') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.usefixtures("unpublished")
def test_what_cannot_be_predicted_says_why_and_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise CannotPredict("nothing is known of it")

    monkeypatch.setattr(Predictor, "predict", refuse)
    assert here(tmp_path, *SIMULATE) == 0
    assert "unsupported: cannot be predicted: nothing is known of it" in capsys.readouterr().out
    found = Sweep(tmp_path / "results", "foretold")
    assert {record.status for record in found.look().records.values()} == {"skipped"}
    measuring = look([*GRID, f"results={tmp_path}/results", "sweep=foretold"])
    assert len(todo_of(measuring, found).cells) == 4


def test_a_later_sweep_of_the_same_name_measures_what_was_predicted(predicted: Predicted) -> None:
    found = predicted[0]
    plan = look([*GRID, f"results={found.root}", f"sweep={found.name}"])
    measured = {i for i, record in found.look().records.items() if record.attempts}
    assert {cell.id for cell in todo_of(plan, found).cells} == set(found.entries()) - measured


def test_a_rerun_measures_nothing_that_was_only_predicted(predicted: Predicted, capsys: pytest.CaptureFixture[str]) -> None:
    found = predicted[0]
    assert rerun_command.main(["--failed", found.name, "--results", str(found.root)]) == 0
    assert "no failed cells" in capsys.readouterr().out
    only = next(i for i, record in found.look().records.items() if not record.attempts)
    assert rerun_command.main([f"{found.name}/{only}", "--results", str(found.root)]) == 2
    assert "--launcher <name> measures" in capsys.readouterr().err


def test_a_fit_that_lcbench_ships_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    (conf / "machine").mkdir(parents=True)
    (conf / "machine" / "h200.yaml").write_bytes((CONF / "machine" / "h200.yaml").read_bytes())
    Fit(machine="h200").write(conf / "machine" / "h200.fit.json")
    for module in ("predict.machines", "runs.predictions"):
        monkeypatch.setattr(f"lcbench.{module}.CONF", conf)
    assert Source.of("h200", None, {}).fit == conf / "machine" / "h200.fit.json"
    monkeypatch.setattr("lcbench.runs.passes._made", {})
    assert passes_on(next(d for d in known_devices() if d["name"] == "h200")).predictor.fitted == Fit(machine="h200")
