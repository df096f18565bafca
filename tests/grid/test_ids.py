"""Ids of cells never change: results of every version are found again.

``golden_cells.json`` holds 200 cells as the first version stored them, with the overrides that it made them from. The file is
never to be changed. A test here that fails says that ids of stored results have changed: mend the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcbench.grid.axes import RENAMED
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look

GOLDEN: list[dict[str, Any]] = json.loads(Path(__file__).with_name("golden_cells.json").read_text())


def by_overrides() -> dict[tuple[str, ...], dict[str, bool]]:
    """Ids of the golden cells, and whether each is skipped, by the overrides that made them."""
    found: dict[tuple[str, ...], dict[str, bool]] = {}
    for golden in GOLDEN:
        found.setdefault(tuple(golden["from"]), {})[golden["id"]] = golden["skip"]
    return found


def as_typed_now(line: str) -> str:
    key, _, value = line.partition("=")
    return f"{next((name.new for name in RENAMED if name.old == key), key)}={value}"


def test_stored_configs_have_their_ids() -> None:
    assert len(GOLDEN) == 200
    for golden in GOLDEN:
        cell = Cell.from_config(golden["config"])
        assert cell.id == golden["id"]
        assert Cell.from_config(cell.config) == cell, "what is stored from now on is another cell"
        assert cell.problem.reduce_dtype == golden["config"]["transit"]


@pytest.mark.parametrize("typed", by_overrides(), ids=lambda typed: " ".join(typed)[:60])
def test_overrides_make_the_same_cells(typed: tuple[str, ...]) -> None:
    plan = look([*map(as_typed_now, typed), "site=plain"])
    made = {planned.cell.id: planned.skip is not None for planned in plan.cells}
    for cell_id, skipped in by_overrides()[typed].items():
        assert made.get(cell_id) is skipped, cell_id


def test_what_is_read_has_the_names_of_now() -> None:
    """In configs, frames and MLflow's parameters."""
    cells = [Cell.from_config(golden["config"]) for golden in GOLDEN]
    keys = {key for cell in cells for key in cell.flat}
    assert {name.new for name in RENAMED if name.old != "cp.selector"} <= keys
    assert not {name.old for name in RENAMED} & keys
    drawn = next(cell for cell in cells if cell.config["mask"].get("samples", 1) > 1)
    assert drawn.flat["mask.samples"] > 1


def test_an_option_of_ones_own_keeps_its_name() -> None:
    """A strategy of the user's may have an option that is called as one of ours was."""
    config = {**GOLDEN[0]["config"], "cp": {"_target_": "mine.Mine", "name": "mine", "order": "up"}}
    assert Cell.from_config(config).config["cp"]["order"] == "up"


def refused(*lines: str) -> str:
    with pytest.raises(ValueError, match="now") as error:
        look([*lines, "site=plain"])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "typed",
    [
        "transit=input",
        "+transit=input",
        "cp.order=zigzag",
        "cp.order=zigzag,striped",
        "++cp.order=zigzag",
        "mask.draws=2",
        "+mask.draws=2",
    ],
)
def test_a_name_of_before_says_the_one_of_now(typed: str) -> None:
    said = refused("mask=document", typed)
    key = typed.lstrip("+").partition("=")[0]
    new = next(name.new for name in RENAMED if name.old == key)
    assert f"{key} is called {new} now; write {new}" in said


@pytest.mark.parametrize(
    ("path", "text", "typed", "new"),
    [
        ("cp/mine.yaml", "_target_: lcbench.cp.ring.Ring\nname: mine\norder: zigzag\n", "cp=mine", "cp.layout"),
        ("mask/mine.yaml", "_target_: lcbench.masks.document.document\nname: mine\ndraws: 2\n", "mask=mine", "mask.samples"),
        ("experiment/mine.yaml", "# @package _global_\ntransit: input\n", "+experiment=mine", "reduce_dtype"),
        ("experiment/mine.yaml", "# @package _global_\ncp:\n  order: zigzag\n", "+experiment=mine", "cp.layout"),
        ("experiment/mine.yaml", "# @package _global_\nmask:\n  draws: 2\n", "+experiment=mine", "mask.samples"),
        ("experiment/mine.yaml", "# @package _global_\nhydra:\n  sweeper:\n    params:\n      cp.order: zigzag,striped\n",
         "+experiment=mine", "cp.layout"),
        ("experiment/mine.yaml", "# @package _global_\nhydra:\n  sweeper:\n    params:\n      transit: input\n",
         "+experiment=mine", "reduce_dtype"),
    ],
)  # fmt: skip
def test_a_name_of_before_in_ones_own_file(path: str, text: str, typed: str, new: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir()
    file.write_text(text)
    said = refused("mask=document", typed, "--config-dir", str(tmp_path))
    assert f"is called {new} now" in said
