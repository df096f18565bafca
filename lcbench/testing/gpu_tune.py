"""On a machine with a CUDA device: times the launch shapes of our Triton kernels against each other.

``python -m lcbench.testing.gpu_tune [--seconds N] [--out DIR]``. Candidates are compiled in several processes before the clock
starts; each is then compared with dense attention at a short length, and timed on whole cells by CUDA events. Every row is printed
and written to ``DIR/gpu-tune.jsonl`` as soon as it is there; what the seconds do not suffice for is named. The winners belong into
``lcbench/kernels/triton_shapes.py``. Exit code 1 if a candidate was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lcbench.kernels.tile_tables import MakeTables
from lcbench.kernels.triton_band import TritonBand
from lcbench.kernels.triton_block_sparse import TritonBlockSparse
from lcbench.kernels.triton_shapes import Shape
from lcbench.kernels.triton_tiles import Tables, launch_dkv, launch_dq, launch_forward, row_stats
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.gpu_rows import BOUNDS, mask_of

SECONDS = 100.0
WIDE, NARROW = Heads(32, 8, 128), Heads(32, 8, 64)
# Matrix products of a tile, of 2 x rows x columns x dim operations each, by which attention's FLOPs are counted: two forward, five
# backward, of which dk and dv are four (S, dP, dV, dK) and dq three (S, dP, dQ); S and dP are counted in both.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}
# Which cells are timed, in this order; the first says which candidates go on to the others.
CELLS = ((WIDE, "causal", 16384), (WIDE, "causal", 4096), (WIDE, "block_random", 16384), (WIDE, "causal_document", 16384),
         (NARROW, "causal", 16384))  # fmt: skip
# Candidates of a kernel that go on to the other cells.
GO_ON = 6
# Bytes that a cache holds at most, rewritten between two passes.
FLUSHED = 128 << 20


@dataclass(frozen=True)
class Candidate:
    """A launch shape of one kernel."""

    kernel: str
    shape: Shape

    def __str__(self) -> str:
        rows, columns, tested, warps, stages, described = self.shape
        how = "tma" if described else "ptr"
        return f"{self.kernel:<8}{rows:>4} x {columns:<3} tested {tested:<3} warps {warps} stages {stages} {how}"


# (rows, columns, columns of a tested tile, warps, stages), likely ones first; the first few are tried without descriptors as well.
TRIED = {
    "forward": (
        (64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 128, 64, 4, 3), (128, 128, 128, 8, 3),
        (128, 128, 64, 8, 2), (64, 64, 32, 4, 3), (128, 128, 32, 8, 3), (64, 128, 64, 4, 2), (128, 64, 64, 8, 4),
        (64, 128, 128, 4, 3), (128, 64, 64, 4, 3),
    ),
    "dq": (
        (64, 64, 64, 4, 2), (128, 64, 64, 8, 3), (64, 32, 32, 4, 3), (64, 64, 32, 4, 2), (128, 128, 64, 8, 2), (64, 64, 64, 4, 3),
        (64, 128, 64, 4, 2),
    ),
    "dkv": (
        (64, 64, 32, 4, 2), (64, 64, 64, 4, 2), (128, 64, 32, 8, 2), (128, 64, 64, 8, 2), (64, 64, 16, 4, 2), (64, 32, 32, 4, 3),
        (128, 64, 32, 8, 3), (64, 128, 64, 4, 2),
    ),
}  # fmt: skip
BY_POINTERS = 2


def candidates() -> Iterator[Candidate]:
    """What is tried."""
    for kernel, shapes in TRIED.items():
        for described, own in ((True, shapes), (False, shapes[:BY_POINTERS])):
            for shape in own:
                yield Candidate(kernel, Shape(*shape, described))


class Cell:
    """Inputs of one cell, and the results of one way to compute it, for backward to begin from."""

    def __init__(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        shapes = [(mask.num_q, n, heads.dim) for n in (heads.q, heads.kv, heads.kv, heads.q)]
        self.q, self.k, self.v, self.dout = (torch.randn(x, generator=generator, device=device).to(dtype) for x in shapes)
        self.mask, self.heads, self.scale = mask, heads, heads.dim**-0.5
        self.out, self.dq = torch.empty_like(self.q), torch.empty_like(self.q)
        self.dk, self.dv = torch.empty_like(self.k), torch.empty_like(self.v)
        self.lse = torch.empty(self.q.shape[:2], dtype=torch.float32, device=device)
        self.stats: torch.Tensor | None = None
        self._tables: dict[Any, Tables] = {}

    def tables(self, candidate: Candidate) -> Tables:
        key = candidate.kernel == "dkv", *candidate.shape[:3]
        if key not in self._tables:
            self._tables[key] = Tables(tables_of(self.mask.transpose() if key[0] else self.mask)(*key[1:]), self.q.device)
        return self._tables[key]

    def run(self, candidate: Candidate) -> Any:
        """One pass of a kernel into this cell's tensors."""
        tables, shape = self.tables(candidate), candidate.shape
        if candidate.kernel == "forward":
            return launch_forward(tables, shape, self.heads, self.q, self.k, self.v, self.out, self.lse, self.scale)
        if self.stats is None:
            self.stats = row_stats(self.dout, self.out, self.lse, 256)
        given = tables, shape, self.heads, self.q, self.k, self.v, self.dout, self.stats
        if candidate.kernel == "dq":
            return launch_dq(*given, self.dq, self.scale)
        return launch_dkv(*given, self.dk, self.dv, self.scale)


def tables_of(mask: Mask) -> MakeTables:
    """How our kernel for such masks makes their tables."""
    return (TritonBlockSparse if isinstance(mask, BlockMap) else TritonBand)().tables(mask)


def small(name: str, heads: Heads) -> Mask:
    """A mask short enough for dense attention, for which the same code is compiled as for the long one.

    Counts stay multiples of 16, and a block map consists of whole tiles as the long one does.
    """
    return mask_of(name, 768, heads) if name.startswith("block") else mask_of(name, 720, heads, shrink=True)


class Checked:
    """Dense attention at a short length, which a candidate must agree with."""

    def __init__(self, name: str, heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
        self.cell = cell = Cell(small(name, heads), heads, dtype, device)
        q, k, v = leaves = [x.cpu().double().requires_grad_() for x in (cell.q, cell.k, cell.v)]
        out, lse = dense_attention(q, k, v, dense_heads(cell.mask, heads.q), cell.scale)
        grads = torch.autograd.grad(out, leaves, cell.dout.cpu().double())
        found = zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *grads), strict=True)
        self.wanted = {name: x.to(device) for name, x in found}
        cell.out.copy_(self.wanted["out"])
        cell.lse.copy_(self.wanted["lse"])
        cell.stats = row_stats(cell.dout, cell.out, cell.lse, 256)

    def error(self, candidate: Candidate) -> float:
        """The largest error, as a part of the largest value of its tensor; infinite where results do not repeat bit by bit."""
        results = {"forward": ("out", "lse"), "dq": ("dq",), "dkv": ("dk", "dv")}[candidate.kernel]
        seen = []
        for _ in range(2):
            for name in results:
                getattr(self.cell, name).fill_(math.nan)
            self.cell.run(candidate)
            seen.append([getattr(self.cell, name).double() for name in results])
        if not all(torch.equal(a, b) for a, b in zip(*seen, strict=True)):
            return math.inf
        worst = 0.0
        for name, got in zip(results, seen[0], strict=True):
            want = self.wanted[name]
            difference = torch.where(got == want, 0.0, (got - want).abs())
            worst = max(worst, float(difference.max() / want[torch.isfinite(want)].abs().max()))
        return worst if math.isfinite(worst) else math.inf


def compile_all(jobs: list[tuple[Candidate, str, Heads]]) -> str:
    """What one process compiles: kernels are kept in Triton's cache, where the timing process finds them."""
    device, done = torch.device("cuda", 0), 0
    cells: dict[tuple[str, Heads], Cell] = {}
    for candidate, name, heads in jobs:
        if (name, heads) not in cells:
            cells[name, heads] = Cell(small(name, heads), heads, torch.bfloat16, device)
            cells[name, heads].lse.zero_()
        try:
            cells[name, heads].run(candidate)
            done += 1
        except Exception:  # the timing process meets it again, and says it
            continue
    torch.cuda.synchronize()
    return f"{done} of {len(jobs)}"


def timed(cell: Cell, candidate: Candidate, iterations: int) -> float:
    """Median seconds of a pass by CUDA events; the launch queue is kept fed by a sleep of the device."""
    for _ in range(2):
        cell.run(candidate)
    begun, ended = ([torch.cuda.Event(enable_timing=True) for _ in range(iterations)] for _ in range(2))
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=cell.q.device)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)
    for begin, end in zip(begun, ended, strict=True):
        flushed.zero_()
        begin.record()
        cell.run(candidate)
        end.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(begun, ended, strict=True))[iterations // 2] / 1e3


class Tuning:
    """Candidates compiled, checked and timed, cell after cell, until the seconds are spent.

    Attributes:
        rows: of the file, as they come.
        wrong: candidates that gave a wrong result.
        going_on: candidates of each kernel that are still tried.
    """

    def __init__(self, seconds: float, out: Path, wanted: list[Candidate], processes: int) -> None:
        self._seconds, self._ends, self._processes = seconds, time.monotonic() + seconds, processes
        self._device, self._dtype = torch.device("cuda", 0), torch.bfloat16
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "gpu-tune.jsonl"
        self._file = self.path.open("a", buffering=1)
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        self.rows: list[dict[str, Any]] = []
        self.wrong = 0
        self.going_on = {kernel: [c for c in wanted if c.kernel == kernel] for kernel in PRODUCTS}

    def run(self) -> None:
        """Work through all cells."""
        known = set()
        for heads, name, tokens in CELLS:
            if (heads, name) not in known and self._left() > 0:
                known.add((heads, name))
                self._compile(name, heads, [c for own in self.going_on.values() for c in own])
            self._work_through(heads, name, tokens)
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _add(self, candidate: Candidate, **row: Any) -> None:
        self.rows.append({"kernel": candidate.kernel, **candidate.shape._asdict()} | row)
        self._file.write(json.dumps(self.rows[-1]) + "\n")

    def _compile(self, name: str, heads: Heads, own: list[Candidate]) -> None:
        begun = time.monotonic()
        jobs = [(candidate, name, heads) for candidate in own]
        for future in [self._pool.submit(compile_all, jobs[i :: self._processes]) for i in range(self._processes)]:
            try:
                future.result(timeout=max(1.0, self._left() / 2))
            except NotInTime:
                print("compiling took half of the time; what is not compiled is compiled when it is met", flush=True)
                break
            except Exception as error:
                print(f"a compiling process ended: {type(error).__name__}: {str(error)[:200]}", flush=True)
        print(f"\n{len(jobs)} kernels compiled for {name} {heads} in {time.monotonic() - begun:.0f} s", flush=True)

    def _work_through(self, heads: Heads, name: str, tokens: int) -> None:
        """Try every candidate on one cell, and print the fastest first. Those of the first cell say which go on."""
        checked = Checked(name, heads, self._dtype, self._device)
        cell = Cell(mask_of(name, tokens, heads), heads, self._dtype, self._device)
        lines: dict[str, list[tuple[float, str]]] = {}
        for kernel, own in self.going_on.items():
            rates: dict[Candidate, float] = {}
            lines[kernel] = []
            for candidate in own:
                if timing := self._try(candidate, checked, cell, {"mask": name, "tokens": tokens, "heads": str(heads)}):
                    rates[candidate], text = timing
                    lines[kernel].append((-rates[candidate], text))
            best = sorted(rates, key=lambda c: -rates[c])
            if kernel == "forward" and best:  # dq and dk, dv start from its results
                cell.run(best[0])
                cell.stats = None
            if (heads, name, tokens) == CELLS[0] and best:
                self.going_on[kernel] = best[:GO_ON]
        print(f"{name} {tokens} tokens {heads}, TFLOP/s ({self._seconds - self._left():.0f} s)", flush=True)
        for own_lines in lines.values():
            print("\n".join(text for _, text in sorted(own_lines)), flush=True)

    def _try(self, candidate: Candidate, checked: Checked, cell: Cell, head: dict[str, Any]) -> tuple[float, str] | None:
        """TFLOP/s of a candidate with its line; None, and a row that says why, where there is no time of it."""
        if self._left() <= 0:
            self._add(candidate, **head, status="not reached")
            return None
        try:
            error = checked.error(candidate)
            if not error <= BOUNDS["bfloat16"]:
                self.wrong += 1
                self._add(candidate, **head, status="wrong", error=error)
                print(f"WRONG {candidate} {head['mask']} {head['heads']}: error {error:.3g}", flush=True)
                return None
            made = cell.run(candidate)
            median = timed(cell, candidate, 7)
        except Exception as failure:
            self._add(candidate, **head, status="failed", reason=f"{type(failure).__name__}: {str(failure)[:300]}")
            print(f"FAILED {candidate}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}", flush=True)
            if "CUDA error" in str(failure):
                raise  # an error that stays
            return None
        rate = PRODUCTS[candidate.kernel] * 2 * cell.heads.dim * cell.mask.pairs(cell.heads.q) / median / 1e12
        usage = {"registers": made.n_regs, "spills": made.n_spills, "shared": made.metadata.shared}
        self._add(candidate, **head, status="ok", seconds=median, tflops=rate, error=error, **usage)
        compiled = f"{made.n_regs:>3} registers {made.n_spills:>3} spilled {made.metadata.shared >> 10:>3} KiB"
        return rate, f"{rate:7.1f} {median * 1e3:8.3f} ms  {candidate}  {compiled}"


def tune(seconds: float, out: Path, wanted: list[Candidate], processes: int) -> int:
    """Time candidates, write and print the rows; 1 if one was wrong, else 0."""
    tuning = Tuning(seconds, out, wanted, processes)
    tuning.run()
    rows = tuning.rows
    left_out = sum(row["status"] == "not reached" for row in rows)
    print(f"\n{len(rows) - left_out} rows in {tuning.path}; {left_out} not reached; {tuning.wrong} wrong", flush=True)
    return 1 if tuning.wrong else 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lcbench.testing.gpu_tune", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"what all may take (default: {SECONDS:.0f})")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of gpu-tune.jsonl (default: here)")
    parser.add_argument("--kernel", choices=[*PRODUCTS], action="append", help="only this kernel; may be said several times")
    parser.add_argument("--processes", type=int, default=12, help="processes that compile (default: 12)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-tune needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    wanted = [c for c in candidates() if c.kernel in (options.kernel or PRODUCTS)]
    return tune(options.seconds, options.out, wanted, options.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
