"""Sound cells, of which the check may refuse none: every kernel that runs on a CPU, in every type, over masks, lengths and seeds.

``python -m tests.measure.sound [--cells N] [--seed N] [--device cpu|cuda] [--processes N] [kernel ...]`` prints how near the
nearest of each kernel and type came to its bound; interrupted, of the cells it had by then.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from lcbench.cp.none import Local
from lcbench.grid.build import build_kernel
from lcbench.kernels.base import Kernel, refusal
from lcbench.masks.band import DoesNotFit
from lcbench.measure.bounds import Check
from lcbench.measure.numerics import one_pass
from lcbench.measure.session import Gang
from lcbench.problem import DTYPES, Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.masks import every_mask, load, small, softmax_kernels
from lcbench.workloads.attention import Attention, AttentionSession
from lcbench.workloads.base import Work

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
def kernels(device: torch.device = CPU, wanted: tuple[str, ...] = ()) -> dict[str, Kernel]:
    """Those that run there; on a CPU but for Triton's, whose interpreter is tested by tests/kernels."""
    problem = Problem(512, HEADS[0], Scale(1, 1), "float32" if device == CPU else "bfloat16", "forward_backward")
    found = {
        name: build_kernel(load("kernel", name))
        for name in wanted or softmax_kernels()
        if device != CPU or not name.startswith("triton")
    }
    return {name: kernel for name, kernel in found.items() if refusal(kernel, problem, device) is None}


def cells(first_seed: int = 0, cast: Iterable[str] | None = None) -> Iterator[Cell]:
    """Cells without end, each kernel and type in turn, the rest drawn."""
    cast = list(kernels() if cast is None else cast)
    random = np.random.default_rng(first_seed)
    for seed in itertools.count(first_seed):
        for kernel, dtype in itertools.product(cast, DTYPES):
            lengths = [n for n in LENGTHS if n <= SLOW_BEYOND.get(kernel, LENGTHS[-1])]
            # Long ones are rarer, since they take long.
            weights = np.array([1 / n for n in lengths])
            seqlen = int(random.choice(lengths, p=weights / weights.sum()))
            heads = HEADS[2] if seqlen > 4096 else HEADS[random.integers(len(HEADS))]
            masks = (
                [n for n in every_mask() if n.startswith(("block_", "chosen_")) and n != "block_causal"]
                if kernel.endswith("_sparse")
                else every_mask()
            )
            yield Cell(kernel, str(random.choice(masks)), dtype, seqlen, heads, seed)


def examined(cell: Cell, folder: Path, kernel: Kernel | None = None, device: torch.device = CPU) -> Check | None:
    """What the check says of a sound cell; None where its kernel does not take the mask."""
    kernel = kernel or kernels()[cell.kernel]
    try:
        mask = small(cell.mask, cell.seqlen, cell.heads, folder, seed=cell.seed)
    except DoesNotFit:
        return None
    problem = Problem(cell.seqlen, cell.heads, Scale(1, 1), cell.dtype, "forward_backward")
    if kernel.unsupported(problem, mask) or refusal(kernel, problem, device):
        return None
    work = Work(Attention(), problem, lambda _: mask, kernel, Local(), {}, cell.seed)
    started = AttentionSession(work, 0, Gang(0, 1, device, Groups(), []))
    if started.refused:
        return None
    assert started.wrong is None
    examination = started.examination
    examination.first(started.shard, one_pass(started.run, started.shard, problem))
    for probe in examination.probes:
        examination.probe(probe, started.shard)
    started.draw()
    started.check_last()
    return examination.check()


@dataclass
class Found:
    """By kernel and type: how many cells ran, and the largest error over its bound, and of what."""

    ran: Counter[tuple[str, str]] = field(default_factory=Counter)
    nearest: dict[tuple[str, str], tuple[float, str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, cell: Cell, check: Check) -> None:
        key = cell.kernel, cell.dtype
        self.ran[key] += 1
        worst, of = max((ratio, f"{part}: {x}") for part, found in check.ratios.items() for x, ratio in found.items())
        self.nearest[key] = max(self.nearest.get(key, (0.0, "")), (worst, f"{of}, {cell.mask} {cell.seqlen} {cell.heads}"))
        if check.failures:
            self.refused.append(f"{cell}: {check.failures}")

    def join(self, other: Found) -> None:
        self.ran += other.ran
        self.nearest |= {key: max(own, self.nearest.get(key, (0.0, ""))) for key, own in other.nearest.items()}
        self.refused += other.refused


def look(count: int, first_seed: int, device: torch.device, wanted: tuple[str, ...] = ()) -> Found:
    """So many sound cells, or those that there are until an interrupt."""
    if device == CPU:
        torch.set_num_threads(1)
    found, cast = Found(), kernels(device, wanted)
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        for cell in cells(first_seed, cast):
            if found.ran.total() >= count:
                break
            check = examined(cell, Path(folder), cast[cell.kernel], device)
            if check is None:
                continue
            found.add(cell, check)
            if not found.ran.total() % 250:
                print(f"{found.ran.total()} cells", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.sound", description=__doc__)
    parser.add_argument("kernels", nargs="*")
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(arguments)
    share = -(-given.cells // given.processes)
    if given.processes == 1:
        found = look(share, given.seed, given.device, tuple(given.kernels))
    else:
        found = Found()
        with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
            seeds = [given.seed + place * given.cells for place in range(given.processes)]
            for part in [pool.submit(look, share, seed, given.device, tuple(given.kernels)) for seed in seeds]:
                found.join(part.result())
    print("| kernel | type | cells | nearest to its bound | what |")
    print("| --- | --- | --- | --- | --- |")
    for key in sorted(found.ran):
        print(f"| {key[0]} | {key[1]} | {found.ran[key]} | {found.nearest[key][0]:.2f} | {found.nearest[key][1]} |")
    print(*found.refused, sep="\n", end="\n" if found.refused else "")
    print(f"{found.ran.total()} sound cells, {len(found.refused)} refused")
    return bool(found.refused)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
