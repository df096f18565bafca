"""How long planning and the mask algebra take: printed, never asserted. ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable

from lcbench.cp.verify import verify
from lcbench.grid.build import build_strategy
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.full import full
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads, Problem, Scale
from lcbench.sweep import look


def timed(name: str, run: Callable[[], object]) -> None:
    begun = time.perf_counter()
    run()
    print(f"{name:<64} {1e3 * (time.perf_counter() - begun):10.1f} ms")


def main() -> None:
    seeds = ",".join(map(str, range(70)))
    lengths = ",".join(f"{n}k" for n in range(1, 13))
    grid = [f"seed={seeds}", f"seqlen={lengths}", "cp=ring,ulysses,usp", "mask=full,causal", "scale=1x8,2x8"]
    timed("plan of 10,080 cells", lambda: look(grid))
    for tokens in (1 << 16, 1 << 20, 10 << 20):
        timed(f"full, area, {tokens} tokens", lambda n=tokens: full(n).area)
        timed(f"causal, area, {tokens} tokens", lambda n=tokens: causal(n).area)
        timed(f"sliding window, area, {tokens} tokens", lambda n=tokens: sliding_window(n, left=4096, right=0).area)
        timed(f"documents of 100 tokens, area, {tokens} tokens", lambda n=tokens: causal_document(n, seed=0, mean_length=100).area)
    problem = Problem(1 << 20, Heads(96, 8, 128), Scale(12, 8), "bfloat16", "forward_backward")
    for cp, target in (("ring", "lcbench.cp.ring.Ring"), ("ulysses", "lcbench.cp.ulysses.Ulysses"), ("usp", "lcbench.cp.usp.USP")):
        strategy = build_strategy({"name": cp, "_target_": target})
        mask = causal_document(1 << 20, seed=0, mean_length=4096)
        timed(f"{cp}: schedule, 96 ranks, 1M tokens, causal documents", lambda s=strategy, m=mask: s.schedule(problem, m))
        schedule = strategy.schedule(problem, mask)
        timed(f"{cp}: verify the same", lambda s=schedule, m=mask: verify(s, m, problem.heads, 2))


if __name__ == "__main__":
    main()
