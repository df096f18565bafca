"""A mesh in a plan: what a cell's problem, mask, length and numbers are where there are several context-parallel groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lcbench.grid.build import build_mask, group_mask
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.refusals import mask_of, pairs
from lcbench.masks.block import BlockMap
from lcbench.problem import Heads, Mesh, Scale

BASE = ["cp=ring", "kernel=sdpa_flash", "mask=causal", "heads=8x4x64", "seqlen=4k", "scale=2x8"]


def planned(*words: str) -> list[Cell]:
    plan = look([*BASE, *words])
    assert all(each.skip is None for each in plan.cells), [each.skip for each in plan.cells]
    return [each.cell for each in plan.cells]


def test_the_problem_is_that_of_a_group_and_the_cell_has_all_ranks() -> None:
    (cell,) = planned("mesh.tp=2", "mesh.dp=2")
    assert (cell.mesh, cell.scale, cell.heads) == (Mesh(2, 2), Scale(2, 8), Heads(8, 4, 64))
    assert (cell.problem.scale, cell.problem.heads, cell.problem.seqlen) == (Scale(1, 4), Heads(4, 2, 64), 4096)
    (across,) = planned("mesh.tp=2", "mesh.dp=2", "mesh.order=tp-dp-cp")
    assert across.problem.scale == Scale(2, 2)
    assert across.id != cell.id
    flat = cell.flat
    assert (flat["nodes"], flat["gpus_per_node"], flat["world_size"]) == (2, 8, 16)
    assert (flat["mesh.tp"], flat["mesh.dp"]) == (2, 2)


def test_tokens_per_gpu_are_those_of_a_rank_of_its_group() -> None:
    lengths = {
        (c.mesh.tp, c.mesh.dp): c.problem.seqlen for c in planned("seqlen=null", "seqlen_per_rank=1k", "mesh.tp=1,2", "mesh.dp=1,4")
    }
    assert lengths == {(1, 1): 16384, (2, 1): 8192, (1, 4): 4096, (2, 4): 2048}


def test_maps_of_heads_are_those_of_the_first_groups_share(tmp_path: Path) -> None:
    edges = np.arange(0, 4097, 512)
    keep = np.random.default_rng(0).random((4, 8, 8)) < 0.5
    np.savez(tmp_path / "maps.npz", q_edges=edges, k_edges=edges, keep=keep)
    (alone, cell) = planned("mask=block_file", f"mask.file={tmp_path / 'maps.npz'}", "mesh.tp=1,2")
    whole, mine = build_mask(alone.config["mask"], 4096, alone.heads, 0), group_mask(cell)
    assert isinstance(whole, BlockMap)
    assert isinstance(mine, BlockMap)
    assert (whole.maps, mine.maps) == (4, 2)
    assert (mine.keeps() == keep[:2]).all()
    assert isinstance(made := mask_of(cell), BlockMap)
    assert (made.keeps() == keep[:2]).all()
    assert pairs(cell) <= pairs(alone)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mesh.dp=3"], "mesh.tp=1 times mesh.dp=3 does not divide the 16 ranks of scale=2x8"),
        (["mesh.tp=8"], "mesh.tp=8 does not divide the 4 key/value heads of heads=8x4x64"),
        (["mesh.tp=2", "scale=2x3"], "lays context-parallel groups unevenly over the nodes of scale=2x3"),
    ],
)
def test_a_mesh_that_does_not_fit_is_bad_input(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        look([*BASE, *words])
