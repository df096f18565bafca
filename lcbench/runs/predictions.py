"""What a command predicts with, and a cell's prediction as a record of the store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lcbench.grid.cell import Cell
from lcbench.grid.paths import CONF
from lcbench.grid.refusals import approximates
from lcbench.predict.machines import machine_of_site
from lcbench.predict.predictor import Predictor
from lcbench.runs.attempt import CAUSE_LENGTH, FORETOLD, Attempt, Failure


@dataclass(frozen=True)
class Source:
    """A machine and what was fitted for it.

    Attributes:
        digest: of the machine, the fit and the version of lcbench: what was predicted with the same need not be again.
    """

    predictor: Predictor
    digest: str

    @classmethod
    def of(cls, machine: str | None, fit: str | None, site: Mapping[str, Any]) -> Source:
        """From what was typed; by default the site's device and the fit that lcbench has of it.

        Raises:
            ValueError: no such machine, none of the site, a file that is no fit, or one of another machine; one line.
        """
        name = machine or machine_of_site(site)
        predictor = Predictor.of(name, Path(fit) if fit else None)
        return cls(predictor, _digest(name, predictor.fit.read_bytes() if predictor.fit else b""))

    @property
    def fit(self) -> Path | None:
        """Its file; None where nothing was fitted."""
        return self.predictor.fit

    @property
    def machine(self) -> str:
        return self.predictor.machine.name

    def __str__(self) -> str:
        """For people: ``on b200, fitted by b200.fit.json``."""
        fitted = f"fitted by {self.fit}" if self.fit else "with no fit, so that rates are guesses (python -m lcbench.fit makes one)"
        return f"on {self.machine}, {fitted}"

    def has_made(self, prediction: Attempt | None) -> bool:
        """Whether a prediction is what this would predict again."""
        return prediction is not None and prediction.prediction.get("digest") == self.digest

    def predict(self, cell: Cell, sweep: str) -> Attempt:
        """The record of a cell's prediction; of one that cannot be predicted, with the reason."""
        begun = time.time()
        made: dict[str, Any] = {
            "machine": self.machine, "fit": self.fit.name if self.fit else None, "digest": self.digest,
            "lcbench": version("lcbench"),
        }  # fmt: skip
        try:
            if reason := self.predictor.refusal(cell):
                return self._record(cell, sweep, "skipped", {"prediction": made}, begun, failure=Failure("unsupported", reason))
            found = self.predictor.predict(cell)
        except ValueError as error:  # CannotPredict, and what code of the user's says
            failure = Failure("unsupported", f"cannot be predicted: {' '.join(str(error).split())}"[:CAUSE_LENGTH])
            return self._record(cell, sweep, "skipped", {"prediction": made}, begun, failure=failure)
        made |= {"approximate": True} if approximates(cell) else {}
        made |= {"error": found.error, "basis": found.basis, "peak_interval": list(found.peak_interval)}
        provenance = found.notes | {"prediction": made, "device": found.machine.device, "versions": {"lcbench": made["lcbench"]}}
        return self._record(cell, sweep, "predicted", provenance, begun, metrics=found.metrics())

    @staticmethod
    def _record(cell: Cell, sweep: str, status: Any, provenance: dict[str, Any], begun: float, **more: Any) -> Attempt:
        return Attempt(
            cell.id, sweep, FORETOLD, status, provenance=provenance, config=cell.config,
            started_at=begun, finished_at=time.time(), **more,
        )  # fmt: skip


def _digest(machine: str, fit: bytes) -> str:
    parts = (version("lcbench").encode(), (CONF / "machine" / f"{machine}.yaml").read_bytes(), fit)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
