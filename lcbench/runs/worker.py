"""One rank of a gang: works through the cells of a pack, one after the other.

A rank that meets an exception writes why and exits at once; its agent ends the gang and starts it anew, the new gang closes
the attempt that was in flight and goes on with the next cell. So no rank is ever left waiting in a collective for one that
is gone, and one cell cannot take the others with it. A cell that hangs is ended, with a stack dump, by a timer that needs
neither the interpreter lock nor a working communicator.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcbench.cp.execute import Groups
from lcbench.grid.build import build_kernel, build_mask, build_strategy, draws
from lcbench.grid.cell import Cell
from lcbench.measure.cell import Gang, Measured, Work, measure_cell
from lcbench.measure.environment import describe
from lcbench.runs.failure import classify_exception
from lcbench.runs.jobs import close
from lcbench.runs.pack import Pack
from lcbench.runs.store import Attempt, Failure, Running, Sweep, write_json

FAILED_EXIT = 1


def main(pack_path: Path) -> None:
    pack = Pack.read(pack_path)
    sweep = Sweep(Path(pack.root), pack.sweep)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device()
    # The hang timer of a cell must speak before a collective gives up.
    patience = max(timeout_s(config) for config in pack.configs.values())
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=2 * patience + 300),
        device_id=device if device.type == "cuda" else None,
    )
    if rank == 0:
        close_interrupted(sweep, pack)
    dist.barrier()
    gang = Gang(rank, world_size, device, Groups(), pack.devices)
    provenance = describe(device)
    for cell_id in _remaining(sweep, pack):
        cell = Cell.from_config(pack.configs[cell_id])
        running = _agree(sweep.begin(cell_id, pack.id) if rank == 0 else None)
        measured = _guarded(cell, gang, sweep, pack, running)
        if rank == 0:
            sweep.finish(attempt_of(measured, running, sweep, provenance))
        dist.barrier()
    dist.destroy_process_group()


def attempt_of(measured: Measured, running: Running, sweep: Sweep, provenance: dict[str, Any]) -> Attempt:
    """The record of an attempt that came to its end, well or not."""
    failure = None
    status = "ok"
    if measured.unavailable:
        status, failure = "skipped", Failure("unsupported", measured.unavailable)
    elif measured.check is not None and measured.check.failures:
        status, failure = "failed", Failure("numerics", "; ".join(measured.check.failures))
    return Attempt(
        cell_id=running.cell_id,
        sweep=sweep.name,
        number=running.number,
        status=status,  # type: ignore[arg-type]
        failure=failure,
        metrics=measured.metrics,
        samples=measured.samples,
        checks=measured.check.as_dict() if measured.check else {},
        provenance={**provenance, **measured.notes},
        pack=running.pack,
        started_at=running.started_at,
        finished_at=time.time(),
    )


def close_interrupted(sweep: Sweep, pack: Pack) -> None:
    """Record attempts of this pack that began and never ended: their gang is gone."""
    for cell_id in pack.cells:
        for running in sweep.running(cell_id):
            if running.pack == pack.id:
                close(sweep, running)


def _remaining(sweep: Sweep, pack: Pack) -> list[str]:
    """Cells that this pack has not tried yet: after a restart or a requeue, what is done stays done."""
    todo = [c for c in pack.cells if not sweep.has_attempt_of(c, pack.id)]
    agreed: list[str] = _agree(todo)
    return agreed


def _guarded(cell: Cell, gang: Gang, sweep: Sweep, pack: Pack, running: Running) -> Measured:
    """Measure a cell; on an exception or a hang leave word in the pack's failures folder and end this process."""
    failures = pack.folder / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    stem = f"{cell.id}.attempt-{running.number}.rank-{gang.rank}"
    log = sweep.attempt_path(cell.id, running.number, "log")

    def say(line: str) -> None:
        if gang.rank == 0:
            _append(log, f"{time.strftime('%H:%M:%S')} {line}")

    say(f"{cell.label} (attempt {running.number}, {gang.world_size} ranks)")
    with _hang_timer(failures / f"{stem}.hang.txt", timeout_s(cell.config)):
        try:
            return measure_cell(_work(cell), gang, say)
        except BaseException as error:
            failure = classify_exception(error)
            record = {"kind": failure.kind, "cause": failure.cause, "rank": gang.rank, "time": time.time()}
            write_json(failures / f"{stem}.json", record)
            _append(log, f"rank {gang.rank}: {traceback.format_exc()}")
            sys.stdout.flush()
            sys.stderr.flush()
            # No clean-up: destroying a group would wait for ranks that may be stuck.
            os._exit(FAILED_EXIT)


def timeout_s(config: dict[str, Any]) -> float:
    """Seconds after which a cell counts as hung: its own limit for each draw of its mask."""
    return float(config["measure"]["timeout_s"]) * draws(config["mask"])


def _work(cell: Cell) -> Work:
    config, problem = cell.config, cell.problem
    return Work(
        problem=problem,
        make_mask=lambda draw: build_mask(config["mask"], problem.seqlen, problem.heads, config["seed"], draw),
        kernel=build_kernel(config["kernel"]),
        strategy=build_strategy(config["cp"]),
        settings=config["measure"],
        seed=config["seed"],
        draws=draws(config["mask"]),
    )


@contextmanager
def _hang_timer(dump: Path, timeout_s: float) -> Iterator[None]:
    """After ``timeout_s`` write every thread's stack to ``dump`` and end the process."""
    with open(dump, "w") as file:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    dump.unlink(missing_ok=True)


def _append(log: Path, line: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(line.rstrip() + "\n")


def _agree(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return device
    # Ranks share the host's cores; more threads than that only get in each other's way.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    return torch.device("cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
