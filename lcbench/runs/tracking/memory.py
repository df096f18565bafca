"""What tracking servers have of a sweep, remembered beside its results (``mlflow.json``), so that publishing asks for little."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from lcbench.redact import redacted_uri
from lcbench.runs.attempt import Attempt
from lcbench.runs.files import write_json
from lcbench.runs.store import MEMORY, Sweep

# What is published of a cell. One that was published otherwise is published again.
FORM = 2


class Known(NamedTuple):
    """What a server has of a cell: its run, the newest attempt there, how many blocks of timings that had then and had lost,
    when its file was written (0: not known), whether it has the files of the attempts too, and in which form it was published.
    """

    run_id: str
    attempt: int = 0
    status: str | None = None
    blocks: int = 0
    lost: int = 0
    written_ns: int = 0
    files: bool = True
    form: int = 0

    @classmethod
    def of(cls, run_id: str, attempt: Attempt, written_ns: int, files: bool) -> Known:
        """An attempt that was published just now."""
        return cls(run_id, attempt.number, attempt.status, attempt.blocks, len(attempt.lost_blocks), written_ns, files, FORM)

    def has(self, attempt: Attempt) -> bool:
        """Whether it has an attempt as it is now, and as it is published now."""
        return self.form == FORM and self[1:5] == (attempt.number, attempt.status, attempt.blocks, len(attempt.lost_blocks))


def remembered(sweep: Sweep, uri: str | None) -> dict[str, Any]:
    """What a server has of a sweep; empty where nothing was published."""
    found: dict[str, Any] = _of_servers(sweep).get(redacted_uri(uri), {}) if uri else {}
    return found


def _of_servers(sweep: Sweep) -> dict[str, Any]:
    """What servers have of a sweep, by their addresses without user and password."""
    return {redacted_uri(uri): known for uri, known in sweep.remembered().items()}


class Memory:
    """What one server has of a sweep: cell -> ``Known``. The file says ``open`` while somebody publishes; who finds it so asks the
    server, by tag, what became of that (``recalled``).
    """

    def __init__(self, sweep: Sweep, uri: str) -> None:
        self._sweep, self._uri = sweep, redacted_uri(uri)
        self._others = _of_servers(sweep)
        self._mine: dict[str, Any] = self._others.get(self._uri, {})
        self.changed = False

    def is_of(self, experiment: str) -> bool:
        """Whether what is remembered lies in this experiment of the server's."""
        return bool(self._mine.get("experiment") == experiment)

    def recall(self, found: dict[str, Any]) -> None:
        """Take what was found on the server for what it has."""
        self._mine, self.changed = {**found, "open": True}, True

    @property
    def open(self) -> bool:
        return bool(self._mine.get("open"))

    @property
    def parent(self) -> str:
        """The sweep's own run; empty if there is none."""
        return str(self._mine.get("parent", ""))

    @property
    def cells(self) -> dict[str, Any]:
        found: dict[str, Any] = self._mine.setdefault("cells", {})
        return found

    def cell(self, cell_id: str) -> Known:
        return Known(*self._mine.get("cells", {}).get(cell_id, ("",)))

    @property
    def predictions(self) -> dict[str, Any]:
        """Of predictions: by cell their run, and when the file that is there was written."""
        found: dict[str, Any] = self._mine.setdefault("predictions", {})
        return found

    @property
    def colors(self) -> dict[str, str]:
        """The colours of runs, by their ids."""
        found: dict[str, str] = self._mine.setdefault("colors", {})
        return found

    def save(self, *, open_: bool) -> None:
        self._mine["open"] = open_
        write_json(self._sweep.folder / MEMORY, {**self._others, self._uri: self._mine})

    def told(self, cells: int) -> bool:
        """Whether the sweep's run says what its cells come to as they are there now; ``cells``: how many it has."""
        return bool(self._mine.get("told") == self._digest(cells))

    def tell(self, cells: int) -> None:
        self._mine["told"] = self._digest(cells)

    def _digest(self, cells: int) -> str:
        """What is there of the cells, as one word."""
        there = {cell_id: Known(*known)[1:5] for cell_id, known in self.cells.items()}
        more = [self.predictions] if self.predictions else []
        return hashlib.sha256(json.dumps([cells, there, *more], sort_keys=True).encode()).hexdigest()
