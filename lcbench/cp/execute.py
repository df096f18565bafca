"""Run a schedule with torch.distributed: the one engine behind every strategy, forward and backward.

Backward is not written per strategy. The moves of forward are walked in reverse by their adjoints: an exchange goes the
other way, a hop carries the keys and values back one place and their accumulated gradient with them. Keys and values are
first fetched to where forward left them, by the sum of all hops; so nothing is kept from forward but q, k, v, out and LSE,
and the gradients arrive at their owners with the last hop.

Out, LSE and gradients are accumulated in float32 (float64 for float64 inputs), and gradients travel in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from lcbench.cp.schedule import Exchange, Hop, Mesh, Schedule
from lcbench.cp.verify import net_shifts
from lcbench.kernels.base import Kernel, Prepared, accumulation_dtype, merge, prepare
from lcbench.masks.mask import Mask
from lcbench.problem import Problem


class Groups:
    """Process groups by their ranks, made once per process: creating one is collective and slow."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, mesh: Mesh, dim: str, rank: int) -> dist.ProcessGroup:
        """The group of this rank along a mesh dimension. Collective over all ranks on first use."""
        own = None
        for ranks in mesh.groups(dim):
            key = tuple(ranks)
            if key not in self._groups:
                group = dist.new_group(ranks)
                assert isinstance(group, dist.ProcessGroup) or rank not in ranks
                self._groups[key] = group  # type: ignore[assignment]
            if rank in ranks:
                own = self._groups[key]
        assert own is not None
        return own


@dataclass(frozen=True)
class Saved:
    """What backward needs of forward: tensors as the compute steps saw them, kv stacked as (2, T, Hk, D)."""

    q: torch.Tensor
    kv: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Arrival:
    """A tensor under way."""

    tensor: torch.Tensor
    works: list[dist.Work]

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.tensor


class Executor:
    """One rank's run of a schedule. What depends on the mask alone is prepared here, outside of any timing.

    Attributes:
        bytes_sent: counted where it is sent, since ``forward`` or ``backward`` last began.
        calls: native kernel calls of this rank's forward pass.
        pairs: unmasked pairs that this rank computes, over its share of the query heads.
    """

    def __init__(
        self,
        schedule: Schedule,
        mask: Mask,
        kernel: Kernel,
        problem: Problem,
        *,
        rank: int,
        device: torch.device,
        groups: Groups,
    ) -> None:
        self.schedule, self.problem, self.rank, self.device = schedule, problem, rank, device
        self.bytes_sent = 0
        mesh = schedule.mesh
        moves = [move for step in schedule.steps for move in step.moves]
        dims = {move.dim: None for move in moves if mesh.size(move.dim) > 1}
        # Every rank makes every group, in the same order.
        self._groups = {dim: groups.of(mesh, dim, rank) for dim in dims}
        self._tiles: list[list[Prepared]] = []
        self.pairs = 0
        shares = schedule.head_shares
        q_heads = problem.heads.q // (int(shares.max()) + 1)
        mask = mask.of_heads(int(shares[rank]) * q_heads, q_heads, problem.heads.q)
        self._held: list[int] = []  # tokens of keys and values that this rank holds in each step
        held = schedule.shard_of
        for step in schedule.steps:
            self._held.append(schedule.shards.size(int(held[rank])))
            own = [(q, k) for r, q, k in step.tiles[step.tiles[:, 0] == rank].tolist()]
            masks = [schedule.shards.tile(mask, q, k).merged() for q, k in own]
            self.pairs += sum(tile.pairs(q_heads) for tile in masks)
            self._tiles.append([prepare(kernel, tile, device) for tile in masks if len(tile)])
            for move in step.moves:
                if isinstance(move, Hop):
                    held = held[mesh.source(move.dim, move.shift)]
        self.calls = sum(tile.calls for tiles in self._tiles for tile in tiles)

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """out (T, Hq, D) of this rank's tokens from its q (T, Hq, D) and k, v (T, Hk, D), and what backward needs."""
        self.bytes_sent = 0
        kv = own = torch.stack([k, v])
        partial: tuple[torch.Tensor, torch.Tensor] | None = None
        saved: Saved | None = None
        out = q
        for number, step in enumerate(self.schedule.steps):
            hops = [m for m in step.moves if isinstance(m, Hop)]
            arriving = [self._shift(kv, hop.dim, hop.shift, self._held[number + 1]) for hop in hops]
            for tile in self._tiles[number]:
                part = tile.forward(q, kv[0], kv[1], softmax_scale=self.problem.softmax_scale)
                partial = part if partial is None else merge(partial[0].to(part[1].dtype), partial[1], *part)
            for arrival in arriving:
                kv = arrival.wait()
            for move in step.moves:
                if isinstance(move, Exchange) and move.way == "gather":
                    q, kv = self._gather(q, move.dim), self._gather_kv(kv, move.dim)
                    own = kv
                elif isinstance(move, Exchange):
                    saved = self._save(q, own, partial)
                    out = self._scatter(saved.out, move.dim)
        if saved is None:
            saved = self._save(q, own, partial)
            out = saved.out
        return out, saved

    def _save(self, q: torch.Tensor, kv: torch.Tensor, partial: tuple[torch.Tensor, torch.Tensor] | None) -> Saved:
        if partial is None:  # a rank whose queries see no key at all
            lse = torch.full(q.shape[:2], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
            return Saved(q, kv, torch.zeros_like(q), lse)
        return Saved(q, kv, partial[0].to(q.dtype), partial[1])

    def lse(self, saved: Saved) -> torch.Tensor:
        """LSE (T, Hq) of this rank's own tokens. Collective; apart from ``forward``, since only the check needs it."""
        lse = saved.lse
        for step in self.schedule.steps:
            for move in step.moves:
                if isinstance(move, Exchange) and move.way == "scatter":
                    lse = self._scatter(lse[..., None], move.dim)[..., 0]
        return lse

    # -- backward ------------------------------------------------------------------------------------------------

    def backward(self, dout: torch.Tensor, saved: Saved) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this rank's tokens from its dout (T, Hq, D), in the inputs' type."""
        self.bytes_sent = 0
        steps = self.schedule.steps
        dtype = accumulation_dtype(saved.q.dtype)
        dq = torch.zeros(saved.q.shape, dtype=dtype, device=self.device)
        kv = self._fetch_last(saved.kv)
        dkv = torch.zeros(kv.shape, dtype=dtype, device=self.device)
        returning: Arrival | None = None
        for number in range(len(steps) - 1, -1, -1):
            for move in steps[number].moves:
                if isinstance(move, Exchange) and move.way == "scatter":
                    dout = self._gather(dout, move.dim)
            before = [m for m in steps[number - 1].moves if isinstance(m, Hop)] if number else []
            fetching = self._fetch_previous(kv, saved.kv, number, before)
            grads = [
                tile.backward(dout, saved.q, kv[0], kv[1], saved.out, saved.lse, softmax_scale=self.problem.softmax_scale)
                for tile in self._tiles[number]
            ]
            if returning is not None:
                dkv = returning.wait()
                returning = None
            for tile_dq, dk, dv in grads:
                dq += tile_dq
                dkv[0] += dk
                dkv[1] += dv
            for hop in before:
                returning = self._shift(dkv, hop.dim, -hop.shift, self._held[number - 1])
            kv = fetching.wait()
            for move in steps[number].moves:
                if isinstance(move, Exchange) and move.way == "gather":
                    dq, dkv = self._scatter(dq.to(dout.dtype), move.dim), self._scatter_kv(dkv, move.dim, dout.dtype)
        return dq.to(dout.dtype), dkv[0].to(dout.dtype), dkv[1].to(dout.dtype)

    def _fetch_last(self, kv: torch.Tensor) -> torch.Tensor:
        """The keys and values that this rank held when forward ended, straight from their owner."""
        for dim, shift in net_shifts(self.schedule).items():
            kv = self._shift(kv, dim, shift, self._held[-1]).wait()
        return kv

    def _fetch_previous(self, kv: torch.Tensor, own: torch.Tensor, number: int, hops: list[Hop]) -> Arrival:
        """The keys and values of the step before; the first ones are this rank's own and need no message."""
        first = not any(isinstance(m, Hop) for step in self.schedule.steps[: max(number - 1, 0)] for m in step.moves)
        if not hops:
            return Arrival(kv, [])
        if first:
            return Arrival(own, [])
        (hop,) = hops
        return self._shift(kv, hop.dim, -hop.shift, self._held[number - 1])

    # -- moves ---------------------------------------------------------------------------------------------------

    def _shift(self, x: torch.Tensor, dim: str, shift: int, tokens: int) -> Arrival:
        """Send x (2, T, H, D) along a mesh dimension and receive its like with ``tokens`` tokens; both in one batch."""
        source = self.schedule.mesh.source(dim, shift)
        if source[self.rank] == self.rank:
            return Arrival(x, [])
        (to,) = (source == self.rank).nonzero()[0].tolist()
        received = torch.empty((x.shape[0], tokens, *x.shape[2:]), dtype=x.dtype, device=x.device)
        group = self._groups[dim]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x.contiguous(), to, group),
                dist.P2POp(dist.irecv, received, int(source[self.rank]), group),
            ]
        )
        self.bytes_sent += x.numel() * x.element_size()
        return Arrival(received, works)

    def _gather(self, x: torch.Tensor, dim: str) -> torch.Tensor:
        """(own tokens, H, E) to (tokens of the group, own H / U, E)."""
        sizes = self._group_sizes(dim)
        count = len(sizes)
        if count == 1:
            return x
        tokens, heads, width = x.shape
        sent = x.reshape(tokens, count, heads // count, width).transpose(0, 1).reshape(-1, heads // count, width)
        return self._all_to_all(sent, [tokens] * count, sizes, dim)

    def _scatter(self, x: torch.Tensor, dim: str) -> torch.Tensor:
        """(tokens of the group, own H, E) to (own tokens, U * H, E): the adjoint, and the inverse, of ``_gather``."""
        sizes = self._group_sizes(dim)
        count = len(sizes)
        if count == 1:
            return x
        _, heads, width = x.shape
        tokens = self.schedule.layout.size(self.rank)
        received = self._all_to_all(x.contiguous(), sizes, [tokens] * count, dim)
        return received.view(count, tokens, heads, width).transpose(0, 1).reshape(tokens, count * heads, width)

    def _gather_kv(self, kv: torch.Tensor, dim: str) -> torch.Tensor:
        """(2, own tokens, Hk, D) to (2, tokens of the group, Hk / U or 1, D); fewer heads than ranks are replicated."""
        group, heads = self.schedule.mesh.size(dim), kv.shape[2]
        packed = kv.permute(1, 2, 0, 3).flatten(2)  # (T, Hk, 2D)
        if heads < group:
            packed = packed.repeat_interleave(group // heads, dim=1)
        return self._gather(packed, dim).unflatten(2, (2, -1)).permute(2, 0, 1, 3).contiguous()

    def _scatter_kv(self, dkv: torch.Tensor, dim: str, dtype: torch.dtype) -> torch.Tensor:
        """The adjoint of ``_gather_kv``: gradients of replicas are summed, in the accumulation type."""
        heads = self.problem.heads.kv
        replicated = heads < self.schedule.mesh.size(dim)
        packed = (dkv if replicated else dkv.to(dtype)).permute(1, 2, 0, 3).flatten(2)
        back = self._scatter(packed, dim)
        if replicated:
            back = back.unflatten(1, (heads, -1)).sum(2)
        return back.unflatten(2, (2, -1)).permute(2, 0, 1, 3)

    def _group_sizes(self, dim: str) -> list[int]:
        """Tokens of each rank of this rank's group, in group order."""
        (ranks,) = (ranks for ranks in self.schedule.mesh.groups(dim) if self.rank in ranks)
        return [self.schedule.layout.size(rank) for rank in ranks]

    def _all_to_all(self, sent: torch.Tensor, send: list[int], receive: list[int], dim: str) -> torch.Tensor:
        received = torch.empty((sum(receive), *sent.shape[1:]), dtype=sent.dtype, device=sent.device)
        group = self._groups[dim]
        dist.all_to_all_single(received, sent, receive, send, group=group)
        own = send[dist.get_rank(group)]
        self.bytes_sent += (sent.shape[0] - own) * sent.shape[1] * sent.shape[2] * sent.element_size()
        return received
