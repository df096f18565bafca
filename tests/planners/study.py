"""What planners gain over one degree for all, by prediction: ``python -m tests.planners.study [--ranks 32,64] [--batches 200]``.

Seeded batches of each profile of document lengths are planned by every planner, and what they take is predicted by the cost of a
machine of conf/machine. Prints a table per number of ranks, and fails where a planner is slower than ``fixed`` by more than 2 % on
any batch. ``--scale`` plans 10,000 documents for 1,024 ranks instead, once per planner and profile.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from lcbench.grid.build import build, cell_mask, check_options
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.paths import CONF
from lcbench.grid.values import axis_values
from lcbench.masks.band import Ints
from lcbench.planners.base import Documents, Fleet, Floats, Infeasible, Planner
from lcbench.predict.costs import cost_of
from lcbench.predict.predictor import Predictor
from lcbench.schedule.layout import documents
from lcbench.testing.masks import load, names

MACHINE, HEADS, PER_NODE, CAPACITY = "h100", "32x8x128", 8, 16384
BASE = "fixed"
WORST = 0.02  # relative, by which a planner may be slower than ``fixed`` on a batch
MUST_GAIN = ("flexsp", "bytescale_hdp", "hydraulis")
ON = ("web_text", "long_text_64k", "long_text_512k")
# Besides each planner at its defaults: a published rule, of which no gain is asked.
AS_PUBLISHED: dict[str, dict[str, Any]] = {"bytescale_hdp": {"spread": False}}
LARGE_DOCUMENTS, LARGE_RANKS = 10_000, 1024


@dataclass(frozen=True)
class Row:
    """What a planner came to on batches of a profile: of each its makespan in seconds, NaN where it has no plan, and the seconds of
    a processor that planning took."""

    name: str
    makespan_s: Floats
    planning_s: Floats
    refusal: str = ""


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


def cell(profile: str, ranks: int, cp: str, tokens: int, batches: int) -> Cell:
    """A cell whose draws are the batches."""
    words = [
        "workload=batch", f"workload.capacity={CAPACITY}", f"cp={cp}", "mask=causal_document", f"mask.samples={batches}",
        f"lengths={profile}", f"seqlen={tokens}", f"scale={ranks // PER_NODE}x{PER_NODE}", f"heads={HEADS}", "kernel=flash_attn3",
    ]  # fmt: skip
    (planned,) = look(words).cells
    return planned.cell


def batch(of: Cell, draw: int) -> Documents:
    """The documents of a draw."""
    bounds, pairs = documents(cell_mask(of, draw))
    sizes: Ints = np.diff(bounds)
    return Documents(sizes, pairs)


def rows(
    profile: str, ranks: int, cp: str, tokens: int, batches: int, chosen: Sequence[str], *, told: bool = False
) -> list[Row]:  # fmt: skip
    """Planners on the batches of a profile.

    Args:
        chosen: their names.
        told: print a planner's progress.
    """
    of = cell(profile, ranks, cp, tokens, batches)
    cost, fleet = cost_of(of, Predictor.of(MACHINE)), Fleet(ranks, PER_NODE, CAPACITY)
    every = [batch(of, draw) for draw in range(batches)]
    for degree in cost.degrees:  # groups are simulated once in a process, which is no part of planning
        cost.documents_s(every[0], degree)
    found = []
    for name, planner in planners(chosen).items():
        makespan_s, planning_s, refusal = np.full(batches, np.nan), np.full(batches, np.nan), ""
        for draw, own in enumerate(every):
            begun = time.process_time()
            try:
                plan = planner.plan(own, fleet, cost, partial(print, f"{profile}:", flush=True) if told else lambda line: None)
            except Infeasible as error:
                refusal = str(error)
                break
            planning_s[draw] = time.process_time() - begun
            if wrong := plan.wrong(own, fleet):
                raise AssertionError(f"{name} on batch {draw} of {profile}: {wrong}")
            makespan_s[draw] = plan.makespan_s(own, cost, ranks)
        found.append(Row(name, makespan_s, planning_s, refusal))
        print(f"{profile} on {ranks} ranks: {name} {np.nansum(planning_s):.1f} s {refusal}", file=sys.stderr, flush=True)
    return found


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
            if row.name not in defaults or row.name == "none" or row.refusal:
                continue
            gained = gains(row, base)
            if gained.min() < -WORST:
                yield f"{row.name} is slower than {BASE} by {-gained.min():.1%} on batch {gained.argmin()} of {profile}"
            if row.name in MUST_GAIN and profile in ON and gained.mean() <= 0:
                yield f"{row.name} gains nothing over {BASE} on {profile}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planners.study", description=__doc__)
    parser.add_argument("--ranks", default="32,64")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--cp", default="ring")
    parser.add_argument("--profiles", default=",".join(axis_values(CONF, "lengths")))
    parser.add_argument("--planners", default=",".join(names("planner")), help=f"{BASE} is one of them in any case")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--scale", action="store_true", help=f"plan {LARGE_DOCUMENTS} documents for {LARGE_RANKS} ranks")
    options = parser.parse_args()
    profiles, failed = options.profiles.split(","), []
    chosen = list(dict.fromkeys([BASE, *options.planners.split(",")]))
    pool = ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"))
    if options.scale:
        tokens = {p: int(LARGE_DOCUMENTS * batch(cell(p, PER_NODE, options.cp, 1 << 24, 1), 0).tokens.mean()) for p in profiles}
        work = {LARGE_RANKS: {p: pool.submit(rows, p, LARGE_RANKS, options.cp, tokens[p], 1, chosen, told=True) for p in profiles}}
    else:
        work = {
            ranks: {p: pool.submit(rows, p, ranks, options.cp, options.tokens, options.batches, chosen) for p in profiles}
            for ranks in map(int, options.ranks.split(","))
        }  # fmt: skip
    for ranks, submitted in work.items():
        found = {profile: future.result() for profile, future in submitted.items()}
        print("\n".join(table(found, ranks)), flush=True)
        failed += [f"{ranks} ranks: {line}" for line in missed(found)]
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
