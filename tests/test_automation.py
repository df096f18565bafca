"""What runs the project's targets, on a desk and in public CI: every name in it is of something that there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.M))
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M))
SETS_UP = {"apt-get", "git"}  # what a step may call besides make: a bare container has neither make nor Python


def parsed(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def recipe(target: str) -> list[str]:
    """The lines of a target."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert found, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def steps() -> list[str]:
    """Every command of the workflow, once for each value of its matrix."""
    found = []
    for job in parsed(".github/workflows/ci.yml")["jobs"].values():
        values = job.get("strategy", {}).get("matrix", {"": [""]})
        for step in job["steps"]:
            for name, each in values.items():
                found += [str(step["run"]).replace(f"${{{{ matrix.{name} }}}}", value) for value in each if "run" in step]
    return found


def test_the_workflow_runs_targets_that_there_are_and_nothing_else() -> None:
    called = set()
    for line in steps():
        assert "${{" not in line
        for command in line.split(" && "):
            word, *rest = command.split()
            assert word == "make" or word in SETS_UP, line
            called |= {name for name in rest if "=" not in name} if word == "make" else set()
            assert {name.partition("=")[0] for name in rest if word == "make" and "=" in name} <= VARIABLES, line
    assert {"lint", "test", "coverage", "wheel", "site"} <= called
    assert called <= TARGETS, called - TARGETS


def test_a_desk_runs_the_same_targets() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / ".ci" / "run").read_text()))
    assert {"lint", "test"} <= named <= TARGETS
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_before_a_commit_are_the_lines_of_make_lint() -> None:
    (local,) = parsed(".pre-commit-config.yaml")["repos"]
    hooks = {tuple(word for word in hook["entry"].split() if not word.startswith("--")) for hook in local["hooks"]}
    lines = {tuple(word for word in line.split() if word != "." and not word.startswith("--")) for line in recipe("lint")}
    assert hooks == lines
    pinned = (ROOT / "requirements.lock").read_text()
    for hook in local["hooks"]:
        tool = Path(hook["entry"].split()[0]).name
        assert re.search(rf"^{tool}==", pinned, re.M), tool
        assert hook["language"] == "system"  # the pinned one, and no other that pre-commit would fetch


def test_the_hooks_of_ruff_run_as_they_are_written() -> None:
    for hook in parsed(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        tool, *words = hook["entry"].split()
        if Path(tool).name == "ruff":
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *words, "--no-cache", __file__],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr


def test_modules_and_scripts_that_the_makefile_runs_are_there() -> None:
    run = set(re.findall(r"-m ((?:lcbench|tests)[\w.]*)", MAKEFILE))
    scripts = set(re.findall(r"^\t@?((?:slurm|tests)/[\w./-]+)", MAKEFILE, re.M))
    assert len(run) > 5
    assert len(scripts) > 2
    assert not [module for module in run if find_spec(module) is None]
    assert not [script for script in scripts if not os.access(ROOT / script, os.X_OK)]


def test_help_lists_every_target_and_each_is_one_that_no_file_shadows() -> None:
    listed = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M))
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony is not None
    assert listed == set(phony[1].split()) == TARGETS
