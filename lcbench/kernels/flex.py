"""FlexAttention (torch.nn.attention.flex_attention): any mask in one call, by a mask function and a BlockMask made from bands.

The operators below the public function are called, since backward has to take the out and LSE of all ranks: each is traced once per
mask. On CUDA it is then compiled by Inductor, which is FlexAttention's fused kernel; on CPU, where Inductor has no backward of
it, the trace runs as it is, which holds every score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lcbench.kernels.base import HALVES, LOG2_E, Kernel, Platform, Prepared, Rounding, Saved, half_on_cuda, heads_first
from lcbench.kernels.naive import too_many_scores
from lcbench.masks.flex import block_mask, mask_lookup
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.base import Gradients, OutLse

OPTIONS = {
    "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False,
}  # fmt: skip


@dataclass(frozen=True)
class Flex(Kernel):
    """FlexAttention on static masks: half types and float32 on CUDA, any type on CPU; softcaps."""

    softcaps: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("triton",)  # what Inductor compiles it with

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return flex_limits(problem, platform)

    def holds_scores(self, platform: Platform) -> bool:
        return platform.type == "cpu"  # where it is not compiled

    def rounding(self, platform: Platform) -> Rounding:
        return Rounding(scores=platform.type == "cpu")  # where it is not compiled

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return PreparedFlex(mask, heads, device)


def flex_limits(problem: Problem, platform: Platform) -> str | None:
    """Why FlexAttention does not run a problem on a platform, or None."""
    if platform.type != "cuda":
        return too_many_scores(problem, platform)
    return half_on_cuda(problem, platform, "FlexAttention", dtypes=(*HALVES, "float32"))


@dataclass
class PreparedFlex:
    """A mask as a BlockMask. Each direction is traced, and on CUDA compiled, at its first pass with a scale and a softcap."""

    mask: Mask
    heads: Heads
    device: torch.device
    calls: int = 1
    _compiled: dict[tuple[str, float, float], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self._lookup, self._tables = mask_lookup(self.mask, self.device, self.heads.q)
        whole = block_mask(self.mask, self.device, self.heads.q, mod=self._lookup).as_tuple()
        # The mask function is last; it is given anew with its tables as arguments, which a trace needs.
        self._blocks = whole[:-1]
        self._block_tensors = [x for x in self._blocks if isinstance(x, torch.Tensor)]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, softcap: float = 0.0) -> OutLse:
        out, lse = self._run("forward", softmax_scale, softcap, *(heads_first(x) for x in (q, k, v)))
        return out[0].transpose(0, 1), (lse[0].T / LOG2_E).contiguous()

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float, softcap: float = 0.0) -> Gradients:
        q, k, v, out, lse = saved
        log2 = (lse.T * LOG2_E)[None].contiguous()
        given = [heads_first(x) for x in (q, k, v, out.to(q.dtype))]
        grads = self._run("backward", softmax_scale, softcap, *given, log2, heads_first(dout))
        dq, dk, dv = (grad[0].transpose(0, 1) for grad in grads)
        return dq, dk, dv

    def _run(self, direction: str, scale: float, softcap: float, *inputs: torch.Tensor) -> Any:
        arguments = [*inputs, *self._block_tensors, *self._tables]
        key = direction, scale, softcap
        if key not in self._compiled:
            self._compiled[key] = self._trace(direction, scale, softcap, arguments)
        return self._compiled[key](*arguments)

    def _trace(self, direction: str, scale: float, softcap: float, arguments: list[torch.Tensor]) -> Callable[..., Any]:
        from torch.fx.experimental.proxy_tensor import make_fx

        count = {"forward": 3, "backward": 6}[direction]
        run = _forward if direction == "forward" else _backward
        score = partial(_capped, softcap) if softcap else _same

        def flat(*tensors: torch.Tensor) -> Any:
            inputs, rest = tensors[:count], iter(tensors[count:])
            blocks = tuple(next(rest) if x is not None and not isinstance(x, int) else x for x in self._blocks)
            return run(inputs, (*blocks, self._lookup), tuple(rest), score, scale)

        graph: Callable[..., Any] = make_fx(flat, tracing_mode="fake")(*arguments)
        if self.device.type != "cuda":
            return graph
        import torch

        compiled: Callable[..., Any] = torch._inductor.compile(graph, arguments)  # type: ignore[arg-type]
        return compiled


def _forward(
    inputs: tuple[torch.Tensor, ...], blocks: tuple[Any, ...], tables: tuple[torch.Tensor, ...], score: Callable[..., Any],
    scale: float,
) -> Any:  # fmt: skip
    """(out, LSE in powers of two)."""
    from torch._higher_order_ops.flex_attention import flex_attention

    q, k, v = inputs
    out, lse, *_ = flex_attention(q, k, v, score, blocks, scale, OPTIONS, (), tables)
    return out, lse


def _backward(
    inputs: tuple[torch.Tensor, ...], blocks: tuple[Any, ...], tables: tuple[torch.Tensor, ...], score: Callable[..., Any],
    scale: float,
) -> Any:  # fmt: skip
    import torch
    from torch._higher_order_ops.flex_attention import create_fw_bw_graph, flex_attention_backward
    from torch.fx import GraphModule

    q, k, v, out, lse, dout = inputs
    at = q.new_zeros((), dtype=torch.int)
    forward, joint = create_fw_bw_graph(score, (q.new_zeros((), requires_grad=True), at, at, at, at), ())
    dq, dk, dv, _ = flex_attention_backward(
        q, k, v, out, lse, dout, torch.zeros_like(lse), forward, cast(GraphModule, joint), blocks, scale, OPTIONS, (), tables
    )
    return dq, dk, dv


def _capped(softcap: float, score: Any, batch: Any, head: Any, q: Any, k: Any) -> Any:
    import torch

    return softcap * torch.tanh(score / softcap)


def _same(score: Any, batch: Any, head: Any, q: Any, k: Any) -> Any:
    return score
