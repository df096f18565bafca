"""What every launcher does alike: write the manifest, leave out what is done, make packs, report; and the collector."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lcbench.arguments import bad_input
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.expand import Plan
from lcbench.grid.paths import REPOSITORY
from lcbench.redact import redacted, redacted_uri, secrets_of
from lcbench.runs.address import planned_address, planned_experiment, variables
from lcbench.runs.budget import Cost
from lcbench.runs.estimate import Estimator
from lcbench.runs.ownership import here_instead, only_shown, others
from lcbench.runs.pack import Pack, Settings, given_up, group, tries_again
from lcbench.runs.store import Entry, Failure, Sweep, user_name, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from lcbench.runs.jobs import SweepStatus

OK, SOME_FAILED, NOT_SUBMITTED, INTERRUPTED = 0, 1, 3, 130
TOO_MUCH = 2  # as bad input
REFUSED_PAUSE_S = 10.0
NOT_PUBLISHED = (
    f"nothing is published to MLflow: {REPOSITORY}/.mlflow may not be written by {user_name()};"
    " name a place: tracking_uri=sqlite:////<folder>/mlflow.db or http://<host>:<port>"
)
LOOKING_SHARE = 5.0  # a collector sleeps so many times as long as it looks


class NotSubmitted(Exception):
    """The launcher could not hand over packs.

    ``refused`` are those that will never be taken as they are; the rest may be tried again.
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


class PackLauncher(Launcher):
    """Subclasses say how packs reach processes; all else is here.

    ``submit`` writes them down and hands them over, under the sweep's lock; ``follow`` stays with them until they have ended.
    """

    name = ""
    detaches = False
    output = "table"  # what the command prints: table, quiet or json

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        sys.exit("error: this launcher runs plans, so it needs hydra/sweeper=lcbench (the default)")

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        """Raises:
        NotSubmitted: packs were refused; the message says which and why.
        """
        raise NotImplementedError

    def follow(self, sweep: Sweep, packs: list[Pack]) -> None:
        raise NotImplementedError

    @property
    def console(self) -> Console:
        """Where words for people go: nowhere, or out of the way of what a script reads, if the output is for one."""
        from rich.console import Console

        return Console(stderr=self.output == "json", quiet=self.output == "quiet", highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def launch_plan(self, plan: Plan) -> int:
        """Run what the plan asks for and is missing; the exit code of the command."""
        self.output = plan.options["output"]
        sweep, settings = sweep_of(plan), settings_of(plan)
        runnable = [p.cell for p in plan.cells if not p.skip]
        cost = Cost.of(make_packs(sweep, todo_of(plan, sweep).cells, launcher=self.name, settings=settings))
        if refusal := cost.refusal(plan.options["budget"], settings.hang["max_s"]):
            print(f"error: {refusal}", file=sys.stderr)
            return TOO_MUCH
        if settings.tracking_uri is None:
            self.say(NOT_PUBLISHED)
        sweep.check_writable([p.cell.id for p in plan.cells])
        secret = secrets_of(settings.site.get("env")).values()
        with sweep.lock():
            sweep.add([Entry(p.cell, p.skip) for p in plan.cells], command=[redacted(o, secret) for o in plan.overrides], launch={
                "launcher": self.name, "settings": settings.public(), "by": user_name(),
            })  # fmt: skip

        def choose() -> Todo:
            todo = missing(sweep, runnable, force=plan.options["force"])
            given = f"{len(todo.given_up)} given up (killed their gang twice; rerun them by name), " if todo.given_up else ""
            self.say(
                f"sweep {sweep.name}: {len(plan.cells)} cells, {len(plan.cells) - len(runnable)} cannot run, "
                f"{len(todo.done)} done before, {len(todo.under_way)} under way, {given}{len(todo.cells)} to run"
            )
            self.say(str(cost))
            if lonely := cost.on_one_rank():
                self.say(
                    f"note: {len(lonely)} cells have a strategy on one rank, where it has nothing to do: scale=1x2, or cp=none"
                )
            for line in todo.held:
                self.say(line)
            return todo

        return self.launch_cells(
            sweep, choose, settings=settings, wait=bool(plan.options["wait"]), report=[p.cell.id for p in plan.cells]
        )

    def launch_cells(self, sweep: Sweep, choose: Callable[[], Todo], *, settings: Settings, wait: bool, report: list[str]) -> int:
        """Run the cells that ``choose`` names, under the sweep's lock, then report on the cells ``report``."""
        todo, packs, refusal = self.hand_over(sweep, choose, settings)
        if refusal is not None:
            print(f"error: {refusal}", file=sys.stderr)
            if not wait or not refusal.waiting:
                return NOT_SUBMITTED
        if self.detaches and not wait and (packs or todo.under_way):
            self.say(f"follow it:  {sweep.command('status', '--follow')}")
            self.say(f"end it:     {sweep.command('cancel')}")
            self._answer(sweep, submitted=sum(len(pack.cells) for pack in packs))
            return OK
        try:
            self.follow(sweep, packs)
        except KeyboardInterrupt:
            print(f"\ninterrupted; what was measured is kept: {sweep.command('status')}", file=sys.stderr)
            return INTERRUPTED
        return self.finish(sweep, report, settings.tracking_uri)

    def finish(self, sweep: Sweep, report: list[str], tracking_uri: str | None) -> int:
        """Settle, print the table and what to type next; 0 if every cell has a good result or an honest skip, else 1."""
        from rich.console import Console

        from lcbench.report.inert import printable
        from lcbench.report.table import WIDTH, cells_table, fastest_table, to_rows
        from lcbench.runs.jobs import Watch
        from lcbench.runs.tracking import dashboard_hint, publish_or_say

        standing = Watch(sweep, settles=True).look()
        publish_or_say(sweep, tracking_uri)
        if self.output == "table":
            console = Console(width=None if sys.stdout.isatty() else WIDTH)
            console.print(cells_table(standing.seen, sweep.name, report))
            if (fastest := fastest_table(sweep, standing.seen, report)) is not None:
                console.print(fastest)
        for damaged in standing.seen.damaged:
            print(printable(str(damaged)), file=sys.stderr)
        failed = [c.id for c in standing.cells if c.id in set(report) and c.state not in ("ok", "skipped", "running", "pending")]
        self.say(f"status:     {sweep.command('status')}")
        if failed:
            self.say(f"run the {len(failed)} failed again:  {sweep.command('rerun', '--failed')}")
        self.say(f"report:     {sweep.command('report')}")
        if tracking_uri:
            self.say(f"dashboard:  {dashboard_hint(sweep, tracking_uri, ours=tracking_uri == default_tracking_uri())}")
        self._answer(sweep, cells=to_rows(standing.seen, report))
        for line in standing.held_words():
            print(line, file=sys.stderr)
        return SOME_FAILED if failed or standing.held else OK

    def _answer(self, sweep: Sweep, **more: Any) -> None:
        """What a script reads."""
        if self.output == "quiet":
            print(sweep.name)
        elif self.output == "json":
            print(json.dumps({"sweep": sweep.name, "results": str(sweep.root), **more}, indent=1))

    def hand_over(
        self, sweep: Sweep, choose: Callable[[], Todo], settings: Settings
    ) -> tuple[Todo, list[Pack], NotSubmitted | None]:
        """Make packs of what ``choose`` names and submit them, under the sweep's lock; what was refused is kept as such."""
        with sweep.lock():
            todo = choose()
            try:
                settings = settings.revealed()
            except ValueError as error:
                return todo, [], NotSubmitted(str(error)) if todo.cells else None
            packs = make_packs(sweep, todo.cells, launcher=self.name, settings=settings)
            sweep.check_writable([cell.id for cell in todo.cells])
            try:
                if packs:
                    sweep.allow(set().union(*(build.check_targets(cell.config) for cell in todo.cells)))
                    with _inherited(settings):
                        self.submit(sweep, packs)
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


def settings_of(plan: Plan) -> Settings:
    options, site = plan.options, plan.site
    with bad_input():
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


def _inherited(settings: Settings) -> AbstractContextManager[None]:
    """Jobs that are submitted in here inherit the tracking server's password, for the collector, which has no private file."""
    uri = settings.tracking_uri
    return variables({"MLFLOW_TRACKING_URI": uri} if uri and redacted_uri(uri) != uri else {})


def missing(sweep: Sweep, cells: Sequence[Cell], *, force: bool, settles: bool = True) -> Todo:
    """Of these cells, those that have no good result, that no live job has, and that are worth another try."""
    from lcbench.runs.jobs import Watch

    standing = Watch(sweep, settles=settles).look()
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
    """Write a pack before anybody is told of it. Until a launcher says more, it waits for this process."""
    told = {"launcher": pack.launcher, "pid": os.getpid(), "host": socket.gethostname(), "started_at": time.time()}
    write_json(pack.folder / "job.json", told)
    pack.write()  # with it the pack is there, so it comes last


def turn_down(sweep: Sweep, error: NotSubmitted) -> None:
    """Keep why packs were refused, as the result of their cells; packs that only wait leave no trace."""
    from shutil import rmtree

    from lcbench.runs.jobs import record

    for pack in error.refused:
        pack.write_note("end.json", Failure("no-start", str(error)))
        for cell_id in pack.cells:
            record(sweep, sweep.begin(cell_id, pack.id), pack.configs[cell_id], Failure("no-start", str(error)))
    for pack in error.waiting:
        rmtree(pack.folder, ignore_errors=True)


def launcher_named(name: str) -> PackLauncher:
    """A launcher, for commands that run stored cells again without composing anything.

    Raises:
        ValueError: there is none of this name.
    """
    from importlib import import_module

    kinds = {"local": "LocalLauncher", "slurm": "SlurmLauncher", "dry": "DryLauncher"}
    if name not in kinds:
        raise ValueError(f"there is no launcher {name!r}; write --launcher {', '.join(sorted(kinds))}")
    made: PackLauncher = getattr(import_module(f"hydra_plugins.lcbench.{name}"), kinds[name])()
    return made


def make_packs(sweep: Sweep, cells: Sequence[Cell], *, launcher: str, settings: Settings) -> list[Pack]:
    """Packs for these cells.

    Raises:
        ValueError: a cell names code that neither lcbench nor this user knows.
    """
    if not cells:
        return []
    build.allow(sweep.allowed())
    for cell in cells:
        build.check_targets(cell.config)
    estimator = Estimator.of(sweep.root, settings.site, settings.devices, here=launcher == "local")
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
                scale=str(made.scale),
                cells=tuple(c.id for c in made.cells),
                configs={c.id: c.config for c in made.cells},
                seconds=made.seconds,
                timeout_min=made.minutes,
                settings=settings,
            )
        )
    return packs


class Collector:
    """Brings a sweep to its end whatever became of the command that began it: settles what has ended, runs again what its failure
    class says, and hands over what never was.

    A sweep that is not, or not wholly, the caller's own is only looked at, unless ``as_mine``: what it would run in the caller's
    name is what somebody else has written down.
    """

    def __init__(self, sweep: Sweep, *, as_mine: bool = False) -> None:
        from lcbench.runs.jobs import Watch
        from lcbench.runs.queue import Patient

        self._sweep, self._as_mine = sweep, as_mine
        self._watch = Watch(sweep, Patient(), settles=True if as_mine else None)
        self._next, self._said, self._pause_s = 0.0, "", 1.0
        self._left_out: set[str] = set()

    def advance(self) -> SweepStatus:
        """One round; where it stands now."""
        begun = time.monotonic()
        standing = self._watch.look()
        self._pause_s = max(1.0, LOOKING_SHARE * (time.monotonic() - begun))
        launch = standing.seen.launch
        if not launch or launch.get("cancelled") or launch["launcher"] != "slurm":
            return standing
        people = others(self._sweep)
        if people and not self._as_mine:
            self._say(only_shown(self._sweep, people))
            return standing
        settings = Settings(**launch["settings"])
        if people:
            settings = replace(settings, site=here_instead(settings.site))

        def wanted(now: SweepStatus) -> Todo:
            records = {i: r for i, r in now.seen.records.items() if i not in now.under_way and not r.entry.skip}
            due = [r.entry.cell for r in records.values() if not r.attempts or tries_again(r.attempts, settings.retry)]
            return Todo([cell for cell in due if self._can_be_built(cell)])

        if wanted(standing).cells and time.monotonic() >= self._next:
            # Looked at again under the lock: somebody else may have done it.
            launcher = launcher_named("slurm")
            launcher.output = "json"  # whoever collects may be asked for JSON: what is submitted is said on stderr
            _, _, refusal = launcher.hand_over(self._sweep, lambda: wanted(self._watch.look()), settings)
            if refusal is not None:
                self._next = time.monotonic() + REFUSED_PAUSE_S
                self._say(str(refusal))
            standing = self._watch.look()
        return replace(standing, waiting=len(wanted(standing).cells))

    def _can_be_built(self, cell: Cell) -> bool:
        """Whether the classes of a cell are known here; one whose are not is left out, and said once."""
        build.allow(self._sweep.allowed())
        try:
            build.check_targets(cell.config)
        except ValueError as error:
            if cell.id not in self._left_out:
                print(f"left out: cell {cell.id}: {error}", file=sys.stderr)
            self._left_out.add(cell.id)
            return False
        return True

    def pause(self) -> None:
        """Sleep until it is time for the next round: longer where looking takes long."""
        time.sleep(self._pause_s)

    def _say(self, text: str) -> None:
        """On stderr, once."""
        if text != self._said:
            print(text, file=sys.stderr)
        self._said = text


def default_name(plan: Plan) -> str:
    """Time, cells, and a word of its own: two people who type the same in the same second have two sweeps."""
    digest = hashlib.sha256(" ".join(p.cell.id for p in plan.cells).encode()).hexdigest()[:6]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}{secrets.token_hex(1)}"


def default_tracking_uri() -> str | None:
    """SQLite below the checkout, which ``make mlflow`` serves; None where the checkout may not be written. Makes nothing."""
    folder = REPOSITORY / ".mlflow"
    database = folder / "mlflow.db"
    needed = [path for path in (database, folder) if path.exists()] or [REPOSITORY]
    return f"sqlite:///{database}" if all(os.access(path, os.W_OK) for path in needed) else None
