"""Several Unix users at one results folder: what they may see is shown, what they may not is one line, nobody is blocked."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcbench.grid.command_line import look
from lcbench.runs.files import read_json
from lcbench.runs.store import Sweep
from tests.report.made import made_sweep
from tests.users import hostile
from tests.users.people import ALICE, BOB, NOBODY, needs_users, run

pytestmark = needs_users
GRID = (
    "cp=none seqlen=64 heads=1x1x8 dtype=float32 measure.budget_s=0.1 measure.max_iterations=3 measure.blocks=1"
    " tracking_uri=sqlite:///$WHO.db output=quiet"
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter (pytest closes its own), with one to work in for everybody and one that a group shares."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for name, mode in (("work", 0o777), ("shared", 0o2775)):
            (folder / name).mkdir()
            os.chown(folder / name, 5, 60)
            (folder / name).chmod(mode)
        yield folder


@pytest.mark.gloo
@pytest.mark.slow
def test_a_second_user_reads_compares_reports_and_continues(place: Path) -> None:
    shared, work = place / "shared", place / "work"
    first = run(ALICE, f"python -m lcbench.sweep {GRID} kernel=naive sweep=one results={shared}", here=work, umask="002")
    assert first.returncode == 0, first.stderr
    for path in shared.rglob("*"):
        mode = path.stat().st_mode
        assert path.stat().st_gid == 60, path
        assert stat.S_IMODE(mode) & 0o775 == (0o775 if path.is_dir() else 0o664), (path, oct(mode))
    # In the group: goes on, with a cell more, and its own report; the first user's agents left no lock behind.
    script = f"""
        python -m lcbench.sweep {GRID} kernel=naive,reference sweep=one results={shared} &&
        python -m lcbench.report one --results {shared} --no-publish && python -m lcbench.status one --results {shared} --quiet
    """
    second = run(BOB, script, here=work, umask="002", group=ALICE)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 ok" in second.stdout
    sweep = Sweep(shared, "one")
    assert [len(sweep.attempts(c)) for c in sweep.entries()] == [1, 1]
    # Outside of the group, without a name: looks, and writes elsewhere.
    script = f"""
        R="--results {shared}"
        python -m lcbench.status one --quiet $R && python -m lcbench.logs one/{next(iter(sweep.entries()))} $R >/dev/null &&
        python -m lcbench.results all $R --out own/x.csv && python -m lcbench.compare one one $R >/dev/null
        python -m lcbench.report one $R; echo "report: $?"
        python -m lcbench.report one $R --out own/report --no-publish
        python -m lcbench.sweep {GRID} kernel=naive,flex sweep=one results={shared}; echo "sweep: $?"
        python -m lcbench.cancel one $R; echo "cancel: $?"
        python -m lcbench.sweep {GRID} kernel=naive hydra/launcher=dry results=nowhere >/dev/null; ls -d nowhere
    """
    before = {p: p.stat().st_mtime_ns for p in shared.rglob("*")}
    third = run(NOBODY, script, here=work)
    assert "2 rows" in third.stdout, third.stderr
    assert all(line in third.stdout for line in ("report: 3", "sweep: 3", "cancel: 2")), third.stdout + third.stderr
    assert "belongs to" in third.stderr
    assert (work / "own" / "report" / "report.html").exists()
    assert not (work / "nowhere").exists()
    assert {p: p.stat().st_mtime_ns for p in shared.rglob("*")} == before
    assert read_json(sweep.manifest_path)["launch"]["by"] == BOB


@pytest.mark.slow
def test_what_may_not_be_read_is_one_line_or_left_out_by_name(place: Path) -> None:
    shared, work = place / "shared", place / "work"
    grid = ["kernel=naive", "cp=none", "seqlen=64,128", "heads=1x1x8", "dtype=float32"]
    open_, hidden, closed = (made_sweep(shared, name, grid) for name in ("open", "hidden", "closed"))
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    first = next(iter(open_.entries()))
    open_.attempt_path(first, 1).chmod(0o600)
    hidden.manifest_path.chmod(0o600)
    closed.folder.chmod(0o700)
    (place / "locked").mkdir()
    (place / "locked").chmod(0o700)
    script = f"""
        R="--results {shared}"
        for c in "status open" "results all --out all.csv" "report open --out r --no-publish" "compare open open" \
            "status hidden" "status closed" "logs {first}" "rerun hidden/{first}" "cancel hidden" "sync hidden" "collect hidden" \
            "cp --cell hidden/{first}" "status --results {place}/locked" "results all --out {place}/locked/x.csv"; do
            case "$c" in *--results*) w=;; *) w=$R;; esac
            python -m lcbench.$c $w >out 2>err; echo "$? $(grep -c . err) $c: $(cat err)"
        done
        python -m lcbench.sweep {GRID} kernel=naive hydra/launcher=dry $(echo results={shared}) | tail -2
    """
    said = run(BOB, script, here=work).stdout.splitlines()
    for line in said:
        code, lines, command = line.split(" ", 2) if line[:1].isdigit() else ("", "", "")
        if any(word in command.partition(":")[0] for word in ("hidden", "closed", "locked")):
            assert code == "3", line
            assert lines == "1" or command.startswith("results"), line  # which names what it leaves out, too
            assert "belongs to" in line
            assert "daemon" in line
    told = "\n".join(said)
    assert told.count("open/" + first) >= 2, told  # named by status and results
    assert "nothing was submitted" in told


@pytest.mark.slow
def test_a_third_users_folder_runs_nothing(place: Path) -> None:
    shared, work = place / "shared", place / "work"
    marker = work / "MARKER"
    cells = hostile.make(shared, marker)
    for tool in ("squeue", "sacct", "scancel", "sbatch", "git", "nvidia-smi"):
        path = shared / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {marker}\n")
        path.chmod(0o755)
    (shared / f"$(touch {marker.name}).json").touch()
    for path in (shared, *shared.rglob("*")):
        os.chown(path, 5, 60)
    (work / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (planned,) = look([*GRID.replace("$WHO", "x").split(), "kernel=naive"]).cells
    script = f"""
        R="--results {shared}"
        for c in "status evil" "status" "logs evil/{cells[0]}" "rerun {cells[0]}" "rerun --failed evil" "collect evil" \
            "cancel {cells[0]}" "cp --cell {cells[-1]}" "report evil --out r" "results all --out x.csv" "compare evil evil"; do
            python -m lcbench.$c $R >out 2>err; echo "$? $c"
        done
        python -m lcbench.sweep {GRID} kernel=naive hydra/launcher=dry results={shared} | grep {planned.cell.id}
        python -m lcbench.sweep {GRID} kernel=naive hydra/launcher=dry results=own >/dev/null && echo planned
    """
    done = run(BOB, script, here=work)
    assert f"2 rerun {cells[0]}" in done.stdout, done.stdout + done.stderr
    assert f"2 cp --cell {cells[-1]}" in done.stdout
    assert planned.cell.id in done.stdout
    assert "planned" in done.stdout
    assert not marker.exists()
