"""What all runs of a sweep say of where they come from."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from lcbench.grid.site import runs_here
from lcbench.redact import redacted
from lcbench.runs.manifest import Entry, entries_of
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.server import TAG_LENGTH
from lcbench.runs.users import user_name


@dataclass(frozen=True)
class Origin:
    """A sweep, by its manifest."""

    sweep: Sweep
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @property
    def created_at(self) -> float:
        """Seconds since the epoch."""
        return float(self.manifest["created_at"])

    @property
    def launch(self) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest["launch"] or {}
        return found

    def entries(self) -> dict[str, Entry]:
        return entries_of(self.manifest)

    def tags(self) -> dict[str, str]:
        """Tags of every run of it."""
        # Its id, since two people may both have a sweep called "first".
        return {
            "lcbench.sweep": self.sweep.name, "lcbench.sweep_id": self.id, "mlflow.user": self._user(),
            "mlflow.source.name": redacted(_command((self.manifest["commands"] or [[]])[-1]))[:TAG_LENGTH],
            "mlflow.source.type": "LOCAL" if runs_here(str(self.launch.get("launcher"))) else "JOB",
        }  # fmt: skip

    def about(self) -> str:
        """Where its results lie and which commands made them, Markdown."""
        # Not as blocks of code: MLflow's page gets as wide as their longest line.
        commands = [f"`{redacted(_command(words))}`" for words in self.manifest["commands"]]
        return "\n\n".join([f"Results in `{self.sweep.folder}`.", *commands])

    def _user(self) -> str:
        """Who started the sweep, or the number of whoever owns it."""
        return str(self.launch.get("by") or user_name(self.sweep.folder.stat().st_uid))


def _command(words: list[str]) -> str:
    return shlex.join(["python", "-m", "lcbench.sweep", *words])
