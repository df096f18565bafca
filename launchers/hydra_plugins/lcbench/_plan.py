"""What every launcher does alike: leave out what is done, record what cannot run, write the manifest, make packs, report."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lcbench.grid.cell import Cell
from lcbench.grid.expand import REPOSITORY, Plan
from lcbench.runs.pack import Pack, estimate_s, group
from lcbench.runs.store import Attempt, Entry, Failure, Sweep, write_json

OK, SOME_FAILED, NOT_SUBMITTED, INTERRUPTED = 0, 1, 3, 130


class NotSubmitted(Exception):
    """The launcher could not hand over a pack."""


class PackLauncher(Launcher):
    """Subclasses say how packs reach processes, in ``run``; all else is here."""

    name = ""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        sys.exit("error: this launcher runs plans, so it needs hydra/sweeper=lcbench (the default)")

    def run(self, sweep: Sweep, packs: list[Pack], *, wait: bool | None) -> bool:
        """Bring packs to processes; True if they have ended when this returns.

        Raises:
            NotSubmitted: a pack was refused; the message says which and why.
        """
        raise NotImplementedError

    def launch_plan(self, plan: Plan) -> int:
        """Run what the plan asks for and is missing; the exit code of the command."""
        options = plan.options
        sweep = Sweep(Path(options["results"]).absolute(), str(options["sweep"] or default_name(plan)))
        sweep.add([Entry(p.cell, p.skip) for p in plan.cells], command=list(plan.overrides))
        for planned in plan.cells:
            if planned.skip:
                record_skip(sweep, planned.cell, planned.skip)
        runnable = [p.cell for p in plan.cells if not p.skip]
        wanted = runnable if options["force"] else [c for c in runnable if not is_done(sweep, c)]
        under_way = busy(sweep)
        cells = [c for c in wanted if c.id not in under_way]
        print(
            f"sweep {sweep.name}: {len(plan.cells)} cells, {len(plan.cells) - len(runnable)} cannot run, "
            f"{len(runnable) - len(wanted)} done before, {len(wanted) - len(cells)} under way, {len(cells)} to run"
        )
        return self.launch_cells(
            sweep,
            cells,
            site=plan.site,
            devices=known_devices(),
            tracking_uri=options["tracking_uri"] or plan.site.get("tracking_uri") or default_tracking_uri(),
            max_cells=options["pack"] or plan.site.get("max_cells"),
            wait=options["wait"],
            report=[p.cell.id for p in plan.cells],
        )

    def launch_cells(
        self,
        sweep: Sweep,
        cells: list[Cell],
        *,
        site: dict[str, Any],
        devices: list[dict[str, Any]],
        tracking_uri: str | None,
        max_cells: int | None,
        wait: bool | None,
        report: list[str],
    ) -> int:
        """Run these cells whatever their history says, then report on the cells ``report``."""
        packs = make_packs(sweep, cells, site=site, devices=devices, tracking_uri=tracking_uri, max_cells=max_cells)
        for pack in packs:
            pack.write()
            # Until a launcher says more: the pack waits for this process.
            write_json(
                pack.folder / "job.json",
                {"launcher": self.name, "pid": os.getpid(), "host": socket.gethostname(), "started_at": time.time()},
            )
        try:
            ended = self.run(sweep, packs, wait=wait)
        except NotSubmitted as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_SUBMITTED
        except KeyboardInterrupt:
            _settle(sweep)
            print(f"\ninterrupted; what was measured is kept: python -m lcbench.status {sweep.name}", file=sys.stderr)
            return INTERRUPTED
        if not ended:
            print(f"follow it:  python -m lcbench.status {sweep.name} --watch")
            return OK
        return finish(sweep, report, tracking_uri)


def finish(sweep: Sweep, report: list[str], tracking_uri: str | None) -> int:
    """Settle, print the table and what to type next; 0 if every cell has a good result or an honest skip, else 1."""
    from rich.console import Console

    from lcbench.report.table import WIDTH, cells_table

    _settle(sweep)
    if tracking_uri:
        _publish(sweep, tracking_uri)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(cells_table(sweep, report))
    failed = [c for c in report if not (attempts := sweep.attempts(c)) or attempts[-1].status == "failed"]
    where = "" if sweep.root == Path("results").absolute() else f" --results {sweep.root}"
    print(f"status:     python -m lcbench.status {sweep.name}{where}")
    if failed:
        print(f"run the {len(failed)} failed again:  python -m lcbench.rerun --failed {sweep.name}{where}")
    print("dashboards: make mlflow")
    return SOME_FAILED if failed else OK


def launch_cells(
    *,
    launcher: str,
    sweep: Sweep,
    cells: list[Cell],
    site: dict[str, Any],
    devices: list[dict[str, Any]],
    tracking_uri: str | None,
    max_cells: int | None,
    wait: bool | None,
) -> int:
    """Run stored cells again, without composing anything: what ``lcbench.rerun`` calls. Returns the exit code."""
    from importlib import import_module

    kinds = {"local": "LocalLauncher", "slurm": "SlurmLauncher", "dry": "DryLauncher"}
    made: PackLauncher = getattr(import_module(f"hydra_plugins.lcbench.{launcher}"), kinds[launcher])()
    return made.launch_cells(
        sweep, cells, site=site, devices=devices, tracking_uri=tracking_uri, max_cells=max_cells, wait=wait,
        report=[c.id for c in cells],
    )  # fmt: skip


def make_packs(
    sweep: Sweep,
    cells: Sequence[Cell],
    *,
    site: dict[str, Any],
    devices: list[dict[str, Any]],
    tracking_uri: str | None,
    max_cells: int | None,
) -> list[Pack]:
    packs = []
    groups = group(cells, estimate_s, max_cells=max_cells, max_minutes=site.get("max_minutes"))
    for number, (scale, members, minutes) in enumerate(groups):
        packs.append(
            Pack(
                id=f"{time.strftime('%y%m%d-%H%M%S')}-{number:03d}-{secrets.token_hex(2)}",
                sweep=sweep.name,
                root=str(sweep.root),
                scale=str(scale),
                cells=tuple(c.id for c in members),
                configs={c.id: c.config for c in members},
                site=site,
                devices=devices,
                timeout_min=minutes,
                tracking_uri=tracking_uri,
            )
        )
    return packs


def is_done(sweep: Sweep, cell: Cell) -> bool:
    attempts = sweep.attempts(cell.id)
    return bool(attempts) and attempts[-1].status == "ok"


def busy(sweep: Sweep) -> set[str]:
    """Cells that a live job has or will come to: the same command twice must not run them twice."""
    from lcbench.runs.jobs import cell_states

    _settle(sweep)
    return {state.id for state in cell_states(sweep) if state.state in ("running", "pending")}


def record_skip(sweep: Sweep, cell: Cell, reason: str) -> None:
    """The answer to a cell that cannot run, once: asking again for the same reason adds nothing."""
    failure = Failure("unsupported", reason)
    attempts = sweep.attempts(cell.id)
    if attempts and attempts[-1].failure == failure:
        return
    running = sweep.begin(cell.id, pack="")
    sweep.finish(
        Attempt(
            cell.id, sweep.name, running.number, "skipped", failure, started_at=running.started_at,
            finished_at=time.time(),
        )
    )  # fmt: skip


def default_name(plan: Plan) -> str:
    digest = hashlib.sha256(" ".join(p.cell.id for p in plan.cells).encode()).hexdigest()[:6]
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}"


def default_tracking_uri() -> str:
    """SQLite below the checkout, which ``make mlflow`` serves."""
    folder = REPOSITORY / ".mlflow"
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def known_devices() -> list[dict[str, Any]]:
    """Every conf/device file: peaks by device name."""
    found = []
    for path in sorted((REPOSITORY / "conf" / "device").glob("*.yaml")):
        found.append(json.loads(json.dumps(OmegaConf.to_container(OmegaConf.load(path)))))
    return found


def _settle(sweep: Sweep) -> None:
    from lcbench.runs.jobs import settle

    settle(sweep)


def _publish(sweep: Sweep, uri: str) -> None:
    from lcbench.runs.tracking import TrackingUnavailable, publish

    try:
        publish(sweep, uri)
    except TrackingUnavailable as error:
        print(f"not published: {error}; later: python -m lcbench.sync {sweep.name}", file=sys.stderr)
