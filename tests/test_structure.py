"""The rooms: who may import whom, and what launchers know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may use besides itself; commands (lcbench/*.py) and testing may use all.
ALLOWED = {
    "masks": {"problem"},
    "kernels": {"masks", "problem"},
    "schedule": {"masks", "kernels", "problem"},
    "cp": {"schedule", "masks", "kernels", "problem"},
    "measure": {"masks", "kernels", "schedule", "cp", "problem"},
    "workloads": {"measure", "cp", "schedule", "masks", "kernels", "problem"},
    "grid": {"workloads", "masks", "kernels", "schedule", "cp", "problem", "redact"},
    "runs": {"workloads", "grid", "masks", "kernels", "schedule", "cp", "measure", "problem", "redact"},
    "report": {"runs", "grid", "measure", "problem", "redact"},
}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_the_architecture_allows(room: str) -> None:
    for path in (ROOT / "lcbench" / room).rglob("*.py"):
        if path.name == "__main__.py":
            continue  # a command
        for used in re.findall(r"^\s*(?:from|import) lcbench\.(\w+)", path.read_text(), re.M):
            assert used in ALLOWED[room] | {room}, f"{path.name} imports lcbench.{used}"
        assert "hydra_plugins" not in path.read_text(), f"{path.name} imports launchers"


def test_only_execute_and_the_measuring_side_talk_to_other_ranks() -> None:
    for room in ("masks", "kernels", "schedule", "cp", "grid"):
        for path in (ROOT / "lcbench" / room).rglob("*.py"):
            if path.name != "execute.py" and path.parent.name != "peers":
                assert not re.search(r"^\s*(?:from|import) torch\.distributed", path.read_text(), re.M), path


def test_launchers_know_nothing_of_attention() -> None:
    for path in (ROOT / "launchers").rglob("*.py"):
        found = re.findall(r"attention|seqlen|\bmask|kernel|ulysses|causal", path.read_text(), re.I)
        assert not found, f"{path.name}: {found}"


def test_no_package_init_in_the_plugin_namespace() -> None:
    assert not (ROOT / "launchers" / "hydra_plugins" / "__init__.py").exists()
    assert (ROOT / "launchers" / "hydra_plugins" / "lcbench" / "__init__.py").exists()
