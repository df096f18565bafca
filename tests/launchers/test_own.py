"""A scheduler of one's own is one module and one file of conf/hydra/launcher, outside of the checkout too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.commands.launchers import launcher_named
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT

LAUNCHER = '''
from hydra_plugins.lcbench.base import PackLauncher

from lcbench.grid.values import parse_scale
from lcbench.runs.launch import write_down


class PbsLauncher(PackLauncher):
    """Prints what qsub would be given."""

    name = "pbs"
    detaches = True

    def submit(self, sweep, packs):
        for pack in packs:
            write_down(pack)
            scale = parse_scale(pack.scale)
            self.say(f"#PBS -l select={scale.nodes}:ngpus={scale.gpus_per_node},walltime=00:{pack.timeout_min}:00")
            self.say(f"mpiexec python -m lcbench.runs.agent {pack.path}")
'''
PLAN = ["kernel=sdpa_flash", "cp=ring,ulysses", "seqlen=64k", "scale=2x8", "site=plain", "sweep=own"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where somebody keeps a launcher: a module on PYTHONPATH and a file for --config-dir."""
    for path, text in (
        ("hydra_plugins/pbs.py", LAUNCHER),
        ("conf/hydra/launcher/pbs.yaml", "_target_: hydra_plugins.pbs.PbsLauncher\n"),
    ):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    arguments = [sys.executable, "-m", f"lcbench.{command}", "--config-dir", str(folder / "conf"), *words]
    return subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_launcher_outside_of_the_checkout_submits_and_runs_again(folder: Path) -> None:
    results = folder / "results"
    done = run(folder, "sweep", *PLAN, "hydra/launcher=pbs", f"results={results}", f"tracking_uri=sqlite:///{folder}/mlflow.db")
    assert done.returncode == 0, done.stderr
    assert "#PBS -l select=2:ngpus=8,walltime=00:" in done.stdout
    assert "python -m lcbench.status own --follow" in done.stdout.replace(f" --results {results}", "")
    sweep = Sweep(results, "own")
    assert sweep.manifest()["launch"]["launcher"] == "pbs"
    assert [sweep.pack_file(pack, "pack.json")["launcher"] for pack in sweep.packs()] == ["pbs"]

    again = run(folder, "rerun", "--failed", "own", "--results", str(results))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("#PBS") == 1
    assert len(sweep.packs()) == 2


def test_a_launcher_that_is_not_there_is_one_line_with_those_that_are(folder: Path) -> None:
    done = run(folder, "sweep", *PLAN, "hydra/launcher=pds")
    assert done.returncode == 2
    assert "pbs" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(ValueError, match=r"no launcher 'basic'; write --launcher dry, local, slurm$"):
        launcher_named("basic")  # Hydra's own
