"""The study of planners runs, goes on from what it kept, and sees what is slower than ``fixed``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.planners import study
from tests.planners.study import Row, Study, all_rows, missed, rows, table

PROFILES = ("web_text", "long_text_64k")
FAST = ("fixed", "bytescale_hdp", "megatron_hybrid", "oracle")


@pytest.fixture(scope="module")
def found() -> dict[str, list[Row]]:
    return {profile: rows(Study(profile, 16, "ring", 1 << 18), range(2), FAST) for profile in PROFILES}


@pytest.mark.slow
def test_fast_planners_are_not_slower_than_fixed_by_more_than_2_percent(found: dict[str, list[Row]]) -> None:
    assert list(missed(found)) == []
    for of in found.values():
        assert [row.name for row in of if row.refusal] == ["oracle"]
        assert all((row.makespan_s > 0).all() and (row.planning_s >= 0).all() for row in of if not row.refusal)
    lines = list(table(found, 16))
    assert lines[0].startswith("| 16 ranks | web_text | long_text_64k |")
    assert len(lines) == 2 + len(FAST) - 1 + 2  # the oracle has no plan; two are shown as published too


@pytest.mark.slow
def test_what_is_slower_gains_nothing_or_refuses_is_said(found: dict[str, list[Row]]) -> None:
    base, own = found["web_text"][:2]
    slower = replace(own, makespan_s=base.makespan_s * np.array([0.5, 1.1]))
    assert list(missed({"web_text": [base, slower]})) == ["bytescale_hdp is slower than fixed by 9.1% on batch 1 of web_text"]
    assert list(missed({"web_text": [base, replace(own, makespan_s=base.makespan_s * 1.01)]})) == [
        "bytescale_hdp gains nothing over fixed on web_text"
    ]
    (line,) = missed({"web_text": [base, replace(own, refusal="too long")]})
    assert line.endswith("too long")


@pytest.mark.slow
def test_parts_are_kept_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies, out = [Study("uniform", 8, "ring", 1 << 16)], tmp_path / "parts.jsonl"
    monkeypatch.setattr(study, "PART", 1)
    first = all_rows(studies, 1, ["fixed"], 1, out)[studies[0]][0].makespan_s
    kept = json.loads(out.read_text())
    kept["rows"][0]["makespan_s"] = [7.0]  # which nothing computes
    out.write_text(json.dumps(kept) + "\n")
    (again,) = all_rows(studies, 2, ["fixed"], 1, out)[studies[0]]
    assert again.makespan_s[0] == 7.0
    assert again.makespan_s[1] not in (7.0, first[0])
    assert len(out.read_text().splitlines()) == 2
