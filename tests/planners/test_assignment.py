"""Assignments by themselves: what is wrong with one, when its groups are at work, and ranks that have nothing to share."""

from __future__ import annotations

import numpy as np
import pytest

from lcbench.planners import telling
from lcbench.planners.base import LEAST, Assignment, Documents, Fleet, Group
from lcbench.testing.costs import Quadratic

FLEET = Fleet(4, 4, 100)


def documents(*tokens: int) -> Documents:
    lengths = np.array(tokens)
    return Documents(lengths, lengths * (lengths + 1) // 2)


def group(ranks: tuple[int, ...], *numbers: int) -> Group:
    return Group(ranks, numbers, "ring")


@pytest.mark.parametrize(
    ("groups", "word"),
    [
        ([(group((0, 1), 0), group((2,), 1))], None),
        ([(group((0, 1), 0), group((1,), 1))], "twice"),
        ([(group((0, 1), 0), group((4,), 1))], "ranks 0 to 3"),
        ([(group((0, 1), 0),)], "document 1 is computed 0 times"),
        ([(group((0, 1), 0, 1),), (group((0,), 1),)], "document 1 is computed 2 times"),
        ([(group((0,), 0), group((2,), 1))], "capacity of 100"),
        ([(group((), 0), group((2,), 1))], "without ranks"),
        ([(group((0, 1), 0, 2), group((2,), 1))], "documents 0 to 1"),
        ([(Group((0, 1), (0,), "ring", 1.5), group((2,), 1))], "no share"),
    ],
)
def test_what_is_wrong(groups: list[tuple[Group, ...]], word: str | None) -> None:
    found = Assignment(tuple(groups)).wrong(documents(150, 40), FLEET)
    assert (found is None) if word is None else (found is not None and word in found)


def test_groups_wait_for_their_own_ranks_only() -> None:
    made = Assignment(((group((0, 1), 0), group((2,), 1)), (group((0,), 2), group((1, 2), 3))))
    begins, ends = made.played([3.0, 1.0, 1.0, 2.0], 4)
    np.testing.assert_array_equal(begins, [0, 0, 3, 3])
    np.testing.assert_array_equal(ends, [3, 1, 4, 5])
    assert Assignment.of_plain(made.plain()) == made


@pytest.mark.parametrize(("tokens", "left"), [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (50, 4)])
def test_a_group_of_few_tokens_has_no_spare_ranks(tokens: int, left: int) -> None:
    cost, every = Quadratic((1, 2, 4)), documents(tokens, 90)
    made = Assignment(((group((3, 1, 0, 2), 0),), (group((0,), 1),))).without_spare_ranks(every, cost)
    assert made.micro_batches[0][0].ranks == (3, 1, 0, 2)[:left]
    assert left == 1 or tokens // left >= LEAST
    assert made.micro_batches[1] == (group((0,), 1),)
    assert made.wrong(every, FLEET) is None


def test_progress_is_told_once_a_second(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.5, 1.0, 1.0, 1.9, 2.5, 2.5])
    monkeypatch.setattr("lcbench.planners.telling.time.monotonic", lambda: next(times))
    marks: list[None] = []
    say = telling.telling(lambda: marks.append(None))
    for line in ("early", "first", "soon", "second"):
        say(line)
    assert capsys.readouterr() == ("", "planning: first\nplanning: second\n")
    assert len(marks) == 4
