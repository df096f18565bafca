"""A scheduler of one's own is one module and one file of conf/hydra/launcher, outside of the checkout too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcbench.commands.launchers import launcher_named
from lcbench.runs.queues import SLURM, Queue, Slurm, queue_of
from lcbench.runs.squeue import Answer
from lcbench.runs.store import Sweep
from tests.commands import lcbench
from tests.databases import database
from tests.slurm.stage import ROOT

LAUNCHER = '''
import json
import os
from dataclasses import replace
from pathlib import Path

from hydra_plugins.lcbench.base import PackLauncher

from lcbench.grid.values import parse_scale
from lcbench.runs.launch import write_down
from lcbench.runs.notes import job_here, write_job
from lcbench.runs.squeue import Answer, Job
from lcbench.runs.queues import Queue

STATES = Path(__file__).parent / "states.json"  # stands for the server
WORDS = {"Q": "PENDING", "R": "RUNNING", "F": "FAILED", "N": "NODE_FAIL", "C": "CANCELLED"}


class PbsQueue(Queue):
    """What qstat would say."""

    name = "PBS"

    def ask(self, names, since, site, ids=()):
        states = json.loads(STATES.read_text())
        return Answer({(name, 0): Job(WORDS[states[name]], "", name) for name in names if name in states}, True)

    def cancel(self, job_ids, site):
        states = json.loads(STATES.read_text())
        STATES.write_text(json.dumps({**states, **dict.fromkeys(job_ids, "C")}))
        return {}


class PbsLauncher(PackLauncher):
    """Prints what qsub would be given."""

    name = "pbs"
    queue = PbsQueue()

    def submit(self, sweep, packs):
        for pack in packs:
            pack = replace(pack, job_name=pack.id)
            write_down(pack)
            scale = parse_scale(pack.scale)
            self.say(f"#PBS -l select={scale.nodes}:ngpus={scale.gpus_per_node},walltime=00:{pack.timeout_min}:00")
            self.say(f"mpiexec python -m own_node {pack.path}")
            STATES.write_text(json.dumps({**json.loads(STATES.read_text()), pack.id: "Q"}))
            write_job(pack.folder, replace(job_here(self.name), job_id=pack.id))
'''
FAULTY = {
    "broken": "x = y",
    "needs": "import nowhere",
    "other": "class Other:\n    pass",
}
PLAN = ["kernel=sdpa_flash", "cp=ring,ulysses", "seqlen=64k", "scale=2x8", "sweep=own"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody keeps a launcher: a module on PYTHONPATH and files for --config-dir."""
    for path, text in (
        ("hydra_plugins/pbs.py", LAUNCHER),
        ("hydra_plugins/states.json", "{}"),
        ("conf/hydra/launcher/pbs.yaml", "_target_: hydra_plugins.pbs.PbsLauncher\n"),
        ("conf/site/pbs.yaml", "name: pbs\nlauncher: pbs\ndevice: h100\nscale: 2x8\ncpus_per_task: 64\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(folder: Path, command: str, *words: str, own: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    where = ["--config-dir", str(folder / "conf")] if own else []
    return lcbench(command, *where, *words, env=env)


@pytest.mark.slow
def test_a_launcher_outside_of_the_checkout_submits_is_asked_collects_and_cancels(folder: Path) -> None:
    results, states = folder / "results", folder / "hydra_plugins" / "states.json"
    done = run(folder, "sweep", *PLAN, "site=pbs", f"results={results}", f"tracking_uri={database(folder)}")
    assert done.returncode == 0, done.stderr
    assert "#PBS -l select=2:ngpus=8,walltime=00:" in done.stdout
    assert "python -m lcbench.status own --follow" in done.stdout.replace(f" --results {results}", "")
    sweep = Sweep(results, "own")
    assert sweep.manifest()["launch"]["launcher"] == "pbs"
    packs = [sweep.pack_file(pack, "pack.json") for pack in sweep.packs()]
    assert [(pack["launcher"], pack["queue"]) for pack in packs] == [("pbs", "hydra_plugins.pbs.PbsQueue")]

    def counts() -> dict[str, int]:
        """Its queue is asked, without its folder: the person who asks has launched the sweep with it."""
        looked = run(folder, "status", "own", "--results", str(results), "--json", own=False)
        found: dict[str, int] = json.loads(looked.stdout)["counts"]
        return found

    def becomes(word: str) -> None:
        states.write_text(json.dumps(dict.fromkeys(json.loads(states.read_text()), word)))

    assert counts() == {"pending": 2}
    again = run(folder, "rerun", "--failed", "own", "--results", str(results))
    assert "#PBS" not in again.stdout + again.stderr  # what waits in its queue is under way
    becomes("N")  # what lost its node is tried again, by the collector, which needs the launcher
    without = run(folder, "collect", "own", "--results", str(results), own=False)
    assert "there is no launcher 'pbs'" in without.stderr
    assert "--config-dir" in without.stderr
    collected = run(folder, "collect", "own", "--results", str(results))
    assert "#PBS" in collected.stderr, collected.stderr
    assert counts() == {"pending": 2}
    assert len(sweep.packs()) == 2
    ended = run(folder, "cancel", "own", "--results", str(results), own=False)
    assert ended.returncode == 0, ended.stderr
    assert set(json.loads(states.read_text()).values()) == {"N", "C"}
    assert counts() == {"failed": 2}
    again = run(folder, "rerun", "--failed", "own", "--results", str(results))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("#PBS") == 1


@pytest.mark.slow
def test_a_queue_that_one_has_not_launched_with_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of somebody else's names a class; nothing of it runs, and its cells are not taken for ended."""
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(str(folder))
    for allowed in ((), ("evil.Other",)):
        with pytest.raises(ValueError, match=r"its queue evil.Queue is not one that you have launched this sweep with"):
            queue_of("evil.Queue", allowed)
    assert "evil" not in sys.modules
    results = folder / "results"
    run(folder, "sweep", *PLAN, "site=pbs", f"results={results}", f"tracking_uri={database(folder)}")
    sweep = Sweep(results, "own")
    next(sweep.folder.glob(".allowed.*")).unlink()
    looked = json.loads(run(folder, "status", "own", "--results", str(results), "--json", own=False).stdout)
    assert [pack["state"] for pack in looked["packs"]] == ["UNKNOWN"]
    assert not looked["ended"]


def test_what_is_no_queue_is_said_with_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_queue.py").write_text("class Other:\n    pass\n")
    (folder / "own_broken.py").write_text("x = 1\nx = y\n")
    monkeypatch.syspath_prepend(str(folder))
    for target, said in (
        ("own_queue.Other", "its queue own_queue.Other is no Queue"),
        ("own_queue.None", "is no Queue"),
        ("own_broken.Queue", f"cannot be imported: {folder}/own_broken.py:2: NameError"),
    ):
        with pytest.raises(ValueError, match=said):
            queue_of(target, [target])
    assert isinstance(queue_of(SLURM, ()), Slurm)
    assert isinstance(queue_of("", ()), Slurm)  # of packs that earlier versions wrote


def test_a_queue_has_to_answer_and_to_cancel() -> None:
    class Silent(Queue):
        name = "silent"

        def ask(self, *_: Any) -> Answer:
            return Answer({}, True)

    with pytest.raises(TypeError, match="cancel"):
        Silent()  # type: ignore[abstract]


def test_a_launcher_that_is_not_there_is_one_line_with_those_that_are(folder: Path) -> None:
    for asked in ("hydra/launcher=pds", "site.launcher=pds"):
        done = run(folder, "sweep", *PLAN, "site=pbs", asked)
        assert done.returncode == 2
        assert "pbs" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    with pytest.raises(ValueError, match=r"no launcher 'basic': there are dry, local, simulate, slurm, and"):
        launcher_named("basic")  # Hydra's own


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", "{folder}/hydra_plugins/broken.py:1: NameError: name 'y' is not defined"),
        ("needs", "{folder}/hydra_plugins/needs.py:1: ModuleNotFoundError: No module named 'nowhere'"),
        ("other", "hydra_plugins.other.Other is no launcher: it has no name"),
    ],
)
def test_a_launcher_that_is_none_is_one_line_with_its_file(name: str, said: str, folder: Path) -> None:
    (folder / "hydra_plugins" / f"{name}.py").write_text(f"{FAULTY[name]}\n")
    (folder / "conf" / "hydra" / "launcher" / f"{name}.yaml").write_text(f"_target_: hydra_plugins.{name}.Other\n")
    done = run(folder, "sweep", *PLAN, "site=pbs", f"hydra/launcher={name}", f"results={folder}/results")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said.format(folder=folder) in errors[0]
    assert "Traceback" not in done.stderr
    assert not (folder / "results").exists()


def test_nothing_outside_of_the_launchers_names_one() -> None:
    """A scheduler is a file more: no other code asks whether it is Slurm or this machine."""
    for path in (ROOT / "lcbench").rglob("*.py"):
        if path.parent.name in ("selectors", "inputs"):
            continue  # where local is a part of a mask
        words = path.read_text()
        assert not [name for name in ('"slurm"', '"local"') if name in words], path
