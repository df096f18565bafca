"""The axis of planners: which cells have it, and what a plan refuses."""

from __future__ import annotations

import pytest

from lcbench.grid.build import build_planner
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.planners.none import NoPlanner
from lcbench.testing.masks import load, names

BASE = ["cp=ring", "mask=causal_document", "heads=8x4x64", "scale=1x2", "seqlen=8k", "site=plain"]


def cells(*words: str) -> list[Cell]:
    return [each.cell for each in look([*BASE, *words]).cells]


def refused(*words: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        look([*BASE, *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_batch_has_a_planner_and_says_nothing_of_none() -> None:
    found = {cell.words.get("planner"): cell for cell in cells("workload=batch", f"planner={','.join(names('planner'))}", "-m")}
    assert set(found) == {None, *names("planner")} - {"none"}
    assert "planner" not in found[None].config
    assert isinstance(build_planner(found[None].config), NoPlanner)
    assert len({cell.id for cell in found.values()}) == len(names("planner"))


@pytest.mark.parametrize("name", [name for name in names("planner") if name != "none"])
def test_its_options_are_a_part_of_the_cell_and_of_what_is_built(name: str) -> None:
    (cell,) = cells("workload=batch", f"planner={name}")
    assert cell.config["planner"]["name"] == name
    assert f"planner={name}" in cell.label
    assert type(build_planner(cell.config)).__module__ == f"lcbench.planners.{name}"
    assert {key for key in cell.config["planner"] if key not in ("name", "_target_")} <= set(load("planner", name))


@pytest.mark.parametrize("words", [["workload=batch"], ["workload=batch_step", "recompute=full"]])
def test_a_planner_cannot_offload_where_nothing_waits(words: list[str]) -> None:
    batch = [word for word in BASE if not word.startswith("heads=")]
    offloads, model = ["planner=bytescale_hdp", "planner.offload=true"], ["model=tiny", "heads=4x2x16"]
    (found,) = look([*batch, *words, *offloads, *(model if "batch_step" in words[0] else ["heads=4x2x16"])]).cells
    assert found.skip is not None
    assert found.skip.startswith("planner bytescale_hdp: planner.offload=true")
    (taken,) = look([*batch, *model, "workload=batch_step", *offloads]).cells
    assert taken.skip is None


def test_other_workloads_have_none() -> None:
    (cell,) = (each.cell for each in look(BASE).cells)
    assert "planner" not in cell.config
    assert build_planner(cell.config) is None
    with pytest.raises(ValueError, match="planner"):
        look([*BASE, "planner=fixed"])


def test_what_is_wrong_is_one_line() -> None:
    assert "planner=" in refused("workload=batch", "planner=fixd")
    assert "workload.capacity=0" in refused("workload=batch", "workload.capacity=0")
    assert "workload.gradient_bytes=-1" in refused("workload=batch", "workload.gradient_bytes=-1")


@pytest.mark.parametrize(
    "words", [["planner=oracle", "seqlen=9k"], ["planner=fixed", "planner.degree=3"], ["planner=oracle", "scale=1x8"]]
)
def test_what_a_planner_never_plans_is_skipped_before_any_job(words: list[str]) -> None:
    batch = ["workload=batch", "lengths=fixed", "lengths.length=1k"]
    (found,) = look([*BASE, *batch, *words]).cells
    assert found.skip is not None
    assert found.skip.startswith(f"planner {words[0].removeprefix('planner=')}: ")
    assert "\n" not in found.skip
    (taken,) = look([*BASE, *batch, words[0]]).cells
    assert taken.skip is None
