"""A figure of what is predicted up to 4,096 GPUs: ``python -m tests.docs.predicted [--fit FILE]``. It takes minutes and gigabytes.

8 Mi tokens of causal documents, every strategy of ours that can run, on the machine h100. Nothing in it is measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.cp.base import Scheduled
from lcbench.grid.build import build_strategy
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.predict.predictor import CannotPredict, Prediction, Predictor
from lcbench.testing.masks import load, names
from tests.docs.drawings import DOCS, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS, PER_NODE = (64, 256, 1024, 4096), 8
# Where a strategy would take longer it is left out, by what its points before took: work grows at most with the square of ranks.
LONGEST_S = 900.0
MEMORY_SHARE = 0.8  # of this machine's, which is more than a point may take
MACHINE, MASK, TOKENS, HEADS = "h100", "causal_document", "8m", "64x8x128"


def cell(cp: str, ranks: int) -> Cell:
    """The cell of a strategy at a number of GPUs, of one draw of the mask."""
    words = (f"cp={cp}", f"mask={MASK}", f"seqlen={TOKENS}", f"scale={ranks // PER_NODE}x{PER_NODE}", f"heads={HEADS}")
    (planned,) = look([*words, "kernel=flash_attn3", "lengths=web_text"]).cells
    return planned.cell


def add(found: dict[str, dict[int, Prediction]], took: dict[str, tuple[int, float]], predictor: Predictor, ranks: int) -> None:
    """Predict every strategy of ours that shares one sequence among ranks; says what cannot run, or is too much.

    ``took``: ranks and seconds of the last point of each strategy.
    """
    for cp in names("cp"):
        strategy = build_strategy(load("cp", cp))
        if not isinstance(strategy, Scheduled) or strategy.one_rank:
            continue
        before, seconds = took.get(cp, (ranks, 0.0))
        begun = time.process_time()
        try:
            if (expected := seconds * (ranks / before) ** 2) > LONGEST_S:
                raise CannotPredict(f"it would take up to {expected:,.0f} s to simulate")
            made = predictor.predict(cell(cp, ranks), memory=False)
        except (CannotPredict, MemoryError) as error:
            print(f"{cp} at {ranks}: {error or 'more memory than there is'}", flush=True)
            continue
        took[cp] = ranks, time.process_time() - begun
        found.setdefault(cp, {})[ranks] = replace(made, draws=())
        print(f"{cp} at {ranks}: {1e3 * made.seconds:.2f} ms predicted in {took[cp][1]:.0f} s", flush=True)
        del made
        gc.collect()


def draw(found: dict[str, dict[int, Prediction]], fit: Path | None) -> Figure:
    """Milliseconds of an iteration over GPUs, dashed: it is a prediction."""
    made = figure(9, 5.2)
    axes = made.subplots()
    for number, (cp, by_ranks) in enumerate(sorted(found.items())):
        if by_ranks:
            times, marker = [1e3 * p.seconds for p in by_ranks.values()], "osD^vPX<>*"[number % 10]
            axes.plot(list(by_ranks), times, "--", marker=marker, label=cp, markerfacecolor="white")
    ranks = sorted({r for by_ranks in found.values() for r in by_ranks})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [f"{r:,}" for r in ranks])
    axes.set_xlabel("GPUs, 8 in a node")
    axes.set_ylabel("ms, forward and backward")
    axes.set_facecolor("#fbf7e6")
    axes.set_title(
        f"PREDICTION, nothing here is measured: 8 Mi tokens, causal documents, {HEADS}, bfloat16\n"
        f"machine {MACHINE}, fit: {fit.name if fit else 'none, half of the peak is guessed'}", fontsize=9,
    )  # fmt: skip
    axes.legend(title="strategy", fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", type=Path, help="what lcbench.fit has written for h100")
    parser.add_argument("--points", default=",".join(map(str, POINTS)), help="numbers of GPUs")
    parser.add_argument("--out", type=Path, default=DOCS / "predicted-scaling.png")
    options = parser.parse_args()
    predictor = Predictor.of(MACHINE, options.fit)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (int(MEMORY_SHARE * memory), -1))  # numpy says so, where Linux would kill
    found: dict[str, dict[int, Prediction]] = {}
    took: dict[str, tuple[int, float]] = {}
    for ranks in map(int, options.points.split(",")):
        add(found, took, predictor, ranks)
        draw(found, options.fit).savefig(options.out, metadata={"Software": None})
        print(f"written to {options.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
