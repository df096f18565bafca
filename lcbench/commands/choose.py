"""Find the fastest kernel and strategy for a problem: rank all by prediction, and measure those that may win until one has.

Words are a sweep's: scale, heads, mask and length say the problem, kernel and cp the choices (all of conf/ if not said). What
cannot win by prediction, or does not fit, is not measured; the rest race, a few iterations each round, within budget=.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from rich.console import Console

from lcbench.advice.answers import answers, none_may_win, predicted_table, reasons, to_rows
from lcbench.advice.front import pareto_figure
from lcbench.advice.measuring import NothingMeasured, Rounds
from lcbench.advice.racing import Budget, Outcome, Race
from lcbench.advice.ranking import MAY_WIN, Candidate, by_problem, rank
from lcbench.advice.sizing import GIB, Limits, break_even_table, break_evens, ladder, predicted_s, scales_table, smallest
from lcbench.commands.arguments import add_plan_arguments, command_parser
from lcbench.commands.launchers import launcher_named
from lcbench.commands.sweep import with_site
from lcbench.grid import build, own
from lcbench.grid.axes import PROBLEM
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import loader_of
from lcbench.grid.expand import Plan, expand
from lcbench.grid.overrides import key_of
from lcbench.grid.site import runs_here
from lcbench.grid.values import parse_number
from lcbench.predict.machines import machine_of_site
from lcbench.predict.predictor import Predictor
from lcbench.report.amounts import duration, size
from lcbench.report.ending import INTERRUPTED, OK, REFUSED, SOME_FAILED, bad_input
from lcbench.report.fitted import console
from lcbench.runs.budget import Cost
from lcbench.runs.launch import Launches, Todo, make_packs, settings_of, sweep_of, write_cells
from lcbench.runs.manifest import Entry
from lcbench.runs.pack import Settings
from lcbench.runs.store import Sweep

EXAMPLES = """
python -m lcbench.choose scale=4x8 heads=32x8x128 mask=causal_document seqlen=256k kernel=flash_attn3 site=plain budget=2gpuh
python -m lcbench.choose scale=4x8 heads=32x8x128 mask=causal seqlen=64k kernel=flash_attn3 machine=h200 --predict-only --break-even
python -m lcbench.choose scale=1x2 heads=8x4x64 dtype=float32 mask=causal seqlen=2k,4k kernel=sdpa_flash budget=5min
"""
OWN = ("machine", "budget")  # words of this command, which no sweep has
EXPERIMENT = "race"


def main(arguments: list[str]) -> int:
    parser = command_parser("choose", __doc__, EXAMPLES)
    add_plan_arguments(parser, "scale=... heads=... mask=... seqlen=..., and machine=..., budget=...")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="of python -m lcbench.fit; without it predictions are guesses")
    parser.add_argument("--predict-only", action="store_true", help="stop after the prediction; nothing is measured")
    parser.add_argument(
        "--max-ms", metavar="MS", help="find the smallest scale where an iteration takes no longer, in 95 %% of cases"
    )
    parser.add_argument("--max-gib", metavar="GIB", help="find the smallest scale where a GPU needs no more memory")
    parser.add_argument("--break-even", action="store_true", help="from which length on each strategy beats none, and the next")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw time, memory and GPUs of all scales, as PNG and PDF")
    options = parser.parse_args(arguments)
    with bad_input():
        limits = _limits(options)
        asked = _asked(options)
        if options.break_even and (batch := next((p.cell.batch for p in asked.plan.cells if p.cell.batch is not None), None)):
            raise ValueError(f"--break-even is of lengths of one sequence, and batch={batch} has its own; leave one of them out")
        refuse = _missing_here if asked.measures and runs_here(asked.plan.launcher) else lambda cell: None
        sizes = _scales(asked, limits, refuse) if str(limits) or options.figures else []
        chosen = smallest(sizes, limits) if str(limits) else None
        if str(limits):
            candidates = [c for c in sizes if chosen is not None and c.cell.scale == chosen.cell.scale]
        else:
            candidates = rank(asked.plan.cells, asked.predictor, refuse)
    asked.show(candidates)
    if sizes:
        asked.terminal.print(scales_table(sizes, limits))
    if options.figures:
        drawn = pareto_figure(sizes, asked.predictor).save(options.figures)
        asked.say(f"figure: {', '.join(map(str, drawn))}")
    if options.break_even:
        found = list(break_evens(candidates, asked.none, asked.predictor))
        asked.terminal.print(break_even_table(found))
    if str(limits):
        asked.say(_size_said(chosen, limits))
    if asked.measures and candidates:
        return _Choosing(asked, candidates).run()
    if asked.output == "json":
        said = {"scale": str(chosen.cell.scale) if chosen else None} if str(limits) else {}
        print(json.dumps({**said, "candidates": to_rows(sizes or candidates)}, indent=1))
    return OK if any(c.fate in MAY_WIN for c in candidates) else SOME_FAILED


def _limits(options: argparse.Namespace) -> Limits:
    """Raises:
    ValueError: a limit that is no number above 0.
    """
    ms, gib = (None if text is None else parse_number(text, name) for text, name in (
        (options.max_ms, "--max-ms"), (options.max_gib, "--max-gib"),
    ))  # fmt: skip
    return Limits(None if ms is None else ms / 1e3, None if gib is None else gib * GIB)


def _scales(asked: Asked, limits: Limits, refuse: Callable[[Cell], str | None]) -> list[Candidate]:
    """Candidates at the scales that were asked for, or, of one scale, from one GPU on until one holds the limits."""
    given = list(dict.fromkeys(p.cell.scale for p in asked.plan.cells))
    if len({json.dumps([p.cell.config[a] for a in PROBLEM if a in p.cell.config and a != "scale"]) for p in asked.plan.cells}) > 1:
        raise ValueError("limits and figures are of one problem: write one mask, one length and one value of every other axis")
    found: list[Candidate] = []
    for scale in sorted(given, key=lambda s: s.world_size) if len(given) > 1 else ladder(given[0].gpus_per_node):
        lines = [*(line for line in asked.plan.overrides if key_of(line) != "scale"), f"scale={scale}"]
        found += rank(expand(lines, asked.loader).cells, asked.predictor, refuse)
        if len(given) == 1 and (scale.world_size >= given[0].world_size if not str(limits) else smallest(found, limits)):
            break
    return found


def _size_said(chosen: Candidate | None, limits: Limits) -> str:
    if chosen is None or chosen.prediction is None:
        return f"no scale that was looked at holds {limits} with 95 % confidence, by prediction"
    (low, high), (least, most), words = chosen.prediction.interval, chosen.prediction.needs_interval, chosen.cell.words
    return (
        f"smallest scale that holds {limits} with 95 % confidence, by prediction: {words['scale']}, with {words['cp']} "
        f"{words['kernel']} ({duration(predicted_s(chosen))} predicted, 95 %: {duration(low)} to {duration(high)}; "
        f"{size(chosen.prediction.needs_bytes)} a rank, 95 %: {size(least)} to {size(most)})"
    )


@dataclass(frozen=True)
class Asked:
    """What a command line asks for. ``budget``: None where nothing is measured."""

    plan: Plan
    predictor: Predictor
    budget: Budget | None
    folders: list[Path]

    @property
    def measures(self) -> bool:
        return self.budget is not None

    @property
    def output(self) -> str:
        return str(self.plan.options["output"])

    @property
    def loader(self) -> ConfigLoaderImpl:
        return loader_of(str(self.folders[0]) if self.folders else None)

    @property
    def none(self) -> dict[str, Any]:
        """The config of cp=none."""
        config: dict[str, Any] = expand(["cp=none", "scale=1x1"], self.loader).cells[0].cell.config["cp"]
        return config

    @property
    def terminal(self) -> Console:
        return console(stderr=self.output == "json", quiet=self.output == "quiet")

    def say(self, text: str, style: str | None = None) -> None:
        self.terminal.print(text, markup=False, soft_wrap=True, style=style)

    def show(self, candidates: Sequence[Candidate]) -> None:
        """What is predicted of them, problem by problem."""
        for group in by_problem(candidates).values():
            if (empty := none_may_win(group)) is not None:
                self.say(empty)
            else:
                self.terminal.print(predicted_table(group, self.predictor))
            for line in reasons(group):
                self.say(line, "dim")


def _asked(options: argparse.Namespace) -> Asked:
    """Raises:
    ValueError: bad input.
    """
    for word in options.overrides:
        if "=" not in word:
            raise ValueError(f"{word!r} is no override; write <axis>=<value>, such as scale=4x8, machine=h200 or budget=2gpuh")
    own = {name: word.partition("=")[2] for word in options.overrides if (name := key_of(word)) in OWN}
    lines = with_site([word for word in options.overrides if key_of(word) not in OWN])
    if not any(key_of(line) == "experiment" for line in lines):
        lines = [f"+experiment={EXPERIMENT}", *lines]
    if len(options.config_dir) > 1:
        raise ValueError(f"--config-dir is given {len(options.config_dir)} times; put the files into one folder")
    plan = expand(lines, loader_of(str(options.config_dir[0]) if options.config_dir else None)).with_lengths()
    machine = own.get("machine") or machine_of_site(plan.site)
    predictor = Predictor.of(machine, options.fit)
    if options.predict_only:
        return Asked(plan, predictor, None, options.config_dir)
    if machine != (site := machine_of_site(plan.site)):
        raise ValueError(
            f"machine={machine} is not what site={plan.site['name']} measures on ({site}); write --predict-only, or the site of one"
        )
    if "budget" not in own:
        raise ValueError(
            "budget is not set: what measuring may take, such as budget=2gpuh or budget=10min; or write --predict-only"
        )
    return Asked(plan, predictor, Budget.parse(own["budget"]), options.config_dir)


def _missing_here(cell: Cell) -> str | None:
    """Why a cell does not run in a process like this one: which library is not installed."""
    kernel, strategy = build.build_kernel(cell.config["kernel"]), build.build_strategy(cell.config["cp"])
    for axis, value in (("cp", strategy), ("kernel", kernel)):
        if reason := own.answer(axis, cell.config[axis], value.missing):
            return f"{axis} {cell.config[axis]['name']}: {reason}"
    return None


class _Choosing:
    """The race, from the plan to the answer."""

    def __init__(self, asked: Asked, candidates: list[Candidate]) -> None:
        assert asked.budget is not None
        self.asked, self.candidates, self.budget = asked, candidates, asked.budget
        self.runners = {key: [c for c in group if c.fate in MAY_WIN] for key, group in by_problem(candidates).items()}
        self.cells = {c.cell.id: c.cell for group in self.runners.values() for c in group}

    def run(self) -> int:
        if not self.cells:
            print("error: no choice may win: the reasons are above", file=sys.stderr)
            return SOME_FAILED
        with bad_input():
            launcher = launcher_named(self.asked.plan.launcher, self.asked.folders)
            launcher.output = self.asked.output
            sweep, settings = sweep_of(self.asked.plan), settings_of(self.asked.plan)
            self._check_cost(sweep, launcher, settings)
        if not launcher.measures:
            return launcher.launch_cells(
                sweep, lambda: Todo(list(self.cells.values())), settings=settings, wait=True, report=list(self.cells)
            )
        return self._race(sweep, launcher, settings)

    def _check_cost(self, sweep: Sweep, launcher: Launches, settings: Settings) -> None:
        """Raises:
        ValueError: the budget is more than the site allows, or a cell would be ended as hung.
        """
        option = "gpu_hours" if self.budget.of_ranks else "hours"
        allowed = self.asked.plan.options["budget"].get(option)
        if allowed is not None and self.budget.seconds > 3600 * allowed:
            raise ValueError(f"budget={self.budget.text} is more than budget.{option}={allowed:g} allows")
        packs = make_packs(sweep, list(self.cells.values()), launcher=launcher.name, settings=settings)
        cost = Cost.of(packs, here=runs_here(launcher.name))
        if refusal := cost.refusal({}, settings.hang["max_s"]):
            raise ValueError(refusal)

    def _race(self, sweep: Sweep, launcher: Launches, settings: Settings) -> int:
        source = Rounds(sweep, launcher, settings, self.budget, self.cells)
        self.asked.say(f"sweep {sweep.name}: {len(self.cells)} choices may win, budget {self.budget.said(self.budget.seconds)}")
        if source.reused:
            self.asked.say(f"{source.reused} of their results were measured before, and count")
        sweep.check_writable(list(self.cells))
        words = ["choose", *self.asked.plan.overrides, f"budget={self.budget.text}"]
        write_cells(sweep, [Entry(cell) for cell in self.cells.values()], words, launcher.name, settings)
        race = Race({key: [c.cell.id for c in group] for key, group in self.runners.items() if group}, source, self.budget.seconds)
        race.told = self._tell
        try:
            with bad_input():
                outcomes = self._run(race)
        except NothingMeasured as error:
            print(f"error: {error}", file=sys.stderr)
            return REFUSED
        except KeyboardInterrupt:
            print(
                f"\ninterrupted; what was measured is kept, and counts for the same command with sweep={sweep.name}",
                file=sys.stderr,
            )
            return INTERRUPTED
        return self._answer(sweep, settings, race, outcomes)

    def _run(self, race: Race) -> list[Outcome]:
        """Raises:
        ValueError: the budget does not do for a first round.
        """
        try:
            return race.run()
        except ValueError as error:
            raise ValueError(f"budget={self.budget.text}: {error}") from error

    def _tell(self, number: int, names: Sequence[str], expected: float, spent: float) -> None:
        self.asked.say(
            f"round {number}: {len(names)} choices, estimated {self.budget.said(expected)}; spent {self.budget.said(spent)} of "
            f"{self.budget.said(self.budget.seconds)}"
        )

    def _answer(self, sweep: Sweep, settings: Settings, race: Race, outcomes: list[Outcome]) -> int:
        from lcbench.report.frame import good_rows, reported
        from lcbench.report.publishing import publish_sweep
        from lcbench.runs.tracking.publish import publish_or_say

        publish_or_say(sweep, settings.tracking_uri, publish_sweep)
        found = answers(outcomes, self.candidates, good_rows(reported(sweep)))
        for answer in found:
            self.asked.terminal.print(answer.table)
            for line in answer.lines:
                self.asked.say(line)
        self.asked.say(f"spent {self.budget.said(race.spent)} of {self.budget.said(self.budget.seconds)}")
        self.asked.say(f"status:     {sweep.command('status')}")
        self.asked.say(f"report:     {sweep.command('report')}")
        if self.asked.output == "quiet":
            print(sweep.name)
        if self.asked.output == "json":
            more: dict[str, Any] = {"sweep": sweep.name, "results": str(sweep.root), "spent": race.spent}
            print(json.dumps({**more, "answers": [a.as_dict() for a in found], "candidates": to_rows(self.candidates)}, indent=1))
        return OK if all(outcome.winner for outcome in outcomes) else SOME_FAILED
