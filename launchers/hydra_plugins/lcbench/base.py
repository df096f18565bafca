"""What every launcher does alike: launch a plan within its budget, and report what came of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from lcbench.grid.expand import Plan
from lcbench.grid.paths import INSTALLED, REPOSITORY
from lcbench.report.ending import BAD_INPUT, INTERRUPTED, OK, REFUSED, SOME_FAILED
from lcbench.runs.budget import Cost
from lcbench.runs.jobs import Watch
from lcbench.runs.launch import (
    Todo,
    default_tracking_uri,
    hand_over,
    lacks_a_place,
    make_packs,
    missing,
    settings_of,
    sweep_of,
    todo_of,
    write_cells,
)
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.queues import Queue
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep
from lcbench.runs.users import user_name

if TYPE_CHECKING:
    from rich.console import Console

NOT_PUBLISHED = (
    f"nothing is published to MLflow: {REPOSITORY}/.mlflow may not be written by {user_name()};"
    " name a place: tracking_uri=sqlite:////<folder>/mlflow.db or http://<host>:<port>"
)


class PackLauncher(Launcher):
    """Subclasses say how packs reach processes; all else is here.

    ``submit`` writes them down and hands them over, under the sweep's lock; ``follow`` stays with them until they have ended.

    Attributes:
        name: that of its file in conf/hydra/launcher.
        queue: what knows its jobs, which run on without the command; None: packs end with the command.
        here: whether packs are processes on this machine, as its file says.
        measures: whether results come of it, so that a command can wait for them and go on.
    """

    name = ""
    measures = True
    queue: Queue | None = None
    output = "table"  # what the command prints: table, quiet or json

    def __init__(self, here: bool = False) -> None:
        self.here = here

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
        from lcbench.report.fitted import console

        return console(stderr=self.output == "json", quiet=self.output == "quiet")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def launch_plan(self, plan: Plan) -> int:
        """Run what the plan asks for and is missing; the exit code of the command."""
        self.output = plan.options["output"]
        sweep, settings = sweep_of(plan), settings_of(plan)
        runnable = [p.cell for p in plan.cells if not p.skip]
        packs = make_packs(sweep, todo_of(plan, sweep).cells, launcher=self.name, settings=settings)
        cost = Cost.of(packs, here=self.here)
        if refusal := cost.refusal(plan.options["budget"], settings.hang["max_s"]):
            print(f"error: {refusal}", file=sys.stderr)
            return BAD_INPUT
        if lacks_a_place(plan, settings):
            self.say(NOT_PUBLISHED)
        sweep.check_writable([p.cell.id for p in plan.cells])
        write_cells(sweep, [Entry(p.cell, p.skip) for p in plan.cells], plan.overrides, self.name, settings, trace=plan.trace)
        self.say_trace(plan)

        def choose() -> Todo:
            todo = missing(sweep, runnable, force=plan.options["force"])
            given = f"{len(todo.given_up)} given up (killed their gang twice; rerun them by name), " if todo.given_up else ""
            self.say(
                f"sweep {sweep.name}: {len(plan.cells)} cells, {len(plan.cells) - len(runnable)} cannot run, "
                f"{len(todo.done)} done before, {len(todo.under_way)} under way, {given}{len(todo.cells)} to run"
            )
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

    def say_trace(self, plan: Plan) -> None:
        if plan.trace is not None:
            self.say(str(plan.trace))
            self.say(f"its batches: {plan.trace.batches}")

    def launch_cells(self, sweep: Sweep, choose: Callable[[], Todo], *, settings: Settings, wait: bool, report: list[str]) -> int:
        """Run the cells that ``choose`` names, under the sweep's lock, then report on the cells ``report``."""
        todo, packs, refusal = hand_over(self, sweep, choose, settings, self._say_cost)
        if refusal is not None:
            print(f"error: {refusal}", file=sys.stderr)
            if not wait or not refusal.waiting:
                return REFUSED
        if self.queue is not None and not wait and (packs or todo.under_way):
            self.say(f"follow it:  {sweep.command('status', '--follow')}")
            self.say(f"end it:     {sweep.command('cancel')}")
            self._answer(sweep, submitted=sum(len(pack.cells) for pack in packs))
            return OK
        try:
            self.follow(sweep, packs)
        except KeyboardInterrupt:
            goes_on = f"the sweep goes on; again: {sweep.command('status', '--follow')}"
            ends = f"interrupted; what was measured is kept: {sweep.command('status')}"
            print(f"\n{ends if self.queue is None else goes_on}", file=sys.stderr)
            return INTERRUPTED
        return self.finish(sweep, report, settings.tracking_uri)

    def _say_cost(self, packs: list[Pack]) -> None:
        self.say(str(Cost.of(packs, here=self.here)))

    def finish(self, sweep: Sweep, report: list[str], tracking_uri: str | None, *, predicted: bool = False) -> int:
        """Settle, print the table and what to type next; 0 if every cell has a good result or an honest skip, else 1.

        ``predicted``: the table is of predictions, whatever was measured.
        """
        from lcbench.report.causes import again, by_node
        from lcbench.report.inert import printable
        from lcbench.report.publishing import publish_sweep
        from lcbench.report.standing import unwell_of
        from lcbench.report.table import cells_table, summary, to_rows
        from lcbench.report.trace import served, tables
        from lcbench.runs.tracking.links import dashboard_hint, failures_url
        from lcbench.runs.tracking.publish import publish_or_say

        standing = settled(Watch(sweep), as_mine=True)
        seen = standing.seen.foretold() if predicted else standing.seen
        publish_or_say(sweep, tracking_uri, publish_sweep)
        traces = served(sweep, seen, predicted=predicted)
        if self.output == "table":
            self.console.print(cells_table(seen, sweep.name, report, predicted=predicted))
            if (said := summary(sweep, seen, report, predicted=predicted)) is not None:
                self.console.print()
                self.console.print(said)
            for table in tables(traces, sweep.name):
                self.console.print()
                self.console.print(table)
        for damaged in standing.seen.damaged:
            print(printable(str(damaged)), file=sys.stderr)
        fine = ("ok", "skipped", "running", "pending")
        failed = [] if predicted else [c.id for c in standing.cells if c.id in set(report) and c.state not in fine]
        self.say(f"status:     {sweep.command('status')}")
        if failed:
            suspects = by_node(unwell_of(standing.cells), sweep)
            for suspect in suspects:
                self.say(suspect.says)
            self.say(f"run the {len(failed)} failed again:  {again(sweep, [suspect.node for suspect in suspects])}")
        self.say(f"report:     {sweep.command('report', *(['--predicted'] if predicted else []))}")
        if tracking_uri:
            ours = tracking_uri == default_tracking_uri() and not INSTALLED  # a wheel has no Makefile
            self.say(f"dashboard:  {dashboard_hint(sweep, tracking_uri, ours=ours)}")
            if failures := failures_url(sweep, tracking_uri):
                self.say(f"failures:   {failures}")
        self._answer(sweep, cells=to_rows(seen, report), **({"traces": [one.as_dict() for one in traces]} if traces else {}))
        for line in standing.held_words():
            print(line, file=sys.stderr)
        return SOME_FAILED if failed or standing.held else OK

    def _answer(self, sweep: Sweep, **more: Any) -> None:
        """What a script reads."""
        if self.output == "quiet":
            print(sweep.name)
        elif self.output == "json":
            print(json.dumps({"sweep": sweep.name, "results": str(sweep.root), **more}, indent=1))
