"""The libraries that the page holds are those that were published, and say so."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lcbench.report.page import HERE, LIBRARIES, REPORT, SCRIPTS

ROWS = [
    [word.strip() for word in line.strip("|\n ").split("|")]
    for line in (HERE / "vendor" / "README.md").read_text().splitlines()
    if line.startswith("| ") and ".js |" in line
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_library_is_as_it_was_published_and_has_its_licence(row: list[str]) -> None:
    name, _, version, digest, licence = row
    content = (HERE / "vendor" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert version.encode() in content[:2000] or name.startswith("plot")  # Plot's file does not say its version at its head
    assert "Permission to use" in (HERE / "vendor" / licence.split(", ")[1]).read_text()


def test_every_library_that_the_page_holds_is_listed() -> None:
    assert {row[0] for row in ROWS} == set(LIBRARIES) == {p.name for p in (HERE / "vendor").glob("*.js")}


def test_no_script_can_end_its_element_and_each_is_of_some_page() -> None:
    ours = sorted((HERE / "assets").glob("*.js"))
    for path in [*ours, *(HERE / "vendor" / name for name in LIBRARIES)]:
        assert "</script" not in path.read_text().lower(), path
        assert "<!--" not in path.read_text(), path
    assert {path.name for path in ours} == {*SCRIPTS, *REPORT, "comparison.js"}


def test_our_scripts_are_lines_that_people_read() -> None:
    for path in [*(HERE / "assets").glob("*.js"), *(HERE / "assets").glob("*.css")]:
        assert max(map(len, path.read_text().splitlines())) <= 132, path


def test_the_readme_of_the_libraries_is_in_the_folder() -> None:
    assert Path(HERE / "vendor" / "README.md").read_text().startswith("# Libraries")
