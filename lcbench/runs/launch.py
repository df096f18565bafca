"""A launch: the sweep and the settings of a plan, the cells that are missing, their packs, and the hand-over of these."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.expand import Plan
from lcbench.grid.paths import REPOSITORY
from lcbench.grid.search import Search
from lcbench.grid.site import runs_here
from lcbench.grid.trace import Trace
from lcbench.redact import redacted, redacted_uri, secrets_of
from lcbench.runs.address import NOWHERE, given_address, planned_address, planned_experiment, variables
from lcbench.runs.attempt import Failure
from lcbench.runs.estimate import Estimator
from lcbench.runs.jobs import Watch
from lcbench.runs.manifest import Entry
from lcbench.runs.notes import END, job_here, write_job
from lcbench.runs.pack import Pack, Settings, given_up, group, newest_good
from lcbench.runs.queues import SLURM, Queue, target_of
from lcbench.runs.settle import record, settled
from lcbench.runs.store import Sweep
from lcbench.runs.users import user_name


class NotSubmitted(Exception):
    """The launcher could not hand over packs.

    ``refused``: packs that the launcher will never take as they are. ``waiting``: packs that may be tried again.
    """

    def __init__(self, message: str, refused: Sequence[Pack] = (), waiting: Sequence[Pack] = ()) -> None:
        cells = sum(len(p.cells) for p in waiting)
        super().__init__(message + (f"; {cells} cells wait, and the same command submits them when there is room" if cells else ""))
        self.refused, self.waiting = refused, waiting


@dataclass(frozen=True)
class Todo:
    """What a launch would run, and what it leaves out and why."""

    cells: list[Cell]
    done: Sequence[Cell] = ()
    under_way: Sequence[Cell] = ()
    given_up: Sequence[Cell] = ()
    held: Sequence[str] = ()  # a line for each job under way that does not go on by itself


class Launches(Protocol):
    """A launcher, as the code below the launchers knows it: it brings packs to processes.

    ``name``: that of its file in conf/hydra/launcher. ``queue``: what knows its jobs, which run on without the command; None: its
    packs end with the command. ``output``: what the command prints: table, quiet or json. ``measures``: whether results come of it.
    """

    name: str
    queue: Queue | None
    output: str
    measures: bool

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        """Write packs down and hand them over, under the sweep's lock.

        Raises:
            NotSubmitted: packs were refused; the message says which and why.
        """

    def follow(self, sweep: Sweep, packs: list[Pack]) -> None:
        """Stay with packs that were handed over until they have ended."""

    def launch_plan(self, plan: Plan) -> int:
        """Run what the plan asks for and is missing; the exit code of the command."""

    def launch_cells(self, sweep: Sweep, choose: Callable[[], Todo], *, settings: Settings, wait: bool, report: list[str]) -> int:
        """Run the cells that ``choose`` names, under the sweep's lock, then report on the cells ``report``; the exit code."""


def hand_over(
    launcher: Launches, sweep: Sweep, choose: Callable[[], Todo], settings: Settings,
    tell: Callable[[list[Pack]], None] = lambda packs: None,
) -> tuple[Todo, list[Pack], NotSubmitted | None]:  # fmt: skip
    """Make packs of what ``choose`` names and submit them, under the sweep's lock; what was refused is kept as such. ``tell`` hears
    of them before.

    Returns: what was chosen, the packs, and why some were refused, or None.
    """
    with sweep.lock():
        todo = choose()
        try:
            settings = settings.revealed()
        except ValueError as error:
            return todo, [], NotSubmitted(str(error)) if todo.cells else None
        packs = make_packs(sweep, todo.cells, launcher=launcher.name, queue=target_of(launcher.queue), settings=settings)
        sweep.check_writable([cell.id for cell in todo.cells])
        try:
            if packs:
                tell(packs)
                named = set().union(*(build.check_targets(cell.config) for cell in todo.cells))
                sweep.allow(named | ({packs[0].queue} - {"", SLURM}))
                with _inherited(settings):
                    launcher.submit(sweep, packs)
        except NotSubmitted as refusal:
            turn_down(sweep, refusal)
            return todo, packs, refusal
    return todo, packs, None


def todo_of(plan: Plan, sweep: Sweep) -> Todo:
    """What of a plan is missing, found without writing: the sweep need not be there."""
    runnable = [p.cell for p in plan.cells if not p.skip]
    if not sweep.exists():
        return Todo(runnable)
    known = sweep.entries()
    todo = missing(sweep, [c for c in runnable if c.id in known], force=plan.options["force"], settles=False)
    return replace(todo, cells=[c for c in runnable if c.id not in known] + todo.cells)


def sweep_of(plan: Plan) -> Sweep:
    """The plan's sweep: the one it names, or a new one."""
    root = Path(plan.options["results"]).absolute()
    name = plan.options["sweep"]
    return Sweep(root, str(name)) if name is not None else Sweep(root, default_name(plan))


def write_cells(
    sweep: Sweep, entries: list[Entry], words: Sequence[str], launcher: str, settings: Settings, search: Search | None = None,
    trace: Trace | None = None,
) -> None:  # fmt: skip
    """Write cells into a sweep's manifest, with who asked for them, by which words, how they are launched, and which search they
    are steps of or which trace's batches they have.

    Cells that are only predicted leave the launch of a sweep as it was: it goes on as it is measured. So does its search.
    """
    secret = secrets_of(settings.site.get("env")).values()
    with sweep.lock():
        kept = sweep.exists() and all(entry.predicted for entry in entries)
        known = sweep.manifest() if kept else {}
        sweep.add(entries, command=[redacted(word, secret) for word in words], launch=known.get("launch") or {
            "launcher": launcher, "settings": settings.public(), "by": user_name(),
        }, search=search if known.get("search") is None else None, trace=trace)  # fmt: skip


def settings_of(plan: Plan) -> Settings:
    options, site = plan.options, plan.site
    tracking_uri = planned_address(options["tracking_uri"], site.get("tracking_uri"), default_tracking_uri())
    experiment = planned_experiment(options["mlflow_experiment"])
    return Settings(
        site=site,
        devices=known_devices(),
        tracking_uri=tracking_uri,
        pack=options["pack"],
        hang=options["hang"],
        retry=options["retry"],
        experiment=experiment,
    )


def lacks_a_place(plan: Plan, settings: Settings) -> bool:
    """Whether nothing is published although nobody has said so."""
    return (
        settings.tracking_uri is None and given_address(plan.options["tracking_uri"], plan.site.get("tracking_uri"))[1] != NOWHERE
    )


def _inherited(settings: Settings) -> AbstractContextManager[None]:
    """Have jobs that are submitted in here inherit the tracking server's password: the collector has no private file."""
    uri = settings.tracking_uri
    return variables({"MLFLOW_TRACKING_URI": uri} if uri and redacted_uri(uri) != uri else {})


def missing(sweep: Sweep, cells: Sequence[Cell], *, force: bool, settles: bool = True) -> Todo:
    """The cells of these that have no good result, that no live job has, and that are worth another try."""
    watch = Watch(sweep)
    standing = settled(watch, as_mine=True) if settles else watch.look()
    records, under_way = standing.seen.records, standing.under_way
    todo, done, hopeless = [], [], []
    for cell in (c for c in cells if c.id not in under_way):
        attempts = records[cell.id].attempts
        if not force and attempts and attempts[-1].status == "ok":
            done.append(cell)
        elif not force and given_up(attempts):
            hopeless.append(cell)
        else:
            todo.append(cell)
    return Todo(todo, done, [c for c in cells if c.id in under_way], hopeless, standing.held_words())


def write_down(pack: Pack) -> None:
    """Write a pack before anybody hears of it. Until the launcher says more, the pack waits for this process."""
    write_job(pack.folder, job_here(pack.launcher))
    pack.write()  # with it the pack is there, so it comes last


def turn_down(sweep: Sweep, error: NotSubmitted) -> None:
    """Record why packs were refused, as the result of their cells. Packs that only wait are removed."""
    for pack in error.refused:
        pack.write_note(END, Failure("no-start", str(error)))
        for cell_id in pack.cells:
            record(sweep, sweep.begin(cell_id, pack.id), pack.configs[cell_id], Failure("no-start", str(error)))
    for pack in error.waiting:
        shutil.rmtree(pack.folder, ignore_errors=True)


def make_packs(sweep: Sweep, cells: Sequence[Cell], *, launcher: str, settings: Settings, queue: str = "") -> list[Pack]:
    """Packs for these cells; ``queue``: the class that will know their jobs.

    Raises:
        ValueError: a cell names code that neither lcbench nor this user knows, or the fit of its machine is none.
    """
    if not cells:
        return []
    build.allow(sweep.allowed())
    for cell in cells:
        build.check_targets(cell.config)
    good = {cell.id: newest_good(sweep.attempts(cell.id)) for cell in cells}
    estimator = Estimator.of(sweep.root, settings.site, settings.devices, here=runs_here(launcher))
    groups = group(cells, estimator, max_cells=settings.pack["max_cells"], max_minutes=settings.max_minutes)
    packs: list[Pack] = []
    stamp = f"{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    for number, made in enumerate(groups):
        packs.append(
            Pack(
                id=f"{stamp}-{number:03d}",
                sweep=sweep.name,
                root=str(sweep.root),
                launcher=launcher,
                queue=queue,
                scale=str(made.scale),
                cells=tuple(c.id for c in made.cells),
                configs={c.id: c.config for c in made.cells},
                seconds=made.seconds,
                basis=made.basis,
                good={c.id: good[c.id] for c in made.cells},
                timeout_min=made.minutes,
                settings=settings,
            )
        )
    return packs


def default_name(plan: Plan) -> str:
    """A name of time, hash of the cells, and a random word: two people who type the same in the same second get two sweeps."""
    digest = hashlib.sha256(" ".join(p.cell.id for p in plan.cells).encode()).hexdigest()[:6]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}{secrets.token_hex(1)}"


def default_tracking_uri() -> str | None:
    """SQLite below ``REPOSITORY``; None where that may not be written. Makes nothing."""
    folder = REPOSITORY / ".mlflow"
    database = folder / "mlflow.db"
    needed = [path for path in (database, folder) if path.exists()] or [REPOSITORY]
    return f"sqlite:///{database}" if all(os.access(path, os.W_OK) for path in needed) else None
