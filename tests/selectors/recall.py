"""What selectors find: ``python -m tests.selectors.recall [--inputs structured] [--seqlen 8k] [--densities 0.05,0.1,0.2,0.4]``.

Every selector of conf/selector chooses blocks of the same inputs. Prints a table of recall, the share of the softmax's weight that
lies in blocks that are kept, in the mean over heads and rows, by selector and density; what as many blocks of each row have at
best; the density that was reached; the worst and the best head; and how long choosing took on this machine. Fails where a selector
has more than is there, or SALE, AdaSpa or DSV no more than as many blocks at random would have.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.grid.build import build, check_options
from lcbench.grid.values import parse_heads, parse_tokens
from lcbench.inputs.base import Inputs, Wanted
from lcbench.masks.band import BandMask
from lcbench.masks.block import Keep
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.problem import Heads, Problem, Scale
from lcbench.selectors.base import Selector, block_edges
from lcbench.testing.masks import load, names
from lcbench.testing.selecting import choose
from tests.selectors import dense

Floats = NDArray[np.float64]

MASKS = {"causal": causal, "full": full}
MUST_FIND = ("adaspa", "sale", "dsv")
# AdaSpa keeps as many blocks as it needs; told that all of the weight is wanted, it keeps the share that is asked for.
AT_DENSITY = {"adaspa": {"recall": 1}}
SLACK = 1e-9  # of sums of float64


@dataclass(frozen=True)
class Setting:
    """What is chosen from: inputs under a mask, in blocks of q_block x k_block, with a map per query head."""

    inputs: str
    mask: str
    seqlen: int
    heads: Heads
    q_block: int
    k_block: int
    dtype: str = "float32"

    @property
    def problem(self) -> Problem:
        return Problem(self.seqlen, self.heads, Scale(1, 1), self.dtype, "forward")

    @property
    def band_mask(self) -> BandMask:
        found: BandMask = MASKS[self.mask](self.seqlen)
        return found

    def selector(self, name: str, density: float) -> Selector:
        """A selector of conf/selector, told to keep a share of the blocks."""
        sizes = {"q_block": self.q_block, "k_block": self.k_block, "per": "q_head", "density": density}
        built: Selector = build(check_options("selector", {**load("selector", name), **sizes, **AT_DENSITY.get(name, {})}))
        return built

    def drawn(self, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k of a step."""
        made: Inputs = build(check_options("inputs", load("inputs", self.inputs)))
        tokens, cpu = np.arange(self.seqlen), torch.device("cpu")
        q, k = (made.draw(Wanted(name, tokens, self.problem, seed, cpu, step=step)) for name in ("q", "k"))
        return q, k


@dataclass(frozen=True)
class Found:
    """What a selector found of one seed's inputs, in the mean over rows.

    Attributes:
        recall: of the softmax's weight, by head, (Hq,).
        best: the same of as many blocks of each row with most weight.
        random: the same of as many blocks of each row at random, expected.
        density: share of the mask's pairs that are kept, by head, (Hq,).
        seconds: that choosing took.
    """

    recall: Floats
    best: Floats
    random: Floats
    density: Floats
    seconds: float


def weights(setting: Setting, q: torch.Tensor, k: torch.Tensor) -> tuple[Floats, Floats]:
    """The softmax's weight in each block, in the mean over its queries, (Hq, rows of blocks, columns of blocks); and LSE (T, Hq).

    In float64. Every query sees a key.
    """
    heads, allowed = setting.heads, torch.from_numpy(dense.visible(setting.band_mask))
    edges = block_edges(setting.seqlen, setting.k_block)
    scale, each = setting.problem.softmax_scale, heads.q // heads.kv
    of_rows, lse = [], []
    for begin, end in pairwise(block_edges(setting.seqlen, setting.q_block).tolist()):
        own = torch.stack([q[begin:end, h].double() @ k[:, h // each].double().T for h in range(heads.q)]) * scale
        own = own.masked_fill_(~allowed[begin:end], -torch.inf)
        lse.append(own.logsumexp(-1).T)
        sums = torch.softmax(own, -1).mean(1).numpy()
        of_rows.append(np.add.reduceat(sums, edges[:-1], axis=1))
    return np.stack(of_rows, 1), torch.cat(lse).numpy()


def pairs(setting: Setting) -> Floats:
    """Pairs of the mask in each block, (rows of blocks, columns of blocks)."""
    q_edges, k_edges = (block_edges(setting.seqlen, size) for size in (setting.q_block, setting.k_block))
    allowed = dense.visible(setting.band_mask).astype(np.float64)
    return np.add.reduceat(np.add.reduceat(allowed, q_edges[:-1], axis=0), k_edges[:-1], axis=1)


def judged(keep: Keep, masses: Floats, of_mask: Floats, tokens: Sequence[int], seconds: float) -> Found:
    """What a choice comes to.

    Args:
        keep: bool (Hq, rows of blocks, columns of blocks).
        masses: as ``weights`` gives them.
        of_mask: as ``pairs`` gives them.
        tokens: queries of each row of blocks.
    """
    share = np.array(tokens) / sum(tokens)
    counts, seen = keep.sum(-1), (of_mask > 0).sum(-1)
    highest = np.cumsum(-np.sort(-masses, axis=-1), axis=-1)
    best = np.take_along_axis(highest, counts[..., None] - 1, axis=-1)[..., 0]
    return Found(
        recall=(np.where(keep, masses, 0.0).sum(-1) * share).sum(-1),
        best=(best * share).sum(-1),
        random=(counts / seen * share).sum(-1),
        density=(keep * of_mask).sum((-1, -2)) / of_mask.sum(),
        seconds=seconds,
    )


def found(setting: Setting, names: Sequence[str], densities: Sequence[float], seed: int) -> dict[tuple[str, float], Found]:
    """Selectors at densities, on the second of two steps; whoever wants it has the LSE of the first."""
    of_mask = pairs(setting)
    tokens = np.diff(block_edges(setting.seqlen, setting.q_block)).tolist()
    (q, k), before = setting.drawn(seed, 1), setting.drawn(seed, 0)
    lse = torch.from_numpy(weights(setting, *before)[1]).to(torch.float32)
    masses, _ = weights(setting, q, k)
    results = {}
    for name in names:
        for density in densities:
            selector = setting.selector(name, density)
            begun = time.perf_counter()
            keep = choose(selector, setting.problem, setting.band_mask, q, k, lse if selector.needs_lse else None)
            results[name, density] = judged(keep, masses, of_mask, tokens, time.perf_counter() - begun)
    return results


def table(results: dict[tuple[str, float], list[Found]], densities: Sequence[float]) -> Iterator[str]:
    """Lines of markdown: a selector per row; by density the recall, what as many blocks have at best, and the density that was
    reached; then the worst and the best head, and the seconds of choosing, at the middle density."""
    middle = densities[len(densities) // 2]
    heads = [f"{density:g}: recall (at best), density" for density in densities]
    yield f"| selector | {' | '.join(heads)} | heads at {middle:g} | s |"
    yield "| --- |" + " ---: |" * (len(densities) + 2)
    for name in dict.fromkeys(name for name, _ in results):
        cells = []
        for density in densities:
            of = results[name, density]
            recall, best, reached = (np.mean([getattr(one, what) for one in of]) for what in ("recall", "best", "density"))
            cells.append(f"{recall:.3f} ({best:.3f}), {reached:.3f}")
        every = np.concatenate([one.recall for one in results[name, middle]])
        seconds = np.median([one.seconds for one in results[name, middle]])
        yield f"| `{name}` | {' | '.join(cells)} | {every.min():.2f} to {every.max():.2f} | {seconds:.1f} |"


def missed(results: dict[tuple[str, float], list[Found]]) -> Iterator[str]:
    """What is asked for and not so, of each seed: nobody has more than the best has, and what looks at q and k more than chance."""
    for (name, density), every in results.items():
        for seed, one in enumerate(every):
            recall, best, random = (float(x.mean()) for x in (one.recall, one.best, one.random))
            if recall > best + SLACK or (name == "oracle" and recall < best - 1e-4):
                yield f"{name} at {density:g} of seed {seed} has {recall:.4f} of the weight, as many blocks {best:.4f} at best"
            if name in MUST_FIND and recall <= random:
                yield f"{name} at {density:g} of seed {seed} has {recall:.4f} of the weight, as many blocks at random {random:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.selectors.recall", description=__doc__)
    parser.add_argument("--inputs", default="structured")
    parser.add_argument("--mask", default="causal", choices=MASKS)
    parser.add_argument("--seqlen", default="8k", type=parse_tokens)
    parser.add_argument("--heads", default="8x2x64", type=parse_heads)
    parser.add_argument("--q-block", type=int, default=64)
    parser.add_argument("--k-block", type=int, default=64)
    parser.add_argument("--densities", default="0.05,0.1,0.2,0.4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--selectors", default=",".join(name for name in names("selector") if name != "none"))
    options = parser.parse_args()
    setting = Setting(options.inputs, options.mask, options.seqlen, options.heads, options.q_block, options.k_block)
    densities = [float(density) for density in options.densities.split(",")]
    results: dict[tuple[str, float], list[Found]] = {}
    for seed in range(options.seeds):
        for key, one in found(setting, options.selectors.split(","), densities, seed).items():
            results.setdefault(key, []).append(one)
        print(f"seed {seed} is done", file=sys.stderr, flush=True)
    print("\n".join(table(results, densities)), flush=True)
    wrong = list(missed(results))
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
