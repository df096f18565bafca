"""How long planning and the mask algebra take: printed, never asserted. ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lcbench.cp.layout import contiguous
from lcbench.cp.verify import verify
from lcbench.grid.build import build_mask, build_strategy, check_options, with_lengths
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.causal_document import causal_document
from lcbench.masks.convert import varlen
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.sweep import look
from lcbench.testing.masks import load, names


def timed(name: str, run: Callable[[], Any]) -> Any:
    begun = time.perf_counter()
    result = run()
    print(f"{name:<64} {1e3 * (time.perf_counter() - begun):10.1f} ms", flush=True)
    return result


def fitting(config: dict[str, Any], tokens: int, heads: Heads) -> Mask | None:
    try:
        return build_mask(config, tokens, heads, 0)
    except DoesNotFit as error:
        print(f"    {error}")
        return None


def main() -> None:
    seeds = ",".join(map(str, range(70)))
    lengths = ",".join(f"{n}k" for n in range(1, 13))
    grid = [f"seed={seeds}", f"seqlen={lengths}", "cp=ring,ulysses,usp", "mask=full,causal", "scale=1x8,2x8"]
    timed("plan of 10,080 cells", lambda: look(grid))
    heads = Heads(32, 8, 128)
    for tokens in (1 << 16, 1 << 20, 10 << 20):
        for name in names():
            if name.endswith("_file"):
                continue
            config = with_lengths(check_options("mask", load("mask", name)), check_options("lengths", load("lengths", "web_text")))
            mask = timed(f"{name}, build, {tokens} tokens", lambda c=config, n=tokens: fitting(c, n, heads))
            if isinstance(mask, BandMask):
                timed(f"{name}, area of {len(mask)} bands", lambda m=mask: m.area)
                timed(f"{name}, tile of rank 0 of 96, merged", lambda m=mask: contiguous(m.num_q, 96).tile(m, 0, 0).merged())
            elif mask is not None and tokens <= 1 << 16:
                timed(f"{name}, draw and area of {mask.maps} maps", lambda m=mask: m.pairs(heads.q))
    documents = causal_document(10 << 20, seed=(0, 0), lengths=Uniform(1, 200))
    timed(f"{len(documents)} causal documents at 10M tokens, area", lambda: documents.area)
    timed("the same, area of 96 contiguous ranks", lambda: contiguous(10 << 20, 96).areas(documents))
    timed("the same, varlen calls", lambda: varlen(documents))
    timed("the same, overlap check", documents.overlap)
    problem = Problem(1 << 20, Heads(96, 8, 128), Scale(12, 8), "bfloat16", "forward_backward")
    for cp, target in (("ring", "lcbench.cp.ring.Ring"), ("ulysses", "lcbench.cp.ulysses.Ulysses"), ("usp", "lcbench.cp.usp.USP")):
        strategy = build_strategy({"name": cp, "_target_": target})
        mask = causal_document(1 << 20, seed=(0, 0), lengths=Uniform(1, 8192))
        timed(f"{cp}: schedule, 96 ranks, 1M tokens, causal documents", lambda s=strategy, m=mask: s.schedule(problem, m))
        schedule = strategy.schedule(problem, mask)
        timed(f"{cp}: verify the same", lambda s=schedule, m=mask: verify(s, m, problem.heads, 2))


if __name__ == "__main__":
    main()
