"""How tests get their ranks."""

from __future__ import annotations

import lcbench.cp.ring  # noqa: F401  # for the first test
from lcbench.testing.masks import load
from lcbench.testing.spawn import PRELOAD, preload


def test_ranks_come_from_a_process_that_has_imported_what_tests_have() -> None:
    """Each rank would import them for itself otherwise, which takes longer than most of what ranks are for."""
    assert {*PRELOAD, "lcbench.cp.ring", "pytest"} <= set(preload())
    assert "tests.schedule.test_ranks" not in preload()  # what a test leaves in its own module is no other's


def test_what_a_test_changes_of_a_yaml_is_not_there_for_the_next() -> None:
    first = load("cp", "ring")
    first["name"] = "mine"
    assert load("cp", "ring")["name"] == "ring"
