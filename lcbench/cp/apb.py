"""APB (arXiv 2502.12085; thunlp/APB, ``ring_flash_attn/lring_flash_attn.py``): Star Attention with a small anchor, and with keys that
ranks pass on.

Of each block of a prompt a selector chooses, for each key/value head by itself, ``passing`` keys that are not in the anchor. They are
all-gathered with their values, 2 of ``passing`` x Hk heads to each other rank: (P-1) passing Hk (D + Dv) b bytes of a prompt, of latent
heads (P-1) passing Hk D b. Rank r puts those of the ranks before it in front of what it is given, so that its queries see passing
keys, anchor and their own block, causally; the anchor's own queries see the anchor alone. After the attention what was passed is
dropped. Requests with a cache are those of Star Attention, exact.

Which keys a pass has seen is in its data: ``APBRun.chosen`` tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.cp.base import Place, Strategy
from lcbench.cp.blocks import OWN, BlockRun, Blocks, refusal, spans
from lcbench.cp.selectors.base import Block, Selector
from lcbench.cp.selectors.oracle import Oracle
from lcbench.kernels.base import Kernel
from lcbench.masks.band import OPEN, BandMask, Ints, TokenSpan
from lcbench.masks.by_head import BandsByHead
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import check_count

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class APB(Strategy):
    """``anchor``: tokens of the anchor; ``passing``: keys of each block and key/value head that are passed on; ``selector``: how they
    are chosen."""

    anchor: int = 4096
    passing: int = 2048
    selector: Selector = field(default_factory=Oracle)

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
        if self.passing > (most := int(_choices(blocks)[blocks.prompts].min(initial=self.passing))):
            return f"passing={self.passing} is more than the {most} keys of a prompt's block beside its anchor"
        return None

    def missing(self) -> str | None:
        return self.selector.missing()

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> APBRun:
        assert isinstance(mask, BandMask)
        return APBRun(problem, mask, kernel, place, Blocks.of(problem, self.anchor), self)


def _choices(blocks: Blocks) -> Ints:
    """Keys that each block has beside the anchor, (requests, P)."""
    found = blocks.sizes.copy()
    found[:, 0] -= blocks.anchors
    return found


class APBRun(BlockRun):
    """A rank's run. What depends on the mask alone is prepared here; keys are chosen in every pass."""

    def __init__(self, problem: Problem, mask: BandMask, kernel: Kernel, place: Place, blocks: Blocks, options: APB) -> None:
        selector = options.selector
        self._passed = np.where(blocks.prompts & (blocks.ranks > 1), options.passing, 0)  # keys of a block, (requests,)
        self._before = place.rank * self._passed  # that arrive from the ranks before, (requests,)
        begin, end = blocks.q_bounds[:-1], blocks.q_bounds[1:]
        last = np.stack([np.maximum(begin, end - selector.asks), end], axis=1)[self._passed > 0]
        asked = [np.arange(*each) for each in last.tolist()]
        super().__init__(problem, mask, kernel, place, blocks, np.concatenate([np.empty(0, dtype=np.int64), *asked]))
        self.negates = selector.odd
        self._scores = selector.start(problem, place.device, self.exchange)
        self._lay_out()
        self._look_at_blocks(mask, asked)

    def _lay_out(self) -> None:
        """Where in the operand what this rank is given lies, and what arrives: request after request, what arrives first."""
        import torch

        lengths = np.diff(self.keys, axis=-1)[..., 0].sum(1)
        ends = np.cumsum(lengths + self._before)
        number = np.repeat(np.arange(len(lengths)), lengths)
        held = np.arange(lengths.sum()) + np.cumsum(self._before)[number]
        starts, count = ends - lengths - self._before, self._passed
        arrives = [
            start + rank * n + np.arange(n)
            for rank in range(self.rank)
            for start, n in zip(starts.tolist(), count.tolist(), strict=True)
        ]
        places = held, np.concatenate([np.empty(0, dtype=np.int64), *arrives])
        self._held_at, self._arrives_at = (torch.from_numpy(x).to(self.device) for x in places)
        self._length = int(ends[-1])

    def _look_at_blocks(self, mask: BandMask, asked: list[Ints]) -> None:
        """Of each prompt: its rows among the queries and the keys that this rank is given, where the last queries lie, what they see."""
        import torch

        sizes = [np.diff(side, axis=-1)[..., 0] for side in (self.queries, self.keys)]
        starts = [np.cumsum(size.ravel()).reshape(size.shape) - size for size in sizes]
        given = np.argsort(self.held.q.tokens, kind="stable")
        self._blocks = []
        for request, last in zip(np.nonzero(self._passed)[0].tolist(), asked, strict=True):
            q, k = (
                slice(int(at[request, OWN]), int(at[request, OWN] + n[request, OWN])) for at, n in zip(starts, sizes, strict=True)
            )
            at = given[np.searchsorted(self.held.q.tokens, last, sorter=given)]
            sees = mask.tile([TokenSpan(int(last[0]), len(last))] if len(last) else [], spans(self.keys[request, OWN]))
            where = torch.from_numpy(at).to(self.device), torch.from_numpy(_dense(sees)).to(self.device)
            self._blocks.append((request, q, k, *where))

    @property
    def communicates(self) -> bool:
        return super().communicates or bool(self._passed.any())

    # -- the operand -----------------------------------------------------------------------------------------------

    def tile(self, tile: BandMask) -> BandMask:
        """Keys of each request move behind those that arrive for it, which its own queries see."""
        if not self._before.any():
            return tile
        sizes = [np.diff(side, axis=-1)[..., 0] for side in (self.queries, self.keys)]
        q_ends, k_ends = (np.cumsum(size.sum(1)) for size in sizes)
        # A band of a tile lies within one stretch of keys.
        shift = np.cumsum(self._before)[np.searchsorted(k_ends, tile.bands[:, 2], side="right")]
        moved = tile.bands + shift[:, None] * np.array([0, 0, 1, 1, 1, 1])
        begin = k_ends - sizes[1].sum(1) + np.cumsum(self._before) - self._before
        rows = [
            q_ends - sizes[0][:, OWN],
            q_ends,
            begin,
            begin + self._before,
            np.full_like(begin, -OPEN),
            np.full_like(begin, OPEN),
        ]
        arrived = np.stack(rows, axis=1)[self._before > 0]
        return BandMask.of(tile.num_q, tile.num_k + int(self._before.sum()), np.concatenate([moved, arrived]))

    def more_pairs(self) -> int:
        return int(np.diff(self.queries[:, OWN], axis=-1)[:, 0] @ self._before)

    def operand(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of the kernel's call, and the tokens that this rank passed on, (keys, Hk). Collective."""
        if not self._blocks:
            return k, v, None
        rows = self._choose(q, k, v, compute=compute)
        arrived = self.exchange.all_gather(self._gathered(rows, k, v))
        if not self.rank:
            return k, v, rows
        arrived = arrived[: self.rank].flatten(0, 1)
        heads = self.problem.heads
        keys = self._laid_out(k, arrived[..., : heads.dim])
        values = keys[..., : heads.v] if heads.latent else self._laid_out(v, arrived[..., heads.dim :])
        return keys, values, rows

    def _choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, compute: bool) -> torch.Tensor:
        """Rows of k that are passed on, block after block, (keys, Hk): those of the highest scores; without ``compute`` the first."""
        import torch

        blocks = [
            Block(q[own_q], k[own_k], v[own_k], q[last], sees, (request, self.rank))
            for request, own_q, own_k, last, sees in self._blocks
        ]  # fmt: skip
        found = []
        scores = self._scores(blocks) if compute else [None] * len(blocks)
        for (request, _, own_k, _, _), score in zip(self._blocks, scores, strict=True):
            begin = own_k.start + (0 if self.rank else int(self.blocks.anchors[request]))
            count = int(self._passed[request])
            if score is None:
                rows = torch.arange(count, device=k.device)[:, None].expand(-1, k.shape[1])
            else:
                rows = torch.topk(score[begin - own_k.start :], count, dim=0).indices
            found.append(rows + begin)
        return torch.cat(found)

    def _gathered(self, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """(keys, Hk, W): key and value of each row and head; of latent heads the key, which has its value in it."""
        import torch

        parts = [
            torch.gather(x, 0, rows[..., None].expand(-1, -1, x.shape[-1])) for x in ([k] if self.problem.heads.latent else [k, v])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _laid_out(self, held: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
        """What this rank is given and what arrived, as the kernel's call has them."""
        found = held.new_empty((self._length, *held.shape[1:]))
        found.index_copy_(0, self._held_at, held)
        return found.index_copy_(0, self._arrives_at, arrived.contiguous())

    # -- what it was -----------------------------------------------------------------------------------------------

    def chosen(self, saved: Any) -> BandsByHead | None:
        """The mask of a pass, of each key/value head. Collective."""
        import torch

        if saved.passed is None:
            return BandsByHead((self._mask,))
        tokens = torch.from_numpy(self.held.kv.tokens).to(self.device)[saved.passed]
        every = self.exchange.told(tokens).cpu().numpy()  # (P, keys, Hk)
        requests = np.repeat(np.arange(len(self._passed)), self._passed)
        shift = (self.blocks.q_bounds - self.blocks.k_bounds)[:-1]
        masks = []
        for head in range(every.shape[-1]):
            parts = [self._mask.bands]
            for rank in range(len(every) - 1):
                # Queries from the next block on see what this one passed on.
                key, first = every[rank, :, head], self.blocks.edges[:, rank + 1] + shift
                bands = [first[requests], self.blocks.q_bounds[1:][requests], key, key + 1]
                parts.append(np.stack([*bands, np.full_like(key, -OPEN), np.full_like(key, OPEN)], axis=1))
            masks.append(BandMask.of(self._mask.num_q, self._mask.num_k, np.concatenate(parts)).merged())
        return BandsByHead(tuple(masks))


def _dense(mask: BandMask) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool (queries, keys), of a tile that is small."""
    at, begin, end = mask.intervals(np.arange(mask.num_q))
    steps = np.zeros((mask.num_q, mask.num_k + 1), dtype=np.int64)
    np.add.at(steps, (at, begin), 1)
    np.add.at(steps, (at, end), -1)
    return np.asarray(steps.cumsum(1)[:, :-1] > 0)
