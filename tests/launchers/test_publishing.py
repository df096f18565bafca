"""What packs on this machine have measured is published by the command, between packs and at its end; not by a process each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.lcbench import local

from lcbench.commands import sync
from lcbench.grid.command_line import look
from lcbench.runs.launch import lacks_a_place, make_packs, settings_of
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.publish import Counts
from lcbench.runs.tracking.server import TrackingUnavailable

URI = "http://127.0.0.1:9"
WORDS = ["seed=1,2,3", "cp=none", "kernel=naive", "seqlen=64", "heads=2x2x8", "dtype=float32", "pack.max_cells=1"]


@dataclass
class Told:
    """What happened, in order; the server is away for the first ``away`` times."""

    happened: list[str]
    away: int = 0

    def run(self, sweep: Sweep, pack: Pack) -> Iterator[tuple[int, str]]:
        self.happened.append(f"run {pack.id[-1]}")
        yield 1, "finishing"

    def publish(self, sweep: Sweep, uri: str, *, budget_s: float) -> Counts:
        assert (uri, budget_s) == (URI, 30.0)
        self.happened.append("publish")
        if self.happened.count("publish") <= self.away:
            raise TrackingUnavailable(uri, "Connection refused")
        return Counts(1, 0)


@pytest.mark.parametrize(
    ("uri", "away", "happened"),
    [
        (URI, 0, ["run 0", "publish", "run 1", "publish", "run 2"]),
        (URI, 1, ["run 0", "publish", "run 1", "run 2"]),  # it is asked once more, at the command's end, which says so
        (None, 0, ["run 0", "run 1", "run 2"]),
    ],
)
def test_a_command_publishes_between_its_packs(
    uri: str | None, away: int, happened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("lcbench.runs.launch.default_tracking_uri", lambda: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plan = look([*WORDS, f"results={tmp_path}", "sweep=s", *([f"tracking_uri={uri}"] if uri else [])])
    sweep, settings, cells = Sweep(tmp_path, "s"), settings_of(plan), [planned.cell for planned in plan.cells]
    sweep.add([Entry(cell) for cell in cells], command=[], launch={"launcher": "local", "settings": settings.public()})
    packs = make_packs(sweep, cells, launcher="local", settings=settings)
    told = Told([], away)
    monkeypatch.setattr(local, "_run_pack", told.run)
    monkeypatch.setattr(local, "publish", told.publish)
    launcher = local.LocalLauncher()
    launcher.output = "quiet"
    launcher.follow(sweep, packs)
    assert told.happened == happened
    assert not capfd.readouterr().err


def test_nothing_is_published_where_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("lcbench.runs.launch.default_tracking_uri", lambda: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = [*WORDS, f"results={tmp_path}", "sweep=s"]
    unsaid, said = look(words), look([*words, "tracking_uri=none"])
    assert settings_of(unsaid).tracking_uri is settings_of(said).tracking_uri is None
    assert lacks_a_place(unsaid, settings_of(unsaid))
    assert not lacks_a_place(said, settings_of(said))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert not lacks_a_place(unsaid, settings_of(unsaid))
    cells = [planned.cell for planned in said.cells]
    Sweep(tmp_path, "s").add([Entry(cell) for cell in cells], command=[], launch={
        "launcher": "local", "settings": settings_of(said).public(),
    })  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        sync.main(["s", "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert "sweep s names no tracking server; add --tracking-uri" in capsys.readouterr().err
