"""What commands print for people: at any width, in any height, and when they are left with Ctrl-C. All times here are synthetic."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import geometric_mean

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

from lcbench.commands import cancel, collect, compare, cp, kernels, logs, masks, rerun, results, status, sync
from lcbench.commands import report as report_command
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.report import comparison
from lcbench.report.ending import INTERRUPTED
from lcbench.report.fitted import LEAST, Column, Fitted
from lcbench.report.standing import Standing, sweeps_table, time_left
from lcbench.report.table import by_problem, cells_table, summary
from lcbench.runs.attempt import Attempt, Failure, Running
from lcbench.runs.files import write_json
from lcbench.runs.jobs import CellState, PackState, SweepStatus, Watch
from lcbench.runs.manifest import Entry
from lcbench.runs.records import Look, Record
from lcbench.runs.store import Sweep
from tests.report.made import NODE_FAILURE, SOCKET_FAILURE, made_sweep
from tests.slurm.stage import ROOT

WIDTHS = (80, 100, 120, 200)
ID = re.compile(r"\b[0-9a-f]{12}\b")


@pytest.fixture(scope="module")
def big(big: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A copy, which may be written into and has other sweeps beside it."""
    root = tmp_path_factory.mktemp("results")
    shutil.copytree(big.folder, root / big.name)
    return Sweep(root, big.name)


@pytest.fixture(scope="module")
def later(big: Sweep) -> Sweep:
    """Some cells once more: allgather is faster, usp slower with one of the masks, two have failed."""
    grid = ["cp=allgather,usp,tokenring,ring,loongtrain", "mask=full,causal", "seqlen=64k,128k", "scale=1x8,2x8"]
    same = [*grid, "heads=32x8x128", "kernel=flash_attn3", "site=plain"]
    made_sweep(big.root, "before", same, seed=1)
    lost = {"tokenring flash_attn3 full 64k 1x8": NODE_FAILURE, "tokenring flash_attn3 full 64k 2x8": NODE_FAILURE}
    return made_sweep(big.root, "after", same, seed=2, slower={"allgather": 0.9, "usp flash_attn3 causal": 1.2}, failed=lost)


def printed(shown: RenderableType, width: int, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), record=True, force_terminal=False)
    console.print(shown)
    return console.export_text().splitlines()


def room_of(head: str, lines: list[str]) -> int:
    """How many columns the values under a head have; with the last column as many as there are."""
    line = next(line for line in lines if re.search(rf"(^|  ){re.escape(head)}(  |$)", line.rstrip()))
    begin = line.index(head)
    following = re.search(r"\S", line[begin + len(head) :])
    rule = next(line for line in lines if line.startswith("──"))
    return (begin + len(head) + following.start() if following else len(rule.rstrip())) - begin


# -- tables by width -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_ids_and_what_a_cell_is_are_there_at_any_width(big: Sweep, width: int) -> None:
    seen = big.look()
    lines = printed(cells_table(seen, big.name), width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert set(ID.findall(text)) == set(seen.records)
    assert "…" not in text
    assert room_of("what", lines) >= LEAST
    # Each failure has its cause whole, on lines of its own below its row.
    place = next(i for i, line in enumerate(lines) if "failed" in line)
    assert lines[place + 1].startswith("  ")
    assert SOCKET_FAILURE.cause in " ".join(text.split())
    assert ("MFU" in text) == (width >= 120)
    assert lines[0].split() == ["sweep", "big:", "kernel", "flash_attn3,", "heads", "32x8x128"]
    assert text.count("flash_attn3") == 1  # what all cells share stands in the title


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("main", "arguments", "heads", "words"),
    [
        (status.main, ["before", "--all"], ["what"], []),
        (status.main, [], [], ["last", "before", "after", "big"]),
        (compare.main, ["before", "after"], ["what"], ["allgather", "usp"]),
        (masks.main, ["mask=causal_document,sliding_window_full,block_random", "seqlen=64k"], ["mask"], [
            "causal_document(web_text)", "sliding_window_full", "block_random", "zigzag"]),
        (cp.main, ["cp=ring,usp,ulysses", "mask=causal_document", "seqlen=64k", "scale=12x8"], ["what"], [
            "balance", "cannot split"]),
        (kernels.main, ["kernel=naive,sdpa_flash,flash_attn2,cudnn"], ["one call"], ["sdpa_flash", "flash_attn2, cudnn"]),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_every_table_fits_and_says_what_it_is_about(
    main: Callable[[list[str]], int], arguments: list[str], heads: list[str], words: list[str], width: int, later: Sweep,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    takes_results = main in (status.main, compare.main)
    main([*arguments, *(["--results", str(later.root)] if takes_results else [])])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "python -m" not in line]  # what is to be copied is not folded
    assert max(map(cell_len, lines)) <= width
    assert "…" not in out or main is cp.main
    for word in words:
        assert word in out
    for head in heads:
        table = lines[next(i for i, line in enumerate(lines) if re.search(rf"(^|  ){head}(  |$)", line)) :]
        assert room_of(head, table) >= LEAST, table[:3]
    if "before" in arguments:
        ids = set(ID.findall(out))
        assert ids <= set(later.entries())
        assert len(ids) >= 10


def test_what_matters_least_is_left_out_first_and_nothing_is_cut() -> None:
    table = Fitted("t", [
        Column("id"), Column("what", folds=True, wanted=30), Column("first", 9, right=True), Column("then", 8, right=True),
    ])  # fmt: skip
    words = "many words about this one " * 2
    table.add("0123456789ab", words, "1.0", "2.0", below="why " * 30)
    shown = {width: [c.head for c in table.shown(width)] for width in (40, 55, 60, 90)}
    assert shown == {
        40: ["id", "what"], 55: ["id", "what", "then"], 60: ["id", "what", "first", "then"], 90: ["id", "what", "first", "then"],
    }  # fmt: skip
    for width in (36, 40, 60, 300):
        lines = printed(table, width)
        assert max(map(cell_len, lines)) <= width
        assert " ".join(lines).count("why") == 30
        text = "\n".join(lines)
        assert "0123456789ab" in text
        assert text.count("words") == 2


@pytest.mark.slow
def test_a_pipe_gets_wide_tables_and_words_are_never_markup(tmp_path: Path) -> None:
    table = Fitted("[red]t[/]", [Column("[b]x[/b]")])
    table.add("[/red] \x1b[2J", below="[bold]y")
    text = "\n".join(printed(table, 80))
    for words in ("[red]t[/]", "[/red] \\x1b[2J", "[bold]y"):
        assert words in text
    made_sweep(tmp_path, "s", ["cp=ring,usp", "seqlen=64k", "scale=1x8"])
    command = [sys.executable, "-m", "lcbench.status", "s", "--all", "--results", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert "ring" in done.stdout
    narrow = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment | {"COLUMNS": "80"}, check=True)
    assert max(map(cell_len, narrow.stdout.splitlines())) <= 80 < max(map(cell_len, done.stdout.splitlines()))


# -- the table of a sweep ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cells_are_ranked_within_their_problem(big: Sweep) -> None:
    seen = big.look()
    problems = list(by_problem(seen.records))
    assert len(problems) == 64
    order = []
    for problem in problems:
        seconds = [r.last.metrics["time/total/median_s"] for c in problem if (r := seen.records[c]).last and r.status == "ok"]  # type: ignore[union-attr]
        assert seconds == sorted(seconds)
        assert next(iter(problem.values())) == 1.0
        assert [ratio for ratio in problem.values() if ratio < 1e9] == pytest.approx([s / seconds[0] for s in seconds])
        order += problem
    assert ID.findall("\n".join(printed(cells_table(seen, "big"), 120))) == order
    console = Console(width=120, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(cells_table(seen, "big"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    bold = re.findall(r"\x1b\[1m([0-9a-f]{12})", text)
    assert bold == [next(iter(problem)) for problem in problems]
    assert text.count("1.00x") == 64
    assert re.search(r"\+\d+\.\d %", text)


@pytest.mark.slow
def test_a_choice_is_summed_up_in_few_lines(big: Sweep) -> None:
    said = summary(big, big.look(), list(big.entries()))
    assert said is not None
    lines = printed(said, 100)
    text = " ".join(" ".join(lines).split())
    assert text.startswith("Use groupcast. Over 6")
    rows = [line for line in lines if re.search(r"\d+ of 64$", line.rstrip())]
    assert len(rows) == 5
    assert "and 3 more choices" in text


def test_one_problem_names_its_fastest_and_no_choice_nothing(tmp_path: Path) -> None:
    grid = ["mask=causal", "seqlen=64k", "scale=1x8"]
    few = made_sweep(tmp_path, "few", ["cp=ring,usp", *grid], slower={"ring": 2.0})
    said = summary(few, few.look(), list(few.entries()))
    assert said is not None
    (line,) = printed(said, 120)
    assert line.startswith("fastest for causal 64k 1x8: usp (ring ")
    one = made_sweep(tmp_path, "one", ["cp=ring", *grid])
    assert summary(one, one.look(), list(one.entries())) is None
    assert not any("vs best" in line for line in printed(cells_table(one.look(), "one"), 120))
    nothing = made_sweep(tmp_path, "nothing", ["cp=ring", *grid], failed={"": Failure("oom", "no memory")})
    assert summary(nothing, nothing.look(), list(nothing.entries())) is None
    assert "no memory" in "\n".join(printed(cells_table(nothing.look(), "nothing"), 80))


@pytest.mark.parametrize(("noise", "width", "there"), [(0.01, 80, False), (0.01, 120, True), (0.4, 80, True)])
def test_noise_stands_beside_the_times_where_it_is_large_or_there_is_room(
    tmp_path: Path, noise: float, width: int, there: bool
) -> None:
    grid = ["cp=loongtrain,usp", "mask=causal_document,full", "lengths=long_text_64k", "seqlen=64k,128k", "scale=1x8"]
    sweep = made_sweep(tmp_path, "s", grid, noise=noise, blocks=1)
    assert ("noise" in "\n".join(printed(cells_table(sweep.look(), "s"), width))) == there


# -- where a sweep stands ------------------------------------------------------------------------------------------------


@cache
def planned() -> list[Cell]:
    """512 cells."""
    grid = ["cp=ring,usp,lightseq,tokenring", "mask=full,causal,sliding_window,causal_document", "seqlen=64k,128k,256k,512k"]
    return [p.cell for p in look([*grid, "scale=1x8,2x8,4x8,8x8", "direction=forward,forward_backward"]).cells]


def standing_of(packs: int, causes: int, failures: int, *, name: str = "live") -> tuple[SweepStatus, Sweep]:
    """A sweep of 512 cells in so many jobs, each at a cell, of which so many failed of so many causes; nothing is on disk."""
    cells, now = planned(), time.time()
    states, records = [], {}
    jobs = [
        PackState(f"p{n}", "slurm", f"2842_{n}", "RUNNING", "", tuple(c.id for c in cells[n::packs]), 1, "n", seconds={
            c.id: 60.0 for c in cells[n::packs]})
        for n in range(packs)
    ]  # fmt: skip
    for number, cell in enumerate(cells):
        pack = jobs[number % packs]
        marks: tuple[Running, ...] = ()
        tries: tuple[Attempt, ...] = ()
        state = CellState(cell.id, cell.label, "pending", 0, pack.id, pack.job_id, "RUNNING")
        if number < packs:
            state = CellState(cell.id, cell.label, "running", 1, pack.id, pack.job_id, "RUNNING", elapsed_s=130.0)
            marks = (Running(cell.id, 1, pack.id, now - 130),)
        elif number < packs + failures:
            cause = f"cause {chr(97 + number % causes)} of letters, which is long: " + 3 * SOCKET_FAILURE.cause
            why = Failure("nccl", cause)
            state = CellState(cell.id, cell.label, "failed", 1, pack.id, pack.job_id, "RUNNING", "nccl", cause)
            tries = (Attempt(cell.id, name, 1, "failed", why, pack=pack.id, started_at=now - 300, finished_at=now - 200),)
        states.append(state)
        records[cell.id] = Record(Entry(cell), tries, marks)
    return SweepStatus(Look(records, (), None), jobs, states), Sweep(Path("/r"), name)


@pytest.mark.parametrize("name", ["live", "a-name-" * 30])
@pytest.mark.parametrize(("packs", "causes", "failures"), [(200, 2, 30), (200, 26, 60), (1, 1, 1), (20, 1, 0), (3, 26, 400)])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 24), (80, 12), (200, 60)])
def test_counts_and_time_left_come_first_and_all_of_it_fits(
    name: str, packs: int, causes: int, failures: int, width: int, height: int
) -> None:
    standing, sweep = standing_of(packs, causes, failures, name=name)
    lines = printed(Standing(standing, sweep, height=height - 1), width, height)
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width
    assert f"{failures}/512" in lines[0]
    assert f"{packs} running" in lines[0]
    assert not failures or f"{failures} failed" in lines[0]
    assert re.match(r"about .* left, until \d\d:\d\d", lines[1])
    text = "\n".join(lines)
    if height > 12 and failures and len(name) < 20:
        assert any(line.startswith("failed") for line in lines)
        assert f"--failed {name}" in text
        assert ("--exclude node003" in text) == (failures > 1)  # one failure alone makes no suspect
    if height > 12 and (packs < 200 or causes < 3):
        assert any(line.startswith("running") for line in lines)
        assert ID.search(next(line for line in lines if line.startswith("running")))


def test_time_left_says_when_and_how_fast() -> None:
    standing, _ = standing_of(4, 1, 30)
    said = time_left(standing, now=1.0e9)
    moment = time.strftime("%H:%M", time.localtime(1.0e9 + standing.left().running_s))
    assert f"until {moment}" in said
    assert re.search(r"\(1x8: \d+/128, 2x8: ", said)
    assert re.search(r"[\d.e+]+ cells/min", time_left(standing))
    ended = SweepStatus(standing.seen, [], standing.cells)
    assert time_left(ended) == ""


@pytest.mark.slow
def test_failures_are_grouped_by_cause_and_node_and_jobs_are_a_line(big: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([big.name, "--results", str(big.root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "512/512" in lines[0]
    assert "13 failed" in lines[0]
    assert sum(SOCKET_FAILURE.cause in line for line in lines) == 1
    (row,) = (line for line in lines if SOCKET_FAILURE.cause in line)
    assert row.split()[:3] == ["failed", "5", "nccl"]
    assert "8 of 13 failures name node003." in "\n".join(lines)
    assert lines[-1].split(maxsplit=1)[1].startswith("python -m lcbench.rerun --failed big --exclude node003")
    assert len(lines) < 24
    packs = [PackState(str(n), "slurm", str(n), state, why, (), 0, "n") for n, (state, why) in enumerate(
        128 * [("COMPLETED", "")] + 2 * [("RUNNING", "")] + 3 * [("PENDING", "Priority")])]  # fmt: skip
    shown = "\n".join(printed(Standing(SweepStatus(Look({}, (), None), packs, []), big), 80))
    assert "128 ended; 3 pending, Priority; 2 running" in shown


@pytest.mark.slow
def test_all_gives_every_cell_a_row(later: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([later.name, "--all", "--results", str(later.root)]) == 1
    assert set(ID.findall(capsys.readouterr().out)) == set(later.entries())
    assert status.main([later.name, "--results", str(later.root)]) == 1
    assert len(set(ID.findall(capsys.readouterr().out))) == 2  # those that failed


@pytest.mark.slow
def test_sweeps_are_listed_with_what_one_looks_for(later: Sweep) -> None:
    lines = printed(sweeps_table(later.root), 120)
    found = {line.split()[0]: line.split() for line in lines[3:]}
    assert list(found) == ["after", "before", "big"]
    assert found["after"][-1] == "last"
    assert "last" not in found["before"]
    assert found["big"][3:9] == ["512", "483", "13", "0", "16", "h100"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["big"][1])


def test_a_sweep_that_cannot_be_read_is_listed_with_why(tmp_path: Path) -> None:
    made_sweep(tmp_path, "good", ["cp=ring", "seqlen=64k", "scale=1x8"])
    write_json(tmp_path / "later" / "manifest.json", {"schema": 999, "sweep": "later"})
    text = "\n".join(printed(sweeps_table(tmp_path), 80))
    assert "good" in text
    assert "later" in text
    assert "999" in text


@pytest.mark.slow
def test_the_state_of_jobs_is_asked_only_where_cells_have_no_result(later: Sweep) -> None:
    asked: list[str] = []

    def watch(sweep: Sweep) -> Watch:
        asked.append(sweep.name)
        return Watch(sweep)

    sweeps_table(later.root, watch)
    assert not asked
    unfinished = Sweep(later.root.parent / "other", "open")
    unfinished.add([Entry(p.cell) for p in look(["cp=ring", "seqlen=64k", "scale=1x8"]).cells], command=[])
    sweeps_table(unfinished.root, watch)
    assert asked == ["open"]


# -- leaving -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Sweep]:
    """A sweep with a cell in flight, in a pack of a process that lives."""
    sweep = Sweep(tmp_path, "live")
    cells = [p.cell for p in look(["cp=ring,usp", "seqlen=64k", "scale=1x8"]).cells]
    sweep.add([Entry(c) for c in cells], command=[])
    agent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job = {"pid": agent.pid, "pids": [agent.pid], "host": socket.gethostname(), "started_at": time.time()}
    write_json(sweep.pack_folder("p") / "job.json", job)
    pack = {"launcher": "local", "cells": [c.id for c in cells], "job_name": "", "index": 0, "scale": "1x8"}
    write_json(sweep.pack_folder("p") / "pack.json", {
        **pack, "settings": {"site": {}, "retry": {}}, "seconds": {c.id: 100.0 for c in cells}, "configs": {},
    })  # fmt: skip
    sweep.begin(cells[0].id, "p")
    yield sweep
    agent.kill()
    agent.wait()


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["status", "live", "--follow"], "lcbench.status live --results {root} --follow"),
        (["status", "live", "--follow", "--json"], "lcbench.status live --results {root} --follow"),
        (["status", "live", "--follow", "--quiet"], "lcbench.status live --results {root} --follow"),
        (["collect", "live", "--wait"], "lcbench.collect live --results {root} --wait"),
        (["logs", "{cell}", "--follow"], "lcbench.logs {cell} --follow --results {root}"),
    ],
)
def test_ctrl_c_says_where_the_sweep_stands_and_how_to_come_back(
    live: Sweep, words: list[str], again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    names = {"root": str(live.root), "cell": next(iter(live.entries()))}
    name, *arguments = (word.format(**names) for word in words)
    main = {"status": status.main, "collect": collect.main, "logs": logs.main}[name]
    with pytest.raises(SystemExit, match=str(INTERRUPTED)):
        main([*arguments, "--results", str(live.root)])
    err = capsys.readouterr().err
    assert again.format(**names) in err
    if name == "status":
        assert "1 running, 1 pending" in err
        assert "left" in err
    assert live.running(names["cell"])  # nothing was ended


@pytest.mark.slow
def test_a_terminal_of_24_lines_shows_the_counts_and_is_left_with_ctrl_c(live: Sweep) -> None:
    import fcntl
    import pty
    import select
    import struct
    import termios

    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "lcbench.status", "live", "--follow", "--results", str(live.root)]
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, stdin=below, stdout=below, stderr=subprocess.PIPE, text=True, env=environment)
    shown, told = b"", False
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:  # who does not read a terminal stops who writes to it
        if select.select([above], [], [], 0.2)[0]:
            shown += os.read(above, 4096)
        if b"1 running" in shown and not told:
            process.send_signal(signal.SIGINT)
            told = True
    _, err = process.communicate(timeout=120)
    os.close(above)
    os.close(below)
    assert process.returncode == INTERRUPTED, err
    assert b"0/2" in shown
    assert b"Traceback" not in shown
    assert "Traceback" not in err
    assert "the sweep goes on; again: python -m lcbench.status live" in err


def test_the_list_of_commands_may_be_cut_by_its_reader() -> None:
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -m lcbench | head -1', sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.startswith("usage: lcbench")
    assert done.stderr == ""


def test_ctrl_c_in_any_command_is_one_line() -> None:
    code = (
        "import sys; from lcbench.report.ending import run\n"
        "def main(arguments): raise KeyboardInterrupt\n"
        "sys.argv = ['x']; run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (INTERRUPTED, "", "interrupted")


# -- which sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (status.main, ["{}"]), (compare.main, ["{}", "before"]), (compare.main, ["before", "{}"]), (results.main, ["{}"]),
        (report_command.main, ["{}"]), (collect.main, ["{}"]), (sync.main, ["{}"]), (rerun.main, ["--failed", "{}"]),
        (cancel.main, ["{}"]), (logs.main, ["{}/0123"]), (rerun.main, ["{}/0123"]), (cp.main, ["--cell", "{}/0123"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("typed", "meant"), [("lsat", "last"), ("befor", "before"), ("bigg", "big"), ("qqqq", "")])
@pytest.mark.slow
def test_a_sweep_that_there_is_not_names_the_one_that_was_meant(
    main: Callable[[list[str]], int], arguments: list[str], typed: str, meant: str, later: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*(word.format(typed) for word in arguments), "--results", str(later.root)])
    (line,) = capsys.readouterr().err.splitlines()
    assert (f"did you mean {meant}?" in line) == bool(meant)
    assert "there are: big, before, after" in line


# -- the others ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_comparison_answers_first_and_then_by_axis(later: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["before", "after", "--results", str(later.root)]) == 0
    out = capsys.readouterr().out
    first, second, *rest = out.splitlines()
    assert re.match(r"4 slower, 8 faster, 26 same of 38 cells in both; on average after takes \d\.\d\dx the time of before", first)
    assert second.startswith("environments: no difference in lcbench, ")
    assert "torch" in second
    assert "nccl" in second
    by_axis = {line.split()[-5]: line.split()[-4:] for line in rest[: rest.index("")] if line.split()[-1].isdigit()}
    assert by_axis["allgather"][0] == "8"
    assert by_axis["allgather"][1:] == ["0.90x", "8", "0"]
    assert by_axis["usp"][2:] == ["0", "4"]
    found = comparison.compare(comparison.side_of(Sweep(later.root, "before")), comparison.side_of(later))
    shares = {(s.axis, s.value): s for s in found.by_axis()}
    assert {axis for axis, _ in shares} == {"cp", "mask", "seqlen", "scale"}
    assert sum(s.cells for (axis, _), s in shares.items() if axis == "mask") == 38
    usp = [c.ratio.value for c in found.cells if c.cell.label.startswith("usp")]
    assert shares["cp", "usp"].ratio == pytest.approx(geometric_mean(usp))
    assert "only in before: 2 cells" in out
    assert out.count(NODE_FAILURE.cause) == 1
    (sentence, *_) = compare._noise(replace(found, run_to_run=0.022))
    assert (
        sentence == "Repeating the same cell changes its time by about 2.2 % (one standard deviation); the intervals include that."
    )


@pytest.mark.slow
def test_what_is_only_in_one_is_counted_by_cause(big: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = {
        **{f"{s} flash_attn3 full 64k 1x8": SOCKET_FAILURE for s in ("ring", "usp")},
        "allgather flash_attn3": Failure("oom", "no memory"),
    }  # fmt: skip
    grid = ["cp=ring,usp,allgather,ulysses", "mask=full,causal", "seqlen=64k", "scale=1x8", "heads=32x8x128", "kernel=flash_attn3"]
    made_sweep(tmp_path, "a", grid)
    made_sweep(tmp_path, "b", grid, failed=everything)
    assert compare.main(["a", "b", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("only in a: 4 cells")
    counts = [line.split()[:2] for line in lines[begin + 3 :] if re.match(r" *\d+  \S", line)]
    assert sorted(counts) == [["2", "nccl:"], ["2", "oom:"]]


@pytest.mark.parametrize(("ratio", "colour"), [(1.5, "31"), (0.6, "32"), (1.0, "")])
def test_the_verdict_has_its_colour(
    ratio: float, colour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["cp=ring,ulysses,usp", "mask=full,causal", "seqlen=64k,128k,256k", "scale=1x8"]
    made_sweep(tmp_path, "a", grid, seed=1)
    made_sweep(tmp_path, "b", grid, seed=2, slower={"usp": ratio})
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert compare.main(["a", "b", "--results", str(tmp_path)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"\x1b[1;{colour}m" if colour else "\x1b[1m")


@pytest.mark.slow
def test_a_dry_plan_estimates_before_it_limits_and_counts_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lcbench.commands.launchers import launcher_named

    plan = look(["-m", "cp=ring,ulysses,usp", "seqlen=64k,256k,1m", "site=plain", f"results={tmp_path}/r"])
    assert launcher_named("dry").launch_plan(plan) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    found = re.search(r"9 cells, 9 to run; estimated about ([\d.,]+) GPU-hours, at most ([\d.,]+) \(time limits\)", first)
    assert found
    expected, limits = (float(text.replace(",", "")) for text in found.groups())
    assert 0 < expected < limits
    assert re.search(r"^  9 cells, about \d+ min$", out, re.MULTILINE)
    assert not re.search(r"pack \d", out)


def test_one_schedule_shows_its_first_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cp.main(["cp=ring", "mask=causal", "seqlen=64k", "scale=2x8"]) == 0
    out = capsys.readouterr().out
    assert "rank 3" in out
    assert "rank 4" not in out
    assert "--grid prints all 16 steps of 16 ranks" in out
    assert cp.main(["cp=ring", "mask=causal", "seqlen=64k", "scale=1x2"]) == 0
    out = capsys.readouterr().out
    assert "rank 1" in out
    assert "--grid" not in out
    assert cp.main(["cp=ring,usp", "mask=causal", "seqlen=64k", "scale=2x8"]) == 0
    assert "rank 0" not in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_that_run_nothing_are_a_line_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--platform", "cpu", "mask=causal,block_random"]) == 0
    out = capsys.readouterr().out
    table, _, rest = out.partition("what runs nothing here")
    assert rest.count("on CUDA devices") == 1
    assert "flash_attn3" in rest
    assert "flash_attn3" not in table
    assert "naive" in table
    assert len(out.splitlines()) < 40


def test_rows_keep_their_style() -> None:
    table = Fitted("", [Column("x")])
    table.add(Text("red", "red"))
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(table)
    assert "\x1b[31mred" in console.file.getvalue()  # type: ignore[attr-defined]
