"""A hang is told by what ranks do not do any more, never by the clock alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lcbench.measure import progress
from lcbench.measure.progress import Mark, Progress
from lcbench.runs.hang import REST_S, SETTLE_S, STOPPED_S, Judge, View, Watcher, _is_stopped

VIEW = View(0, "cell.attempt-1", 0.0, 7200.0, 120.0, (3, 1), (3, 1), 0, "'timing', iteration 1", False)


def seen(judge: Judge, moments: list[tuple[float, int]], view: View = VIEW) -> list[float]:
    """Moments at which the judge would end a gang, of (seconds, marks so far)."""
    return [at for at, total in moments if judge.see(replace(view, total=total, elapsed_s=at), 1000.0 + at)]


def every_second(until: int, total: int = 1) -> list[tuple[float, int]]:
    return [(float(at), total) for at in range(until)]


def test_no_marks_for_the_patience_is_a_hang_and_any_mark_begins_anew() -> None:
    assert seen(Judge(5.0, 60.0), every_second(200))[0] == 121.0
    slow = [(float(at), at // 100) for at in range(3000)]  # a mark every 100 s, far beyond every estimate
    assert not seen(Judge(5.0, 60.0), slow)
    stuck = slow + [(3000.0 + at, 29) for at in range(1000)]
    # It has gone 100 s without a mark before, so 500 s say something.
    assert seen(Judge(5.0, 60.0), stuck)[0] == pytest.approx(2900 + 501, abs=2)


def test_estimates_count_until_a_cell_has_a_pace() -> None:
    timing = replace(VIEW, patience_s=0.0)
    fast = [(float(at), at) for at in range(100)]
    assert seen(Judge(5.0, 60.0), fast + [(100.0 + at, 99) for at in range(200)], timing)[0] == pytest.approx(99 + 61, abs=1)


def test_what_goes_on_has_until_max_s() -> None:
    judge = Judge(5.0, 60.0)
    view = replace(VIEW, limit_s=300.0)
    assert seen(judge, [(float(at), at) for at in range(400)], view)[0] == 301.0
    verdict = judge.see(replace(view, total=9999, elapsed_s=401.0), 1401.0)
    assert verdict is not None
    assert verdict.cause == "not at its end after hang.max_s=300 s; it was at 'timing', iteration 1"
    # Nor is any patience longer.
    assert seen(Judge(5.0, 60.0), every_second(99), replace(view, limit_s=20.0, patience_s=20.0))[0] == 21.0


def test_another_work_and_the_time_between_cells_begin_anew() -> None:
    judge = Judge(5.0, 60.0)
    assert not seen(judge, every_second(100))
    between = replace(VIEW, work="", limit_s=0.0, patience_s=1200.0)
    assert not judge.see(between, 1100.0)
    assert not judge.see(between, 1100.0 + 20)
    late = judge.see(between, 1100.0 + 1201)
    assert late is None  # the agent itself was not there
    assert next(at for at in range(1300) if judge.see(between, 2301.0 + at)) == pytest.approx(1201 - 20, abs=2)


def test_an_agent_that_was_stopped_with_its_job_ends_nothing() -> None:
    judge = Judge(5.0, 60.0)
    assert not seen(judge, every_second(50))
    gap = 10 * STOPPED_S + 3600
    assert not judge.see(replace(VIEW, total=1, elapsed_s=50 + gap), 1050 + gap)
    assert not judge.see(replace(VIEW, total=1, elapsed_s=7190 + gap), 1051 + gap)  # nor does that time count for max_s
    assert judge.see(replace(VIEW, total=1, elapsed_s=7300 + gap), 1052 + gap)


def marks(*steps: tuple[int, int]) -> dict[int, Mark]:
    return {rank: Mark(10, 900.0, 7200.0, 120.0, step, f"phase {step[0]}", "cell.attempt-1") for rank, step in enumerate(steps)}


def test_the_rank_that_the_others_wait_for_is_named_where_marks_show_it() -> None:
    view = View.of(marks((3, 2), (3, 1), (3, 2)), set(), 1000.0)
    assert view is not None
    assert (view.apart, view.place, view.total, view.elapsed_s) == (1, "'phase 3', iteration 1", 30, 100.0)
    same = View.of(marks((3, 2), (3, 2)), set(), 1000.0)
    assert same is not None
    assert same.apart is None
    stopped = View.of(marks((3, 2), (3, 2)), {1}, 1000.0)
    assert stopped is not None
    judge = Judge(5.0, 60.0)
    judge.see(stopped, 1000.0)
    for at in range(1001, 1121):
        assert not judge.see(stopped, float(at))
    verdict = judge.see(stopped, 1121.0)
    assert verdict is not None
    assert (verdict.rank, verdict.cause) == (1, "no progress for 121 s at 'phase 3', iteration 2, rank 1 is stopped")
    # On another node, too.
    assert View.together(same, [stopped]).apart == 1
    assert View.together(same, [view]).apart == 1
    assert View.of({**marks((3, 2)), 1: replace(marks((1, 0))[0], begun=0.0)}, set(), 1.0) is None  # a rank that has not come up


class Store:
    """What agents share."""

    def __init__(self) -> None:
        self.data: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.data[key] = value

    def get(self, key: str) -> bytes:
        return self.data[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.data for key in keys)


def test_the_marks_of_all_nodes_count_and_all_their_ranks_write_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    store, hang = Store(), {"factor": 5.0, "min_s": 30.0, "max_s": 7200.0}
    ranks: list[Progress] = []
    watchers = []
    for node in range(2):
        watchers.append(Watcher(node, 2, 2, hang))
        for local in range(2):
            monkeypatch.setenv("LOCAL_RANK", str(local))
            monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
            ranks.append(Progress.of_environment())
    for rank in ranks:
        rank.begin("cell.attempt-1", patience_s=30.0, limit_s=7200.0)

    def look() -> tuple[list[Any], list[Any]]:
        clock.now += 1.0
        found = [watchers[node].look({0: 2 * node, 1: 2 * node + 1}, {}, store) for node in (1, 0)]
        return [f[0] for f in found if f[0]], [f[1] for f in found if f[1]]

    for _ in range(100):  # only a rank of node 1 goes on
        ranks[3].mark()
        assert look() == ([], [])
    asked, ended = [], []
    while not ended and clock.now < 2000:
        some, ended = look()
        asked += some
    assert len(asked) == 2  # once on each node
    assert 30 < clock.now - 1100 < 30 + SETTLE_S + 5
    assert ended[0].cause.startswith("no progress for 3")
    assert "'building'" in ended[0].cause
    watchers[0].forget()
    watchers[1].forget()
    assert Mark.read(watchers[0]._memory, 0).begun == 0
    store.data.clear()
    assert look() == ([], [])
    clock.now += REST_S  # no rank of the new gang has come up
    look()
    clock.now += SETTLE_S
    _, (ended_too,) = look()
    assert (ended_too.work, ended_too.cause) == ("", "not all ranks came up in 1200 s")


def test_a_mark_is_cheap_and_changes_nothing_where_nobody_looks() -> None:
    Progress().enter("timing")
    assert progress.own.mark() is None
    watcher = Watcher(0, 1, 1, {"factor": 1.0, "min_s": 1.0, "max_s": 1.0})
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        rank = Progress.of_environment()
    finally:
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", progress.VARIABLE):
            del os.environ[name]
    rank.begin("wörk " * 50, patience_s=1.0, limit_s=2.0)
    rank.enter("a phase whose name is much longer than there is room for it in the slot of a rank")
    rank.iterate()
    mark = Mark.read(watcher._memory, 0)
    assert (mark.count, mark.step, mark.limit_s) == (3, (2, 1), 2.0)
    assert mark.place.startswith("'a phase whose name is much longer")
    rank.has_pace()
    assert Mark.read(watcher._memory, 0).patience_s == 0


def test_a_stopped_process_is_told() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not _is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert _is_stopped(process.pid)
        process.kill()
    assert not _is_stopped(None)
    assert not _is_stopped(process.pid)
