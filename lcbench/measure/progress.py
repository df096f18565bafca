"""Where a rank is: a few bytes of memory that it shares with its node's agent, which tells a rank that goes on from one that hangs.

A mark costs about a microsecond and no system call, and none is made inside of what is timed.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

# A rank's slot: marks so far, seconds of CLOCK_MONOTONIC at which its work began (0: the rank has not come up), how long it may go
# on and how long it may stand still, phases so far, iteration, phase, work.
SLOT = struct.Struct("<Q3d2Q64s128s")
VARIABLE = "LCBENCH_PROGRESS"


@dataclass(frozen=True)
class Mark:
    """What a slot says.

    Attributes:
        count: marks since the rank started.
        begun: when its work began, in seconds of ``time.monotonic``; 0 while the rank has not come up.
        limit_s: how long its work may take in all; 0 for no limit.
        patience_s: how long it may go on without a mark, by what is expected of its work; 0 once it has a pace of its own.
        step: how many phases it has begun, and the iteration in the last: the same place on all ranks.
        phase: what it is doing.
        work: the attempt or the block that it is at; empty between two.
    """

    count: int
    begun: float
    limit_s: float
    patience_s: float
    step: tuple[int, int]
    phase: str
    work: str

    @property
    def place(self) -> str:
        return f"{self.phase!r}" + (f", iteration {self.step[1]}" if self.step[1] else "")

    @classmethod
    def read(cls, memory: mmap.mmap, slot: int) -> Mark:
        count, begun, limit_s, patience_s, phases, iteration, phase, work = SLOT.unpack_from(memory, slot * SLOT.size)
        return cls(count, begun, limit_s, patience_s, (phases, iteration), _text(phase), _text(work))


class Progress:
    """The marks of this rank. Without ``memory`` nobody looks, and a mark is nothing."""

    def __init__(self, memory: mmap.mmap | None = None, slot: int = 0) -> None:
        self._memory, self._offset = memory, slot * SLOT.size
        self._count = self._phases = self._iteration = 0
        self._begun = self._limit_s = self._patience_s = 0.0
        self._phase = self._work = b""

    @classmethod
    def of_environment(cls) -> Progress:
        """In the memory that the agent named, in the slot of the local rank."""
        path = os.environ.get(VARIABLE)
        if path is None:
            return cls()
        descriptor = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(descriptor, SLOT.size * int(os.environ["LOCAL_WORLD_SIZE"]))
        finally:
            os.close(descriptor)
        return cls(memory, int(os.environ["LOCAL_RANK"]))

    def begin(self, work: str, *, patience_s: float, limit_s: float) -> None:
        """From here on this rank is to make progress."""
        self._work, self._begun = _bytes(work, 128), time.monotonic()
        self._patience_s, self._limit_s = patience_s, limit_s
        self.enter("building")

    def enter(self, phase: str) -> None:
        """The next phase begins; all ranks enter the same ones."""
        self._phases, self._iteration, self._phase = self._phases + 1, 0, _bytes(phase, 64)
        self.mark()

    def iterate(self) -> None:
        """Another iteration of this phase is done."""
        self._iteration += 1
        self.mark()

    def has_pace(self) -> None:
        """From here on a mark comes with every pass: how long that takes has been seen, and estimates do not count any more."""
        self._patience_s = 0.0
        self.mark()

    def mark(self) -> None:
        """This rank goes on."""
        self._count += 1
        if self._memory is not None:
            SLOT.pack_into(
                self._memory, self._offset, self._count, self._begun, self._limit_s, self._patience_s, self._phases,
                self._iteration, self._phase, self._work,
            )  # fmt: skip


# Of this process.
own = Progress()


def share() -> Progress:
    """Let the agent of this node see the marks of this process from now on."""
    global own
    own = Progress.of_environment()
    return own


def _bytes(text: str, size: int) -> bytes:
    return text.encode(errors="replace")[:size]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
