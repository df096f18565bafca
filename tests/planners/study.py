"""What planners gain over one degree for all, by prediction: ``python -m tests.planners.study [--ranks 32] [--batches 200]``.

Seeded batches of each profile of document lengths are planned by every planner, and what they take is predicted by the cost of a
machine of conf/machine. Prints a table per number of ranks, and fails where a planner is slower than ``fixed`` by more than 2 % on
any batch. With ``--out FILE`` every part is kept there as it is done: a study that was cut off goes on, and ``--batches`` may grow.
``--scale`` plans 10,000 documents for 1,024 ranks instead, once per planner and profile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lcbench.grid.build import build, cell_mask, check_options
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.paths import CONF
from lcbench.grid.values import axis_values
from lcbench.masks.band import Ints
from lcbench.planners.base import Documents, Fleet, Floats, Infeasible, Planner
from lcbench.predict.costs import FittedCost, cost_of
from lcbench.predict.predictor import Predictor
from lcbench.schedule.layout import documents
from lcbench.testing.masks import load, names

MACHINE, HEADS, PER_NODE, CAPACITY = "h100", "32x8x128", 8, 16384
BASE = "fixed"
WORST = 0.02  # relative, by which a planner may be slower than ``fixed`` on a batch
MUST_GAIN = ("flexsp", "bytescale_hdp", "hydraulis")
ON = ("web_text", "long_text_64k", "long_text_512k")
# Besides each planner at its defaults: a published rule, of which no gain is asked.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "bytescale_hdp": {"spread": False, "fallback": False},
    "hydraulis": {"stay": True},
    "megatron_hybrid": {"fallback": False},
}
UNASKED = ("none", "oracle")  # what others are held against, and what plans small batches only
LARGE_DOCUMENTS, LARGE_RANKS = 10_000, 1024
PART = 10  # batches that a process plans before it asks for more


@dataclass(frozen=True)
class Row:
    """What a planner came to on batches of a profile: of each its makespan in seconds, NaN where it has no plan, and the seconds of
    a processor that planning took."""

    name: str
    makespan_s: Floats
    planning_s: Floats
    refusal: str = ""

    def plain(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return {**asdict(self), "makespan_s": self.makespan_s.tolist(), "planning_s": self.planning_s.tolist()}

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> Row:
        """From what ``plain`` gives."""
        return cls(plain["name"], np.array(plain["makespan_s"]), np.array(plain["planning_s"]), plain["refusal"])

    @classmethod
    def joined(cls, rows: Sequence[Row]) -> Row:
        """Of the batches of several, one behind the other."""
        makespan_s, planning_s = (np.concatenate([getattr(row, of) for row in rows]) for of in ("makespan_s", "planning_s"))
        return cls(rows[0].name, makespan_s, planning_s, next((row.refusal for row in rows if row.refusal), ""))


def planners(chosen: Sequence[str]) -> dict[str, Planner]:
    """Planners at their defaults, and as they were published where that is something else."""
    options: dict[str, dict[str, dict[str, Any]]] = {name: {name: {}} for name in chosen}
    for name, said in AS_PUBLISHED.items():
        if name in chosen:
            options[name][f"{name} {', '.join(f'{k}={str(v).lower()}' for k, v in said.items())}"] = said
    return {
        label: build(check_options("planner", {**load("planner", name), **said}))
        for name, labels in options.items() for label, said in labels.items()
    }  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Batches of a profile on some ranks.

    Attributes:
        tokens: of a batch.
        cp: the strategy inside of groups.
    """

    profile: str
    ranks: int
    cp: str
    tokens: int

    @cached_property
    def cell(self) -> Cell:
        """A cell whose draws are the batches."""
        words = [
            "workload=batch", f"workload.capacity={CAPACITY}", f"cp={self.cp}", "mask=causal_document", f"lengths={self.profile}",
            f"seqlen={self.tokens}", f"scale={self.ranks // PER_NODE}x{PER_NODE}", f"heads={HEADS}", "kernel=flash_attn3",
        ]  # fmt: skip
        (planned,) = look(words).cells
        return planned.cell

    def batch(self, draw: int) -> Documents:
        """The documents of a draw."""
        bounds, pairs = documents(cell_mask(self.cell, draw))
        sizes: Ints = np.diff(bounds)
        return Documents(sizes, pairs)


@cache
def prepared(study: Study) -> FittedCost:
    """The cost, with all groups simulated that a batch asks for, which is no part of planning."""
    cost, first = cost_of(study.cell, Predictor.of(MACHINE)), study.batch(0)
    for degree in cost.degrees:
        cost.documents_s(first, degree)
    print(f"{study.profile} on {study.ranks} ranks: the cost took {cost.prepared_s:.1f} s", file=sys.stderr, flush=True)
    return cost


def rows(study: Study, draws: Sequence[int], chosen: Sequence[str], *, told: bool = False) -> list[Row]:
    """Planners on batches.

    Args:
        draws: which batches.
        chosen: planners by name.
        told: print a planner's progress.
    """
    cost, fleet = prepared(study), Fleet(study.ranks, PER_NODE, CAPACITY)
    every = [study.batch(draw) for draw in draws]
    found = []
    for name, planner in planners(chosen).items():
        makespan_s, planning_s, refusal = np.full(len(draws), np.nan), np.full(len(draws), np.nan), ""
        for place, own in enumerate(every):
            begun = time.process_time()
            try:
                plan = planner.plan(
                    own, fleet, cost, partial(print, f"{study.profile}:", flush=True) if told else lambda line: None
                )
            except Infeasible as error:
                refusal = str(error)
                break
            planning_s[place] = time.process_time() - begun
            if wrong := plan.wrong(own, fleet):
                raise AssertionError(f"{name} on batch {draws[place]} of {study.profile}: {wrong}")
            makespan_s[place] = plan.makespan_s(own, cost, study.ranks)
        found.append(Row(name, makespan_s, planning_s, refusal))
        if told:
            print(f"{study.profile} on {study.ranks} ranks: {name} {np.nansum(planning_s):.1f} s {refusal}", flush=True)
    return found


def all_rows(studies: Sequence[Study], batches: int, chosen: Sequence[str], jobs: int, out: Path | None) -> dict[Study, list[Row]]:
    """Planners on so many batches of each study, in as many processes as ``jobs``, which do the batches of every profile in turns.

    Args:
        out: lines of JSON, one for each part that is done; of these none is done again.
    """
    labels = list(planners(chosen))
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    known = {(Study(**line["study"]), *line["draws"]): line for line in lines if [row["name"] for row in line["rows"]] == labels}
    parts = [(study, first, min(first + PART, batches)) for first in range(0, batches, PART) for study in studies]
    found = {part: [Row.of_plain(row) for row in known[part]["rows"]] for part in parts if part in known}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        left = {pool.submit(rows, part[0], range(*part[1:]), chosen): part for part in parts if part not in found}
        for future in as_completed(left):
            part = left[future]
            found[part] = future.result()
            line = {"study": asdict(part[0]), "draws": part[1:], "rows": [row.plain() for row in found[part]]}
            if out:
                with out.open("a") as file:
                    print(json.dumps(line), file=file)
            print(f"{len(found)} of {len(parts)} parts are done: {part[0].profile}", file=sys.stderr, flush=True)
    return {study: [Row.joined(of) for of in zip(*(found[p] for p in parts if p[0] == study), strict=True)] for study in studies}


def gains(row: Row, base: Row) -> Floats:
    """Of each batch, relative to the base: 0.25 where that takes a quarter more."""
    return base.makespan_s / row.makespan_s - 1


def table(found: dict[str, list[Row]], ranks: int) -> Iterator[str]:
    """Lines of markdown: a planner per row, mean gain and worst batch by profile, and median and longest planning."""
    yield f"| {ranks} ranks | {' | '.join(found)} | planning, s |"
    yield f"| --- |{' --- |' * (len(found) + 1)}"
    for place, name in enumerate(row.name for row in next(iter(found.values()))):
        own = {profile: (of[place], next(row for row in of if row.name == BASE)) for profile, of in found.items()}
        if all(row.refusal for row, _ in own.values()):
            continue
        shown = [_shown(row, base) for row, base in own.values()]
        seconds = np.concatenate([row.planning_s for row, _ in own.values()])
        yield f"| `{name}` | {' | '.join(shown)} | {np.nanmedian(seconds):.2g} to {np.nanmax(seconds):.2g} |"


def _shown(row: Row, base: Row) -> str:
    if row.refusal:
        return "no plan"
    if row.name == BASE:
        return f"{1e3 * float(np.mean(row.makespan_s)):.3g} ms"
    gained = gains(row, base)
    return f"{gained.mean():+.0%} ({gained.min():+.1%})"


def missed(found: dict[str, list[Row]]) -> Iterator[str]:
    """What is asked for and not so."""
    defaults = names("planner")
    for profile, of in found.items():
        base = next(row for row in of if row.name == BASE)
        for row in of:
            if row.name not in defaults or row.name in UNASKED or base.refusal:
                continue
            if row.refusal:
                yield f"{row.name} has no plan of a batch of {profile}, and {BASE} has: {row.refusal}"
                continue
            gained = gains(row, base)
            if gained.min() < -WORST:
                yield f"{row.name} is slower than {BASE} by {-gained.min():.1%} on batch {gained.argmin()} of {profile}"
            if row.name in MUST_GAIN and profile in ON and gained.mean() <= 0:
                yield f"{row.name} gains nothing over {BASE} on {profile}"


def scale(profiles: Sequence[str], cp: str, chosen: Sequence[str], jobs: int) -> dict[str, list[Row]]:
    """Planners on one large batch of each profile, with what they say meanwhile."""
    tokens = {p: int(LARGE_DOCUMENTS * Study(p, PER_NODE, cp, 1 << 24).batch(0).tokens.mean()) for p in profiles}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        work = {p: pool.submit(rows, Study(p, LARGE_RANKS, cp, tokens[p]), [0], chosen, told=True) for p in profiles}
        return {profile: future.result() for profile, future in work.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planners.study", description=__doc__)
    parser.add_argument("--ranks", default="32")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1 << 19, help="of a batch")
    parser.add_argument("--cp", default="ring")
    parser.add_argument("--profiles", default=",".join(axis_values(CONF, "lengths")))
    parser.add_argument("--planners", default=",".join(names("planner")), help=f"{BASE} is one of them in any case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="file to keep parts in")
    parser.add_argument("--scale", action="store_true", help=f"plan {LARGE_DOCUMENTS} documents for {LARGE_RANKS} ranks")
    options = parser.parse_args()
    profiles, failed = options.profiles.split(","), []
    chosen = list(dict.fromkeys([BASE, *options.planners.split(",")]))
    if options.scale:
        tables = {LARGE_RANKS: scale(profiles, options.cp, chosen, options.jobs)}
    else:
        studies = [Study(p, int(ranks), options.cp, options.tokens) for ranks in options.ranks.split(",") for p in profiles]
        every = all_rows(studies, options.batches, chosen, options.jobs, options.out)
        tables = {
            ranks: {s.profile: of for s, of in every.items() if s.ranks == ranks}
            for ranks in dict.fromkeys(s.ranks for s in studies)
        }
    for ranks, found in tables.items():
        print("\n".join(table(found, ranks)), flush=True)
        failed += [f"{ranks} ranks: {line}" for line in missed(found)]
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
