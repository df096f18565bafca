# mypy: disable-error-code="call-arg, arg-type, assignment, no-untyped-call"
"""A stand-in for flash-linear-attention (fla-core 0.6.0): its chunked gated linear attention and gated delta rule."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lcbench.kernels.linear import Rule, Tokens
from lcbench.testing.fake_libraries.common import Tensor, modules_of, sums
from lcbench.testing.recurrence import recurrence, recurrence_backward


class Chunk(torch.autograd.Function):
    """The library's function of torch: what it saves is its inputs, and its backward works the rest out again."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, scale: float, state: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(state, *given)
        ctx.rule, ctx.scale = rule, scale
        out, end = recurrence(rule, Tokens(*(part[0] for part in given)), scale=scale, state=state[0])
        return out.to(given[0].dtype)[None], end.to(sums(given[0].dtype))[None]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dend: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        state, *given = ctx.saved_tensors
        assert dout.dtype == given[0].dtype
        assert dend.dtype == state.dtype
        tokens = Tokens(*(part[0] for part in given))
        grads, begin = recurrence_backward(ctx.rule, tokens, dout[0], scale=ctx.scale, state=state[0], dstate=dend[0])
        return (
            None,
            None,
            begin.to(state.dtype)[None],
            *(g.to(x.dtype)[None] for g, x in zip(grads, given, strict=False) if g is not None),
        )


def run(rule: Rule, scale: float | None, initial_state: Tensor | None, output_final_state: bool, *given: Tensor) -> tuple[Any, Any]:
    """Both functions, behind the checks that each has of its own."""
    q, _, v = given[:3]
    assert len(q) == 1, "several sequences come by cu_seqlens"
    assert q.shape[1], "an empty grid of programs"
    assert {x.dtype for x in given[:3]} == {q.dtype}, "dots take one type"
    assert len({x.device for x in given}) == 1
    assert q.shape[-1] <= 256
    state = q.new_zeros(1, q.shape[2], q.shape[3], v.shape[3], dtype=sums(q.dtype)) if initial_state is None else initial_state
    assert state.shape == (1, q.shape[2], q.shape[3], v.shape[3]), "a state of each head, keys first"
    out, end = Chunk.apply(rule, q.shape[-1] ** -0.5 if scale is None else scale, state, *given)
    return out, end if output_final_state else None


def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: int | None = None, initial_state: Tensor = None,
    output_final_state: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert not state_v_first
    assert cu_seqlens is cu_seqlens_cpu is None
    if initial_state is not None:
        assert initial_state.dtype == sums(q.dtype), "initial_state must be in float32."
    assert q.shape == k.shape == g.shape, "q, k, g must have the same shape."
    assert v.shape == (*q.shape[:3], v.shape[-1]), "v must be of shape (batch size, seq len, num of head, head dim)."
    return run("gla", scale, initial_state, output_final_state, q, k, v, g)


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None, cp_context: Any = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert not any((use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, kwargs))
    assert cu_seqlens is cu_seqlens_cpu is chunk_indices is cp_context is None
    assert q.shape == k.shape, "more value heads than heads of queries and keys are another model's"
    assert v.shape[:3] == q.shape[:3]
    assert g.shape == beta.shape == v.shape[:3], "a number of each token and head"
    if initial_state is not None:
        assert initial_state.dtype == sums(q.dtype)
    return run("gated_delta_rule", scale, initial_state, output_final_state, q, k, v, g, beta)


def modules(version: str = "0.6.0") -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    found = modules_of("fla.ops.gla", chunk_gla)
    found |= {
        name: found.get(name, module) for name, module in modules_of("fla.ops.gated_delta_rule", chunk_gated_delta_rule).items()
    }
    found["fla"].__version__ = version  # type: ignore[attr-defined]
    return found
