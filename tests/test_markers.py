"""The markers that people choose tests by are true: what tests/conftest.py refuses and says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = 'sys.audit("lcbench.testing.run_ranks", 2)'
AGENT = 'subprocess.run([sys.executable, "-c", "", "lcbench.runs.agent"], check=True)'


def outcome(folder: Path, body: str, marker: str = "", argument: str = "") -> tuple[int, str]:
    """Exit code and words of pytest, of one test with the project's conftest."""
    lines = ["import subprocess, sys", "import pytest", f"@pytest.mark.{marker}" if marker else "", f"def test_it({argument}):"]
    (folder / "test_made.py").write_text("\n".join([*lines, f"    {body}", ""]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("body", [RANKS, AGENT], ids=["run_ranks", "agent"])
def test_one_that_starts_ranks_is_marked_gloo(body: str, tmp_path: Path) -> None:
    assert outcome(tmp_path, body, "gloo")[0] == 0
    code, said = outcome(tmp_path, body)
    assert (code, "mark it gloo" in said) == (1, True), said


def test_one_on_the_cluster_is_marked_slurm(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import pytest\n@pytest.fixture\ndef devcluster(): pass\n")
    code, said = outcome(tmp_path, "pass", argument="devcluster")
    assert (code, "mark it slurm" in said) == (4, True), said
    assert outcome(tmp_path, "pass", "slurm", "devcluster")[0] == 0


def test_one_without_ranks_needs_no_marker(tmp_path: Path) -> None:
    assert outcome(tmp_path, 'subprocess.run([sys.executable, "-c", ""], check=True)')[0] == 0
