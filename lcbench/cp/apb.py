"""APB: Star Attention with a small anchor, and with keys that blocks pass on (arXiv 2502.12085; thunlp/APB).

Of each block of a prompt a compressor chooses ``passing`` keys that are not in the anchor, for each key/value head by itself. They
are all-gathered with their values: (P-1) passing Hk (D + Dv) b bytes of a prompt, of latent heads (P-1) passing Hk D b. Rank r puts
those of the ranks before it in front of what it is given: its queries see passing keys, anchor and their own block, causally, and
the anchor's own queries see the anchor alone (``ring_flash_attn/lring_flash_attn.py`` there). What was passed on is dropped after
the attention. Requests with a cache are those of Star Attention, exact.

Which keys a pass saw depends on its data: ``APBRun.chosen`` tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcbench.cp.base import Place, Strategy
from lcbench.cp.blocks import OWN, Answer, BlockRun, Blocks, lengths, refusal, spans
from lcbench.cp.compressors.base import Block, Compressor
from lcbench.cp.compressors.oracle import Oracle
from lcbench.kernels.base import Kernel
from lcbench.masks.band import OPEN, BandMask, Ints, TokenSpan, spread
from lcbench.masks.by_head import BandsByHead
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class APB(Strategy):
    """``anchor``: its tokens; ``passing``: keys of each block and key/value head that are passed on; ``compressor``: which ones."""

    anchor: int = 4096
    passing: int = 2048
    compressor: Compressor = field(default_factory=Oracle)

    def __post_init__(self) -> None:
        check_count("anchor", self.anchor)
        check_count("passing", self.passing)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        refused = refusal(problem, mask, self.anchor)
        if refused is not None or problem.scale.world_size == 1:
            return refused
        assert isinstance(mask, BandMask)
        blocks = Blocks.of(problem, self.anchor)
        if blocks.hides(mask):
            return "needs a mask by which a prompt's queries see all keys before their block, such as causal"
        beside = blocks.sizes[blocks.prompts]
        beside[:, 0] -= self.anchor
        if self.passing > (most := int(beside.min(initial=self.passing))):
            return f"passing={self.passing} is more than the {most} keys of a prompt's block beside its anchor"
        return None

    def approximates(self, problem: Problem, mask: Mask) -> bool:
        blocks = Blocks.of(problem, self.anchor)
        return blocks.ranks > 1 and bool(blocks.prompts.any())

    def missing(self) -> str | None:
        return self.compressor.missing()

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> APBRun:
        assert isinstance(mask, BandMask)
        return APBRun(problem, mask, kernel, place, Blocks.of(problem, self.anchor), self)


class Prompt(NamedTuple):
    """Of a prompt: rows of this rank's block among the queries and keys that it is given, rows of the last queries, and which keys
    of the block these see, bool (last, keys)."""

    number: int
    q: slice
    k: slice
    last: torch.Tensor
    sees: torch.Tensor


class APBRun(BlockRun):
    """A rank's run. What depends on the mask alone is prepared here; keys are chosen in every pass."""

    def __init__(self, problem: Problem, mask: BandMask, kernel: Kernel, place: Place, blocks: Blocks, options: APB) -> None:
        compressor = options.compressor
        # By request: keys that a block passes on, and keys that arrive here from the blocks before.
        self._passing = np.where(blocks.prompts & (blocks.ranks > 1), options.passing, 0)
        self._arriving = place.rank * self._passing
        begin, end = blocks.q_bounds[:-1], blocks.q_bounds[1:]
        last = np.stack([np.maximum(begin, end - compressor.asks), end], axis=1)[self._passing > 0]
        super().__init__(problem, mask, kernel, place, blocks, spread(*last.T)[1])
        self.negates = compressor.odd
        self._scores = compressor.start(problem, place.device, self.exchange)
        self._lay_out()
        self._prompts = self._look(mask, last)

    def _lay_out(self) -> None:
        """Where in the kernel's operand lies what this rank is given, and what arrives: request by request, what arrives first."""
        given = lengths(self.keys).sum(1)
        ends = np.cumsum(given + self._arriving)
        number, row = spread(np.zeros_like(given), given)
        held = row + (ends - given)[number]
        # What arrives is in order of ranks, and of each in order of requests.
        number, row = spread(np.zeros_like(given), self._passing)
        starts, rank = (ends - given - self._arriving)[number], np.arange(self.rank)[:, None]
        arriving = starts + rank * self._passing[number] + row
        self._held_at, self._arriving_at, self._length = self._index(held), self._index(arriving.ravel()), int(ends[-1])

    def _index(self, values: NDArray[Any]) -> torch.Tensor:
        import torch

        return torch.from_numpy(values).to(self.device)

    def _look(self, mask: BandMask, last: Ints) -> list[Prompt]:
        """The prompts; ``last``: the stretch of last queries of each."""
        sides = self.queries, self.keys
        q_end, k_end = (np.cumsum(lengths(side).sum(1)) for side in sides)
        q_size, k_size = (lengths(side)[:, OWN] for side in sides)
        order, found = np.argsort(self.held.q.tokens, kind="stable"), []
        for number, (begin, end) in zip(np.nonzero(self._passing)[0].tolist(), last.tolist(), strict=True):
            q, k = (slice(int(stop[number] - size[number]), int(stop[number])) for stop, size in ((q_end, q_size), (k_end, k_size)))
            at = order[np.searchsorted(self.held.q.tokens, np.arange(begin, end), sorter=order)]
            sees = mask.tile([TokenSpan(begin, end - begin)], spans(self.keys[number, OWN]))
            found.append(Prompt(number, q, k, self._index(at), self._index(_dense(sees))))
        return found

    @property
    def communicates(self) -> bool:
        return super().communicates or bool(self._prompts)

    # -- the kernel's call -----------------------------------------------------------------------------------------

    def tile(self, tile: BandMask) -> BandMask:
        """Keys of each request move behind those that arrive for it, which the queries of its own block see."""
        q_end, k_end = (np.cumsum(lengths(side).sum(1)) for side in (self.queries, self.keys))
        behind = np.cumsum(self._arriving)
        shift = behind[np.searchsorted(k_end, tile.bands[:, 2], side="right")]  # a band lies within one request
        moved = tile.bands + shift[:, None] * np.array([0, 0, 1, 1, 1, 1])
        begin = k_end - lengths(self.keys).sum(1) + behind - self._arriving
        arriving = _rectangles(q_end - lengths(self.queries)[:, OWN], q_end, begin, begin + self._arriving)
        return BandMask.of(tile.num_q, tile.num_k + int(behind[-1]), np.concatenate([moved, arriving]))

    def more_pairs(self) -> int:
        return int(lengths(self.queries)[:, OWN] @ self._arriving)

    def operand(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of the kernel's call, and the rows of k that this rank passes on, (keys, Hk). Collective."""
        if not self._prompts:
            return k, v, None
        import torch

        heads = self.problem.heads
        rows = self._chosen_rows(q, k, v, compute=compute)
        parts = [torch.gather(x, 0, rows[..., None].expand(-1, -1, x.shape[-1])) for x in ((k,) if heads.latent else (k, v))]
        arrived = self.exchange.all_gather(torch.cat(parts, -1))[: self.rank].flatten(0, 1)
        if not self.rank:
            return k, v, rows
        keys = self._laid_out(k, arrived[..., : heads.dim])
        return keys, keys[..., : heads.v] if heads.latent else self._laid_out(v, arrived[..., heads.dim :]), rows

    def _chosen_rows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool) -> torch.Tensor:
        """Rows of k, prompt after prompt, (keys, Hk): those of the highest scores; without ``compute`` the first of each block."""
        import torch

        blocks = [Block(q[x.q], k[x.k], v[x.k], q[x.last], x.sees, (x.number, self.rank)) for x in self._prompts]
        scores = self._scores(blocks) if compute else [-torch.arange(len(x.k), device=k.device)[:, None] for x in blocks]
        found = []
        for prompt, score in zip(self._prompts, scores, strict=True):
            anchor = 0 if self.rank else int(self.blocks.anchors[prompt.number])
            best = torch.topk(score[anchor:], int(self._passing[prompt.number]), dim=0).indices
            found.append((best + (prompt.k.start + anchor)).expand(-1, k.shape[1]))
        return torch.cat(found)

    def _laid_out(self, held: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
        """What this rank is given and what arrived, as the kernel's call has them."""
        found = held.new_empty((self._length, *held.shape[1:]))
        return found.index_copy_(0, self._held_at, held).index_copy_(0, self._arriving_at, arrived.contiguous())

    # -- what a pass was -------------------------------------------------------------------------------------------

    def chosen(self, saved: Answer) -> BandsByHead:
        """The mask of a pass, of each key/value head, or of all where nothing is passed on. Collective."""
        if saved.passed is None:
            return BandsByHead((self.computed,))
        every = self.exchange.told(self._index(self.held.kv.tokens)[saved.passed]).cpu().numpy()  # (P, keys, Hk)
        number = np.repeat(np.arange(len(self._passing)), self._passing)
        # Queries of the blocks after a key's own see it.
        first = self.blocks.edges[:, 1:-1] + (self.blocks.q_bounds - self.blocks.k_bounds)[:-1, None]
        begin, end = first.T[:, number].ravel(), np.tile(self.blocks.q_bounds[1:][number], len(every) - 1)
        masks = []
        for keys in np.moveaxis(every[:-1], -1, 0).reshape(every.shape[-1], -1):
            bands = np.concatenate([self.computed.bands, _rectangles(begin, end, keys, keys + 1)])
            masks.append(BandMask.of(self.computed.num_q, self.computed.num_k, bands).merged())
        return BandsByHead(tuple(masks))


def _rectangles(q0: Ints, q1: Ints, k0: Ints, k1: Ints) -> Ints:
    """Bands that are whole rectangles."""
    return np.stack([q0, q1, k0, k1, np.full_like(q0, -OPEN), np.full_like(q0, OPEN)], axis=1)


def _dense(mask: BandMask) -> NDArray[np.bool_]:
    """bool (queries, keys) of a small tile."""
    at, begin, end = mask.intervals(np.arange(mask.num_q))
    steps = np.zeros((mask.num_q, mask.num_k + 1), dtype=np.int64)
    np.add.at(steps, (at, begin), 1)
    np.add.at(steps, (at, end), -1)
    return np.asarray(steps.cumsum(1)[:, :-1] > 0)
