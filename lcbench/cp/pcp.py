"""Prefill context parallelism: a prompt is computed by many ranks, and its keys and values lie as decoding will read them.

Each rank has two chunks of the new tokens of every request, in zigzag, so that a causal mask is shared evenly. Keys and values are
dealt out as the cache of ``dcp`` or ``kvp`` is, a stretch of each request or some tokens in turn, and every rank sees all of them:
gathered at once, or passed around (vLLM, ``prefill_context_parallel_size``).

Bytes that a rank sends; n tokens of all requests, W numbers of a token's key and value in each head, b of an input::

    (P - 1) / P n Hk W b
"""

# No postponed annotations: options are asked for their types.

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.cp.split_cache import query_runs, shares
from lcbench.masks.band import TokenSpan
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_choice, check_count, only_forward, rings
from lcbench.schedule.layout import Layout, by_document
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Side, Step, head_groups, rows, singles

Exchange = Literal["allgather", "ring"]


@dataclass(frozen=True)
class PCP(Scheduled):
    """Prefill context parallelism, forward only.

    Attributes:
        exchange: how keys and values come to all ranks.
        interleave: tokens of a request that go to one rank before the next ones go to the next, in turn; None: each rank has one
            stretch of it.
    """

    exchange: Exchange = "allgather"
    interleave: int | None = None

    def __post_init__(self) -> None:
        check_choice("exchange", self.exchange, ("allgather", "ring"))
        if self.interleave is not None:
            check_count("interleave", self.interleave)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return only_forward(problem)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        ranks = problem.scale.world_size
        every = np.arange(ranks)
        zigzag = by_document(problem.requests.q_bounds, ranks, folded=True)
        queries = Layout(tuple(self._runs(spans, ranks) for spans in zigzag.shards))
        keys = shares(problem.requests.k_bounds, ranks, self.interleave)
        q, k = Side(queries, every, singles(ranks)), Side(keys, every, (*singles(ranks), tuple(range(ranks))))
        steps = rings([ranks]) if self.exchange == "ring" else _gathered(ranks)
        return Schedule(ranks, q, k, head_groups(problem.heads, 1), steps)

    def _runs(self, spans: tuple[TokenSpan, ...], ranks: int) -> tuple[TokenSpan, ...]:
        """The queries of a rank in the order of ``query_runs``."""
        found = [query_runs(span.start, span.start + span.size, ranks, self.interleave) for span in spans]
        return tuple(run for runs in found for run in runs) or spans


def _gathered(ranks: int) -> tuple[Step, ...]:
    """Every rank gets the keys of all others, then computes its queries on all of them, bundle ``ranks``."""
    source, to = np.nonzero(~np.eye(ranks, dtype=bool))
    every = np.arange(ranks)
    computed = Step(rows(every, 0, every, ranks))
    return (Step(NO_ROWS, (Move("kv", rows(source, to, source, 0)),)), computed) if ranks > 1 else (computed,)
