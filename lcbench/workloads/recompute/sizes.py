"""Bytes of what is kept between forward and backward, and of the peak of a step. No torch, so that plans and predictions use it.

What a layer saves is what its modules of ``lcbench.workloads.transformer`` give autograd to save, each tensor once. Tests count it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcbench.problem import itemsize
from lcbench.workloads.models import Model


def rows_of(share: float, rows: int) -> int:
    """How many rows a share of them is."""
    return round(share * rows)


@dataclass(frozen=True)
class Rows:
    """A tensor by rows, which may be moved apart."""

    rows: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class LayerBytes:
    """What autograd saves of a layer on one rank.

    Attributes:
        x: its input. saves_x: whether it is among what is saved: where a norm saves a wider copy, it is not. token_wise: what else
        the halves save, and q, k and v: all of them together, by token. attention: the results of the attention, out and LSE of own
        tokens first, then those of other ranks' that were computed here alone. buffers: bytes of each buffer of the strategy that
        backward needs.
    """

    x: Rows
    saves_x: bool
    before: Rows
    after: Rows
    attention: tuple[Rows, ...]
    buffers: tuple[int, ...] = ()

    @property
    def results(self) -> int:
        return sum(each.bytes for each in self.attention)

    @property
    def all(self) -> int:
        """Everything."""
        return self.saves_x * self.x.bytes + self.before.bytes + self.after.bytes + self.results + sum(self.buffers)

    def share(self, share: float) -> int:
        """As many bytes as the first rows of each tensor have."""
        return sum(rows_of(share, each.rows) * each.row_bytes for each in self.tensors())

    def tensors(self) -> list[Rows]:
        """All that is saved; what else a half saves is one."""
        return [*[self.x] * self.saves_x, self.before, self.after, *self.attention, *(Rows(size, 1) for size in self.buffers)]


@dataclass(frozen=True)
class Held:
    """What a policy has of a layer's tensors in memory, in bytes.

    Attributes:
        device: on the device between forward and backward.
        host: in the host's memory between forward and backward.
        working: on the device besides, while the layer's MLP is in backward.
        attending: on the device besides, while its attention is, where that is more.
        passing: on the device besides, when the last layer's forward ends.
        inputs: of ``device``, what is the layer's input itself.
        buffered: whether ``working`` is there to the end of the layer's backward, not only until each tensor has been used.
    """

    device: int
    host: int = 0
    working: int = 0
    attending: int = 0
    passing: int = 0
    inputs: int = 0
    buffered: bool = False


def layer_bytes(
    model: Model,
    tokens: int,
    dtype: str,
    *,
    fused_norms: bool,
    finals: Sequence[tuple[int, int]] = (),
    buffers: Sequence[int] = (),
) -> LayerBytes:
    """What a layer saves.

    Args:
        model: heads and ``ffn`` as this rank has them. tokens: T, of this rank. fused_norms: whether RMSNorm is one kernel, as on
        CUDA, which saves one number a row besides its input. On CPU it is made of several operations, of which some save copies in
        float32. finals: tokens and heads of each result that this rank computes for others. buffers: bytes of each buffer of the
        strategy that lives from forward to backward.
    """
    size = itemsize(dtype)
    wide = max(size, 4)
    direct = fused_norms or size == wide

    def norm(width: int, count: int) -> int:
        """A norm of ``count`` stretches: its input, where that is saved as a wider copy, and what it computes."""
        copies = 0 if fused_norms else width * wide
        return count * (wide + copies + (0 if direct else width * wide))

    heads, hidden = model.heads(), model.hidden
    q, kv = heads.q * heads.dim, heads.kv * heads.dim
    normed = norm(heads.dim, heads.q + heads.kv) + direct * (q + kv) * size if model.qk_norm else 0
    before = norm(hidden, 1) + hidden * size + normed
    after = direct * hidden * size + norm(hidden, 1) + hidden * size + 4 * model.ffn * size
    results = [(tokens, heads.q), *finals]
    return LayerBytes(
        Rows(tokens, hidden * size), direct, Rows(tokens, before + (q + 2 * kv) * size), Rows(tokens, after),
        tuple(Rows(rows, own * each) for rows, own in results for each in (heads.dim * size, wide)), tuple(buffers),
    )  # fmt: skip


def step_peak(
    model: Model,
    layer: LayerBytes,
    kept: Callable[[LayerBytes], Held],
    *,
    layers: int,
    dtype: str,
    loss_chunk: int,
    shards: int = 1,
) -> int:
    """Peak of a step's memory on the device above what is there between steps: weights, the first layer's input and buffers.
    Without an optimizer, and without the attention's own room, which is its kernel's and its strategy's.

    It is reached in the MLP of the last layer's backward, in that of the first one's (when the weights of all others have their
    gradients), in the last attention's backward, or in the head.

    Args:
        shards: ranks that weights and gradients are sharded over. The head is whole on each from its forward on, and so is what is
        at work of the layers: two halves, and the gradients of one, which are summed in float32 or wider.
    """
    held, size = kept(layer), itemsize(dtype)
    tokens, y = layer.x.rows, layer.x.bytes
    head = model.head_parameters()
    every = layers * held.device - held.inputs + 2 * y  # with y and its gradient, which last to the end of backward
    in_head = every + held.passing + head_bytes(model, dtype, min(tokens, loss_chunk)) + head * size
    # Gradients of down's output and input, gate and up; down's input is not needed any more then.
    gradients = tokens * size * (model.hidden + (3 if held.buffered else 2) * model.ffn)
    weights, down = model.layer_parameters() * size, model.ffn * model.hidden * size
    last = every + held.working + gradients + down
    first = last - (layers - 1) * (held.device - weights // shards)
    heads = model.heads()
    in_attention = every + held.attending + tokens * size * (model.hidden + 2 * (heads.q + heads.kv) * heads.dim)
    whole = 0 if shards == 1 else weights + weights // size * max(size, 4) // 2
    in_backward = max(first, last, in_attention * bool(held.attending)) + head * size // shards + whole
    return max(in_head + (shards > 1) * head * size, in_backward)


def head_bytes(model: Model, dtype: str, loss_rows: int) -> int:
    """What the head takes while it runs, besides the gradients that it leaves: their sums in float32 or wider, and of ``loss_rows``
    tokens at once their logits, those and their logarithms in the wider type with a gradient of each, and the logits' own."""
    size = itemsize(dtype)
    wide = max(size, 4)
    return model.head_parameters() * wide + loss_rows * model.vocab * (4 * wide + (wide > size) * size)
