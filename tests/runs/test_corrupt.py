"""Files that were cut or overwritten: named and set aside, never fatal, never silently dropped."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from lcbench.results import load
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.failure import first_failure
from lcbench.runs.files import CORRUPT, write_json
from lcbench.runs.jobs import Watch
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from tests.runs.test_store import made_cell

SETTINGS = Settings(
    site={"name": "local"}, devices=[], tracking_uri=None, pack={"max_cells": None, "max_minutes": None, "max_jobs": None},
    hang={"factor": 1.0, "min_s": 1.0, "max_s": 2.0}, retry={},
)  # fmt: skip


def made_sweep(root: Path) -> tuple[Sweep, str]:
    """A sweep with one cell, whose second attempt is good and whose third is in flight, in a pack of this machine."""
    sweep, cell = Sweep(root, "s"), made_cell()
    launch = {"launcher": "local", "settings": asdict(SETTINGS)}
    sweep.add([Entry(cell), Entry(made_cell(1), "because")], command=["a=b"], launch=launch)
    pack = Pack("p", "s", str(root), "local", "1x2", (cell.id,), {cell.id: cell.config}, {cell.id: 9.0}, 5, SETTINGS)
    pack.write()
    write_json(pack.folder / "job.json", {"launcher": "local", "pid": 1, "pids": [1], "host": "elsewhere", "started_at": 0.0})
    for status, failure in (("failed", Failure("oom", "too big")), ("ok", None)):
        running = sweep.begin(cell.id, "p")
        sweep.finish(
            Attempt(cell.id, "s", running.number, status, failure, {"time/x_s": 1.0}, pack="p", config=cell.config)  # type: ignore[arg-type]
        )
    sweep.begin(cell.id, "p")
    return sweep, cell.id


def files(sweep: Sweep) -> list[Path]:
    return sorted(p for p in sweep.folder.rglob("*.json"))


FILES = (
    "attempt-1.json",
    "exit.0.1.0.json",
    "attempt-2.json",
    "attempt-3.running.json",
    "manifest.json",
    "pack.json",
    "job.json",
    "mlflow.json",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_is_set_aside_and_named(tmp_path: Path, name: str) -> None:
    sweep, cell_id = made_sweep(tmp_path)
    failures = sweep.pack_folder("p") / "failures"
    write_json(failures / "exit.0.1.0.json", {"exitcode": 1, "rank": 0, "pid": 1, "time": 0.0})
    write_json(sweep.folder / "mlflow.json", {"http://x": {"sweep_id": "abc", "cells": {cell_id: ["run", 1, "ok"]}}})
    (path,) = (p for p in files(sweep) if p.name == name)
    whole = {p: p.read_bytes() for p in files(sweep)}
    content = whole[path]
    # Every byte of what is short; of the rest the ends and every seventh.
    cuts = range(len(content)) if len(content) < 600 else sorted({*range(40), *range(0, len(content), 7), len(content) - 1})
    for cut in cuts:
        path.write_bytes(content[:cut])
        sweep.remembered()
        first_failure(failures, f"{cell_id}.attempt-3", since=0.0)
        standing = settled(Watch(sweep))
        aside = path.with_name(path.name + CORRUPT)
        assert aside.exists(), f"cut at {cut}"
        assert aside.read_bytes() == content[:cut]
        # A manifest that was made again has what packs, attempts and publishing know.
        assert cell_id in standing.seen.records
        assert sweep.manifest()["launch"]["launcher"] == "local"
        if name == "manifest.json":
            assert sweep.manifest()["id"] == "abc"
        assert [d.path for d in standing.seen.damaged] == [aside]
        with pytest.warns(UserWarning, match=f"set aside: .*{name}"):
            frame = load(tmp_path)
        assert frame["cell"].iloc[0] == cell_id
        aside.unlink()
        for other, text in whole.items():
            other.write_bytes(text)
