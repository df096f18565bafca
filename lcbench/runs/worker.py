"""One rank of a gang: checks the nodes with the others, then works through the cells of a pack, one after the other.

A rank that meets an exception writes why and exits at once; its agent ends the gang and starts it anew, the new gang closes
the attempt that was in flight and goes on with the next cell. So no rank is ever left waiting in a collective for one that
is gone, and one cell cannot take the others with it. Of a gang that hangs the agent has each rank write its stacks, which needs
neither the interpreter lock nor a working communicator, and ends it (``hang.py``); should the agent not be able to, a timer of the
rank does, after ``hang.max_s``.

A cell is timed in blocks: the first gives its result, and when every cell was tried, those that are well are measured again, block
after block, each time in another order, so that drift and what a process does are in the samples. A later block is written into
the result that is there; one that fails costs a block, and only one that is wrong costs the result.

Between cells rank 0 looks whether the pack is to stop or the next cell was cancelled, whether the cell has got a good result from
another pack meanwhile, and whether there is room for results: a cell is begun only while a reserve on the disk can be held for its
result. The others do as rank 0 says.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lcbench.grid.build import (
    allow,
    build_inputs,
    build_kernel,
    build_planner,
    build_recompute,
    build_selector,
    build_strategy,
    build_workload,
    cell_mask,
    check_targets,
    draws,
    imports_of,
)
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.own import line_in
from lcbench.measure import progress
from lcbench.measure.blocks import blocks_of, shared, with_block, without_times
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.cores import usable_cores
from lcbench.measure.environment import describe
from lcbench.measure.measured import Measured
from lcbench.measure.nodes import check_gang
from lcbench.measure.ranks import EVERY
from lcbench.measure.session import Gang
from lcbench.planners.base import Cost
from lcbench.runs.attempt import CAUSE_LENGTH, Attempt, Failure, Running
from lcbench.runs.failure import classify_exception, stem_of
from lcbench.runs.files import write_json
from lcbench.runs.hang import REST_S, STACKS_SIGNAL
from lcbench.runs.logs import cell_mark
from lcbench.runs.machine import beside
from lcbench.runs.notes import CHECK
from lcbench.runs.pack import Pack, Settings, later_blocks, tries_again
from lcbench.runs.passes import device_of, passes_on
from lcbench.runs.results import STOP, Results, append_line
from lcbench.runs.settle import close_all, with_lost_block
from lcbench.runs.store import Sweep
from lcbench.schedule.groups import Groups, group_options
from lcbench.workloads.base import Work

FAILED_EXIT = 70
# A rank ends itself this long after ``hang.max_s``, if its agent has not.
OVERDUE_S = 30.0
BLOCK_STRIDE = 1000
STDERR = 2


def import_once(pack: Pack) -> None:
    """Import once per node what its ranks, which are forked from here, would each import by themselves."""
    for config in pack.configs.values():
        with suppress(Exception):  # what does not load fails the cell that wants it, and no other
            for module in imports_of(config):
                import_module(module)


def run_rank(pack_path: Path, node_rank: int) -> None:
    """Be a rank; torch elastic's environment says which."""
    # Slurm's warning goes to every process of the job, and is the agent's to act on.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, file=STDERR)
    pack = Pack.read(pack_path)
    sweep = Sweep(Path(pack.root), pack.sweep)
    allow(sweep.allowed())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(pack.site.get("device"), share=bool(pack.site.get("share_gpu")))
    marks = progress.share()
    _rest(marks)
    backend = _backend(device)
    # Who watches the gang must speak before a collective gives up.
    timeout = timedelta(seconds=pack.settings.hang["max_s"] + 2 * REST_S)
    dist.init_process_group(
        backend,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
        pg_options=group_options(backend),
    )
    if rank == 0:
        close_all(sweep, pack)
    if not _nodes_are_well(pack, device, node_rank):
        sys.exit(FAILED_EXIT)
    groups = Groups(timeout=timeout)
    gang = Gang(rank, world_size, device, groups, pack.settings.devices)
    # Its nodes' GPUs one by one stay in the pack's file.
    check = {k: v for k, v in sweep.pack_file(pack.id, CHECK).items() if k != "facts"} if rank == 0 else {}
    # Memory is measured after a collection each, which need not visit all modules again.
    gc.collect()
    gc.freeze()
    crew = Crew(gang, sweep, pack, Results(sweep, pack))
    # Only rank 0's is kept, and asking git costs a process.
    communication = {"backend": backend, "through_host": groups.goes_through_host(device)}
    provenance = describe(device, _others(pack)) | {"check": check, "communication": communication} if rank == 0 else {}
    if crew.measure_first(provenance):
        crew.measure_again()
    if rank == 0:
        crew.store.release()
    dist.barrier()
    dist.destroy_process_group()


def _others(pack: Pack) -> set[str]:
    """What cells of a pack name from outside of lcbench; a cell that names what it may not fails by itself."""
    found: set[str] = set()
    for config in pack.configs.values():
        with suppress(ValueError):
            found |= check_targets(config)
    return found


@dataclass(frozen=True)
class Crew:
    """A rank at work on a pack, together with the others. Its methods are collective; rank 0 alone touches the store."""

    gang: Gang
    sweep: Sweep
    pack: Pack
    store: Results

    def measure_first(self, provenance: dict[str, Any]) -> bool:
        """Measure every cell that has no result yet; whether to go on after that."""
        leads = self.gang.rank == 0
        for cell_id in EVERY.broadcast_object(remaining(self.sweep, self.pack) if leads else None):
            begun = EVERY.broadcast_object(self.store.begin(cell_id) if leads else None)
            if begun == STOP:
                return False
            if begun is None:  # it was cancelled, or has a result meanwhile
                continue
            cell = Cell.from_config(self.pack.configs[cell_id])
            seen = beside(self.pack) if leads else []
            measured = _guarded(cell, self.gang, self.sweep, self.pack, begun)
            if leads:
                self.store.finish(_with_others(attempt_of(measured, begun, cell, self.sweep, provenance), seen + beside(self.pack)))
            dist.barrier()
        return True

    def measure_again(self) -> None:
        """Measure the later blocks of every cell that is well."""
        leads = self.gang.rank == 0
        for block in range(2, max(blocks_of(config["measure"]) for config in self.pack.configs.values()) + 1):
            for cell_id in EVERY.broadcast_object(due_again(self.sweep, self.pack, block) if leads else None):
                begun = EVERY.broadcast_object(self.store.begin_again(cell_id, block) if leads else None)
                if begun == STOP:
                    return
                if begun is None:
                    continue
                seen, timed = (beside(self.pack), self.store.timed) if leads else ([], None)
                measured = _guarded(Cell.from_config(self.pack.configs[cell_id]), self.gang, self.sweep, self.pack, begun)
                if timed is not None:
                    self.store.finish(_with_others(amended(timed, begun, measured), seen + beside(self.pack)))
                    self.sweep.end_again(begun)
                dist.barrier()


def attempt_of(measured: Measured, running: Running, cell: Cell, sweep: Sweep, provenance: dict[str, Any]) -> Attempt:
    """The record of an attempt that came to its end, well or not."""
    failure = None
    status = "ok"
    metrics, samples = measured.metrics, measured.samples
    if measured.unavailable:
        status, failure = "skipped", Failure("unsupported", measured.unavailable)
    elif failure := speaks_against(measured):
        status = "failed"
        metrics, samples = without_times(metrics, samples)
    return Attempt(
        cell_id=running.cell_id,
        sweep=sweep.name,
        number=running.number,
        status=status,  # type: ignore[arg-type]
        failure=failure,
        metrics=metrics,
        samples=samples,
        checks=measured.check.as_dict() if measured.check else {},
        provenance={**provenance, **measured.notes},
        config=cell.config,
        pack=running.pack,
        started_at=running.started_at,
        finished_at=time.time(),
    )


def speaks_against(measured: Measured) -> Failure | None:
    """Why what was measured is no result: it is outside of its bounds, or its numbers cannot be true."""
    if measured.check and measured.check.failures:
        return Failure("numerics", "; ".join(measured.check.failures))
    return Failure("implausible", measured.implausible) if measured.implausible else None


def amended(attempt: Attempt, running: Running, measured: Measured) -> Attempt:
    """A good result with one more block of timings, or what it has become: a number of which one block is wrong is none."""
    if measured.unavailable:
        return with_lost_block(attempt, running.block, Failure("unsupported", measured.unavailable))
    now = time.time()
    times = {"block": running.block, "started_at": running.started_at, "finished_at": now}
    if failure := speaks_against(measured):
        cause = f"block {running.block} of timings: {failure.cause}"[:CAUSE_LENGTH]
        again = [*attempt.again, {**times, "iterations": 0}]
        metrics, samples = without_times(attempt.metrics, attempt.samples)
        found = {key: value for key, value in measured.metrics.items() if key.startswith("check/")}
        return replace(
            attempt, status="failed", failure=replace(failure, cause=cause),
            metrics=metrics | found, samples=samples, checks=measured.check.as_dict() if measured.check else attempt.checks,
            provenance={**attempt.provenance, "again": again}, finished_at=now,
        )  # fmt: skip
    again = [*attempt.again, {**times, "iterations": len(measured.samples["total_s"])}]
    metrics, samples = with_block(attempt.metrics, attempt.samples, measured)
    return replace(attempt, metrics=metrics, samples=samples, provenance={**attempt.provenance, "again": again})


def _with_others(attempt: Attempt, seen: list[str]) -> Attempt:
    """A result that says who else was at work on its devices when it was measured."""
    if not seen:
        return attempt
    every = sorted({*attempt.provenance.get("beside", ()), *seen})
    return replace(attempt, provenance={**attempt.provenance, "beside": every})


def remaining(sweep: Sweep, pack: Pack) -> list[str]:
    """Cells that this pack has still to try: after a restart or a requeue what is done stays done, and what failed so that it is
    tried again comes last.
    """
    fresh, again = [], []
    for cell_id in pack.cells:
        attempts = sweep.attempts(cell_id)
        if not any(a.pack == pack.id for a in attempts):
            fresh.append(cell_id)
        elif tries_again(attempts, pack.settings.retry):
            again.append(cell_id)
    return fresh + again


def due_again(sweep: Sweep, pack: Pack, block: int) -> list[str]:
    """Cells that this block of timings is due for, in an order that the pack and the block decide."""
    order = list(pack.cells)
    random.Random(f"{pack.id} {block}").shuffle(order)
    return [cell_id for cell_id in order if block in later_blocks(sweep.attempts(cell_id), pack.id)[:1]]


def _nodes_are_well(pack: Pack, device: torch.device, node_rank: int) -> bool:
    """The check of all nodes together, by a job's first gang; later ones have its word. Collective."""
    path = pack.folder / CHECK
    if EVERY.broadcast_object(path.exists() if dist.get_rank() == 0 else None):
        return True
    own = Sweep(Path(pack.root), pack.sweep).pack_file(pack.id, f"check/node-{node_rank}.json")
    check = check_gang(device, int(os.environ["LOCAL_WORLD_SIZE"]), own)
    stops = bool(check.fallen) and pack.stops_where_unwell
    if dist.get_rank() == 0:
        write_json(path, {"fallen": check.fallen, **check.found})
        if stops:
            pack.end_unhealthy(check.fallen)
    dist.barrier()
    return not stops


def _guarded(cell: Cell, gang: Gang, sweep: Sweep, pack: Pack, running: Running) -> Measured:
    """Measure a block of a cell; on an exception or a hang leave word in the pack's failures folder and end this process."""
    failures = pack.folder / "failures"
    failures.mkdir(parents=True, exist_ok=True)
    stem = f"{stem_of(running)}.rank-{gang.rank}"
    log = sweep.attempt_path(cell.id, running.number, "log")

    def say(line: str) -> None:
        if gang.rank == 0:
            append_line(log, f"{time.strftime('%H:%M:%S')} {line}")

    first = running.block == 1
    say(f"{cell.label} (attempt {running.number}, {gang.world_size} ranks)" if first else f"block {running.block} of timings")
    for stream in (sys.stdout, sys.stderr):  # python -m lcbench.logs finds a cell's part of a rank's output by it
        print(cell_mark(cell.id, running.number), file=stream, flush=True)
    limit_s = pack.settings.hang["max_s"]
    with _stacks(failures / f"{stem}.hang.txt", limit_s + OVERDUE_S):
        progress.own.begin(stem_of(running), patience_s=pack.patience_s(cell.id), limit_s=limit_s)
        try:
            measured = (measure_cell if first else measure_again)(work_of(cell, running, pack.settings), gang, say)
            _rest(progress.own)
            return measured
        except BaseException as error:
            failure = classify_exception(error)
            line = line_in(error, cell.config)  # code of the user's is theirs to mend
            cause = f"{failure.cause} ({line})" if line else failure.cause
            word = {"kind": failure.kind, "cause": cause, "rank": gang.rank, "time": time.time()}
            with suppress(OSError):
                write_json(failures / f"{stem}.json", word)
            append_line(log, f"rank {gang.rank}: {traceback.format_exc()}")
            sys.stdout.flush()
            sys.stderr.flush()
            # No clean-up: destroying a group would wait for ranks that may be stuck.
            os._exit(FAILED_EXIT)


def work_of(cell: Cell, running: Running | None = None, settings: Settings | None = None) -> Work:
    """A cell as objects, for the first block of timings of an attempt or for a later one.

    Args:
        settings: which site's device says what documents cost; None: what there is here.
    """

    def cost() -> Cost:
        site, devices = (settings.site, settings.devices) if settings is not None else ({}, known_devices())
        return passes_on(device_of(site, devices, here=True)).cost(cell)

    number, block = (running.number, running.block) if running else (1, 1)
    config, problem = cell.config, cell.problem
    return Work(
        workload=build_workload(config.get("workload")),
        problem=problem,
        make_mask=lambda draw: cell_mask(cell, draw),
        kernel=build_kernel(config["kernel"]),
        strategy=build_strategy(config["cp"]),
        settings=shared(config["measure"], first=block == 1),
        mesh=cell.mesh,
        scale=cell.scale,
        seed=config["seed"],
        draws=draws(config["mask"]),
        # Each block has its check look elsewhere.
        attempt=number + BLOCK_STRIDE * (block - 1),
        recompute=build_recompute(config),
        planner=build_planner(config),
        selector=build_selector(config),
        inputs=build_inputs(config),
        cost=cost,
    )


def _rest(marks: progress.Progress) -> None:
    """Between cells."""
    marks.begin("", patience_s=REST_S, limit_s=0.0)


@contextmanager
def _stacks(dump: Path, timeout_s: float) -> Iterator[None]:
    """Write every thread's stack to ``dump`` when the agent asks for it by a signal; after ``timeout_s`` also end the process."""
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(open(dump, "w"))
        except OSError:  # a full disk
            file = STDERR
        faulthandler.register(STACKS_SIGNAL, file=file)
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.register(STACKS_SIGNAL, file=STDERR)
    dump.unlink(missing_ok=True)


def _device(promised: str | None, *, share: bool) -> torch.device:
    """This rank's device; ``promised`` is the site's: ``cpu``, a GPU's name, or None for what there is.

    ``share``: ranks that there is no GPU for take one that another has. Without, torch refuses them.
    """
    if promised not in (None, "cpu") and not torch.cuda.is_available():
        raise RuntimeError(f"the site promises {promised}, and torch finds no CUDA device here")
    if torch.cuda.is_available() and promised != "cpu":
        number = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", number % torch.cuda.device_count() if share else number)
        torch.cuda.set_device(device)
        return device
    # Ranks share the cores that there are for them; more threads than that only get in each other's way.
    torch.set_num_threads(max(1, usable_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    return torch.device("cpu")


def _backend(device: torch.device) -> str:
    """NCCL for GPUs, where every rank has one: it refuses two ranks on one."""
    shared = int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count()
    return "nccl" if device.type == "cuda" and not shared else "gloo"
