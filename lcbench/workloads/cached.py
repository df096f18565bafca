"""A pass over a cache, on one rank: what ``workload=serving`` runs, times and checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lcbench.cp.base import Passes, RankRun
from lcbench.kernels.base import Unsupported
from lcbench.kernels.cache import Cache, CacheKind, head_scales
from lcbench.measure.ranks import EVERY, Ranks, first_refusal
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases
from lcbench.problem import Problem
from lcbench.workloads.attention import AttentionSession
from lcbench.workloads.base import Work
from lcbench.workloads.started import Started, started


class CachedRun:
    """A strategy's run whose keys and values are in a cache. Making it is collective.

    ``forward`` stores what it is given and computes over it; ``read`` computes over what is stored. All else is the run's own.

    Attributes:
        copies: why ranks copy the cache out before they compute on it; None: their kernels read it where it lies.
    """

    def __init__(self, run: RankRun, problem: Problem, kind: CacheKind, seed: int, ranks: Ranks) -> None:
        self._run, self._problem, self._kind, self._seed, self._ranks = run, problem, kind, seed, ranks
        batch = problem.requests
        request = np.searchsorted(batch.k_bounds, run.held.kv.tokens, side="right") - 1
        self._lengths = tuple(np.bincount(request, minlength=len(batch)).tolist())
        # A cache has requests back to back; a layout of tokens may have them otherwise.
        order = np.argsort(request, kind="stable")
        self._order = None if (np.diff(order) == 1).all() else torch.from_numpy(order)
        self._back = torch.from_numpy(np.argsort(order))
        own = run.reads(kind) if self._order is None else "a rank's tokens are not in the order of requests"
        self.copies = first_refusal(ranks.all_gather_object(own))  # a pass is timed as one, so that all ranks do the same
        self._cache: Cache | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    @property
    def cache(self) -> Cache:
        assert self._cache is not None, "nothing is stored yet"
        return self._cache

    def store(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put keys (Tk, Hk, D) and values (Tk, Hk, Dv) of this rank's tokens into the cache. Collective."""
        scales = self._scales(k, v)
        if self._order is not None:
            self._order, self._back = self._order.to(k.device), self._back.to(k.device)
            k, v = k[self._order], v[self._order]
            v = k[..., : v.shape[-1]] if self._problem.heads.latent else v
        self._cache = Cache.of(k, v, self._lengths, self._kind, latent=self._problem.heads.latent, seed=self._seed, scales=scales)

    def _scales(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of this rank's key/value heads, over all ranks' tokens: every rank stores a head by one scale."""
        if self._kind.storage != "float8":
            return None
        own = self._run.held.kv.heads or range(self._problem.heads.kv)
        of_k, of_v = (self._every_head(head_scales(x), own)[own.start : own.stop] for x in (k, v))
        return of_k, of_v

    def as_stored(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (T, Hk, D) and values (T, Hk, Dv) of all heads and any tokens as the cache would give them. Collective."""
        heads, scales = self._problem.heads, None
        if self._kind.storage == "float8":
            own = self._run.held.kv.heads or range(heads.kv)
            scales = self._every_head(self.cache.k_scale, own), self._every_head(self.cache.v_scale, own)
        kind = replace(self._kind, page=None)
        return Cache.of(k, v, (len(k),), kind, latent=heads.latent, scales=scales).read()

    def _every_head(self, own: torch.Tensor | None, heads: range) -> torch.Tensor:
        """(Hk,): a number for each key/value head, from the ranks that hold it, which agree. Collective."""
        assert own is not None
        every = torch.zeros(self._problem.heads.kv, dtype=torch.float32, device=own.device)
        every[heads.start : heads.stop] = own
        return self._ranks.reduce(every, "max")

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are stored, exactly, in the inputs' type and in the order of this rank's tokens."""
        k, v = self.cache.read()
        if self._order is None:
            return k, v
        k = k[self._back]
        return k, k[..., : v.shape[-1]] if self._problem.heads.latent else v[self._back]

    def read(self, q: torch.Tensor, sink: torch.Tensor | None = None, passes: Passes | None = None) -> tuple[torch.Tensor, Any]:
        """``forward`` over what is stored; ``passes``: of what, None: of the run itself. Collective."""
        passes = passes or self._run
        if self.copies is None:
            return passes.forward_cache(q, self.cache, sink)
        return passes.forward(q, *self.stored(), sink)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        self.store(k, v)
        return self.read(q, sink)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, ...]:
        raise Unsupported("a cache has no backward")


class ServingSession(AttentionSession):
    """One draw of a serving cell on this rank. Its inputs are what is stored, so that the check is of what was computed on."""

    run: CachedRun  # type: ignore[assignment]

    def __init__(self, kind: CacheKind, work: Work, number: int, gang: Gang) -> None:
        self._kind = kind
        if kind.stored_as(work.problem.dtype) != work.problem.dtype:
            self._no_probe = f"stored as {kind.storage}, the numbers of a probe would not be what they are"
        super().__init__(work, number, gang)
        if self.refused is None:
            self._store()

    def _begun(self, work: Work, number: int, gang: Gang) -> Started | str:
        begun = started(work, number, gang)
        if isinstance(begun, str):
            return begun
        run = CachedRun(begun.run, work.problem, self._kind, work.seed, gang.ranks)
        return replace(begun, run=run)  # type: ignore[arg-type]

    def _store(self) -> None:
        """Put the inputs into the cache, and what is stored back into the inputs."""
        shard = self.shard
        self.run.store(shard.k, shard.v)
        if self._kind.storage != "input":
            k, v = self.run.stored()
            shard.k.copy_(k)
            if not self._work.problem.heads.latent:
                shard.v.copy_(v)

    def _by_tokens(self) -> Shard:
        shard, run = super()._by_tokens(), self.run
        if self._kind.storage == "input":
            return shard
        k, v = run.as_stored(shard.k, shard.v)
        return replace(shard, k=k, v=v)

    def draw(self) -> None:
        super().draw()
        self._store()

    def vary(self) -> None:
        super().vary()
        if self.run.cache.k.data_ptr() != self.shard.k.data_ptr():
            self.run.cache.negate()

    @property
    def input_bytes(self) -> int:
        """Of the inputs, and of a cache that is not these."""
        cache = self.run.cache
        apart = cache.k.data_ptr() != self.shard.k.data_ptr()
        return super().input_bytes + (cache.held_bytes if apart else 0)

    def phases(self) -> Phases:
        """Forward gives (out, saved)."""
        return self._reading(None)

    def _alone(self, passes: Passes, saved: Any) -> Phases:
        return self._reading(passes)

    def _reading(self, passes: Passes | None) -> Phases:
        run, shard = self.run, self.shard
        return {"forward": lambda _: run.read(shard.q, shard.sink, passes)}

    def timeline(self) -> list[list[float]] | None:
        """None where kernels read the cache, of which a run's own timeline knows nothing."""
        return super().timeline() if self.run.copies is not None else None

    def costs(self) -> dict[str, Cost]:
        """Stored in fewer bytes, a key takes less memory traffic than in the inputs' type."""
        stored, width = self.run.cache.k.element_size(), self._work.problem.itemsize
        found = super().costs()
        share = min(1.0, stored / width)
        return {phase: replace(cost, least_memory_bytes=cost.least_memory_bytes * share) for phase, cost in found.items()}

    def counted(self) -> Counted:
        counted, problem = super().counted(), self._work.problem
        tokens = float(problem.queries * self._gang.mesh.dp)
        bytes_read = EVERY.all_gather_object(self.run.cache.bytes)
        counted.metrics.update({"serving/new_tokens": tokens, "serving/tokens_per_gpu": tokens / self._gang.world_size})
        counted.metrics["serving/cache_bytes"] = float(max(bytes_read))
        counted.metrics["serving/cache_bytes_per_token"] = sum(bytes_read) / tokens
        if "forward" in counted.bytes_sent:
            counted.metrics["serving/bytes_sent_per_token"] = counted.bytes_sent["forward"] / tokens
        counted.notes["cache"] = f"{self._kind}: " + (
            "read where it lies" if self.run.copies is None else f"copied out in each pass: {self.run.copies}"
        )
        return counted
