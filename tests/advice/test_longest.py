"""A search for the longest length that fits: rounds over a store, what it says, and real ranks that a kill does not lose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcbench.advice.longest import Guesses, Refused, Searching, capped
from lcbench.grid.build import input_bytes
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import loader_of
from lcbench.grid.expand import Plan, Planned, expand
from lcbench.grid.search import CELLS, GIB, Search
from lcbench.predict.fitted import Coefficients, Fit, KernelFit
from lcbench.predict.predictor import Predictor
from lcbench.report.longest import Choice, Longest, longest_of
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from tests.commands import lcbench
from tests.slurm.stage import ROOT

WORDS = ["cp=ring,ulysses", "kernel=sdpa_math", "scale=1x2", "heads=2x2x8", "dtype=float64", "search=max_seqlen"]
RANGE = ["search.from=64", "search.to=4k", "search.gib=1"]
KIB = 1 << 10

# What a cell of so many tokens needs in all, in bytes; or why it failed.
Needs = Callable[[Cell], float | Failure]


class Ranks:
    """Stands for a launcher and its ranks: records an attempt of each cell."""

    def __init__(self, sweep: Sweep, needs: Needs, last_round: int = 100) -> None:
        self.sweep, self.needs, self.last_round = sweep, needs, last_round
        self.taken: list[list[Cell]] = []

    def check(self, cells: list[Cell], number: int) -> str:
        if number > self.last_round:
            raise Refused("no more", 2)
        return ""

    def take(self, cells: list[Cell]) -> None:
        self.taken.append(cells)
        for cell in cells:
            found = self.needs(cell)
            number = self.sweep.begin(cell.id, "pack").number
            failure = found if isinstance(found, Failure) else None
            metrics = {} if isinstance(found, Failure) else {"memory/peak_bytes": found - input_bytes(cell)}
            self.sweep.finish(
                Attempt(cell.id, self.sweep.name, number, "failed" if failure else "ok", failure, metrics, config=cell.config)
            )


def begun(root: Path, *words: str) -> Searching:
    plan = expand([*WORDS, *RANGE, f"results={root}", "sweep=made", *words], loader_of(None))
    return Searching(plan, capped(plan), Sweep(root, "made"))


def go(searching: Searching, ranks: Ranks) -> list[Longest]:
    def write(due: list[Planned], number: int) -> None:
        searching.sweep.add([Entry(p.cell, p.skip) for p in due], command=["words"] * (number == 1), search=searching.search)

    searching.rounds(ranks, write, lambda number, cells, cost: None)
    return searching.answers()


def per_token(ring: float, ulysses: float, power: float = 1.0, fixed: float = 0.0) -> Needs:
    return lambda cell: fixed + {"ring": ring, "ulysses": ulysses}[cell.config["cp"]["name"]] * cell.problem.seqlen**power


@pytest.mark.parametrize(
    ("needs", "cells"),
    [
        (per_token(2e6, 1e6), 5),
        (per_token(3e3, 700.0, power=2), CELLS),
        (per_token(1e5, 2e5, fixed=9e8), CELLS),
        (per_token(5e5, 1e6, power=1.2), CELLS),
    ],
)
def test_the_answer_is_the_longest_length_whose_need_is_below_the_cap(tmp_path: Path, needs: Needs, cells: int) -> None:
    searching = begun(tmp_path)
    ranks = Ranks(searching.sweep, needs)
    found = go(searching, ranks)
    assert [one.cell.config["cp"]["name"] for one in found] == ["ring", "ulysses"]
    for one in found:
        lengths = searching.search.lengths(2)
        fit = [t for t in lengths if needs(Cell.from_config({**one.cell.config, "seqlen": t})) <= GIB]  # type: ignore[operator]
        assert one.tokens == max(fit)
        assert one.beyond == lengths[len(fit)]
        assert one.end == "found"
        assert one.needs_bytes is not None
        assert one.needs_bytes <= GIB
        assert one.why.startswith("needs 1.")
        assert one.cells <= cells
    # Both choices are in every round until one is at its end.
    assert len(ranks.taken[0]) == 2
    assert sum(map(len, ranks.taken)) == sum(one.cells for one in found) == len(searching.sweep.entries())


def test_out_of_memory_is_an_answer_and_is_not_tried_again(tmp_path: Path) -> None:
    full = per_token(1.5e6, 1.5e6)

    def needs(cell: Cell) -> float | Failure:
        found = full(cell)
        return found if not isinstance(found, Failure) and found < 0.9 * GIB else Failure("oom", "OutOfMemoryError: 2 GiB")

    searching = begun(tmp_path, "search.gib=2")
    ring, _ = go(searching, Ranks(searching.sweep, needs))
    assert (ring.end, ring.tokens, ring.beyond) == ("found", 640, 656)
    assert ring.why == "oom: OutOfMemoryError: 2 GiB"
    assert ring.cells <= CELLS
    again = begun(tmp_path, "search.gib=2")
    ranks = Ranks(again.sweep, needs)
    assert go(again, ranks)[0] == ring
    assert not ranks.taken


def test_ends_of_the_range_are_answers(tmp_path: Path) -> None:
    searching = begun(tmp_path)
    none, everything = go(searching, Ranks(searching.sweep, per_token(1e9, 1.0)))
    assert (none.end, none.tokens, none.beyond) == ("none fits", None, 64)
    assert (everything.end, everything.tokens, everything.beyond) == ("all fit", 4096, None)
    assert everything.why == ""


def test_lengths_whose_inputs_alone_are_too_much_are_not_run(tmp_path: Path) -> None:
    searching = begun(tmp_path, "search.gib=0.0001")
    each = input_bytes(searching.plan.cells[0].cell) / searching.plan.cells[0].cell.problem.seqlen
    ranks = Ranks(searching.sweep, lambda cell: 1.001 * input_bytes(cell))
    ring, _ = go(searching, ranks)
    longest = max(cell.problem.seqlen for cells in ranks.taken for cell in cells)
    assert longest * each <= 0.0001 * GIB
    assert ring.end == "found"
    assert ring.why.startswith("its inputs alone need ")


def test_another_failure_ends_the_search_of_its_choice_with_the_reason(tmp_path: Path) -> None:
    def needs(cell: Cell) -> float | Failure:
        broken = cell.config["cp"]["name"] == "ring" and cell.problem.seqlen > 512
        return Failure("crash", "rank 1 was killed by SIGSEGV") if broken else 1e6 * cell.problem.seqlen

    searching = begun(tmp_path)
    ring, ulysses = go(searching, Ranks(searching.sweep, needs))
    assert ulysses.end == "found"
    assert (ring.end, ring.why) == ("stopped", "crash: rank 1 was killed by SIGSEGV")
    assert ring.beyond is None
    # The next command tries that cell once more.
    again = begun(tmp_path)
    ranks = Ranks(again.sweep, per_token(1e6, 1e6))
    assert [one.end for one in go(again, ranks)] == ["found", "found"]
    assert all(cell.config["cp"]["name"] == "ring" for cells in ranks.taken for cell in cells)


def test_a_choice_that_cannot_run_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    searching = begun(tmp_path, "cp=ring,ulysses", "scale=1x4", "heads=2x2x8")
    ranks = Ranks(searching.sweep, per_token(1e6, 1e6))
    ring, ulysses = go(searching, ranks)
    assert ring.end == "found"
    assert ulysses.end == "cannot run"
    assert "ulysses" in ulysses.why
    assert (ulysses.cells, ulysses.tokens) == (0, None)
    assert longest_of(searching.sweep.look()) == [ring, ulysses]


def test_the_store_alone_says_the_answers_and_an_unfinished_search_is_open(tmp_path: Path) -> None:
    needs = per_token(3e6, 2e6)
    searching = begun(tmp_path)
    with pytest.raises(Refused):
        go(searching, Ranks(searching.sweep, needs, last_round=2))
    half = longest_of(searching.sweep.look())
    assert [one.end for one in half] == ["open", "open"]
    again = begun(tmp_path)
    ranks = Ranks(again.sweep, needs)
    found = go(again, ranks)
    assert longest_of(again.sweep.look()) == found
    assert {one.end for one in found} == {"found"}
    assert all(one.cells <= CELLS for one in found)
    assert sum(map(len, ranks.taken)) == sum(one.cells for one in found) - 4
    assert again.sweep.manifest()["search"] == again.search.note()
    assert again.sweep.manifest()["commands"] == [["words"], ["words"]]


def test_force_measures_all_again(tmp_path: Path) -> None:
    go(begun(tmp_path), Ranks(Sweep(tmp_path, "made"), per_token(1e6, 1e6)))
    forced = begun(tmp_path, "force=true")
    ranks = Ranks(forced.sweep, per_token(2e6, 2e6))
    ring, _ = go(forced, ranks)
    assert ring.tokens == 528  # of what needs twice as much now
    assert sum(map(len, ranks.taken)) == ring.cells * 2


def test_another_cap_takes_what_is_known(tmp_path: Path) -> None:
    go(begun(tmp_path), Ranks(Sweep(tmp_path, "made"), per_token(1e6, 1e6)))
    other = begun(tmp_path, "search.gib=1.05")
    ranks = Ranks(other.sweep, per_token(1e6, 1e6))
    ring, _ = go(other, ranks)
    assert ring.tokens == 1120  # 1.05 GiB are 1127 MB
    assert len(ranks.taken) < ring.cells


def test_a_sweep_that_was_no_search_has_no_answers(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "plain")
    sweep.add([Entry(p.cell, p.skip) for p in expand(["cp=ring", "seqlen=1k"], loader_of(None)).cells], command=["words"])
    assert longest_of(sweep.look()) == []


def test_a_note_that_is_none_is_set_aside_with_its_manifest(tmp_path: Path) -> None:
    searching = begun(tmp_path)
    go(searching, Ranks(searching.sweep, per_token(1e6, 1e6)))
    path = searching.sweep.manifest_path
    path.write_text(json.dumps({**json.loads(path.read_text()), "search": {"name": "max_seqlen"}}))
    seen = searching.sweep.look()
    assert seen.search is None
    assert seen.damaged


# -- what a prediction may do --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_of_the_machine_says_where_to_begin_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "this.fit.json"
    kernel = KernelFit(kernel="sdpa_math", dtype="float64", forward=Coefficients(flop_s=1e-9), backward=Coefficients())
    Fit(machine="this", kernels=(kernel,), error={"forward": 0.1, "backward": 0.1}).write(file)
    assert Guesses.of(begun(tmp_path).plan, GIB).predictor is None
    for module in ("lcbench.advice.longest", "lcbench.predict.predictor"):
        monkeypatch.setattr(f"{module}.fit_of", lambda name: file)
    searching = begun(tmp_path, "search.gib=0.02", "search.to=64k")
    guesses = Guesses.of(searching.plan, 0.02 * GIB)
    assert isinstance(guesses.predictor, Predictor)
    choice = Choice.of(searching.search, searching.plan.cells[0].cell, [])
    expected = guesses.expected(choice)
    assert expected is not None
    sure, possible = expected
    assert 0 < sure <= possible <= len(choice.lengths)
    searching.guess = guesses.expected
    begins = next(p.cell.problem.seqlen for p in searching.due())
    assert begins != searching.plan.cells[0].cell.problem.seqlen
    assert choice.lengths[sure - 1] <= begins <= choice.lengths[possible - 1]
    # A prediction that is far off costs cells, and the answer stays.
    needs = per_token(2e2, 2e2)
    ring, _ = go(searching, Ranks(searching.sweep, needs))
    assert ring.cells <= CELLS
    assert ring.end == "all fit" or ring.tokens is not None


# -- the cap -------------------------------------------------------------------------------------------------------------


def plan_of(*words: str) -> Plan:
    return expand([*WORDS, *words], loader_of(None))


@pytest.mark.slow
def test_the_cap_is_the_memory_of_the_device_or_of_the_machine_that_is_predicted() -> None:
    assert capped(plan_of("site=plain")).cap_bytes == 80e9
    assert capped(plan_of("site=plain", "search.gib=40")).cap_bytes == 40 * GIB
    predicted = plan_of("hydra/launcher=simulate", "machine=h200")
    assert capped(predicted).cap_bytes == 141e9
    assert capped(plan_of("search.gib=0.5")) == Search("max_seqlen", KIB, KIB**2, 0.5 * GIB)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "search.gib is not set, which says what a rank may need: site=local names no GPU"),
        (["site=devcluster"], "site=devcluster names no GPU"),
        (["hydra/launcher=simulate", "machine=this"], "ranks of a CPU share its memory"),
        (["site=plain", "search.gib=99"], "search.gib=99 is more than the 74.51 GiB of device h100"),
        (["hydra/launcher=simulate", "machine=h100", "search.gib=99"], "more than the 74.51 GiB of machine=h100"),
        (["search.gib=90000"], "more than half of the"),
        (["hydra/launcher=dry"], "search.gib is not set"),
    ],
)
def test_a_cap_that_is_none_is_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command(*WORDS, f"results={tmp_path}", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- the command -----------------------------------------------------------------------------------------------------------

TINY = [
    "kernel=sdpa_math", "mask=causal", "heads=2x2x8", "dtype=float32", "search=max_seqlen", "search.from=64", "search.to=2k",
    "measure.warmup=0", "measure.min_iterations=1", "measure.max_iterations=1", "measure.budget_s=0.1", "measure.blocks=1",
]  # fmt: skip


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return lcbench("sweep", *words, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "LCBENCH_SHARE_MACHINE": "1"}


def stored(root: Path, name: str = "tiny") -> list[str]:
    return [f"results={root}", f"sweep={name}", "tracking_uri=none"]


def test_dry_shows_the_first_round_and_writes_nothing(tmp_path: Path) -> None:
    where = [f"results={tmp_path}", "sweep=tiny", f"tracking_uri=sqlite:///{tmp_path}/mlflow.db"]
    done = command(*TINY, "cp=ring,ulysses", "scale=1x2", "search.gib=0.01", "hydra/launcher=dry", *where)
    assert done.returncode == 0, done.stderr
    assert "the longest length of 2 choices, 64 to 2k, 10.2 MiB a rank, at most 8 cells of each" in done.stdout
    assert "2 cells, 2 to run" in done.stdout
    assert "ulysses sdpa_math causal" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_simulate_predicts_the_whole_search_and_its_answers_say_so(tmp_path: Path) -> None:
    words = [*TINY, "cp=ring,ulysses", "scale=1x2", "search.gib=0.02", "hydra/launcher=simulate", *stored(tmp_path)]
    done = command(*words, "output=json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert {answer["end"] for answer in answers} == {"found"}
    assert all(answer["predicted"] and answer["seqlen"] < answer["too_long"] for answer in answers)
    seen = Sweep(tmp_path, "tiny").look()
    assert all(record.prediction is not None and not record.attempts for record in seen.records.values())
    # By measurements nothing is known, and by predictions all is.
    assert {one.end for one in longest_of(seen)} == {"open"}
    assert [one.as_dict() for one in longest_of(seen, predicted=True)] == answers
    again = command(*words)
    assert "predicted, not measured" in again.stdout
    assert "round" not in again.stdout


def answered(done: subprocess.CompletedProcess[str], sweep: Sweep, words: list[str]) -> None:
    """A search on real ranks has found an answer that its cells bear out, and the same command gives it and measures nothing."""
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)["answers"]
    cells = sweep.entries()
    tries = {cell: len(sweep.attempts(cell)) for cell in cells}
    assert answer["end"] == "found"
    assert answer["cells"] == len(cells) <= CELLS
    by_length = {c.cell.problem.seqlen: sweep.attempts(i)[-1] for i, c in cells.items()}
    fits, too_long = by_length[answer["seqlen"]], by_length[answer["too_long"]]
    assert fits.metrics["memory/peak_bytes"] < answer["needs_bytes"] <= 0.03 * GIB
    assert too_long.metrics["memory/peak_bytes"] > fits.metrics["memory/peak_bytes"]
    again = command(*words)
    assert json.loads(again.stdout)["answers"] == [answer]
    assert {cell: len(sweep.attempts(cell)) for cell in sweep.entries()} == tries


@pytest.mark.gloo
@pytest.mark.slow
def test_a_real_rank_finds_it_and_the_same_command_measures_nothing_again(tmp_path: Path) -> None:
    words = [*TINY, "cp=none", "scale=1x1", "search.gib=0.03", *stored(tmp_path), "output=json"]
    sweep = Sweep(tmp_path, "tiny")
    answered(command(*words), sweep, words)
    assert all(len(sweep.attempts(cell)) == 1 for cell in sweep.entries())


@pytest.mark.gloo
@pytest.mark.slow
def test_a_cap_that_nothing_fits_takes_few_cells(tmp_path: Path) -> None:
    done = command(*TINY, "cp=ring", "scale=1x2", "search.gib=0.0001", "search.to=128", *stored(tmp_path))
    assert done.returncode == 0, done.stderr
    (answer,) = longest_of(Sweep(tmp_path, "tiny").look())
    assert (answer.end, answer.tokens, answer.beyond) == ("none fits", None, 64)
    assert "none" in done.stdout
    assert "nothing shorter than search.from=64 was looked at" in " ".join(done.stdout.split())


@pytest.mark.gloo
@pytest.mark.slow
def test_a_killed_search_of_two_ranks_goes_on_where_it_was_and_finds_it(tmp_path: Path) -> None:
    words = [*TINY, "cp=ring", "scale=1x2", "search.gib=0.03", *stored(tmp_path), "output=json"]
    sweep = Sweep(tmp_path, "tiny")
    first = subprocess.Popen(
        [sys.executable, "-m", "lcbench.sweep", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and first.poll() is None:
            if sweep.exists() and sum(bool(sweep.attempts(cell)) for cell in sweep.entries()) >= 2:
                break
            time.sleep(0.2)
        else:
            pytest.fail("the search was at its end, or did not begin")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    good = {cell for cell in sweep.entries() if any(a.status == "ok" for a in sweep.attempts(cell))}
    answered(command(*words), sweep, words)
    assert all(len(sweep.attempts(cell)) == 1 for cell in good)


@pytest.mark.slow
def test_a_search_loads_neither_torch_nor_mlflow_before_it_begins() -> None:
    program = (
        "import sys; from lcbench.grid.command_line import loader_of; from lcbench.grid.expand import expand;"
        "from lcbench.advice.longest import Searching, capped;"
        "from lcbench.runs.store import Sweep; from pathlib import Path; plan = expand(sys.argv[1:], loader_of(None));"
        "print(len(Searching(plan, capped(plan), Sweep(Path('nowhere'), 'none')).due()));"
        "print([m for m in ('torch', 'mlflow', 'matplotlib') if m in sys.modules])"
    )
    words = [*WORDS, *RANGE, "workload=attention,block", "model=tiny", "heads=4x2x16"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["4", "[]"]
