"""Packs: every cell once, none over its limits, the shortest first and those that will not fit last; and who is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.cell import Cell
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.estimate import Estimate, Estimator
from lcbench.runs.pack import given_up, group, newer_result, newest_good, owes, tries_again

H100 = {"name": "h100", "names": ["NVIDIA H100 80GB HBM3"], "peak_tflops": {"bfloat16": 989}, "memory_bytes": 80_000_000_000}
BASE = {
    "kernel": {"name": "sdpa_flash", "_target_": "lcbench.kernels.sdpa_flash.SDPAFlash"},
    "cp": {"name": "ring", "_target_": "lcbench.cp.ring.Ring"},
    "mask": {"name": "causal", "_target_": "lcbench.masks.causal.causal"},
    "seqlen": 1024, "scale": "1x8", "heads": "32x8x128", "dtype": "bfloat16", "direction": "forward_backward",
    "reduce_dtype": "float32", "seed": 0,
    "measure": {"warmup": 1, "min_iterations": 5, "max_iterations": 50, "budget_s": 10.0, "precision": 0.02, "timeline": False},
}  # fmt: skip


def cell(**config: object) -> Cell:
    return Cell.from_config({**BASE, **config})


class Given(Estimator):
    """Estimates by seed."""

    def __init__(self, seconds: list[float], fails: list[bool]) -> None:
        super().__init__()
        self._seconds, self._fails = seconds, fails

    def estimate(self, cell: Cell) -> Estimate:
        seconds = self._seconds[cell.config["seed"]]
        return Estimate(seconds, 2 * seconds, "the seed")

    def will_fail(self, cell: Cell) -> bool:
        return self._fails[cell.config["seed"]]


@given(
    st.lists(st.tuples(st.floats(0.1, 4000), st.booleans(), st.sampled_from(["1x2", "2x2"])), min_size=1, max_size=40),
    st.none() | st.integers(1, 7),
    st.none() | st.integers(5, 200),
)
def test_every_cell_is_in_one_pack_and_no_pack_is_over_its_limits(
    drawn: list[tuple[float, bool, str]], max_cells: int | None, max_minutes: int | None
) -> None:
    seconds, fails = [s for s, _, _ in drawn], [f for _, f, _ in drawn]
    cells = [cell(seed=i, scale=scale) for i, (_, _, scale) in enumerate(drawn)]
    groups = group(cells, Given(seconds, fails), max_cells=max_cells, max_minutes=max_minutes)
    assert sorted(c.id for g in groups for c in g.cells) == sorted(c.id for c in cells)
    for made in groups:
        assert {c.scale for c in made.cells} == {made.scale}
        order = [(fails[c.config["seed"]], seconds[c.config["seed"]]) for c in made.cells]
        assert order == sorted(order)
        assert max_cells is None or len(made.cells) <= max_cells
        total = sum(made.seconds.values())
        if max_minutes is not None:
            assert made.minutes <= max_minutes
        if max_minutes is None or len(made.cells) > 1:
            assert 60 * made.minutes >= 2 * total  # there is time for what its cells may take at most


def attempts(*kinds: str) -> list[Attempt]:
    return [
        Attempt("c", "s", i, "failed" if kind else "ok", Failure(kind, "") if kind else None)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds, 1)
    ]


@pytest.mark.parametrize(
    ("history", "again"),
    [
        ((), False), (("",), False), (("node-fail",), True), (("node-fail", "node-fail"), True),
        (("node-fail", "node-fail", "node-fail"), False), (("oom",), False), (("preempted", "node-fail"), True),
        (("nccl",), True), (("nccl", "nccl"), False), (("crash", "nccl"), False), (("node-fail", ""), False),
        (("crash", "preempted"), True),
    ],
)  # fmt: skip
def test_retries_by_class(history: tuple[str, ...], again: bool) -> None:
    assert tries_again(attempts(*history), {"node-fail": 2, "preempted": 5, "nccl": 1, "oom": 0}) == again


def test_what_kills_its_gang_twice_is_not_tried_a_third_time() -> None:
    generous = {"crash": 9, "hang": 9}
    assert tries_again(attempts("crash"), generous)
    assert not tries_again(attempts("crash", "hang"), generous)
    assert given_up(attempts("", "crash", "hang"))
    assert not given_up(attempts("crash", "numerics"))
    assert not given_up(attempts("crash", "crash", ""))


def test_which_result_of_another_pack_has_a_cell_left_out() -> None:
    def tried(*attempts: str) -> list[Attempt]:
        """Attempts as ``pack status``."""
        words = [attempt.split() for attempt in attempts]
        return [Attempt("c", "s", n, status, pack=pack) for n, (pack, status) in enumerate(words, 1)]  # type: ignore[arg-type]

    assert newest_good([]) == newest_good(tried("p failed")) == 0
    assert newest_good(tried("p ok", "q ok", "r failed")) == 2
    for attempts, good, left_out in (
        (tried(), 0, False),
        (tried("p failed"), 0, False),
        (tried("p ok"), 0, True),  # also in the place of a failure that was there when the pack was made
        (tried("p ok"), 1, False),  # asked for although it was there
        (tried("p ok", "q ok"), 1, True),
        (tried("p ok", "q failed"), 0, False),  # the cell's state is that of its newest attempt
        (tried("p failed", "mine ok"), 0, False),
        (tried("p skipped"), 0, False),
        (tried("p ok"), None, False),  # of a pack that does not say what was there
    ):
        assert newer_result(attempts, "mine", good) == (attempts[-1] if left_out else None)
        assert owes(attempts, "mine", good) == (not left_out and all(a.pack != "mine" for a in attempts))
