"""What docs say to type works as they say it, links lead somewhere, and the worked examples work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from lcbench.commands.fit import asked
from lcbench.grid.command_line import loader_of, read_flags
from lcbench.grid.expand import expand
from lcbench.predict.fitted import Fit
from lcbench.predict.machines import known
from lcbench.runs.attempt import Failure
from lcbench.runs.store import Sweep
from tests.commands import lcbench
from tests.docs.commands import COMMANDS, blocks, told
from tests.docs.shown import launch, make_files
from tests.report.made import foretell, made_sweep
from tests.slurm.stage import ROOT

WRITTEN = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
EXTENDING = "extending.md"  # its commands run where its files are
BRIEFLY = ["measure.blocks=1", "measure.max_iterations=5", "measure.budget_s=0.5", "tracking_uri=none"]
ALL = sorted({command: where for where, command in told() if where != EXTENDING}.items())
GRID = ["cp=ring,ulysses", "mask=full,causal", "seqlen=64k,128k", "scale=1x8"]
NAMES = ["first", "mine", "other", "before", "after", "flash2", "flash3", "try", "demo", "choose", "scaling"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with results of every name that docs use, one of them with a failed cell."""
    folder = tmp_path_factory.mktemp("desk")
    for number, name in enumerate(NAMES):
        kernel = {"flash2": "flash_attn2", "flash3": "flash_attn3"}.get(name, "sdpa_flash")
        failed = {"ulysses": Failure("hang", "it hung", 1)} if name == "first" else None
        made = made_sweep(folder / "results", name, [*GRID, f"kernel={kernel}"], seed=number, failed=failed, launch=launch(GRID))
        foretell(made, made)
    shutil.copytree(folder / "results", folder / "colleague" / "results")
    make_files(folder)
    for machine in known():
        Fit(machine=machine).write(folder / f"{machine}.fit.json")
    return folder


def test_there_is_something_to_test() -> None:
    assert len(ALL) > 80
    assert {command.split()[2].removeprefix("lcbench.") for command, _ in ALL if "python -m" in command} >= {*COMMANDS, "sweep"}


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command, _ in ALL], ids=[f"{where}: {command}" for command, where in ALL])
def test_a_command_of_the_docs_runs(
    command: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    monkeypatch.delenv("LCBENCH_SITE", raising=False)
    cell = next(iter(Sweep(desk / "results", "first").entries()))
    command = re.sub(r"(first/)?(<cell id>|<cell>|1a2b3c4d5e6f)", f"first/{cell}", command).replace("mask=<name>", "mask=causal")
    words = shlex.split(command)
    if words[0] == "make":
        target = next(w for w in words[1:] if "=" not in w)
        done = subprocess.run(["make", "-n", "-C", str(ROOT), target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "eval":
        words = ["python", "-m", "lcbench.sweep", "-sc", "install=bash"]
    name, arguments = words[2].removeprefix("lcbench."), words[3:]
    if name.startswith("testing.gpu_"):  # which need a GPU, and say so
        assert import_module(f"lcbench.{name}").main(arguments) == 2 or torch.cuda.is_available()
        return
    if name == "fit":  # which searches for minutes; tests/predict does it
        asked(arguments)
        return
    if "lengths=mine" in arguments:  # which the command above it wrote into the checkout's conf/
        arguments += ["--config-dir", str(desk / "conf")]
    if name == "sweep":
        _sweep(arguments)
        return
    arguments = [a.replace("http://", f"sqlite:///{desk}/").replace("../colleague", "colleague") for a in arguments]
    if name == "lengths":
        arguments += ["--conf", str(desk / "conf"), "--force"]
    if name == "choose" and "--predict-only" not in arguments:  # the plan of a race; what runs is the machine's matter
        arguments += ["hydra/launcher=dry"]
    if name == "rerun" and not any("--" in a for a in arguments):
        arguments += ["--launcher", "dry"]
    try:
        code = import_module(f"lcbench.commands.{name}").main(arguments)
    except SystemExit as ended:
        code = ended.code
    shown = capsys.readouterr()
    # One says that a sweep has failed cells, another that a cell became slower: both are what they are asked.
    allowed = {0, 1} if name in ("status", "collect") or "--fail-on-regression" in arguments else {0}
    assert (code or 0) in allowed, shown.out + shown.err


def _sweep(arguments: list[str]) -> None:
    """Plan it: what runs is the machine's matter."""
    if any(a in arguments for a in ("--cfg", "-sc", "--help")):
        done = lcbench("sweep", *arguments)
        assert done.returncode == 0, done.stderr
        return
    flags = read_flags(arguments)
    plan = expand(flags.overrides, loader_of(flags.config_dir))
    assert any(p.skip is None for p in plan.cells)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        import_module(f"lcbench.commands.{name}").main(["--help"])
    assert not ended.value.code
    assert f"examples:\n  python -m lcbench.{name}" in capsys.readouterr().out


def test_every_command_is_known_to_these_tests() -> None:
    modules = {p.stem for p in (ROOT / "lcbench").glob("*.py")} | {p.parent.name for p in (ROOT / "lcbench").glob("*/__main__.py")}
    assert modules - {"__init__", "__main__", "problem", "arguments", "redact", "sweep"} == set(COMMANDS)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.slow
def test_completion_knows_axes_and_values() -> None:
    script = """
        eval "$(python -m lcbench.sweep -sc install=bash)"
        complete -p python
        COMP_LINE="python -m lcbench.sweep cp=uly"; COMP_WORDS=(python -m lcbench.sweep cp=uly); COMP_CWORD=3
        _lcbench_sweep; echo "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert "_lcbench_sweep python" in done.stdout, done.stderr
    assert done.stdout.split()[-1] == "cp=ulysses"


@pytest.mark.gloo
@pytest.mark.slow
def test_the_worked_examples_work(tmp_path: Path) -> None:
    """Every file of docs/extending.md is put into a copy of the checkout, and every command is run there, for real."""
    for part in ("lcbench", "conf", "launchers"):
        shutil.copytree(ROOT / part, tmp_path / part)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'launchers'}"}
    waiting: list[str] = []
    for name, text in blocks(ROOT / "docs" / EXTENDING):
        if name == "bash":
            waiting += text.splitlines()
        else:
            assert not (tmp_path / name).exists(), f"{name} is there already"
            (tmp_path / name).write_text(text)
    assert len(waiting) == 9
    for command in waiting:
        words = shlex.split(command)
        words += BRIEFLY if "lcbench.sweep" in words else []
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    results = Sweep(tmp_path / "results", "direct")
    assert [results.attempts(c)[-1].status for c in results.entries()] == ["ok"] * 4
