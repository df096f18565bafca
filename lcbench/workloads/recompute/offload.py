"""Activations in the host's memory between forward and backward.

Of ``activations`` each tensor that a layer saves goes there, or the share ``ratio`` of its tokens, and nothing is computed again
(ByteScale, arXiv 2502.21231; where it counts on two layers' tensors staying on the device, all layers are alike here, since the few
that are measured stand for all). Of ``checkpoints`` the layers' inputs go there, and backward runs the layers again (DeepSpeed's
activation checkpointing with ``cpu_checkpointing``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lcbench.cp.base import RankRun
from lcbench.workloads.recompute.base import Again, recomputed
from lcbench.workloads.recompute.sizes import Held, LayerBytes, rows_of
from lcbench.workloads.recompute.swapping import Swapping

if TYPE_CHECKING:
    import torch

    from lcbench.workloads.recompute.swap import Pass
    from lcbench.workloads.transformer import Layer, Rope

What = Literal["activations", "checkpoints"]


@dataclass(frozen=True)
class Offload(Swapping):
    """Options of it.

    Attributes:
        ratio: share that goes to the host.
        what: all ``activations``, or the inputs of layers, ``checkpoints``.

    Raises:
        ValueError: another ``what``, or a ratio that is no share.
    """

    ratio: float = 1.0
    what: What = "activations"

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise ValueError(f"recompute.what={self.what} is none of {', '.join(get_args(What))}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"recompute.ratio={self.ratio} is not from 0 to 1")

    def layer(self, under_way: Pass, layer: Layer, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        shelf = under_way.layer()

        def rows(saved: torch.Tensor, _: int) -> int | None:
            return rows_of(self.ratio, len(saved)) or None

        def input_rows(saved: torch.Tensor, number: int) -> int | None:
            return rows(saved, number) if saved.data_ptr() == x.data_ptr() else None

        if self.what == "activations":
            return under_way.halves(shelf, layer, x, rope, rows, rows)[0]
        with under_way.saving(shelf, "layer", input_rows):
            y: torch.Tensor = recomputed(layer, x, rope)
            return y

    def refuses(self, run: RankRun) -> str | None:
        return super().refuses(run) if self.what == "activations" else None

    def again(self) -> Again:
        return Again(1.0, 1.0) if self.what == "checkpoints" else Again()

    def kept(self, layer: LayerBytes) -> Held:
        if self.what == "checkpoints":
            moved = rows_of(self.ratio, layer.x.rows) * layer.x.row_bytes
            stays, buffers = layer.x.bytes - moved, 2 * layer.x.bytes
            again = layer.all - layer.saves_x * layer.x.bytes
            if not moved:
                return Held(stays, working=again, inputs=stays)
            return Held(stays, moved, working=again + buffers - stays, passing=buffers)
        moved = layer.share(self.ratio)
        if not moved:
            return Held(layer.all, inputs=layer.saves_x * layer.x.bytes)
        buffers = 2 * sum(each.bytes for each in layer.tensors() if rows_of(self.ratio, each.rows))
        stays = layer.all - moved
        return Held(stays, moved, working=buffers - stays, passing=buffers, buffered=True)
