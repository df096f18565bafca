"""Rank 0's way to the store: which cell of a pack may begin, and where its result goes when the disk is full."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from lcbench.measure.environment import node_name
from lcbench.runs.attempt import Attempt, Failure, Running
from lcbench.runs.notes import END, is_cancelled, told_to_stop
from lcbench.runs.pack import RESERVE, Pack, later_blocks, newer_result
from lcbench.runs.settle import record, with_lost_block
from lcbench.runs.store import Sweep

RESERVE_BYTES = 4 << 20
# How long a result waits for a full disk before it goes to the node's own.
PATIENCE_S = 900.0
STOP = "stop"


class Results:
    """The results of a pack, for which a full disk is no reason to lose what was measured.

    ``timed``: the result, as it was when it was last read, that a later block of timings is for.
    """

    def __init__(self, sweep: Sweep, pack: Pack) -> None:
        self._sweep, self._pack = sweep, pack
        self._reserve = pack.folder / RESERVE
        self.timed: Attempt | None = None

    def begin(self, cell_id: str) -> Running | str | None:
        """The attempt that may begin; ``STOP`` if the pack is to end here, None if the cell was cancelled or has got a good result
        from another pack since this one was made.
        """

        def claim() -> Running | None:
            newer = newer_result(self._sweep.attempts(cell_id), self._pack.id, self._pack.good.get(cell_id))
            if newer is not None:
                self._leave_out(newer, "the cell")
                return None
            running = self._sweep.begin(cell_id, self._pack.id)
            if not is_cancelled(self._pack.folder, cell_id):
                return running
            record(self._sweep, running, self._pack.configs[cell_id], Failure("cancelled", "python -m lcbench.cancel"))
            return None

        return self._begin(claim)

    def begin_again(self, cell_id: str, block: int) -> Running | str | None:
        """The same for a later block of timings. It belongs to the attempt of this pack: a cell that has got another one meanwhile
        gets no block. One that was cancelled keeps its result, which says what it lost.
        """

        def claim() -> Running | None:
            attempts = self._sweep.attempts(cell_id)
            if block not in later_blocks(attempts, self._pack.id)[:1]:
                if attempts:
                    self._leave_out(attempts[-1], f"block {block} of timings")
                return None
            self.timed = attempts[-1]
            if not is_cancelled(self._pack.folder, cell_id):
                return self._sweep.begin_again(self.timed, block)
            with suppress(OSError):  # on a full disk the block is lost without a word
                self._sweep.finish(with_lost_block(self.timed, block, Failure("cancelled", "python -m lcbench.cancel")))
            return None

        return self._begin(claim)

    def _leave_out(self, newer: Attempt, what: str) -> None:
        """Say, here and in the log of a cell's newest attempt, that this pack does not go on with the cell."""
        line = f"pack {self._pack.id} leaves out {what}: attempt {newer.number} of pack {newer.pack} is newer"
        print(f"{newer.cell_id}: {line}", flush=True)
        append_line(self._sweep.attempt_path(newer.cell_id, newer.number, "log"), f"{time.strftime('%H:%M:%S')} {line}")

    def _begin(self, claim: Callable[[], Running | None]) -> Running | str | None:
        if told_to_stop(self._pack.folder):
            return STOP
        try:
            if not self._reserve.exists():
                self._reserve.write_bytes(os.urandom(RESERVE_BYTES))  # noise, so that no file system compresses it
            return claim()
        except OSError as error:
            self.release()
            failure = Failure("no-start", f"there is no room for results: {error}")
            with suppress(OSError):
                self._pack.write_note(END, failure)
            print(failure.cause, file=sys.stderr, flush=True)
            return STOP

    def finish(self, attempt: Attempt) -> None:
        """Write a result: into the reserve if the disk is full, after waiting if that is gone too, at last to another place."""
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._sweep.finish(attempt)
            except OSError as error:
                print(f"{attempt.cell_id}: {error}; the result waits", file=sys.stderr, flush=True)
                if self._reserve.exists():
                    self.release()
                elif time.monotonic() > end:
                    break
                else:
                    time.sleep(2)
        # A folder of its own, which nobody else can have made before.
        spilled = Path(tempfile.mkdtemp(prefix="lcbench-")) / f"attempt-{attempt.number}.json"
        spilled.write_text(json.dumps(asdict(attempt)))
        place = self._sweep.attempt_path(attempt.cell_id, attempt.number)
        why = f"the results folder took nothing for {PATIENCE_S:.0f} s"
        raise RuntimeError(f"{why}; the result is in {spilled} on {node_name()}, to be copied to {place}")

    def release(self) -> None:
        with suppress(OSError):
            self._reserve.unlink(missing_ok=True)


def append_line(log: Path, line: str) -> None:
    """Add a line to the log of an attempt."""
    with suppress(OSError), open(log, "a") as file:  # a full disk costs the log, not the measurement
        file.write(line.rstrip() + "\n")
