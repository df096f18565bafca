"""Somebody else's sweep: looking runs nothing of it and changes nothing; acting needs a yes, and says what it runs."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lcbench.commands import cancel, collect, logs, rerun, status, sync
from lcbench.runs.agent import RunPack
from lcbench.runs.files import write_json
from lcbench.runs.jobs import Watch
from lcbench.runs.manifest import Entry
from lcbench.runs.ownership import mine, others
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from tests.runs.test_pack import cell
from tests.runs.test_squeue import command

STRANGER = 54321  # a uid without a name
RETRY = {"no-start": 1}
LIMITS: dict[str, Any] = {"max_cells": None, "max_minutes": None, "max_jobs": None}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The caller's own Slurm, which has no jobs and takes any; and no other one in reach."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol", "scancel", "srun"):
        command(folder, name, "")
    command(folder, "sbatch", "Submitted batch job 99\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "own.conf")
    monkeypatch.delenv("LCBENCH_SITE", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return folder


def hostile_sweep(root: Path, owner: int, *, tracked: bool = False) -> Sweep:
    """A sweep on Slurm whose two cells are to be tried again, and whose site, pack and names are there to run something."""
    evil = root.parent / "evil"
    evil.mkdir()
    for name in ("squeue", "sacct", "scontrol", "scancel", "sbatch", "srun", "python"):
        command(evil, name, "", f"touch {evil}/ran")
    site = {
        "name": "../../evil/site", "launcher": "slurm", "setup": [f"touch {evil}/ran"], "partition": "p",
        "env": {"PATH": str(evil), "SLURM_CONF": f"{evil}/slurm.conf", "LD_PRELOAD": f"{evil}/ran.so", "PYTHONPATH": str(evil)},
        "container": {"image": "evil.sqsh", "python": f"{evil}/python"},
    }  # fmt: skip
    uri = f"sqlite:///{evil}/ran" if tracked else None
    settings = Settings(site, [], uri, LIMITS, {"factor": 1.0, "min_s": 1.0, "max_s": 9.0}, RETRY)
    sweep, cells = Sweep(root, "theirs"), [cell(seed=n, scale="1x1") for n in range(2)]
    sweep.add([Entry(c) for c in cells], command=[], launch={"launcher": "slurm", "settings": asdict(settings), "by": "root"})
    ids = tuple(c.id for c in cells)
    pack = Pack(
        "p",
        "theirs",
        str(root),
        "slurm",
        "1x1",
        ids,
        {c.id: c.config for c in cells},
        dict.fromkeys(ids, 1.0),
        5,
        settings,
        "lcbench-$(ran)",
    )
    pack.write()
    write_json(pack.folder / "job.json", {"job_id": "7", "started_at": 1.0, "pid": -1, "pids": [-1], "host": os.uname().nodename})
    for path in (root, *root.rglob("*")):
        os.chown(path, owner, -1)
    return sweep


def content(folder: Path) -> dict[Path, tuple[float, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_uid) for p in folder.rglob("*")}


@needs_root
def test_looking_at_somebody_else_s_sweep_runs_only_ones_own_commands(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "results"
    sweep = hostile_sweep(root, STRANGER, tracked=True)
    where, cell_id = ["--results", str(root)], next(iter(sweep.entries()))
    before = content(root)
    assert others(sweep) == [str(STRANGER)]
    for view in (["theirs"], ["theirs", "--json"], ["last", "--quiet"]):
        status.main([*view, *where])
    logs.main([cell_id, *where])
    standing = settled(Watch(sweep))
    # PrivateData may hide a colleague's jobs: silence does not end them.
    assert (standing.packs[0].state, standing.packs[0].reason) == ("UNKNOWN", "Slurm shows you nothing of it")
    for act, words in ((cancel, ["theirs"]), (cancel, [cell_id]), (collect, ["theirs"]), (sync, ["theirs"]), (rerun, [cell_id])):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            act.main([*words, *where])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.count("\n") == 1
        for word in (f"of {STRANGER}", "in your name", "site.setup", "evil.sqsh", "evil/python", "LD_PRELOAD", "--as-mine"):
            assert word in said
    assert content(root) == before
    assert not (tmp_path / "evil" / "ran").exists()
    assert not list((tmp_path / "evil").glob("*.args"))
    assert not (tools / "sbatch.args").exists()
    assert not (tools / "scancel.args").exists()
    assert "SLURM_CONF=own.conf" in (tools / "squeue.env").read_text()


@needs_root
def test_following_it_submits_nothing_and_a_yes_does(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "results"
    sweep = hostile_sweep(root, STRANGER)
    where = ["--results", str(root)]
    write_json(
        sweep.pack_folder("p") / "end.json", {"failure": None, "time": 1.0}
    )  # its jobs have ended: cells wait for a collector
    status.main(["theirs", "--follow", "--json", *where])
    assert "it is only shown; python -m lcbench.collect theirs --as-mine goes on with it" in capsys.readouterr().err
    assert not (tools / "sbatch.args").exists()
    monkeypatch.setattr("sys.stdin", type("Tty", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda asked: print(asked) or "n")
    with pytest.raises(SystemExit):
        collect.main(["theirs", *where])
    assert "Do that? [y/N]" in capsys.readouterr().out
    assert not (tools / "sbatch.args").exists()
    collect.main(["theirs", "--as-mine", *where])
    assert "touch" in capsys.readouterr().err
    assert len((tools / "sbatch.args").read_text().splitlines()) == 2  # a job and its collector
    seen = (tools / "sbatch.env").read_text()
    assert "SLURM_CONF=own.conf" in seen
    assert "evil" not in seen
    scripts = [p.read_text() for p in (sweep.folder / "jobs").glob("*/99_submission.sh")]
    assert any(f"touch {tmp_path}/evil/ran" in text for text in scripts)  # what was agreed to
    assert not any("evil/slurm.conf" in text for text in scripts)  # but on one's own cluster
    assert not (tmp_path / "evil" / "ran").exists()


@needs_root
@pytest.mark.parametrize("piece", ["packs/q/pack.json", "packs/p/pack.json", "manifest.json", "jobs/lcbench-x", "."])
def test_a_piece_of_somebody_else_s_makes_it_not_ones_own(tools: Path, tmp_path: Path, piece: str) -> None:
    sweep = hostile_sweep(tmp_path / "results", 0)
    (sweep.folder / "jobs" / "lcbench-x").mkdir(parents=True)
    assert others(sweep) == []
    path = sweep.folder / piece
    if not path.exists():  # put into a shared folder later
        write_json(path, json.loads((sweep.pack_folder("p") / "pack.json").read_text()))
    os.chown(path, STRANGER, -1)
    assert others(sweep) == [str(STRANGER)]
    settled(Watch(sweep))
    assert not (tmp_path / "evil" / "ran").exists()
    if path.name == "pack.json":
        with pytest.raises(SystemExit, match="belongs to somebody else"):
            RunPack(str(path))()


def test_ones_own_sweep_names_the_cluster_and_no_program(tools: Path, tmp_path: Path) -> None:
    sweep = hostile_sweep(tmp_path / "results", os.geteuid())
    settled(Watch(sweep))
    seen = (tools / "squeue.env").read_text()
    assert f"SLURM_CONF={tmp_path}/evil/slurm.conf" in seen
    assert "LD_PRELOAD" not in seen
    assert not (tmp_path / "evil" / "ran").exists()
    assert mine(sweep.manifest_path)
    assert mine(tmp_path / "not there")


@pytest.mark.parametrize("text", ['{"launcher": "slurm"}', '{"settings": 5}', "[]", '{"launcher": {}, "cells": 5}'])
def test_a_pack_file_that_is_none_stops_nobody(tools: Path, tmp_path: Path, text: str) -> None:
    sweep = hostile_sweep(tmp_path / "results", os.geteuid())
    (sweep.folder / "packs" / "odd").mkdir()
    (sweep.folder / "packs" / "odd" / "pack.json").write_text(text)
    assert [p.id for p in settled(Watch(sweep)).packs] == ["p"]


def test_only_an_agent_of_the_pack_is_ended_whatever_number_its_file_names(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = hostile_sweep(tmp_path / "results", os.geteuid())
    pack = Pack.read(sweep.pack_folder("p") / "pack.json")
    write_json(pack.path, {**asdict(pack), "launcher": "local"})
    job = {"host": os.uname().nodename, "pid": -1, "pids": [-1, 0, 1, os.getpid()], "started_at": 1e12}
    write_json(pack.folder / "job.json", job)
    monkeypatch.setattr(os, "kill", lambda pid, _: pytest.fail(f"killed {pid}"))
    assert cancel.main(["theirs", "--results", str(tmp_path / "results")]) == 0
    assert sys.argv  # still here


def test_jobs_of_an_earlier_version_are_cancelled_by_id_and_what_cannot_be_is_said(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were named after their sweep; and one is known to accounting only."""
    sweep = hostile_sweep(tmp_path / "results", os.geteuid())
    pack = json.loads((sweep.pack_folder("p") / "pack.json").read_text())
    write_json(sweep.pack_folder("p") / "pack.json", {**pack, "job_name": "lcbench-c,d|e-1"})
    folder = sweep.folder / "jobs" / "lcbench-c,d|e-1"
    folder.mkdir(parents=True)
    (folder / "7_submission.sh").touch()
    command(tools, "squeue", "7|N/A|RUNNING|None|N/A|lcbench-c,d|e-1\n8|N/A|RUNNING|None|N/A|somebody's\n")
    assert settled(Watch(sweep)).packs[0].state == "RUNNING"
    assert cancel.main(["theirs", "--results", str(sweep.root)]) == 0
    assert capsys.readouterr().out.startswith("1 jobs of theirs")
    assert (tools / "scancel.args").read_text() == "-v 7\n"

    command(tools, "squeue", "")
    command(tools, "sacct", "7|RUNNING|None|lcbench-c,d|e-1\n")
    assert not settled(Watch(sweep)).ended
    command(tools, "scancel", "", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2")
    assert cancel.main(["theirs", "--results", str(sweep.root)]) == 1
    assert "job 7: Invalid job id specified" in capsys.readouterr().err
    assert "does not know its job" in sweep.pack_file("p", "end.json")["failure"]["cause"]  # so it will not be waited for
