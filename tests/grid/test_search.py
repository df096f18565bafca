"""Which lengths a search looks at, that it finds the longest that fits in eight cells, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.grid.command_line import loader_of, look
from lcbench.grid.expand import Plan, expand
from lcbench.grid.search import CELLS, MOST_LENGTHS, Bracket, Search, resolution
from lcbench.grid.values import MOST_TOKENS

WHOLE = {"name": "max_seqlen", "from": "1k", "to": "1m", "gib": None}
SEARCH = ["cp=ring", "scale=1x2", "search=max_seqlen"]


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Search, int]:
    """A search and ranks, such that there is a length to look at."""
    ranks = draw(st.integers(1, 1 << 12))
    unit = 2 * ranks
    longest = draw(st.integers(unit, MOST_TOKENS))
    shortest = draw(st.integers(1, longest // unit * unit))
    return Search("max_seqlen", shortest, longest, None), ranks


@given(ranges())
def test_lengths_suit_every_rank_and_reach_from_end_to_end(asked: tuple[Search, int]) -> None:
    search, ranks = asked
    unit, lengths = 2 * ranks, search.lengths(ranks)
    assert 1 <= len(lengths) <= MOST_LENGTHS
    assert all(a < b for a, b in pairwise(lengths))
    assert all(tokens % unit == 0 and search.shortest <= tokens <= search.longest for tokens in lengths)
    assert lengths[-1] == search.longest // unit * unit
    # The first one is the shortest multiple, unless the range begins between two of them; then it may be the next but one.
    assert lengths[0] < max(search.shortest + 2 * unit, 2 * search.shortest)
    if (lengths[-1] - lengths[0]) // unit + 1 <= MOST_LENGTHS // 2 and search.longest < 2 * search.shortest:
        assert lengths == tuple(range(lengths[0], lengths[-1] + 1, unit))


@given(ranges(), st.data())
def test_the_longest_that_fits_is_found_in_eight_cells_whatever_is_expected(asked: tuple[Search, int], data: st.DataObject) -> None:
    search, ranks = asked
    lengths = search.lengths(ranks)
    fit = data.draw(st.integers(0, len(lengths)), label="how many fit")
    guesses = st.none() | st.tuples(st.integers(-3, len(lengths) + 3), st.integers(-3, len(lengths) + 3)).map(sorted).map(tuple)
    inside, beyond, cells = None, None, 0
    while not (bracket := Bracket.between(lengths, inside, beyond)).closed:
        tokens = bracket.next(cells, data.draw(guesses, label="expected"))
        assert tokens in lengths
        assert (inside or 0) < tokens < (beyond or MOST_TOKENS + 1)
        cells += 1
        inside, beyond = (tokens, beyond) if tokens in lengths[:fit] else (inside, tokens)
    assert cells <= CELLS
    assert bracket.low == fit
    assert inside == (lengths[fit - 1] if fit else None)
    assert beyond == (lengths[fit] if fit < len(lengths) else None)


def test_what_is_expected_and_so_takes_two_cells() -> None:
    lengths = Search("max_seqlen", 1 << 10, 1 << 16, None).lengths(2)[:63]
    bracket = Bracket.between(lengths, None, None)
    first = bracket.next(0, (40, 40))
    assert first == lengths[39]
    second = Bracket.between(lengths, first, None).next(1, (40, 40))
    assert second == lengths[40]
    assert Bracket.between(lengths, first, second).closed


def test_lengths_of_other_searches_count_and_a_search_that_used_its_cells_goes_on() -> None:
    lengths = Search("max_seqlen", 1 << 10, 1 << 20, None).lengths(2)
    bracket = Bracket.between(lengths, 5000, 5001)
    assert bracket.closed
    assert lengths[bracket.low - 1] <= 5000 < lengths[bracket.low]
    wide = Bracket.between(lengths, 2048, None)
    assert wide.next(CELLS) in lengths[wide.low :]


def test_a_usual_range_has_steps_of_a_sixteenth() -> None:
    lengths = Search.parse(WHOLE).lengths(8)
    assert (len(lengths), lengths[0], lengths[-1]) == (161, 1 << 10, 1 << 20)
    assert resolution(lengths) == pytest.approx(1 / 16)
    assert resolution(lengths[:1]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"from": "2k", "to": "1k"}, "search.from=2k is more than search.to=1k"),
        ({"from": 0}, "search.from=0 is no token count"),
        ({"to": "2g"}, "search.to=2g is no token count"),
        ({"to": None}, "search.to=null is no token count"),
        ({"gib": 0}, "search.gib=0 is no number above 0"),
        ({"gib": "much"}, "search.gib=much is no number above 0"),
        ({"gib": [1]}, "search.gib=[1] is no number above 0"),
        ({"till": 3}, "search.till is no option of it"),
    ],
)
def test_what_a_file_of_a_search_may_not_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="^" + "search") as refused:
        Search.parse({**WHOLE, **change})
    assert said in str(refused.value)


def test_an_option_that_is_not_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"search.gib is not set"):
        Search.parse({k: v for k, v in WHOLE.items() if k != "gib"})


@given(ranges(), st.floats(1, 1e15))
def test_a_note_gives_the_search_again(asked: tuple[Search, int], cap: float) -> None:
    search = Search(asked[0].name, asked[0].shortest, asked[0].longest, cap)
    assert Search.from_note(search.note()) == search


@pytest.mark.parametrize("note", [{}, {**Search("a", 1, 2, 3.0).note(), "cap_bytes": None}, {**Search("a", 3, 2, 1.0).note()}])
def test_a_note_that_is_none(note: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Search.from_note(note)


# -- the plan ----------------------------------------------------------------------------------------------------------


def planned(words: list[str]) -> Plan:
    return expand(words, loader_of(None))


def test_a_plan_has_one_cell_of_each_choice_at_a_length_that_suits_its_ranks() -> None:
    plan = planned([*SEARCH, "cp=ring,ulysses,none", "scale=1x3,1x1", "search.from=1k", "search.to=64k", "heads=6x6x16"])
    assert plan.search == Search("max_seqlen", 1 << 10, 1 << 16, None)
    assert len(plan.cells) == 6
    for each in plan.cells:
        ranks = each.cell.problem.scale.world_size
        assert each.cell.problem.seqlen in plan.search.lengths(ranks)


@pytest.mark.slow
def test_lengths_of_an_experiment_give_way() -> None:
    plan = planned(["+experiment=model_step", "search=max_seqlen"])
    assert len(look(["+experiment=model_step"]).cells) > len(plan.cells) > 0
    assert len({json_of(p.cell.config) for p in plan.cells}) == len(plan.cells)


def json_of(config: dict[str, Any]) -> str:
    return str({key: value for key, value in config.items() if key != "seqlen"})


def test_without_a_search_a_plan_has_none() -> None:
    assert look(["cp=ring"]).search is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search.gib=1"], "search.gib=1 says nothing without a search; write search=max_seqlen"),
        (["search=max"], "search=max is not one of max_seqlen"),
        (["search=max_seqlen,max_seqlen"], "search is not an axis and takes one value"),
        ([*SEARCH, "search.gib=1,2"], "search.gib is not an axis and takes one value"),
        ([*SEARCH, "search.foo=1"], "search=max_seqlen has no option 'foo'"),
        ([*SEARCH, "seqlen=1k"], "seqlen=1k says a length, and search=max_seqlen looks for one from search.from=1k"),
        ([*SEARCH, "seqlen_per_rank=1k,2k"], "seqlen_per_rank=1k,2k says a length"),
        ([*SEARCH, "search.from=1", "search.to=3"], "no multiple of 4 tokens lies between"),
        ([*SEARCH, "search.gib=2", "seqlen=2k,4k"], "seqlen=2k,4k says a length"),
        ([*SEARCH, "search.from=2k", "search.to=1k"], "search.from=2k is more than search.to=1k"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"search|seqlen") as refused:
        planned(words)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_commands_that_look_for_no_length_say_so() -> None:
    with pytest.raises(ValueError, match=r"^search=max_seqlen is for python -m lcbench.sweep; write a length here"):
        look(SEARCH)
