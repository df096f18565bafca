"""Optional libraries do not move torch: what pip would install for each extra, in an environment that has the pinned one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lcbench.grid.paths import REPOSITORY

EXTRAS: dict[str, list[str]] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PINS = dict(line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().split())
COMPILED = {"flash-attn", "te"}  # they are built on the machine, against the torch that is there
WHEELS = sorted(set(EXTRAS) - COMPILED - {"gpu", "dev"})
OUT_OF_REACH = re.compile(r"Max retries|NewConnectionError|Temporary failure|ReadTimeout|ProxyError")
PLATFORMS = [word for glibc in (17, 27, 28, 34) for word in ("--platform", f"manylinux_2_{glibc}_x86_64")]
PLATFORMS += ["--platform", "manylinux2014_x86_64"]
STEADY = ("torch", "triton")


def would_install(requirements: list[str], *options: str) -> list[dict[str, Any]]:
    """What pip would install for requirements, from wheels: the metadata of each, with name, version and what it requires."""
    if find_spec("pip") is None:
        pytest.skip("there is no pip in this environment")
    command = [
        "install",
        "--dry-run",
        "--quiet",
        "--report",
        "-",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        *options,
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *command, *requirements], capture_output=True, text=True)
    if done.returncode and OUT_OF_REACH.search(done.stderr):
        pytest.skip(f"the registry is out of reach: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return [item["metadata"] for item in json.loads(done.stdout)["install"]]


def would_move(requirements: list[str]) -> list[str]:
    """What of these, as a Python 3.12 of Linux gets it, asks for another torch or triton than the pinned ones."""
    there = ("--no-deps", "--ignore-installed", "--python-version", "3.12", *PLATFORMS, "--target", "nowhere")
    found, asked = would_install(requirements, *there), []
    assert len(found) == len(requirements)
    for metadata in found:
        for requirement in map(Requirement, metadata.get("requires_dist", ())):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": "", "python_version": "3.12"})
            if requirement.name in STEADY and applies and not requirement.specifier.contains(PINS[requirement.name]):
                asked.append(f"{metadata['name']} {metadata['version']} requires {requirement}")
    return asked


@pytest.mark.slow
def test_no_extra_asks_for_another_torch() -> None:
    """Those of all extras in one call of pip, each without what it requires in turn; what asks for another torch is named."""
    assert would_move(sorted({requirement for extra in WHEELS for requirement in EXTRAS[extra]})) == []


@pytest.mark.slow
def test_what_would_move_torch_is_seen() -> None:
    (found,) = would_move(["fastvideo-kernel==0.3.5"])
    assert "torch==2.12.0" in found


@pytest.mark.slow
def test_all_extras_together_leave_torch_alone() -> None:
    """With all that they require in turn. fastvideo-kernel has no wheel for every Python."""
    wanted = [requirement for extra in WHEELS if extra != "vsa" for requirement in EXTRAS[extra]]
    found = {metadata["name"].lower(): metadata["version"].split("+")[0] for metadata in would_install(wanted)}
    assert len(found) > 5
    assert not {name: version for name, version in found.items() if name in STEADY and version != PINS[name]}


def test_the_pins_are_those_of_the_makefile_and_fit_what_is_asked_for() -> None:
    asked = [Requirement(text) for text in EXTRAS["dev"]]
    asked += [Requirement(t) for t in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]]
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in PINS.items()}
    wrong = [str(r) for r in asked if r.name.lower() not in pins or not r.specifier.contains(pins[r.name.lower()])]
    assert not wrong
    assert {"torch", "triton"} <= pins.keys()
