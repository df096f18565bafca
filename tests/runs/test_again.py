"""Later blocks of timings: whatever ends one, the good result that it was to be added to stays, and what was measured is in it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra_plugins.lcbench.local import _progress

from lcbench.commands import cancel
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.measure.cell import measure_again
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.runs import agent, worker
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.files import write_json
from lcbench.runs.gang import begun_of
from lcbench.runs.jobs import Watch
from lcbench.runs.logs import cell_mark, said_by_ranks
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import KILLS, Pack, later_blocks, tries_again
from lcbench.runs.results import Results
from lcbench.runs.settle import close_all, in_flight, settled
from lcbench.runs.squeue import Job
from lcbench.runs.store import Sweep
from lcbench.schedule.groups import Groups
from lcbench.workloads.base import Work
from tests.runs.queues import Watching, says
from tests.runs.test_corrupt import SETTINGS
from tests.runs.test_pack import BASE

GOOD: Any = SimpleNamespace(failures=[], as_dict=lambda: {"errors": {"out": 0.1}})
WRONG: Any = SimpleNamespace(failures=["out: error 2 above its bound 1"], as_dict=lambda: {"errors": {"out": 2.0}})


def made_sweep(root: Path, cells: int = 3, blocks: int = 3) -> tuple[Sweep, Pack]:
    """A sweep in one pack of this machine, whose cells have a good result with its first block each."""
    measure = {**BASE["measure"], **({"blocks": blocks} if blocks != 3 else {})}
    made = [Cell.from_config({**BASE, "seed": seed, "measure": measure}) for seed in range(cells)]
    sweep = Sweep(root, "s")
    sweep.add([Entry(cell) for cell in made], command=[])
    pack = Pack(
        "p", "s", str(root), "local", "1x1", tuple(c.id for c in made), {c.id: c.config for c in made},
        {c.id: 100.0 for c in made}, 5, replace(SETTINGS, hang={"factor": 1.0, "min_s": 60.0, "max_s": 60.0}),
    )  # fmt: skip
    pack.write()
    write_json(
        pack.folder / "job.json", {"launcher": "local", "pid": 1, "pids": [], "host": os.uname().nodename, "started_at": 0.0}
    )
    for cell in made:
        running = sweep.begin(cell.id, pack.id)
        metrics = {"time/blocks": 1.0, "time/iterations": 2.0, "check/out_error": 0.1, "memory/peak_bytes": 7.0}
        for phase in ("forward", "total"):
            metrics |= {f"time/{phase}/{name}_s": 1.0 for name in ("p20", "median", "p80")}
            rates = "compute" if phase == "total" else f"compute/{phase}"
            metrics |= {f"{rates}/tflops_per_gpu": 8.0, f"{rates}/mfu": 0.5}
        first = Measured(metrics, times(1.0, 1.0), GOOD)
        sweep.finish(worker.attempt_of(first, running, cell, sweep, {"device": "cpu"}))
    return sweep, pack


def times(*seconds: float) -> dict[str, list[float]]:
    whole = list(seconds)
    return {f"{p}_s": whole for p in ("forward", "total")} | {
        f"block_{p}_s": [sum(whole) / len(whole)] for p in ("forward", "total")
    }


def three_seconds(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
    return Measured(samples=times(3.0, 3.0, 3.0), check=GOOD)


class Exit(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(code: int) -> None:
        raise Exit

    monkeypatch.setattr(worker, "measure_again", three_seconds)
    monkeypatch.setattr(worker.os, "_exit", leave)  # type: ignore[attr-defined]


def gang(sweep: Sweep, pack: Pack) -> None:
    """What a gang does of a pack whose cells have a result each."""
    close_all(sweep, pack)
    crew = worker.Crew(Gang(0, 1, torch.device("cpu"), Groups(), []), sweep, pack, Results(sweep, pack))
    if crew.measure_first({}):
        crew.measure_again()


def newest(sweep: Sweep, pack: Pack) -> list[Attempt]:
    return [sweep.attempts(cell_id)[-1] for cell_id in pack.cells]


def check_whole(attempt: Attempt, blocks: int = 3) -> None:
    """A good result that has each of its blocks or says why not, and whose parts agree."""
    assert (attempt.status, attempt.number) == ("ok", 1)
    assert attempt.blocks + len(attempt.lost_blocks) == blocks, attempt.provenance
    values = [1.0] + [3.0] * (attempt.blocks - 1)
    assert attempt.samples["block_total_s"] == attempt.samples["block_forward_s"] == values
    assert attempt.samples["total_s"] == [1.0, 1.0] + [3.0, 3.0, 3.0] * (attempt.blocks - 1)
    median = sum(values) / len(values)
    assert attempt.metrics["time/total/median_s"] == pytest.approx(median)
    assert attempt.metrics["compute/tflops_per_gpu"] == pytest.approx(8.0 / median)
    assert attempt.metrics["time/iterations"] == len(attempt.samples["total_s"])
    assert [later["iterations"] for later in attempt.again] == [3] * (attempt.blocks - 1)
    tried = [later["block"] for later in (*attempt.again, *attempt.lost_blocks)]
    assert sorted(tried) == list(range(2, blocks + 1))
    assert not later_blocks([attempt], attempt.pack)


def test_every_cell_is_measured_again_in_a_seeded_order(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path, cells=8)
    before = newest(sweep, pack)
    order: list[tuple[str, int, int]] = []
    begin_again = Sweep.begin_again

    def noted(self: Sweep, attempt: Attempt, block: int) -> Any:
        order.append((attempt.cell_id, block, later_blocks([attempt], "p").start))
        return begin_again(self, attempt, block)

    monkeypatch.setattr(Sweep, "begin_again", noted)
    gang(sweep, pack)
    assert [block for _, block, _ in order] == [2] * 8 + [3] * 8
    assert all(block == due for _, block, due in order)
    second, third = ([c for c, block, _ in order if block == number] for number in (2, 3))
    assert sorted(second) == sorted(third) == sorted(pack.cells)
    assert len({tuple(second), tuple(third), pack.cells}) == 3
    for attempt, was in zip(newest(sweep, pack), before, strict=True):
        check_whole(attempt)
        assert (attempt.started_at, attempt.finished_at, attempt.checks) == (was.started_at, was.finished_at, was.checks)
    assert not in_flight(sweep, pack)
    gang(sweep, pack)  # nothing is due twice
    assert len(order) == 16
    # The order is that of the pack and the block, whatever is due.
    fresh, same = made_sweep(tmp_path / "other", cells=8)
    assert worker.due_again(fresh, same, 2) == second
    fresh.attempt_path(second[0], 1).unlink()
    assert worker.due_again(fresh, same, 2) == second[1:]


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_as_many_blocks_as_are_asked_for(tmp_path: Path, alone: None, blocks: int) -> None:
    sweep, pack = made_sweep(tmp_path, blocks=blocks)
    gang(sweep, pack)
    for attempt in newest(sweep, pack):
        check_whole(attempt, blocks)


def test_whose_later_blocks_are_due(tmp_path: Path) -> None:
    sweep, pack = made_sweep(tmp_path, cells=1)
    (good,) = newest(sweep, pack)
    failed = replace(good, number=2, status="failed", failure=Failure("crash", ""))
    assert later_blocks([good], "p") == range(2, 4)
    assert later_blocks([failed, good], "p") == range(2, 4)
    assert not later_blocks([], "p")
    assert not later_blocks([good], "q")  # another pack's
    assert not later_blocks([good, failed], "p")
    assert not later_blocks([replace(good, metrics={"time/total/median_s": 1.0})], "p")  # of before there were blocks
    lost = replace(good, provenance={"lost_blocks": [{"block": 2, "cause": "crash: it broke"}]})
    assert later_blocks([lost], "p") == range(3, 4)
    many = replace(lost, config={**good.config, "measure": {**good.config["measure"], "blocks": 9}})
    assert later_blocks([many], "p") == range(3, 10)
    twice = [{"block": block, "cause": ""} for block in range(2, 2 + KILLS)]
    assert not later_blocks([replace(many, provenance={"lost_blocks": twice})], "p")


def test_a_block_that_is_wrong_makes_the_result_none(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path, cells=2)
    wrong = pack.configs[pack.cells[0]]["seed"]

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        return replace(three_seconds(work, gang, say), check=WRONG if work.seed == wrong else GOOD)

    monkeypatch.setattr(worker, "measure_again", measure)
    gang(sweep, pack)
    failed, good = newest(sweep, pack)
    check_whole(good)
    assert (failed.number, failed.status) == (1, "failed")
    assert failed.failure == Failure("numerics", "block 2 of timings: out: error 2 above its bound 1")
    assert failed.checks["errors"] == {"out": 2.0}
    assert not any(key.startswith(("time/", "compute/")) for key in failed.metrics)
    assert failed.metrics["memory/peak_bytes"] == 7.0
    assert not failed.samples
    assert [later["block"] for later in failed.again] == [2]
    assert not in_flight(sweep, pack)


def test_a_block_is_for_the_attempt_of_its_own_pack(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another pack, at the same cells while this one was taken for ended, has a newer result before the block begins."""
    sweep, pack = made_sweep(tmp_path)
    first, second, _ = worker.due_again(sweep, pack, 2)

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        if work.seed == pack.configs[first]["seed"] and not sweep.attempts(second)[1:]:
            sweep.finish(replace(sweep.attempts(second)[0], number=sweep.begin(second, "q").number, pack="q"))
        return three_seconds(work, gang, say)

    monkeypatch.setattr(worker, "measure_again", measure)
    gang(sweep, pack)
    for cell_id in set(pack.cells) - {second}:
        check_whole(sweep.attempts(cell_id)[-1])
    own, newer = sweep.attempts(second)
    assert (own.pack, newer.pack) == ("p", "q")
    assert [(a.status, a.blocks, a.lost_blocks) for a in (own, newer)] == [("ok", 1, [])] * 2
    line = "pack p leaves out block 2 of timings: attempt 2 of pack q is newer"
    assert line in sweep.attempt_path(second, 2, "log").read_text()
    assert capfd.readouterr().out.count(line) == 1
    assert not in_flight(sweep, pack)


TOO_FAST = "forward: 2.5e+04 TFLOP/s per device is 25.3 times the peak of 989 (conf/device entry for NVIDIA H100 80GB HBM3)"


def test_numbers_that_cannot_be_true_are_no_result(tmp_path: Path) -> None:
    sweep, pack = made_sweep(tmp_path, cells=1)
    (good,) = newest(sweep, pack)
    impossible = Measured(dict(good.metrics), times(1e-9), GOOD, implausible=TOO_FAST)
    first = worker.attempt_of(impossible, sweep.begin(good.cell_id, "q"), Cell.from_config(good.config), sweep, {})
    later = worker.amended(good, sweep.begin_again(good, 2), impossible)
    for attempt, cause in ((first, TOO_FAST), (later, f"block 2 of timings: {TOO_FAST}")):
        assert (attempt.status, attempt.failure) == ("failed", Failure("implausible", cause))
        assert not any(key.startswith(("time/", "compute/")) for key in attempt.metrics)
        assert attempt.metrics["check/out_error"] == 0.1
        assert not attempt.samples
        assert not tries_again([attempt], {})  # as launches say it that are older than this class
    # A result that is wrong is the better reason.
    wrong = worker.speaks_against(replace(impossible, check=WRONG))
    assert wrong == Failure("numerics", "out: error 2 above its bound 1")
    assert worker.speaks_against(Measured(check=GOOD)) is None


def test_a_gang_records_what_cannot_be_true_and_goes_on(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path, cells=4)
    fresh, known = pack.cells[0], pack.cells[1]
    sweep.attempt_path(fresh, 1).unlink()

    def first(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        return Measured({"time/blocks": 1.0, "compute/mfu": 25.3}, times(1e-9), GOOD, implausible=TOO_FAST)

    def later(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        cannot_be = TOO_FAST if work.seed == pack.configs[known]["seed"] else None
        return replace(three_seconds(work, gang, say), implausible=cannot_be)

    monkeypatch.setattr(worker, "measure_cell", first)
    monkeypatch.setattr(worker, "measure_again", later)
    gang(sweep, pack)
    gang(sweep, pack)  # it is not tried again
    found = newest(sweep, pack)
    assert [a.failure for a in found[:2]] == [
        Failure("implausible", TOO_FAST), Failure("implausible", f"block 2 of timings: {TOO_FAST}"),
    ]  # fmt: skip
    for attempt in found[:2]:
        assert (attempt.number, attempt.status, attempt.samples) == (1, "failed", {})
        assert not any(key.startswith(("time/", "compute/")) for key in attempt.metrics)
    for attempt in found[2:]:
        check_whole(attempt)
    states = {c.id: (c.state, c.failure, c.cause) for c in settled(Watch(sweep)).cells}
    assert states[fresh] == ("failed", "implausible", TOO_FAST)


@pytest.mark.slow
def test_real_blocks_of_real_cells(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "measure_again", measure_again)
    small = ["cp=none", "scale=1x1", "heads=2x2x8", "dtype=float64", "measure.max_iterations=12", "measure.precision=1e-9"]
    grids = (
        ["mask=causal", "seqlen=64"],
        ["mask=causal_document", "mask.samples=2", "lengths=fixed", "lengths.length=50", "seqlen=96"],
    )
    cells = [planned.cell for grid in grids for planned in look([*small, *grid, "kernel=sdpa_flash"]).cells]
    sweep, pack = made_sweep(tmp_path, cells=0)
    pack = replace(
        pack, cells=tuple(c.id for c in cells), configs={c.id: c.config for c in cells}, seconds={c.id: 100.0 for c in cells}
    )  # fmt: skip
    gang(sweep, pack)
    for attempt in newest(sweep, pack):
        metrics, samples = attempt.metrics, attempt.samples
        assert (attempt.status, attempt.blocks, attempt.lost_blocks) == ("ok", 3, []), attempt.failure
        draws = int(metrics.get("draws/count", 1))
        assert len(samples["total_s"]) == 3 * 4 * draws  # twelve iterations are shared by three blocks
        assert [later["iterations"] for later in attempt.again] == [4 * draws] * 2
        assert metrics["time/iterations"] == 12
        for phase in ("forward", "backward", "total"):
            median = metrics[f"time/{phase}/median_s"]
            assert median == pytest.approx(sum(samples[f"block_{phase}_s"]) / 3)
            halves = [samples[f"{phase}_s"][i : i + 4] for i in range(0, 12 * draws, 4)]
            medians = [sum(sorted(half)[1:3]) / 2 for half in halves]
            assert samples[f"block_{phase}_s"] == pytest.approx(
                [sum(medians[i : i + draws]) / draws for i in range(0, 3 * draws, draws)]
            )
        flops = 4 * 3.5 * metrics["mask/area"] * 2 * 8
        assert metrics["compute/tflops_per_gpu"] == pytest.approx(flops / metrics["time/total/median_s"] / 1e12)
        assert metrics["compute/mfu"] == pytest.approx(metrics["compute/tflops_per_gpu"] / metrics["compute/peak_tflops"])


def test_a_block_that_raises_is_lost_and_the_next_gang_goes_on(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, pack = made_sweep(tmp_path)
    calls = 0

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("it broke")
        return three_seconds(work, gang, say)

    monkeypatch.setattr(worker, "measure_again", measure)
    begun = begun_of(sweep, pack)
    with pytest.raises(Exit):
        gang(sweep, pack)
    assert len(in_flight(sweep, pack)) == 1
    assert [a.status for a in newest(sweep, pack)] == ["ok"] * 3
    assert begun_of(sweep, pack) == begun + 2  # which is progress
    gang(sweep, pack)
    assert calls == 6  # none is tried twice
    for attempt in newest(sweep, pack):
        check_whole(attempt)
    (lost,) = [block for a in newest(sweep, pack) for block in a.lost_blocks]
    assert lost == {"block": 2, "cause": "crash: rank 0: RuntimeError: it broke"}
    (which,) = [a.cell_id for a in newest(sweep, pack) if a.lost_blocks]
    log = sweep.attempt_path(which, 1, "log").read_text()
    assert "block 2 of timings" in log
    assert "rank 0: Traceback" in log


def test_a_cell_that_loses_blocks_is_left_alone(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path, cells=1, blocks=9)

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        raise MemoryError("there is no room")

    monkeypatch.setattr(worker, "measure_again", measure)
    gangs = 0
    while True:
        gangs += 1
        try:
            gang(sweep, pack)
            break
        except Exit:
            assert gangs < 9
    assert gangs == KILLS + 1
    (attempt,) = newest(sweep, pack)
    assert (attempt.status, attempt.blocks) == ("ok", 1)
    assert [lost["cause"] for lost in attempt.lost_blocks] == ["oom: rank 0: MemoryError: there is no room"] * KILLS


def test_a_kernel_that_is_no_longer_there_costs_its_block(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path, cells=1)
    monkeypatch.setattr(worker, "measure_again", lambda *_: Measured(unavailable="it has gone"))
    gang(sweep, pack)
    (attempt,) = newest(sweep, pack)
    check_whole(attempt)
    assert [lost["cause"] for lost in attempt.lost_blocks] == ["unsupported: it has gone"] * 2


def test_a_stop_between_blocks_loses_nothing(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path)
    calls = 0

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        nonlocal calls
        calls += 1
        if calls == 4:
            pack.write_note("stop.json", Failure("timeout", "the time limit of its job came"))
        return three_seconds(work, gang, say)

    monkeypatch.setattr(worker, "measure_again", measure)
    gang(sweep, pack)
    assert calls == 4
    assert sum(a.blocks for a in newest(sweep, pack)) == 3 + 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    agent.begin_anew(sweep, pack)  # the job was requeued
    gang(sweep, pack)
    assert calls == 6
    assert [a.blocks for a in newest(sweep, pack)] == [3, 3, 3]
    assert not any(a.lost_blocks for a in newest(sweep, pack))


def test_a_requeued_job_says_what_ended_the_block_in_flight(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path)
    sweep.begin_again(newest(sweep, pack)[0], 2)
    pack.write_note("stop.json", Failure("preempted", "Slurm took its job off the nodes"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    agent.begin_anew(sweep, pack)
    gang(sweep, pack)
    for attempt in newest(sweep, pack):
        check_whole(attempt)
    assert newest(sweep, pack)[0].lost_blocks == [{"block": 2, "cause": "preempted: Slurm took its job off the nodes"}]


def test_a_cell_that_was_cancelled_meanwhile_keeps_what_it_has(tmp_path: Path, alone: None) -> None:
    sweep, pack = made_sweep(tmp_path)
    (pack.folder / "cancel").mkdir()
    (pack.folder / "cancel" / pack.cells[1]).touch()
    gang(sweep, pack)
    assert [(a.status, a.blocks) for a in newest(sweep, pack)] == [("ok", 3), ("ok", 1), ("ok", 3)]
    for attempt in newest(sweep, pack):
        check_whole(attempt)
    assert [lost["cause"] for lost in newest(sweep, pack)[1].lost_blocks] == ["cancelled: python -m lcbench.cancel"] * 2


def of_this_process(pack: Pack) -> None:
    """Its job is alive as long as the test is."""
    job = {"launcher": "local", "pid": os.getpid(), "pids": [os.getpid()], "host": os.uname().nodename, "started_at": time.time()}
    write_json(pack.folder / "job.json", job)


def test_cancelling_a_cell_that_has_its_result_ends_its_later_blocks(
    tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]
) -> None:
    _, ended = made_sweep(tmp_path / "ended")
    assert cancel.main([ended.cells[1], f"--results={tmp_path / 'ended'}"]) == 0
    assert f"cell {ended.cells[1]} is not under way: it is ok" in capsys.readouterr().out
    assert not (ended.folder / "cancel").exists()
    sweep, pack = made_sweep(tmp_path)
    command = [pack.cells[1], f"--results={tmp_path}"]
    of_this_process(pack)
    assert pack.cells[1] in settled(Watch(sweep)).under_way
    assert cancel.main(command) == 0
    said = f"cell {pack.cells[1]} keeps its result; its blocks of timings from 2 on are cancelled: {sweep.command('status')}\n"
    assert capsys.readouterr().out == said
    gang(sweep, pack)
    assert [(a.status, a.blocks) for a in newest(sweep, pack)] == [("ok", 3), ("ok", 1), ("ok", 3)]
    assert not settled(Watch(sweep)).under_way
    assert cancel.main(command) == 0
    assert "is not under way: it is ok" in capsys.readouterr().out


def test_the_local_launcher_says_which_block_it_is_at(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path)
    said = []

    def measure(work: Work, gang: Gang, say: Callable[[str], None]) -> Measured:
        said.append(_progress(sweep, pack))
        return three_seconds(work, gang, say)

    assert _progress(sweep, pack) == (3, "block 2 of 3")  # between two cells
    monkeypatch.setattr(worker, "measure_again", measure)
    gang(sweep, pack)
    assert [done for done, _ in said] == [3] * 6
    assert sorted(text for _, text in said[:3]) == sorted(f"block 2 of 3: {pack.configs[c]['cp']['name']} {c}" for c in pack.cells)
    assert all(text.startswith("block 3 of 3: ") for _, text in said[3:])
    assert _progress(sweep, pack) == (3, "finishing")
    running = sweep.begin(pack.cells[0], pack.id)
    assert _progress(sweep, pack) == (3, f"{pack.configs[pack.cells[0]]['cp']['name']} {running.cell_id}")


def test_a_full_disk_ends_later_blocks_and_costs_none(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, pack = made_sweep(tmp_path)

    def full(size: int) -> bytes:
        raise OSError("No space left on device")

    monkeypatch.setattr(worker.os, "urandom", full)  # type: ignore[attr-defined]
    gang(sweep, pack)
    assert "no room for results" in sweep.pack_file("p", "end.json")["failure"]["cause"]
    assert [(a.status, a.blocks, a.lost_blocks) for a in newest(sweep, pack)] == [("ok", 1, [])] * 3
    assert not in_flight(sweep, pack)


def test_what_a_rank_said_in_all_blocks_of_a_cell_is_one_text(tmp_path: Path) -> None:
    mine, other = cell_mark("a", 1), cell_mark("b", 1)
    for gang_number, text in (
        (2, f"{mine}\nthird\n"),
        (0, f"{mine}\nfirst\n{other}\nno\n{mine}\nsecond\n"),
        (10, f"{mine}\nlast\n"),
    ):
        folder = tmp_path / "node-0" / "run" / f"attempt_{gang_number}" / "1"
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(text)
        (folder / "stderr.log").write_text(f"{mine}\n{mine}\n")
    assert list(said_by_ranks(tmp_path, "a", 1, 2)) == [(1, "stdout", "first\nsecond\nthird\nlast")]


def asked(state: str) -> Watching:
    return says({("n", 0): Job(state, "", "7")})


def of_slurm(pack: Pack) -> None:
    replace(pack, launcher="slurm", job_name="n").write()
    write_json(pack.folder / "job.json", {"job_id": "7", "started_at": time.time() - 60})


def test_the_end_of_a_job_in_a_later_block_fails_nothing(tmp_path: Path) -> None:
    sweep, pack = made_sweep(tmp_path)
    of_slurm(pack)
    sweep.begin_again(newest(sweep, pack)[0], 2)
    standing = settled(asked("TIMEOUT")(sweep))
    assert standing.ended
    assert standing.counts() == {"ok": 3}
    assert not standing.under_way
    lost = [a.lost_blocks for a in newest(sweep, pack)]
    # The one in flight, and those that nobody came to.
    assert lost == [[{"block": block, "cause": "timeout: its job ended as TIMEOUT"} for block in (2, 3)]] * 3
    assert [len(sweep.attempts(c)) for c in pack.cells] == [1, 1, 1]
    assert not sweep.again("p")
    assert settled(asked("TIMEOUT")(sweep)).seen == standing.seen  # said once


def test_a_job_that_still_measures_again_is_running_and_says_how_long(tmp_path: Path) -> None:
    sweep, pack = made_sweep(tmp_path)
    of_slurm(pack)
    attempts = newest(sweep, pack)
    for attempt in attempts:  # as long as was expected of the first block
        sweep.finish(replace(attempt, started_at=attempt.finished_at - 50.0))
    standing = settled(asked("RUNNING")(sweep))
    assert not standing.ended
    assert standing.counts() == {"ok": 3}
    assert standing.under_way == set(pack.cells)  # nobody else is to begin with them
    assert standing.packs[0].done == 3
    assert standing.packs[0].reason == "6 more blocks of timings"
    assert standing.left().running_s == pytest.approx(150.0)
    marker = sweep.begin_again(newest(sweep, pack)[0], 2)
    sweep.finish(worker.amended(newest(sweep, pack)[0], replace(marker, started_at=time.time() - 25.0), three_seconds(*[None] * 3)))  # type: ignore[arg-type]
    sweep.end_again(marker)
    assert settled(asked("RUNNING")(sweep)).left().running_s == pytest.approx(125.0, rel=1e-3)


def killed_at(step: int, root: Path, work: Callable[[], None]) -> bool:
    """Do it in a process that gets SIGKILL before its ``step``-th change of a file below ``root``; whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0

        def look(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event in ("os.rename", "os.remove", "os.link") or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and str(args[0]).startswith(str(root)):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            sys.addaudithook(look)
            work()
            code = 0
        finally:
            os.kill(os.getpid(), signal.SIGTERM) if code else os.execv("/bin/true", ["true"])
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.slow
def test_kill_9_at_any_step_loses_the_block_in_flight_at_most(tmp_path: Path) -> None:
    results, whole = tmp_path / "results", tmp_path / "whole"
    sweep, pack = made_sweep(results, cells=2)
    results.rename(whole)
    step = lost = 0
    dies = True
    while dies:
        step += 1
        shutil.copytree(whole, results)
        dies = killed_at(step, results, lambda: gang(sweep, pack))
        after = newest(sweep, pack)
        assert all(a.status == "ok" for a in after)
        assert not killed_at(0, results, lambda: gang(sweep, pack))
        for attempt, was in zip(newest(sweep, pack), after, strict=True):
            check_whole(attempt)
            assert attempt.blocks >= was.blocks
        lost_now = sum(len(a.lost_blocks) for a in newest(sweep, pack))
        assert lost_now <= 1
        lost += lost_now
        assert not in_flight(sweep, pack)
        shutil.rmtree(results)
    assert step > 20
    assert lost >= 4 * 2  # at least while it measured and before its result was written


@pytest.mark.slow
def test_gangs_that_are_killed_again_and_again(tmp_path: Path) -> None:
    chance = random.Random(0)
    sweep, pack = made_sweep(tmp_path / "results", cells=4, blocks=4)
    kills = 0
    while killed_at(chance.randint(1, 24), tmp_path, lambda: gang(sweep, pack)):
        kills += 1
        assert all(a.status == "ok" for a in newest(sweep, pack))
    assert kills > 2
    assert not in_flight(sweep, pack)
    tried = [a for a in newest(sweep, pack) if len(a.lost_blocks) < KILLS]
    for attempt in tried:
        check_whole(attempt, 4)
    assert sum(len(a.lost_blocks) for a in newest(sweep, pack)) <= kills
