"""What is known of the cells of a sweep, read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lcbench.grid.search import Search
from lcbench.grid.trace import Trace
from lcbench.runs.attempt import Attempt, Failure, Running
from lcbench.runs.files import Damaged
from lcbench.runs.manifest import Entry


@dataclass(frozen=True)
class Record:
    """A cell of a sweep and all that was tried: attempts that ended, oldest first, and those in flight; and its prediction."""

    entry: Entry
    attempts: tuple[Attempt, ...]
    running: tuple[Running, ...]
    prediction: Attempt | None = None

    def has_attempt_of(self, pack: str) -> bool:
        """Whether a pack has an ended attempt at this cell."""
        return any(a.pack == pack for a in self.attempts)

    @property
    def last(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def known(self) -> Attempt | None:
        """The newest attempt; of a cell that was never tried its prediction."""
        return self.last or self.prediction

    @property
    def status(self) -> str:
        """Of what is known of it, else ``missing``; a cell that cannot run at all is ``skipped``."""
        if self.entry.skip:
            return "skipped"
        return self.known.status if self.known else "missing"

    @property
    def failure(self) -> Failure | None:
        """Why it has no good result, and no prediction."""
        if self.entry.skip:
            return Failure("unsupported", self.entry.skip)
        return self.known.failure if self.known else None


@dataclass(frozen=True)
class Look:
    """A whole sweep, read once."""

    records: dict[str, Record]
    damaged: tuple[Damaged, ...]
    launch: dict[str, Any] | None  # as the manifest has it
    search: Search | None = None  # where its cells are steps of one
    traces: tuple[Trace, ...] = ()  # of a server, whose batches are cells

    def foretold(self) -> Look:
        """Predictions alone: every cell as if it had never been tried."""
        return replace(self, records={cell_id: replace(r, attempts=(), running=()) for cell_id, r in self.records.items()})
