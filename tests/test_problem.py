"""A mesh: which ranks each context-parallel group has, on which nodes, and what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.problem import ALONE, Heads, Mesh, Scale

ORDERS = ["-".join(order) for order in permutations(("tp", "cp", "dp"))]
counts = st.integers(1, 4)


def by_hand(mesh: Mesh, cp: int) -> dict[tuple[int, int, int], int]:
    """The rank of each (dp, tp, cp): counted up with the first dimension of the order as the fastest."""
    first, second, third = mesh.order.split("-")
    sizes = {"tp": mesh.tp, "cp": cp, "dp": mesh.dp}
    found = {}
    for rank, (k, j, i) in enumerate(product(*(range(sizes[name]) for name in (third, second, first)))):
        at = {first: i, second: j, third: k}
        found[at["dp"], at["tp"], at["cp"]] = rank
    return found


@given(counts, counts, counts, st.sampled_from(ORDERS))
def test_ranks_of_groups_follow_the_order(tp: int, dp: int, cp: int, order: str) -> None:
    mesh = Mesh(tp, dp, order)
    groups = mesh.groups(Scale(1, tp * dp * cp))
    assert groups.shape == (dp, tp, cp)
    assert {at: int(groups[at]) for at in np.ndindex(groups.shape)} == by_hand(mesh, cp)
    assert (np.diff(groups, axis=2) > 0).all()


@given(counts, counts, counts, st.integers(1, 4), st.sampled_from(ORDERS))
def test_a_groups_scale_counts_nodes_and_ranks_on_each_or_is_refused(tp: int, dp: int, cp: int, nodes: int, order: str) -> None:
    mesh, per_node = Mesh(tp, dp, order), tp * dp * cp
    scale = Scale(nodes, per_node)
    shares = [
        [sum(rank // per_node == node for rank in group) for node in range(nodes)]
        for group in mesh.groups(scale).reshape(mesh.count, -1).tolist()
    ]
    regular = {tuple(share for share in own if share) for own in shares}
    if len(regular) == 1 and len(set(next(iter(regular)))) == 1:
        (own,) = regular
        assert mesh.group_scale(scale) == Scale(len(own), own[0])
    else:
        with pytest.raises(ValueError, match="unevenly"):
            mesh.group_scale(scale)


def test_all_ranks_are_one_group_by_default() -> None:
    assert ALONE.groups(Scale(2, 4)).tolist() == [[list(range(8))]]
    assert ALONE.group_scale(Scale(2, 4)) == Scale(2, 4)
    assert ALONE.heads(Heads(32, 8, 128)) == Heads(32, 8, 128)


def test_megatrons_order_on_two_nodes() -> None:
    mesh, scale = Mesh(2, 2), Scale(2, 8)
    assert mesh.groups(scale)[0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert mesh.group_scale(scale) == Scale(1, 4)
    assert Mesh(2, 2, "tp-dp-cp").groups(scale)[1, 0].tolist() == [2, 6, 10, 14]
    assert Mesh(2, 2, "tp-dp-cp").group_scale(scale) == Scale(2, 2)
    assert mesh.heads(Heads(32, 8, 128)) == Heads(16, 4, 128)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mesh(0), "mesh.tp=0 is no whole number of at least 1"),
        (lambda: Mesh(dp=1.5), "mesh.dp=1.5 is no whole number of at least 1"),  # type: ignore[arg-type]
        (lambda: Mesh(dp=True), "mesh.dp=True is no whole number of at least 1"),
        (lambda: Mesh(order="tp-dp"), "mesh.order=tp-dp is no order of tp, cp and dp from the innermost out, such as tp-cp-dp"),
        (lambda: Mesh(order="tp-cp-cp"), "mesh.order=tp-cp-cp is no order"),
        (lambda: Mesh(3, 2).groups(Scale(2, 4)), "mesh.tp=3 times mesh.dp=2 does not divide the 8 ranks of scale=2x4"),
        (lambda: Mesh(4).heads(Heads(6, 2, 64)), "mesh.tp=4 does not divide the 6 query heads of heads=6x2x64"),
        (lambda: Mesh(4).heads(Heads(8, 2, 64)), "mesh.tp=4 does not divide the 2 key/value heads of heads=8x2x64"),
        (
            lambda: Mesh(2).group_scale(Scale(2, 3)),
            "mesh.tp=2 mesh.dp=1 mesh.order=tp-cp-dp lays context-parallel groups unevenly over the nodes of scale=2x3: "
            "of ranks 0 2 4 they have 2 1",
        ),
        (
            lambda: Mesh(dp=3).group_scale(Scale(2, 3)),
            "mesh.tp=1 mesh.dp=3 mesh.order=tp-cp-dp lays context-parallel groups unevenly over the nodes of scale=2x3: "
            "of ranks 2 3 they have 1 1, of the first group's 2",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        make()
