"""A results folder is data: no command that reads one runs what it names."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.lcbench.dry import DryLauncher

from lcbench.commands import cancel, collect, compare, cp, logs, masks, report, rerun, results, status
from lcbench.grid import build
from lcbench.grid.command_line import look
from lcbench.report.inert import printable
from lcbench.runs.files import Unreadable, read_json, write_json
from lcbench.runs.store import Sweep, newest_attempts, sweeps
from tests.report.made import made_sweep
from tests.users import hostile

SMALL = ["kernel=naive", "cp=none", "seqlen=256", "heads=2x2x8", "dtype=float32"]
SITE = {"name": "local", "launcher": "local"}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[str]]:
    """Results, the marker that nothing may make, and the cells; the module that some name lies in the current folder."""
    marker, here = tmp_path / "MARKER", tmp_path / "here"
    here.mkdir()
    (here / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')\n\n\nclass Kernel: pass\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    return tmp_path / "results", marker, hostile.make(tmp_path / "results", marker)


def test_no_target_of_a_stored_cell_is_run(evil: tuple[Path, Path, list[str]]) -> None:
    root, marker, cells = evil
    entries, heads = Sweep(root, hostile.NAME).entries(), look(SMALL).cells[0].cell.heads
    assert len(cells) == len(entries) == 4 * len(hostile.targets(marker))

    def made(config: dict[str, Any]) -> None:
        build.build_kernel(config["kernel"])
        build.build_strategy(config["cp"])
        build.build_mask(config["mask"], 256, heads, 0)

    for entry in entries.values():
        with pytest.raises(ValueError, match="_target_"):
            made(entry.cell.config)
    assert not marker.exists()
    assert "evil_module" not in sys.modules


@pytest.mark.slow
def test_commands_that_read_run_nothing(
    evil: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, marker, cells = evil
    where = ["--results", str(root)]
    assert status.main(["evil", *where]) == 1
    shown = capsys.readouterr().out
    assert "[/red] [bold]$(touch" in shown.replace("\n", "")
    assert "\x1b]0" not in shown
    logs.main([f"evil/{cells[0]}", *where])
    for name in ("cells.csv", "new/deep/cells.json"):
        assert results.main(["all", "--out", str(tmp_path / name), *where]) == 0
    assert report.main(["evil", "--out", str(tmp_path / "report"), "--no-publish", *where]) == 0
    compare.main(["evil", "evil", *where])
    assert collect.main(["evil", *where]) == 1
    capsys.readouterr()
    looks_at = cells[len(cells) // 4 :]  # a strategy is looked at without its kernel
    for command, asked in ((rerun.main, cells), (lambda a: cp.main(["--cell", *a]), looks_at)):
        for cell_id in asked[::7]:
            with pytest.raises(SystemExit) as ended:
                command([cell_id, *where])
            said = capsys.readouterr().err.strip()
            assert ended.value.code == 2
            assert said.startswith("error: ")
            assert len(said.splitlines()) == 1, said
    with pytest.raises(SystemExit):
        rerun.main(["--failed", "evil", *where])
    cancel.main(["evil", *where])
    assert not marker.exists()


def test_a_launcher_that_there_is_not_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_sweep(tmp_path, "strange", [*SMALL])
    manifest = json.loads((folder.folder / "manifest.json").read_text())
    manifest["launch"] = {
        "launcher": "pbs",
        "settings": {"site": SITE, "devices": [], "tracking_uri": None, "pack": {}, "hang": {}, "retry": {}},
    }
    (folder.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as ended:
        rerun.main([next(iter(folder.entries())), "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no launcher 'pbs': there are dry, local, simulate, slurm, and in a folder of yours with --config-dir\n"
    )


def test_a_new_sweep_plan_and_mask_beside_it_go_on(evil: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    root, marker, _ = evil
    plan = look([*SMALL, f"results={root}", "sweep=mine"])
    before = sorted(root.rglob("*"))
    assert DryLauncher().launch_plan(plan) == 0
    assert sorted(root.rglob("*")) == before
    assert masks.main(["mask=causal", "seqlen=256"]) == 0
    assert not marker.exists()
    capsys.readouterr()


def test_what_the_user_names_is_built_and_nobody_else_can_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conf" / "mask"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(build, "_allowed", set())
    (tmp_path / "own_masks.py").write_text(
        "from lcbench.masks.causal import causal\n\n\ndef mine(seqlen):\n    return causal(seqlen)\n\n\ndef other(path): pass\n"
    )
    config = {"name": "mine", "_target_": "own_masks.mine"}
    heads = look(SMALL).cells[0].cell.heads
    with pytest.raises(ValueError, match=r"own_masks.mine is neither in .*--config-dir"):
        build.build_mask(config, 8, heads, 0)
    (folder / "mine.yaml").write_text("_target_: own_masks.mine\nname: mine\n")
    # A folder of configuration that the user names: as on the command line, and as rerun and cp --cell take it.
    cell = look(["--config-dir", str(tmp_path / "conf"), *SMALL, "mask=mine"]).cells[0].cell
    assert build.build_mask(cell.config["mask"], 8, heads, 0).pairs(1) == 36
    assert build.check_targets(cell.config) == {"own_masks.mine"}
    assert build.targets_in(tmp_path / "conf") == {"own_masks.mine"}
    build.allow(["own_masks.other"])
    with pytest.raises(ValueError, match="is not a value of an axis"):
        build.build_mask({"name": "other", "_target_": "own_masks.other"}, 8, heads, 0)
    # Workers and whoever goes on with the sweep have it from a file that only this user can have written.
    sweep = Sweep(tmp_path, "s")
    sweep.folder.mkdir()
    sweep.allow({"own_masks.mine"})
    (kept,) = sweep.folder.glob(".allowed.*")
    assert sweep.allowed() == {"own_masks.mine"}
    assert kept.stat().st_mode & 0o777 == 0o600
    sweep.allow({"own_masks.mine", "a.b"})
    assert sweep.allowed() == {"own_masks.mine", "a.b"}
    kept.chmod(0o660)
    assert sweep.allowed() == set()
    kept.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(kept, 5, 60)
        assert sweep.allowed() == set()


@pytest.mark.parametrize(
    "damage",
    [
        "not json", "[]", "{}", "[" * 100_000, '{"schema": 1, "cells": 3}', '{"schema": 99}', "\x00", "NaN",
        '{"schema": 1, "sweep": "x", "id": "x", "created_at": "now", "commands": [[1]], "launch": 7, "cells": {}}',
        "pipe", "folder", "link",
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_read_blocks_nobody(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made_sweep(tmp_path, "good", [*SMALL])
    path = tmp_path / "bad" / "manifest.json"
    path.parent.mkdir()
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(path)}.get(
        damage, lambda: path.write_text(damage)
    )()
    plan = look([*SMALL, f"results={tmp_path}", "sweep=new"])
    assert DryLauncher().launch_plan(plan) == 0
    assert os.path.lexists(path)  # planning sets nothing of others aside
    where = ["--results", str(tmp_path)]
    assert results.main(["all", "--out", str(tmp_path / "all.csv"), *where]) == 0
    assert (tmp_path / "all.csv").read_text().count(next(iter(good.entries()))) == 1
    logs.main([next(iter(good.entries())), *where])
    with suppress(SystemExit, Unreadable):  # the second is one line, where the command is run
        status.main(["bad", *where])
    assert "Traceback" not in "".join(capsys.readouterr())


def test_cells_of_another_version_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made_sweep(tmp_path, "old", [*SMALL, "mask=causal,full"])
    manifest = read_json(sweep.manifest_path)
    first, second = manifest["cells"]
    config = manifest["cells"][second]["config"]
    strange = {
        "aaaa": {**config, "dtype": "float8"}, "bbbb": {**config, "heads": "2x2x192x128"}, "cccc": {},
        "dddd": {**config, "seqlen": "x"},
        "eeee": {**config, "mask": "causal"}, "../../x": config, "ffff": {**config, "kernel": {"name": ["x"], "_target_": "y"}},
    }  # fmt: skip
    manifest["cells"] |= {name: {"config": c, "skip": None} for name, c in strange.items()}
    manifest["cells"]["gggg"] = {"config": config, "skip": ["x"]}
    write_json(sweep.manifest_path, manifest)
    assert list(sweep.entries()) == [first, second]
    left_out = [str(d) for d in sweep.look().damaged]
    assert len(left_out) == len(strange) + 1
    assert all(d.startswith("left out: ") for d in left_out)
    assert status.main(["old", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("left out") == len(strange) + 1
    later = sweep.attempt_path(first, 2)
    later.write_text(json.dumps({**read_json(sweep.attempt_path(first, 1)), "number": 2, "schema": 2, "new": 1}))
    for name, text in {3: '{"a"', 4: "[]"}.items():
        sweep.attempt_path(second, name).write_text(text)
    said = [str(d) for d in sweep.look().damaged]
    assert later.exists()
    assert any("a later lcbench wrote it (schema 2" in d for d in said)
    assert sum(d.startswith("set aside") for d in said) == 2


def test_numbers_that_are_none_and_paths_are_no_attempts(tmp_path: Path) -> None:
    sweep = made_sweep(tmp_path, "s", [*SMALL])
    (cell_id,) = sweep.entries()
    good = read_json(sweep.attempt_path(cell_id, 1))
    for changed in (
        {"metrics": {"time/total/median_s": "x"}}, {"status": "great"}, {"pack": "../../.."}, {"cell_id": "a/b"},
        {"samples": {"x": 1}},
        {"failure": {"kind": 1, "cause": "x"}, "status": "failed"}, {"provenance": []}, {"started_at": None}, {"more": 1},
    ):  # fmt: skip
        sweep.attempt_path(cell_id, 2).write_text(json.dumps({**good, "number": 2, **changed}))
        assert [a.number for a in sweep.attempts(cell_id)] == [1], changed
    (sweep.folder / cell_id / "attempt-9.running.json").write_text(
        json.dumps({"cell_id": cell_id, "number": 9, "pack": "../../x", "started_at": 1.0})
    )
    assert not sweep.running(cell_id)
    assert len(list(newest_attempts(tmp_path))) == 1


def test_odd_entries_of_a_results_folder_are_no_sweeps(tmp_path: Path) -> None:
    made_sweep(tmp_path, "s", [*SMALL])
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert sweeps(tmp_path) == ["s"]
    assert sweeps(tmp_path / "nothing") == []


def test_commands_to_copy_are_words_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b", "it's", "x|y", "$(touch x)", "`x`", "a;b", "*", "-x", "--json", "umlaut-ä"):
        root = tmp_path / f"results of {name}"
        words = shlex.split(Sweep(root, name).command("status", "--follow"))
        assert words[:3] == ["python", "-m", "lcbench.status"]
        assert words[words.index("--results") + 1] == str(root)
        assert "--follow" in words
        options = rerun.command_parser("x", "", "")  # type: ignore[attr-defined]
        options.add_argument("sweep")
        options.add_argument("--results")
        options.add_argument("--follow", action="store_true")
        assert options.parse_args(words[3:]).sweep == name
    assert Sweep(tmp_path / "results", "s").command("report") == "python -m lcbench.report s"


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert printable("a\x1b[2Jb\nc\u202ed\x00\u2028") == "a\\x1b[2Jb\\nc\\u202ed\\x00\\u2028"
    assert printable("ä 64k [x] 😀") == "ä 64k [x] 😀"
