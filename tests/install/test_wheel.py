"""An installed wheel works from any folder: its command, its conf/, its launchers, and a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from lcbench.__main__ import BAD_INPUT, commands, usage
from lcbench.grid.paths import CONF, REPOSITORY
from lcbench.report.page import HERE

Command = Callable[..., "subprocess.CompletedProcess[str]"]
TINY = ["cp=ring", "scale=1x2", "seqlen=256", "heads=2x2x8", "dtype=float64"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=REPOSITORY, check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def lcbench(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The ``lcbench`` of an environment into which only the wheel was installed; other packages are those that are here."""
    if find_spec("pip") is None:
        pytest.skip("there is no pip in this environment")
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # As names of folders: the links that an editable lcbench left in one of them are not followed.
    here = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "those-of-the-tests.pth").write_text("\n".join(here) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(folder / "bin" / "lcbench"), *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )

    return call


def test_the_wheel_has_every_config_and_the_marker_of_its_types(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    assert {f"lcbench/conf/{path.relative_to(CONF)}" for path in CONF.rglob("*.yaml")} <= names
    assert {"lcbench/py.typed", "hydra_plugins/lcbench/py.typed", "hydra_plugins/lcbench/slurm.py"} <= names
    page = {f"lcbench/report/{path.relative_to(HERE)}" for part in ("assets", "vendor") for path in (HERE / part).iterdir()}
    assert len(page) > 10
    assert page <= names
    assert not [name for name in names if name.startswith(("conf/", "tests/", "launchers/", "results/"))]


@pytest.mark.slow
def test_an_installed_lcbench_plans_and_looks_at_kernels(lcbench: Command, tmp_path: Path) -> None:
    planned = lcbench("sweep", "-m", *TINY, "cp=ring,ulysses", "hydra/launcher=dry", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "2 cells" in planned.stdout
    kernels = lcbench("kernels", "kernel=naive", "mask=causal", cwd=tmp_path)
    assert kernels.returncode == 0, kernels.stderr
    assert "naive" in kernels.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.gloo
@pytest.mark.slow
def test_an_installed_lcbench_measures_and_writes_where_it_was_typed(lcbench: Command, tmp_path: Path) -> None:
    limits = ["measure.blocks=1", "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1"]
    done = lcbench("sweep", *TINY, *limits, "sweep=first", "output=json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [cell["status"] for cell in json.loads(done.stdout)["cells"]] == ["ok"]
    assert {path.name for path in tmp_path.iterdir()} == {"results", ".mlflow"}
    assert " INFO " not in done.stderr  # of a database that MLflow makes
    # The charts are served by a command that there is: a Makefile belongs to a checkout.
    (dashboard,) = [line for line in done.stderr.splitlines() if line.startswith("dashboard:")]
    assert f"mlflow server --backend-store-uri sqlite:///{tmp_path}/.mlflow/mlflow.db" in dashboard
    assert "make " not in done.stderr
    provenance = json.loads(next(tmp_path.glob("results/first/*/attempt-1.json")).read_text())["provenance"]
    assert provenance["git"]["commit"] is None
    status = lcbench("status", "first", cwd=tmp_path)
    assert status.returncode == 0, status.stderr


def test_the_command_lists_what_python_m_runs() -> None:
    assert {"sweep", "status", "report", "kernels", "masks", "cp"} <= commands().keys()
    assert not commands().keys() & {"problem", "redact", "arguments", "runs", "measure", "__main__"}
    assert all(len(line.split()) > 3 for line in usage().splitlines() if line.startswith("  "))


def test_a_name_that_is_no_command_is_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "lcbench", "swep"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (BAD_INPUT, "", 1)
    assert "'swep'" in done.stderr
    assert "'sweep'" in done.stderr


@pytest.mark.slow
def test_arguments_and_exit_codes_are_those_of_the_command() -> None:
    asked = {"--version": 0, "status nothing --results nowhere": BAD_INPUT, "sweep cp=rign": BAD_INPUT}
    for line, code in asked.items():
        words = line.split()
        done = subprocess.run([sys.executable, "-m", "lcbench", *words], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert words != ["--version"] or version("lcbench") in done.stdout
