"""A figure of what is predicted up to 4,096 GPUs: ``python -m tests.docs.predicted [--fit FILE]``. It takes minutes and gigabytes.

8 Mi tokens of causal documents, every strategy of ours that can run, on the machine h100. Nothing in it is measured.
"""

from __future__ import annotations

import argparse
import gc
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
# GPUs up to which a strategy is looked at. Over all ranks hybrid cuts each of thousands of documents into 2P chunks; what sends
# from every rank to every other has 33 million messages at 4,096 (all-gather took more than 8 GB and 2 minutes and was not done).
MOST = {"hybrid": 64, "allgather": 1024, "ring": 1024, "tokenring": 1024}
MACHINE, MASK, TOKENS, HEADS = "h100", "causal_document", "8m", "64x8x128"


def cell(cp: str, ranks: int) -> Cell:
    """The cell of a strategy at a number of GPUs, of one draw of the mask."""
    words = (f"cp={cp}", f"mask={MASK}", f"seqlen={TOKENS}", f"scale={ranks // PER_NODE}x{PER_NODE}", f"heads={HEADS}")
    (planned,) = look([*words, "kernel=flash_attn3", "lengths=web_text"]).cells
    return planned.cell


def add(found: dict[str, dict[int, Prediction]], predictor: Predictor, ranks: int) -> None:
    """Predict every strategy of ours that shares one sequence among ranks; says what cannot run, or is too much."""
    for cp in names("cp"):
        strategy = build_strategy(load("cp", cp))
        if not isinstance(strategy, Scheduled) or strategy.one_rank:
            continue
        begun = time.process_time()
        try:
            if ranks > MOST.get(cp, ranks):
                raise CannotPredict("too many pieces or messages to simulate")
            made = predictor.predict(cell(cp, ranks), memory=False)
        except (CannotPredict, MemoryError) as error:
            print(f"{cp} at {ranks}: {error or 'more memory than there is'}", flush=True)
            continue
        found.setdefault(cp, {})[ranks] = replace(made, draws=())
        print(f"{cp} at {ranks}: {1e3 * made.seconds:.2f} ms predicted in {time.process_time() - begun:.0f} s", flush=True)
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
    basis = next(p.basis for by_ranks in found.values() for p in by_ranks.values())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [f"{r:,}" for r in ranks])
    axes.set_xlabel("GPUs, 8 in a node")
    axes.set_ylabel("ms, forward and backward")
    axes.set_facecolor("#fbf7e6")
    axes.set_title(
        f"PREDICTION, nothing here is measured: 8 Mi tokens, causal documents, {HEADS}, bfloat16\n"
        f"machine {MACHINE}; fit: {fit.name if fit else 'none'}; {basis[:90]}", fontsize=9,
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
    found: dict[str, dict[int, Prediction]] = {}
    for ranks in map(int, options.points.split(",")):
        add(found, predictor, ranks)
        draw(found, options.fit).savefig(options.out, metadata={"Software": None})
        print(f"written to {options.out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
