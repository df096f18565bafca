"""The record of one try at one cell, or of its prediction: what is in a file of the store, and what must be in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lcbench.runs.files import SCHEMA, check_names, check_schema

Status = Literal["ok", "failed", "skipped", "predicted"]
FAILURE_CLASSES = (
    "oom", "timeout", "hang", "nccl", "numerics", "implausible", "unsupported", "node-fail", "preempted", "crash", "cancelled",
    "no-start",
)  # fmt: skip
CAUSE_LENGTH = 300
# The number of a prediction, where attempts have 1 and more.
FORETOLD = 0
Numbers = (int, float)


@dataclass(frozen=True)
class Failure:
    """Why an attempt did not end well: one of ``FAILURE_CLASSES`` and the first cause in one line."""

    kind: str
    cause: str
    rank: int | None = None  # the first rank that failed, where known


@dataclass(frozen=True)
class Attempt:
    """The record of one try at one cell, or, in ``prediction.json``, of its prediction.

    ``metrics`` are flat floats keyed as MLflow keys (``time/forward/median_s``, ``compute/mfu``, ``check/dq_error``;
    docs/metrics.md lists them with units); ``samples`` are per-iteration lists (``forward_s``: slowest rank of each
    iteration), lists per block of timings (``block_forward_s``) and per rank (``rank_forward_median_s``); ``checks`` holds
    the errors, their bounds and how the reference was taken; ``provenance`` says where, with what and from which commit, and
    of later blocks when they were measured (``again``) and which were lost and why (``lost_blocks``). A prediction has the status
    ``predicted`` (or ``skipped``, where there can be none), the number 0, metrics by the same keys and no samples; its provenance
    holds ``prediction``: machine, fit, error band, what it rests on. ``config`` is the cell's, so that a file can be read by
    itself. A value that is not finite is left out of ``metrics`` and is null elsewhere, because JSON cannot write it.
    """

    cell_id: str
    sweep: str
    number: int
    status: Status
    failure: Failure | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    pack: str = ""
    started_at: float = 0.0  # seconds since the epoch
    finished_at: float = 0.0
    schema: int = SCHEMA

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attempt:
        """Raises:
        Unreadable: a later version wrote it.
        ValueError, TypeError, KeyError, AttributeError: it is no record of an attempt.
        """
        check_schema(data)
        failure = Failure(**data["failure"]) if data.get("failure") else None
        made = cls(**{**data, "failure": failure})
        check_names(made.cell_id, *filter(None, [made.pack]))
        texts = (failure.kind, failure.cause) if failure else ()
        numbers = (made.number, made.started_at, made.finished_at, *made.metrics.values())
        if made.status not in get_args(Status) or not all(isinstance(t, str) for t in (made.sweep, *texts)):
            raise ValueError(f"no status and cause of an attempt: {made.status!r}, {texts}")
        if made.status == "predicted" and made.number != FORETOLD:
            raise ValueError(f"attempt {made.number} is a prediction, and attempts are measured")
        if not all(isinstance(n, Numbers) for n in numbers) or not all(isinstance(v, list) for v in made.samples.values()):
            raise TypeError("a metric that is no number, or samples that are no list")
        if not all(isinstance(d, dict) for d in (made.checks, made.provenance, made.config)):
            raise TypeError("checks, provenance or config that are no table")
        return made

    @classmethod
    def prediction_from_json(cls, data: dict[str, Any]) -> Attempt:
        """Raises: as ``from_json``; ValueError also where it is an attempt's, or has no error band."""
        made = cls.from_json(data)
        bare = made.status == "predicted" and made.band is None
        if made.number != FORETOLD or made.status not in ("predicted", "skipped") or bare:
            raise ValueError("no prediction with its error")
        return made

    @property
    def blocks(self) -> int:
        """How many blocks of timings it has; 0 where it was not timed, or before there were blocks."""
        return int(self.metrics.get("time/blocks", 0))

    @property
    def prediction(self) -> dict[str, Any]:
        """Of a prediction: machine, fit, relative half-width of its 95 % interval (``error``), basis, and ``approximate`` where its
        strategy is; empty of a measurement."""
        found = self.provenance.get("prediction")
        return found if isinstance(found, dict) else {}

    @property
    def band(self) -> float | None:
        """Relative half-width of the 95 % interval of a prediction's times: they lie within a factor of 1 + it; else None."""
        error = self.prediction.get("error")
        return float(error) if self.status == "predicted" and isinstance(error, Numbers) and error >= 0 else None

    @property
    def approximate(self) -> str:
        """Of results of a strategy that approximates: that, and how far they are from exact ones (``check/distance``), which a
        prediction does not know. Empty: they are exact, and may win."""
        if self.prediction.get("approximate"):
            return "approximate"
        distance = self.metrics.get("check/distance", 0.0)
        return f"approximate, distance {distance:.2g}" if distance > 0 else ""

    @property
    def no_speed(self) -> str:
        """Why the times say nothing about a GPU's speed: ranks shared one, say. The check counts as any other."""
        check = self.provenance.get("check")
        return str(check.get("no_speed", "")) if isinstance(check, dict) else ""

    @property
    def again(self) -> list[dict[str, Any]]:
        """Its later blocks: number, when each began and ended, and how many iterations of the samples are its own."""
        return list(self.provenance.get("again", []))

    @property
    def lost_blocks(self) -> list[dict[str, Any]]:
        """Blocks that began and gave nothing, and why."""
        return list(self.provenance.get("lost_blocks", []))


@dataclass(frozen=True)
class Running:
    """The marker of an attempt in flight, or of a later block of timings of an attempt that has a good result."""

    cell_id: str
    number: int
    pack: str
    started_at: float
    block: int = 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Running:
        made = cls(**data)
        check_names(made.cell_id, made.pack)
        if not all(isinstance(n, Numbers) for n in (made.number, made.started_at, made.block)):
            raise TypeError("a number that is none")
        return made
