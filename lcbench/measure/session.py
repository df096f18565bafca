"""What ``measure_cell`` needs of a cell: a ``Session`` per draw, which runs phases and checks what they gave.

A workload (``lcbench.workloads``) makes sessions. Nothing in ``lcbench.measure.cell`` knows what a phase computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lcbench.cp.base import Place
from lcbench.measure.bounds import Check
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from lcbench.schedule.execute import Groups

# A phase gets what the one before returned, and the first None.
Phases = dict[str, Callable[[Any], Any]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Gang:
    """The ranks that measure together, as one of them sees it."""

    rank: int
    world_size: int
    device: torch.device
    groups: Groups
    devices: list[dict[str, Any]]  # conf/device entries

    @property
    def place(self) -> Place:
        return Place(self.rank, self.device, self.groups)


@dataclass(frozen=True)
class Cost:
    """What a phase costs any sound run.

    Attributes:
        flops: over all ranks.
        least_bytes_sent: by the rank that sends most, at the least.
        least_memory_bytes: read and written, at the least, by the rank with most of them.
        recomputed: FLOPs over all ranks that are done once more, by choice: no part of ``flops``.
    """

    flops: float
    least_bytes_sent: float
    least_memory_bytes: float
    recomputed: float = 0.0


@dataclass(frozen=True)
class Counted:
    """What was counted, over all ranks.

    Attributes:
        metrics: keys of ``measure.metrics``.
        notes: for the provenance.
        bytes_sent: by phase, of the rank that sends most; without the phases that nobody counts.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    bytes_sent: dict[str, float] = field(default_factory=dict)


class Session(Protocol):
    """One draw of a cell, ready to run on this rank. All methods but ``vary`` are collective.

    Attributes:
        refused: why the ranks cannot run it; nothing else is there then.
        wrong: what is wrong with how it is shared among ranks; None if nothing is.
        prepare_s: seconds that it took this rank to make ready.
    """

    refused: str | None
    wrong: str | None
    prepare_s: float

    @property
    def input_bytes(self) -> int:
        """Memory of this rank's inputs."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that the check holds between the first pass and the last."""
        ...

    def phases(self) -> Phases:
        """What is timed, in this order."""
        ...

    def costs(self) -> dict[str, Cost]:
        """The cost of each phase."""
        ...

    def first_pass(self) -> None:
        """Run every phase once, for ``check_first``, and count."""
        ...

    def counted(self) -> Counted:
        """What was counted in the first pass, and what is known of the draw without a run."""
        ...

    def check_first(self, say: Say) -> None:
        """Check the first pass, and by passes of its own what that leaves open. Inputs are as before it afterwards."""
        ...

    def check_again(self) -> None:
        """The short check of a later block of timings, with the first pass in it."""
        ...

    def vary(self) -> None:
        """Change the inputs in place, so that the next pass has another result that is known too."""
        ...

    def check_timed(self, passed: Any) -> None:
        """Check what the last phase of the last timed iteration returned."""
        ...

    def check_last(self) -> None:
        """Check one more pass, on inputs that no pass before had in this order."""
        ...

    def check(self) -> Check:
        """What all checks have found so far."""
        ...

    def variants(self) -> dict[str, Phases]:
        """The phases with ``compute`` alone and with ``communication`` alone; empty where they cannot be told apart."""
        ...

    def shares(self) -> dict[str, float]:
        """Metrics of what the whole is made of, by passes of their own."""
        return {}

    def timeline(self) -> list[list[float]] | None:
        """Seconds of each step of one iteration on this rank; None where steps are not known."""
        ...


class Measurable(Protocol):
    """A cell as ``measure_cell`` sees it.

    Attributes:
        settings: how long to measure it (``measure`` of one block).
        draws: how many sessions there are, from draw 0 on.
    """

    @property
    def problem(self) -> Problem: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def draws(self) -> int: ...

    def unavailable(self, gang: Gang) -> str | None:
        """Why this rank cannot run it on its machine, or None."""
        ...

    def start(self, draw: int, gang: Gang) -> Session:
        """One draw, built anew. Collective."""
        ...
