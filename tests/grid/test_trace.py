"""Traces of a server: what their lines say, and batches with weights that have the same totals."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lcbench.grid.trace import TOLERANCE, TOTALS, Trace, Weighted, read, reduced
from lcbench.grid.values import MOST_TOKENS, parse_batch

Row = tuple[int, int, int]


def of_rows(rows: Sequence[Row]) -> bytes:
    return "\n".join(json.dumps({"prefix": p, "new": n, "concurrency": c}) for p, n, c in rows).encode()


def totals_of(rows: Sequence[Row], weights: Sequence[float]) -> list[Fraction]:
    """Exact, each request and each new token by itself."""
    found = [Fraction(0)] * 5
    for (prefix, new, requests), weight in zip(rows, weights, strict=True):
        pairs = sum(prefix + place for place in range(1, new + 1))
        each = (1, requests, requests * new, requests * prefix, requests * pairs)
        found = [total + Fraction(weight) * one for total, one in zip(found, each, strict=True)]
    return found


def off_by(cells: Sequence[Weighted], rows: Sequence[Row]) -> float:
    aim = totals_of(rows, [1] * len(rows))
    have = totals_of([(c.prefix, c.new, c.requests) for c in cells], [c.weight for c in cells])
    return max(float(abs(h - a) / a) if a else float(h) for h, a in zip(have, aim, strict=True))


# Lengths over all sizes, not the large ones mostly; few values, so that lines are often equal and often at an edge.
LENGTHS = st.integers(0, 9).flatmap(lambda bits: st.integers(0, 1 << bits))
ROWS = st.lists(
    st.tuples(LENGTHS, LENGTHS.map(lambda n: n + 1), st.sampled_from([1, 1, 2, 3, 8, 32, 256])), min_size=1, max_size=60
)


@given(ROWS, st.integers(1, 24))
@pytest.mark.slow
def test_totals_are_those_of_all_lines_or_the_least_number_of_batches_is_named(rows: list[Row], most: int) -> None:
    lines = np.array(rows)
    try:
        cells = reduced(lines, most)
    except ValueError as refused:
        said = re.fullmatch(r"too few batches for the totals of all lines within 1%; the least is (\d+)", str(refused))
        assert said
        cells = reduced(lines, int(said[1]))
        assert int(said[1]) > most
        with pytest.raises(ValueError, match=f"the least is {said[1]}$"):
            reduced(lines, int(said[1]) - 1)
        most = int(said[1])
    assert 1 <= len(cells) <= most
    assert off_by(cells, rows) <= TOLERANCE * (1 + 1e-9)
    assert all(cell.weight > 0 for cell in cells)
    assert len({str(cell.batch) for cell in cells}) == len(cells)


@pytest.mark.slow
@given(ROWS, st.randoms())
def test_the_order_of_lines_does_not_matter_and_the_same_lines_give_the_same_cells(rows: list[Row], random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    assert reduced(np.array(rows), 60) == reduced(np.array(shuffled), 60)


@given(ROWS)
@pytest.mark.slow
def test_lines_of_few_kinds_are_their_own_batches(rows: list[Row]) -> None:
    counts = Counter(rows)
    cells = reduced(np.array(rows), len(counts))
    assert {(c.prefix, c.new, c.requests): c.weight for c in cells} == pytest.approx(counts)


@given(st.data())
@pytest.mark.slow
def test_what_is_decoded_is_never_mixed_with_what_is_filled(data: st.DataObject) -> None:
    rows = data.draw(ROWS)
    cells = reduced(np.array(rows), 60)
    assert {(c.prefix > 0, c.new > 1) for c in cells} <= {(p > 0, n > 1) for p, n, _ in rows}


@example([(463129088, 536870912)])  # 1,000,000,000 tokens: ten digits
@given(st.lists(st.tuples(st.integers(0, MOST_TOKENS // 2), st.integers(1, MOST_TOKENS // 2)), min_size=1, max_size=20))
def test_batches_of_the_largest_lines_can_be_said(pairs: list[tuple[int, int]]) -> None:
    rows = [(p, n, MOST_TOKENS // (p + n)) for p, n in pairs]
    rows = [(p, n, min(c, 1 << 16)) for p, n, c in rows]
    for cell in reduced(read(of_rows(rows), "trace"), 20):
        assert parse_batch(str(cell.batch)) == cell.batch


def served_s(prefix: float, new: float, requests: float) -> float:
    """A time with a knee: what takes longer of computing and reading the cache, and what a pass takes at least."""
    pairs = requests * new * (prefix + (new + 1) / 2)
    return 20e-6 + max(pairs * 4 * 128 * 32 / 600e12, requests * (prefix + new) * 4096 / 3e12)


def test_sixteen_batches_tell_the_time_of_a_day() -> None:
    """Of decoding at many lengths, chunks and whole prompts: a time that is no sum of the totals comes out within 0.1 %."""
    random = np.random.default_rng(0)
    context = random.lognormal(9, 1.2, 6000).astype(int) + 16
    decodes = [(int(p), 1, int(c)) for p, c in zip(context[:4000], random.integers(1, 64, 4000), strict=True)]
    chunks = [(int(p), 2048, 1) for p in context[4000:5000]]
    prompts = [(0, int(n), 1) for n in context[5000:]]
    rows = decodes + chunks + prompts
    cells = reduced(np.array(rows), 16)
    exact = sum(served_s(*row) for row in rows)
    assert sum(c.weight * served_s(c.prefix, c.new, c.requests) for c in cells) == pytest.approx(exact, rel=0.001)
    few = reduced(np.array(rows), 6)
    assert len(few) <= 6 < len(cells) <= 16


# -- lines -------------------------------------------------------------------------------------------------------------


@given(ROWS)
def test_lines_are_read_as_they_are_written(rows: list[Row]) -> None:
    assert [tuple(row) for row in read(of_rows(rows), "trace").tolist()] == rows


def test_what_else_a_line_holds_and_empty_lines_are_not_looked_at() -> None:
    assert read(b'\n{"at": 1.5, "prefix": 3, "new": 2, "concurrency": 1}\r\n  \n', "trace").tolist() == [[3, 2, 1]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prefix": 1, "new": 0, "concurrency": 1}', "new=0 is no whole number from 1"),
        ('{"prefix": 1, "new": 1, "concurrency": 0}', "concurrency=0 is no whole number from 1 to 65536"),
        ('{"prefix": -1, "new": 1, "concurrency": 1}', "prefix=-1 is no whole number from 0"),
        ('{"prefix": 1.5, "new": 1, "concurrency": 1}', "prefix=1.5 is no whole number"),
        ('{"prefix": true, "new": 1, "concurrency": 1}', "prefix=True is no whole number"),
        ('{"prefix": "8k", "new": 1, "concurrency": 1}', "prefix=8k is no whole number"),
        ('{"prefix": null, "new": 1, "concurrency": 1}', "prefix=null is no whole number"),
        (
            '{"prefix": 1, "new": 1}',
            'concurrency is not there; write an object such as {"prefix": 8192, "new": 1, "concurrency": 32}',
        ),
        ('{"prefix": 1, "new": 1, "concurrency": 99999999999999999999}', "concurrency=a huge number is no whole number"),
        ('{"prefix": 1048576, "new": 1, "concurrency": 1024}', "1024 x 1048577 tokens are more than 1024m"),
        ('{"prefix": 1, ', "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("\\xff", "is no JSON"),
        ("[1, 2]", "[1, 2] is no object"),
        ("NaN", "nan is no object"),
    ],
)
def test_a_line_that_is_none_is_named(line: str, said: str) -> None:
    good = '{"prefix": 1, "new": 1, "concurrency": 1}'
    with pytest.raises(ValueError, match=r"^trace=a\.jsonl, line 3: ") as refused:
        read(f"{good}\n\n{line}\n{good}".encode().replace(b"\\xff", b"\xff"), "trace=a.jsonl")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_a_file_without_lines_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^trace=a\.jsonl has no line; each is an object such as"):
        read(content, "trace=a.jsonl")


def mooncake(tokens: int, blocks: list[int]) -> str:
    return json.dumps({"timestamp": 0, "input_length": tokens, "output_length": 5, "hash_ids": blocks})


def test_of_a_mooncake_trace_the_prefix_is_what_earlier_lines_left_in_the_cache() -> None:
    lines = [
        mooncake(6955, [*range(46, 58), 2353, 2354]), mooncake(6472, [*range(46, 58), 2366]),  # those of its description
        mooncake(1024, [46, 47]), mooncake(1000, [7, 47]), mooncake(600, [46, 7]),
    ]  # fmt: skip
    found = read("\n".join(lines).encode(), "trace")
    # All of the third is known, so its last token is computed; a block counts only behind known ones.
    assert found.tolist() == [[0, 6955, 1], [6144, 328, 1], [1023, 1, 1], [0, 1000, 1], [599, 1, 1]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (mooncake(512, [1, 2]), "2 hash_ids of 512 tokens are not input_length=512"),
        (mooncake(0, []), "input_length=0 is no whole number from 1"),
        ('{"input_length": 5}', "hash_ids=null is no list of whole numbers"),
        ('{"input_length": 5, "hash_ids": ["a"]}', "hash_ids=['a'] is no list of whole numbers"),
        ('{"prefix": 1, "new": 1, "concurrency": 1}', "input_length is not there"),
    ],
)
def test_a_line_that_is_none_of_a_mooncake_trace_is_named(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^trace, line 2: ") as refused:
        read(f"{mooncake(5, [1])}\n{line}".encode(), "trace")
    assert said in str(refused.value)


# -- what a manifest keeps ---------------------------------------------------------------------------------------------


def trace_of(tmp_path: Path, rows: Sequence[Row], cells: int = 16) -> Trace:
    file = tmp_path / "day.jsonl"
    file.write_bytes(of_rows(rows))
    trace = Trace.parse({"file": str(file), "cells": cells})
    assert trace is not None
    return trace


ROWS_OF_A_DAY: list[Row] = [(8192, 1, 32)] * 90 + [(4096, 1, 16)] * 30 + [(0, 3000, 1)] * 7 + [(1000, 500, 2)]


def test_a_trace_says_its_totals_how_far_its_batches_are_off_and_their_weights(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, ROWS_OF_A_DAY)
    assert [*trace.totals] == list(TOTALS)
    assert [*trace.totals.values()] == [float(total) for total in totals_of(ROWS_OF_A_DAY, [1] * len(ROWS_OF_A_DAY))]
    assert sum(trace.weights.values()) == pytest.approx(len(ROWS_OF_A_DAY), rel=TOLERANCE)
    assert max(trace.errors.values()) <= TOLERANCE
    assert {"32q1s8193", "q3000"} <= set(trace.weights)
    assert "128 lines as 4 batches" in str(trace)


def test_a_note_gives_the_trace_again(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, ROWS_OF_A_DAY)
    assert Trace.from_note(json.loads(json.dumps(trace.note()))) == trace


@pytest.mark.parametrize(
    "change",
    [
        {"weights": {}},
        {"weights": {"q1": -1.0}},
        {"weights": {"q1": float("nan")}},
        {"weights": {"none": 1.0}},
        {"totals": {}},
        {"errors": [1]},
        {"file": ...},
    ],
)
def test_a_note_that_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    note = {**trace_of(tmp_path, ROWS_OF_A_DAY).note(), **change}
    note = {key: value for key, value in note.items() if value is not ...}
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Trace.from_note(note)
