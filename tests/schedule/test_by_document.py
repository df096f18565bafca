"""The layout that shares every document evenly: even shards, even work, and schedules that hold."""

from __future__ import annotations

import numpy as np
import pytest

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.ring import Ring
from lcbench.cp.usp import USP
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.lengths import Explicit
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.build import deal
from lcbench.schedule.layout import by_document
from lcbench.schedule.tiling import tiling
from lcbench.schedule.verify import verify

LENGTHS = [1, 700, 37, 2048, 5, 1003, 262, 40]  # together 4096


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("shards", [1, 4, 8, 64])
def test_shards_are_even_and_hold_every_token_once(shards: int, folded: bool) -> None:
    bounds = np.concatenate([[0], np.cumsum(LENGTHS)])
    layout = by_document(bounds, shards, folded=folded)
    assert {layout.size(shard) for shard in range(shards)} == {4096 // shards}
    assert np.sort(np.concatenate([layout.tokens(shard) for shard in range(shards)])).tolist() == list(range(4096))


@pytest.mark.parametrize(("mask", "runs"), [(document, 8), (causal_document, 16)])
def test_work_is_even_where_zigzag_of_the_whole_is_not(mask: object, runs: int) -> None:
    made = mask(4096, seed=(0, 0), lengths=Explicit(LENGTHS))  # type: ignore[operator]
    layout = deal(made, 4096, 8, "documents")
    assert layout.imbalance(made) < 1.03 < deal(made, 4096, 8, "zigzag").imbalance(made)
    assert max(len(shard) for shard in layout.shards) <= runs  # a document that is seen whole is one stretch per shard


@pytest.mark.parametrize(
    "strategy", [Ring("documents"), AllGather(layout="documents"), USP(layout="documents"), LoongTrain(layout="documents")]
)
def test_schedules_hold(strategy: Scheduled) -> None:
    problem = Problem(4096, Heads(8, 4, 64), Scale(2, 4), "bfloat16", "forward_backward")
    mask = causal_document(4096, seed=(0, 0), lengths=Explicit(LENGTHS))
    cost = verify(strategy.schedule(problem, mask), mask, problem)
    assert cost is not None


def test_two_stretches_of_a_document_are_one_piece() -> None:
    """A causal document of 1,024 tokens on a ring of 4: each shard has two stretches of 128 of it."""
    problem = Problem(1024, Heads(4, 4, 64), Scale(1, 4), "bfloat16", "forward")
    mask = causal_document(1024, seed=(0, 0), lengths=Explicit([1024]))
    found = tiling(Ring("documents").schedule(problem, mask), mask)
    remote = found.step > 0
    assert set(found.tiles.pieces[remote].tolist()) == {1}
    # Two stretches of queries on one of keys, or the second of queries on both of keys: 2 x 128 x 128 pairs and as many computed.
    assert set(found.tiles.pairs[remote].tolist()) == {2 * 128 * 128}
    assert set(found.tiles.covered[remote].tolist()) == {2 * 128 * 128}
