"""Results without us: frames, files that other tools read, and a schema that is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter, ValidationError

from lcbench.commands.results import load, main, schema
from lcbench.grid.command_line import look
from lcbench.runs.attempt import Attempt, Failure
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from tests.runs.test_store import made_cell

ROOT = Path(__file__).parents[2]


def made(root: Path) -> Sweep:
    """Three cells: a good one at its second attempt, one that cannot run, one that was never tried."""
    sweep = Sweep(root, "s")
    cells = [p.cell for p in look(["mask=sliding_window,attention_sink,causal", "seqlen=64k", "scale=1x8"]).cells]
    sweep.add([Entry(cells[0]), Entry(cells[1], "because"), Entry(cells[2])], command=[])
    for failure, metrics in (
        (Failure("hang", "it hung", 3), {}),
        (None, {"time/forward/median_s": 0.5, "time/noise": float("inf")}),
    ):
        running = sweep.begin(cells[0].id, "p")
        sweep.finish(
            Attempt(
                cells[0].id, "s", running.number, "failed" if failure else "ok", failure, metrics, {"forward_s": [0.5, 0.6]},
                {"errors": {"out": float("nan")}},
                provenance={"device": "H100", "git": {"commit": "abc"}}, config=cells[0].config, pack="p",
            )
        )  # fmt: skip
    return sweep


def test_load_has_a_row_per_cell_with_axes_and_metrics(tmp_path: Path) -> None:
    made(tmp_path)
    frame = load(tmp_path)
    assert list(frame["status"]) == ["ok", "skipped", "missing"]
    assert list(frame["mask"]) == ["sliding_window", "attention_sink", "causal"]
    assert frame["failure"].iloc[1] == "unsupported"
    good = frame.iloc[0]
    assert (good["attempt"], good["time/forward/median_s"], good["seqlen"], good["world_size"]) == (2, 0.5, 65536, 8)
    assert (good["device"], good["commit"]) == ("H100", "abc")
    assert "time/noise" not in frame  # it was not finite
    every = load(tmp_path, "last", attempts="all", samples=True)
    assert list(every["status"]) == ["failed", "ok", "skipped", "missing"]
    assert every["samples/forward_s"].iloc[1] == [0.5, 0.6]
    with pytest.raises(ValueError, match="there are: s"):
        load(tmp_path, "t")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_export_is_what_others_read(tmp_path: Path, suffix: str) -> None:
    made(tmp_path / "results")
    out = tmp_path / f"cells{suffix}"
    assert main(["s", "--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    read = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".json": pd.read_json}[suffix](out)
    assert list(read["status"]) == ["ok", "skipped", "missing"]
    assert read["time/forward/median_s"].iloc[0] == 0.5
    assert np.isnan(read["time/forward/median_s"].iloc[2])


def test_a_format_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["s", "--results", str(tmp_path), "--out", "x.xlsx"])
    assert "formats: .parquet, .csv, .json" in capsys.readouterr().err


def test_the_documented_schema_is_that_of_the_code_and_of_the_files(tmp_path: Path) -> None:
    assert json.loads((ROOT / "docs" / "attempt.schema.json").read_text()) == schema(), "make docs"
    sweep = made(tmp_path)
    for path in sweep.folder.glob("*/attempt-*.json"):
        text = path.read_text()
        TypeAdapter(Attempt).validate_python(json.loads(text))
        assert "NaN" not in text
        assert "Infinity" not in text
        with pytest.raises(ValidationError):
            TypeAdapter(Attempt).validate_python(json.loads(text) | {"status": "fine"})


def test_a_lost_manifest_is_made_again(tmp_path: Path) -> None:
    sweep = made(tmp_path)
    before = [e.cell for e in sweep.entries().values()]
    sweep.manifest_path.write_text("")
    with pytest.warns(UserWarning, match="manifest"):
        frame = load(tmp_path)
    assert list(frame["cell"]) == [before[0].id]  # what was tried is found; the rest comes back with the same command
    assert made_cell().id not in sweep.entries()
