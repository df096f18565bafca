"""MEMO's token-wise recomputation and swapping (arXiv 2407.12117).

Of each layer its input and the results of its attention go to the host's memory. Of every other tensor that it saves the first
tokens do too, as many as ``fraction`` says; backward computes those of the other tokens again, by the halves of the layer that
treat each token alone, from these tokens' rows of the input and of the results. An attention is never computed again, and what its
strategy keeps in buffers goes to the host with its results.

The fraction that nobody gave is the largest with which the transfers of a layer take no longer than its forward, and those of all
layers fit the hosts' memory: the paper's linear program, with times that are measured here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lcbench.workloads.recompute.base import Again
from lcbench.workloads.recompute.sizes import Held, LayerBytes, rows_of
from lcbench.workloads.recompute.swapping import Swapping

if TYPE_CHECKING:
    import torch

    from lcbench.cp.base import RankRun
    from lcbench.workloads.recompute.swap import Pass, Shelf
    from lcbench.workloads.transformer import Layer, Rope, Stack


@dataclass(frozen=True)
class TokenWise(Swapping):
    """Options of it.

    Attributes:
        fraction: of the tokens, whose saved tensors go to the host; None: from the linear program.

    Raises:
        ValueError: a fraction that is no share.
    """

    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"recompute.fraction={self.fraction} is not from 0 to 1")

    def layer(self, under_way: Pass, layer: Layer, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        assert self.fraction is not None  # as of ``settled``
        shelf, run, cut = under_way.layer(), layer.attention.run, rows_of(self.fraction, len(x))
        inputs = len(run.inputs(*[x.new_empty(0, 1, 1)] * 3))
        begin = under_way.put(shelf, x, len(x)) if cut < len(x) else None
        y, out = under_way.halves(
            shelf, layer, x, rope, lambda saved, _: cut if len(saved) == len(x) and saved.ndim > 1 else None,
            lambda saved, number: cut if number < inputs else len(saved), again=True,
        )  # fmt: skip
        if begin is not None:
            end = shelf.find(out)
            assert end is not None
            shelf.again = {
                "before": partial(_before, layer=layer, rope=rope, run=run, x=begin, cut=cut),
                "after": partial(_after, layer=layer, x=begin, out=end, cut=cut),
            }
        return y

    def settled(self, stack: Stack, x: torch.Tensor, layers: int) -> tuple[Swapping, dict[str, Any]]:
        if self.fraction is not None:
            return self, {"token_wise_fraction": self.fraction}
        from lcbench.workloads.recompute.fraction import measured  # with torch and scipy, which planning does without

        always, whole = (replace(self, fraction=share).moved_by_layer(stack, x) for share in (0.0, 1.0))
        found = measured(stack, x, layers, always, whole)
        return replace(self, fraction=found.fraction), {"token_wise_fraction": found.fraction, "token_wise": asdict(found)}

    def foreseen(self, layer: LayerBytes, hides: float) -> TokenWise:
        """The fraction of the linear program, in closed form, if the host has room for it."""
        if self.fraction is not None:
            return self
        always, whole = (replace(self, fraction=share).kept(layer).host for share in (0.0, 1.0))
        return replace(self, fraction=min(1.0, max(0.0, (hides - always) / max(1, whole - always))))

    def unsettled(self) -> str | None:
        return "recompute.fraction" if self.fraction is None else None

    def again(self) -> Again:
        return Again(token_wise=1 - (self.fraction or 0.0))

    def kept(self, layer: LayerBytes) -> Held:
        assert self.fraction is not None  # as of ``settled``
        cut = rows_of(self.fraction, layer.x.rows)
        again = cut < layer.x.rows
        x = layer.x.bytes if again or layer.saves_x else 0
        stored = x + layer.before.bytes + layer.after.bytes + layer.results + sum(layer.buffers)
        host = x + layer.results + sum(layer.buffers) + cut * (layer.before.row_bytes + layer.after.row_bytes)
        return Held(0, host, working=2 * stored, passing=2 * stored, buffered=True)


def _before(shelf: Shelf, *, layer: Layer, rope: Rope, run: RankRun, x: int, cut: int) -> None:
    """Rows of what the first half saves, and of the attention's inputs."""
    from lcbench.workloads.recompute.swap import fill_by

    cos, sin = rope
    rows = shelf.rows(x, cut)
    found = fill_by(shelf, "before", lambda rows: layer.before(rows, (cos[cut:], sin[cut:])), rows, whole=True)
    for index, tensor in zip(shelf.parts["attention"], run.inputs(*(each.detach() for each in found)), strict=False):
        shelf.fill(index, tensor)


def _after(shelf: Shelf, *, layer: Layer, x: int, out: int, cut: int) -> None:
    from lcbench.workloads.recompute.swap import fill_by

    fill_by(shelf, "after", layer.after, shelf.rows(x, cut), shelf.rows(out, cut), whole=False)
