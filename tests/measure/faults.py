"""Kinds of faults, put into a sound kernel or a sound run from outside, and the real ``measure_cell`` that must refuse each.

``python -m tests.measure.faults [length ...] [--seeds N] [--processes N]`` prints how many of each are refused, by type: the table
in docs/measuring.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from typing import Any, ClassVar

import numpy as np
import torch

from lcbench.cp.none import Local
from lcbench.kernels.base import Gradients, Kernel, OutLse, Platform, Prepared, Rounding, Saved, prepare
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import OPEN, Band, BandMask, cropped
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Fixed, Uniform
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.selectors.base import block_edges
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work

CPU = torch.device("cpu")
SETTINGS = {"warmup": 0, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 0.5, "timeline": False}
HEADS = Heads(4, 2, 32)
LONG_HEADS = Heads(2, 1, 16)
DTYPES = ("float64", "float32", "float16", "bfloat16")

Tensors = tuple[torch.Tensor, ...]


def masks(seqlen: int, name: str, seed: int) -> Mask:
    """A mask whose rows see about 1k keys at most where the sequence is long, so that a pass is short."""
    make: dict[str, Callable[[], Mask]] = {
        "full": lambda: full(seqlen),
        "causal": lambda: causal(seqlen),
        "window": lambda: sliding_window(seqlen, left=min(1024, seqlen // 4), right=0),
        "documents": lambda: causal_document(seqlen, seed=(seed, 0), lengths=Uniform(1, min(2000, seqlen // 4))),
        "boxes": lambda: document(seqlen, seed=(seed, 0), lengths=Fixed(128)),
        "blocks": lambda: block_random(
            seqlen, heads=HEADS, seed=(seed, 0), density=min(0.25, 1024 / seqlen), block_size=64, sizes="uniform", per="all_heads"
        ),
        "chosen": lambda: chosen_blocks(seqlen, seed),
    }
    return make[name]()


def chosen_blocks(seqlen: int, seed: int) -> BlockMap:
    """Blocks of 64 under a causal mask: those of the diagonal, and others at random."""
    edges = block_edges(seqlen, 64)
    blocks = len(edges) - 1
    keep = np.random.default_rng((seed, 0)).random((1, blocks, blocks)) < min(0.25, 1024 / seqlen)
    return chosen(keep | np.eye(blocks, dtype=bool), edges, edges, causal(seqlen))


@dataclass
class State:
    """What a fault knows: the passes so far, one forward each, and what it kept."""

    seqlen: int
    heads: Heads
    seed: int
    passes: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def random(self) -> np.random.Generator:
        """The same place in every pass."""
        return np.random.default_rng([self.seed, self.seqlen])

    def row(self) -> int:
        return int(self.random.integers(self.seqlen // 2, self.seqlen))


@dataclass(frozen=True)
class Fault:
    """One kind. What is None is sound.

    Attributes:
        mask: (mask, state) to the mask that the kernel computes; ``only_backward`` leaves forward whole.
        inputs: (q, k, v, state) to those that the kernel is given, in both passes.
        outputs: (out, lse, state) to those that it gives.
        gradients: (dq, dk, dv, state) likewise.
        scale: factor on the softmax scale.
        on: name of the mask.
        least: the lowest precision in which it is a fault and not a rounding, by its place in ``DTYPES``.
        forward: whether a forward-only cell is to find it.
    """

    mask: Callable[[Any, State], Any] | None = None
    inputs: Callable[..., Tensors] | None = None
    outputs: Callable[..., Tensors] | None = None
    gradients: Callable[..., Tensors] | None = None
    scale: float = 1.0
    only_backward: bool = False
    on: str = "causal"
    least: str = "bfloat16"
    most_tokens: int = 1 << 17

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES[: DTYPES.index(self.least) + 1]


class InFloat32(SDPAFlash):
    """torch's own kernel in float32, its results rounded: a CPU without instructions for halves takes several times as long for
    these. What it says of its roundings is the same, so its cells have the same bounds."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> OutLse:
        out, lse = super().attend(q.float(), k.float(), v.float(), causal, scale)
        return out.to(q.dtype), lse

    def adjoint(self, dout: torch.Tensor, saved: Saved, causal: bool, scale: float) -> Gradients:
        wide = Saved(*(x.float() for x in (saved.q, saved.k, saved.v, saved.out, saved.lse)))
        dq, dk, dv = super().adjoint(dout.float(), wide, causal, scale)
        return dq.to(dout.dtype), dk.to(dout.dtype), dv.to(dout.dtype)


class Faulty(Kernel):
    """torch's own kernel with a fault."""

    takes: ClassVar[str] = "blocks"  # a block map comes in one piece, so that it can be changed

    def __init__(self, fault: Fault, state: State, base: Kernel | None = None) -> None:
        self.fault, self.state, self.base = fault, state, base or SDPAFlash()

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def rounding(self, platform: Platform) -> Rounding:
        return self.base.rounding(platform)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        changed = self.fault.mask(mask, self.state) if self.fault.mask else mask
        wrong = prepare(self.base, changed, heads, dtype, device)
        right = wrong if not self.fault.only_backward else prepare(self.base, mask, heads, dtype, device)
        return _Prepared(self.fault, self.state, right, wrong)


class _Prepared:
    calls = 1

    def __init__(self, fault: Fault, state: State, forward: Prepared, backward: Prepared) -> None:
        self._fault, self._state, self._forward, self._backward = fault, state, forward, backward

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> Any:
        self._state.passes += 1
        self._state.kept["inputs"] = (q, k, v)
        given = self._fault.inputs(q, k, v, self._state) if self._fault.inputs else (q, k, v)
        out, lse = self._forward.forward(*given, softmax_scale=softmax_scale * self._fault.scale)
        return self._fault.outputs(out, lse, self._state) if self._fault.outputs else (out, lse)

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Any:
        q, k, v, out, lse = saved
        self._state.kept["dout"] = dout
        given = self._fault.inputs(q, k, v, self._state) if self._fault.inputs else (q, k, v)
        grads = self._backward.backward(dout, Saved(*given, out, lse), softmax_scale=softmax_scale * self._fault.scale)
        return self._fault.gradients(*grads, self._state) if self._fault.gradients else grads


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def without(q0: int, q1: int, k0: int, k1: int, mask: BandMask) -> BandMask:
    """A mask without a rectangle."""
    sides = ((0, q0, 0, mask.num_k), (q1, mask.num_q, 0, mask.num_k), (q0, q1, 0, k0), (q0, q1, k1, mask.num_k))
    return BandMask.of(mask.num_q, mask.num_k, np.concatenate([cropped(mask.bands, *side)[0] for side in sides]))


def tile(size: int) -> Callable[[Any, State], Any]:
    """A square tile of what the mask allows is left out."""

    def change(mask: BandMask, state: State) -> BandMask:
        row = min(state.row() // size * size, mask.num_q - size)
        keys = [b for b in mask if b.q0 <= row < b.q1]
        key = max(0, min(max(b.k0 if b.lo < -(1 << 60) else max(b.k0, row + b.lo) for b in keys) // size * size, row - size))
        return without(row, row + size, key, key + size, mask)

    return change


def a_key(mask: BandMask, state: State) -> BandMask:
    """One row does not see one of its keys."""
    row = state.row()
    return without(row, row + 1, row - 3, row - 2, mask)


def shifted(which: str) -> Callable[[Any, State], Any]:
    def change(mask: BandMask, state: State) -> BandMask:
        bands = mask.bands.copy()
        if which == "left":  # a window that is one key short
            bands[:, 4] = np.where(bands[:, 4] > -(1 << 60), bands[:, 4] + 1, bands[:, 4])
        elif which == "diagonal":  # sees the next key
            bands = bands[:1].copy()
            bands[:, 3:6] = mask.num_k, bands[:, 4].item(), 1
            bands[:, 2] = 0
        else:  # a document that begins one key late for all of its rows
            number = len(bands) // 2
            bands[number, 2] += 1
        return BandMask.of(mask.num_q, mask.num_k, bands)

    return change


def thinned(mask: BandMask, state: State) -> BandMask:
    """Rows of the last half miss a thirty-second of their keys."""
    half, part = mask.num_q // 2, max(1, mask.num_q // 64)
    return without(half, mask.num_q, part, 2 * part, mask)


def forgotten_block(mask: BlockMap, state: State) -> BlockMap:
    def draw(number: int) -> Any:
        keep = mask.keep(number).copy()
        places = np.argwhere(keep)
        keep[tuple(places[len(places) // 2])] = False
        return keep

    return replace(mask, draw=draw)


def uncut(mask: BlockMap, state: State) -> BlockMap:
    return replace(mask, within=None)


def cut_short(mask: BlockMap, state: State) -> BlockMap:
    """No query sees the key at its own place."""
    return replace(mask, within=BandMask.of(mask.num_q, mask.num_k, [Band(0, mask.num_q, 0, mask.num_k, -OPEN, -1)]))


def transposed(mask: BlockMap, state: State) -> BlockMap:
    return mask.transpose()


def at_rows(count: int, change: Callable[[torch.Tensor], torch.Tensor], which: int = 0) -> Callable[..., Tensors]:
    """Some rows of one of the results are changed."""

    def apply(*results: Any) -> Tensors:
        *tensors, state = results
        row = min(state.row(), state.seqlen - count)
        tensors[which] = tensors[which].clone()
        tensors[which][row : row + count] = change(tensors[which][row : row + count])
        return tuple(tensors)

    return apply


def of(which: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Tensors]:
    """All of one of the results is changed."""

    def apply(*results: Any) -> Tensors:
        tensors = list(results[:-1])
        tensors[which] = change(tensors[which])
        return tuple(tensors)

    return apply


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def plus(amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + amount


def swapped_heads(x: torch.Tensor) -> torch.Tensor:
    return x[:, [1, 0, *range(2, x.shape[1])]]


def one_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, -1] = change(x[:, -1])
        return x

    return apply


def beyond(share: float, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Only tokens behind a share of the sequence."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        first = int(share * len(x))
        return torch.cat([x[:first], change(x[first:])])

    return apply


def rounded(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(x.dtype)


def blocks_of_keys(kind: str, size: int = 64) -> Callable[..., Tensors]:
    """Two blocks of keys and values exchanged, or one used in the place of another."""

    def change(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> Tensors:
        one, other = slice(size, 2 * size), slice(4 * size, 5 * size)
        k, v, k0, v0 = k.clone(), v.clone(), k, v
        k[one], v[one] = k0[other], v0[other]
        if kind == "swapped":
            k[other], v[other] = k0[one], v0[one]
        return q, k, v

    return change


def without_last_dim(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> Tensors:
    q = q.clone()
    q[..., -1] = 0
    return q, k, v


def other_kv_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: State) -> Tensors:
    return q, k.flip(1), v.flip(1)


def nothing(out: torch.Tensor, lse: torch.Tensor, state: State) -> Tensors:
    """No work at all: LSE is guessed from the length of q, as it would be of random keys."""
    q, _, _ = state.kept["inputs"]
    size = q.double().square().sum(-1) / q.shape[-1] / 2
    count = torch.arange(1, len(q) + 1, dtype=torch.float64)[:, None]
    return torch.zeros_like(out), (torch.log(count) + size).to(lse.dtype)


def from_pass(first: int, change: Callable[..., Tensors], until: int = 1 << 60) -> Callable[..., Tensors]:
    """A fault that begins at a pass, counted from 1."""

    def apply(*results: Any) -> Tensors:
        return change(*results) if first <= results[-1].passes < until else tuple(results[:-1])

    return apply


def memoised(key: Callable[[torch.Tensor], Any]) -> Callable[..., Tensors]:
    """The first result for a key of the values is given again."""

    def apply(out: torch.Tensor, lse: torch.Tensor, state: State) -> Tensors:
        found: Tensors = state.kept.setdefault(("memo", key(state.kept["inputs"][2])), (out, lse))
        return found

    return apply


def memoised_gradients(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, state: State) -> Tensors:
    found: Tensors = state.kept.setdefault(("grads", state.kept["dout"].data_ptr()), (dq, dk, dv))
    return found


def late(out: torch.Tensor, lse: torch.Tensor, state: State) -> Tensors:
    """Gives the result of the pass before."""
    before = state.kept.get("before", (out, lse))
    state.kept["before"] = (out, lse)
    return tuple(before)


FAULTS: dict[str, Fault] = {
    # scale and type
    "softmax scale x1.001": Fault(scale=1.001),
    "softmax scale x1.01": Fault(scale=1.01),
    "softmax scale x1.05": Fault(scale=1.05),
    "last dim of q ignored": Fault(inputs=without_last_dim),
    "out x1.01": Fault(outputs=of(0, times(1.01))),
    "out x1.001": Fault(outputs=of(0, times(1.001)), least="float16"),
    "out of one head x1.01": Fault(outputs=of(0, one_head(times(1.01)))),
    "out + 0.001": Fault(outputs=of(0, plus(1e-3)), least="float32"),
    "out in bfloat16": Fault(outputs=of(0, rounded(torch.bfloat16)), least="float32"),
    "LSE + 0.05": Fault(outputs=of(1, plus(0.05))),
    "LSE + 0.01": Fault(outputs=of(1, plus(0.01))),
    "LSE + 0.001": Fault(outputs=of(1, plus(0.001))),
    "LSE in powers of two": Fault(outputs=of(1, times(1.4426950408889634))),
    "LSE of one row + 0.01": Fault(outputs=at_rows(1, plus(0.01), 1)),
    "LSE of one head + 0.01": Fault(outputs=of(1, one_head(plus(0.01)))),
    "computes nothing": Fault(outputs=nothing),
    # rows and heads
    "one row x1.5": Fault(outputs=at_rows(1, times(1.5))),
    "one row 0": Fault(outputs=at_rows(1, times(0.0))),
    "one row NaN": Fault(outputs=at_rows(1, times(float("nan")))),
    "16 rows x1.5": Fault(outputs=at_rows(16, times(1.5))),
    "128 rows x1.5": Fault(outputs=at_rows(128, times(1.5))),
    "two heads exchanged": Fault(outputs=of(0, swapped_heads)),
    "key/value heads exchanged": Fault(inputs=other_kv_heads),
    "out 0 behind a quarter": Fault(outputs=of(0, beyond(0.25, times(0.0)))),
    # masks and tiles
    "tile 64 x 64 left out": Fault(mask=tile(64)),
    "tile 128 x 128 left out": Fault(mask=tile(128)),
    "one key of one row left out": Fault(mask=a_key),
    "last half of rows misses 1/32 of the keys": Fault(mask=thinned),
    "sees the next key": Fault(mask=shifted("diagonal"), most_tokens=1 << 14),
    "window one key short": Fault(mask=shifted("left"), on="window"),
    "one document begins one key late": Fault(mask=shifted("document"), on="documents"),
    "one document of many begins one key late": Fault(mask=shifted("document"), on="boxes"),
    "a block forgotten": Fault(mask=forgotten_block, on="blocks"),
    "block map transposed": Fault(mask=transposed, on="blocks"),
    "blocks that are cut computed whole": Fault(mask=uncut, on="chosen"),
    "blocks that are cut one key short": Fault(mask=cut_short, on="chosen"),
    "two blocks of keys exchanged": Fault(inputs=blocks_of_keys("swapped")),
    "a block of keys in the place of another": Fault(inputs=blocks_of_keys("stale")),
    # backward
    "dq x1.01": Fault(gradients=of(0, times(1.01))),
    "dk x1.01": Fault(gradients=of(1, times(1.01))),
    "dv x1.01": Fault(gradients=of(2, times(1.01))),
    "dk of one head x1.01": Fault(gradients=of(1, one_head(times(1.01)))),
    "dk in bfloat16": Fault(gradients=of(1, rounded(torch.bfloat16)), least="float32"),
    "one row of dq x1.5": Fault(gradients=at_rows(1, times(1.5), 0)),
    "one row of dk x1.5": Fault(gradients=at_rows(1, times(1.5), 1)),
    "one row of dv x1.5": Fault(gradients=at_rows(1, times(1.5), 2)),
    "one row of dk 0": Fault(gradients=at_rows(1, times(0.0), 1)),
    "tile 64 x 64 left out of backward": Fault(mask=tile(64), only_backward=True),
    "backward x1.5 behind a half": Fault(gradients=of(1, beyond(0.5, times(1.5)))),
    "dk, dv 0 behind a quarter": Fault(gradients=of(2, beyond(0.25, times(0.0)))),
    "dq of two heads exchanged": Fault(gradients=of(0, swapped_heads)),
    "window one key short in backward": Fault(mask=shifted("left"), only_backward=True, on="window"),
    "softmax scale not in dk": Fault(gradients=of(1, times(5.656854249492381))),
    # from some pass on
    "first result given again, by the address of v": Fault(outputs=memoised(lambda v: v.data_ptr())),
    "first result given always": Fault(outputs=memoised(lambda v: 0)),
    "gradients given again, by the address of dout": Fault(gradients=memoised_gradients),
    "wrong from pass 2 on": Fault(outputs=from_pass(2, of(0, times(0.0)))),
    "wrong from pass 4 on": Fault(outputs=from_pass(4, of(0, times(1.5)))),
    "wrong in the last timed pass": Fault(outputs=from_pass(5, of(0, times(1.5)), 6)),
    "LSE wrong from pass 4 on": Fault(outputs=from_pass(4, of(1, plus(0.05)))),
    "gradients 0 from pass 4 on": Fault(gradients=from_pass(4, of(1, times(0.0)))),
    "a result late by one pass": Fault(outputs=late),
}
LONG = (
    "one row x1.5", "one row NaN", "16 rows x1.5", "LSE + 0.01", "LSE of one row + 0.01", "tile 64 x 64 left out",
    "tile 128 x 128 left out", "one key of one row left out", "window one key short", "one document begins one key late",
    "one document of many begins one key late", "a block forgotten", "one row of dk x1.5", "one row of dq x1.5",
    "one row of dv x1.5", "softmax scale x1.01", "dk x1.01", "tile 64 x 64 left out of backward", "computes nothing",
    "wrong from pass 4 on", "first result given always", "two blocks of keys exchanged",
)  # fmt: skip


def measured(
    name: str | None, dtype: str, seqlen: int, seed: int, *, heads: Heads | None = None, base: Kernel | None = None
) -> Measured:
    """What ``measure_cell`` says of a fault put into ``base``, or with None of the sound kernel (on causal)."""
    fault = FAULTS[name] if name else Fault()
    heads = heads or (HEADS if seqlen <= 8192 else LONG_HEADS)
    on = fault.on if seqlen <= 8192 or fault.on != "causal" else "window"
    problem = Problem(seqlen, heads, Scale(1, 1), dtype, "forward_backward")
    kernel = Faulty(fault, State(seqlen, heads, seed), base)
    work = Work(Attention(), problem, lambda draw: masks(seqlen, on, seed), kernel, Local(), SETTINGS, seed)
    return measure_cell(work, Gang(0, 1, CPU, Groups(), []), lambda _: None)


def refused(found: Measured) -> str | None:
    """Why a cell was refused, in one line; None if it passes."""
    failures = found.check.failures if found.check else []
    return failures[0] if failures else found.implausible


def tried(name: str, dtype: str, seqlen: int) -> bool:
    """Whether a fault is one in a type, and is tried at a length."""
    return dtype in FAULTS[name].dtypes and (seqlen <= 8192 or (name in LONG and dtype in ("float32", "bfloat16")))


def look(name: str, seqlen: int, seeds: int) -> dict[str, list[str | None]]:
    """By type: of each seed why a fault was refused, or None."""
    torch.set_num_threads(1)
    types = [dtype for dtype in DTYPES if tried(name, dtype, seqlen)]
    return {dtype: [refused(measured(name, dtype, seqlen, seed)) for seed in range(seeds)] for dtype in types}


def table(seqlen: int, seeds: int, processes: int) -> None:
    """Detection rates of a length as Markdown."""
    names = [name for name in FAULTS if any(tried(name, dtype, seqlen) for dtype in DTYPES)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        found = dict(zip(names, pool.map(look, names, repeat(seqlen), repeat(seeds)), strict=True))
    every = [why for by_type in found.values() for whys in by_type.values() for why in whys]
    heads = HEADS if seqlen <= 8192 else LONG_HEADS
    caught = f"{sum(why is not None for why in every)} of {len(every)}" if None in every else f"all of {len(every)}"
    print(f"At {seqlen:,} tokens, heads {heads}, {'one seed' if seeds == 1 else f'{seeds} seeds'}: {caught} tries were refused.\n")
    print("| fault | " + " | ".join(DTYPES) + " | seen by, in the last of these |")
    print("| --- |" + " --- |" * (len(DTYPES) + 1))
    for name, by_type in found.items():
        cells = [f"{sum(why is not None for why in whys)} of {len(whys)}" if (whys := by_type.get(d)) else "-" for d in DTYPES]
        print(f"| {name} | {' | '.join(cells)} | {seen_by([why for whys in by_type.values() for why in whys][-1])} |")
    print()


def seen_by(why: str | None) -> str:
    """The tensor and the part of the check in a line such as ``out: error 1 above its bound 0.1 (reference, token 3, head 0)``."""
    if why is None:
        return ""
    tensor, colon, rest = why.partition(": ")
    parts = rest.rpartition("(")[2].rstrip(")").split(", token")[0].split(", head")[0].split(", key/value")[0]
    return f"{tensor}, {parts}" if colon and "above its bound" in rest else "plausible"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.faults", description=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=[1024, 16384])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args(arguments)
    for seqlen in given.lengths:
        table(seqlen, given.seeds, given.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
