"""Sound cells, of which the check may refuse none: every kernel that runs on a CPU, in every type, over masks, lengths and seeds.

``python -m tests.measure.sound [cells] [first seed]`` prints how near the nearest of each kernel and type came to its bound.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from lcbench.cp.execute import Groups
from lcbench.cp.none import Local
from lcbench.grid.build import build_kernel
from lcbench.kernels.base import Kernel, refusal
from lcbench.masks.band import DoesNotFit
from lcbench.measure.bounds import Check
from lcbench.measure.cell import Gang, Started, Work
from lcbench.measure.numerics import one_pass
from lcbench.problem import DTYPES, Heads, Problem, Scale
from lcbench.testing.masks import load, names, small

CPU = torch.device("cpu")
LENGTHS = (512, 1000, 2048, 4096, 16384)
HEADS = (Heads(4, 2, 32), Heads(2, 1, 64), Heads(1, 1, 16), Heads(6, 2, 24), Heads(1, 1, 128))
# These hold every score, or compute one block of rows at a time in float64; naive's products of halves are torch's own, and slow.
SLOW_BEYOND = {"naive": 1000, "sdpa_math": 2048, "flex": 2048, "flex_sparse": 2048, "reference": 2048}


@dataclass(frozen=True)
class Cell:
    kernel: str
    mask: str
    dtype: str
    seqlen: int
    heads: Heads
    seed: int


@cache
def kernels() -> dict[str, Kernel]:
    """Those that run here, but for Triton's, whose interpreter is tested by tests/kernels."""
    problem = Problem(512, HEADS[0], Scale(1, 1), "float32", "forward_backward")
    found = {name: build_kernel(load("kernel", name)) for name in names("kernel") if not name.startswith("triton")}
    return {name: kernel for name, kernel in found.items() if refusal(kernel, problem, CPU) is None}


def cells(first_seed: int = 0) -> Iterator[Cell]:
    """Cells without end, each kernel and type in turn, the rest drawn."""
    random = np.random.default_rng(first_seed)
    for seed in itertools.count(first_seed):
        for kernel, dtype in itertools.product(kernels(), DTYPES):
            lengths = [n for n in LENGTHS if n <= SLOW_BEYOND.get(kernel, LENGTHS[-1])]
            # Long ones are rarer, since they take long.
            weights = np.array([1 / n for n in lengths])
            seqlen = int(random.choice(lengths, p=weights / weights.sum()))
            heads = HEADS[2] if seqlen > 4096 else HEADS[random.integers(len(HEADS))]
            masks = [n for n in names() if n.startswith("block_") and n != "block_causal"] if kernel == "flex_sparse" else names()
            yield Cell(kernel, str(random.choice(masks)), dtype, seqlen, heads, seed)


def examined(cell: Cell, folder: Path) -> Check | None:
    """What the check says of a sound cell; None where its kernel does not take the mask."""
    kernel = kernels()[cell.kernel]
    try:
        mask = small(cell.mask, cell.seqlen, cell.heads, folder, seed=cell.seed)
    except DoesNotFit:
        return None
    problem = Problem(cell.seqlen, cell.heads, Scale(1, 1), cell.dtype, "forward_backward")
    if kernel.unsupported(problem, mask) or refusal(kernel, problem, CPU):
        return None
    work = Work(problem, lambda _: mask, kernel, Local(), {}, cell.seed)
    started = Started(work, 0, Gang(0, 1, CPU, Groups(), []))
    assert started.wrong is None
    examination = started.examination
    examination.first(started.shard, one_pass(started.run, started.shard))
    for probe in examination.probes:
        examination.probe(probe, started.shard)
    started.draw()
    started.check_last()
    return examination.check()


def main(count: int, first_seed: int) -> int:
    torch.set_num_threads(1)
    nearest: dict[tuple[str, str], tuple[float, str]] = {}
    ran: Counter[tuple[str, str]] = Counter()
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(first_seed):
            if sum(ran.values()) >= count:
                break
            check = examined(cell, Path(folder))
            if check is None:
                continue
            key = cell.kernel, cell.dtype
            ran[key] += 1
            worst = max((ratio, f"{part}: {x}") for part, found in check.ratios.items() for x, ratio in found.items())
            nearest[key] = max(nearest.get(key, (0.0, "")), (worst[0], f"{worst[1]}, {cell.mask} {cell.seqlen} {cell.heads}"))
            if not sum(ran.values()) % 250:
                print(f"{sum(ran.values())} cells", file=sys.stderr, flush=True)
            if check.failures:
                refused += 1
                print(cell, check.failures, flush=True)
    print("| kernel | type | cells | nearest to its bound | what |")
    print("| --- | --- | --- | --- | --- |")
    for key in sorted(ran):
        print(f"| {key[0]} | {key[1]} | {ran[key]} | {nearest[key][0]:.2f} | {nearest[key][1]} |")
    print(f"{sum(ran.values())} sound cells, {refused} refused")
    return refused


if __name__ == "__main__":
    given = [int(x) for x in sys.argv[1:]]
    sys.exit(bool(main(*(given + [2000, 0][len(given) :]))))
