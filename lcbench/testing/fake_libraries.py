# mypy: disable-error-code="call-arg, arg-type"
"""Stand-ins for GPU libraries, for tests without a GPU: each library's low-level signature and conventions, on dense attention.

They are as strict as the libraries: layouts, strides and alignment, types and devices of every tensor, argument names, order and
defaults, LSE bases, what a window's bound means, what empty rows give, known defects included. Where a library reads raw pointers,
a stand-in refuses what does not lie as the library assumes. Inputs may be float64, which no library takes, so that results can be
compared exactly; statistics are then float64 too. A test puts them into ``sys.modules`` and runs our adapters on CPU tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor
OPEN = 1 << 40
LN2 = math.log(2)


def sums(dtype: torch.dtype) -> torch.dtype:
    """What a library computes in, and the type of its LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (T, H, D) in the type of q and LSE (H, T), natural, -inf for empty rows; ``allowed`` (T, Tk) or (H, T, Tk)."""
    keys, values = (x.to(sums(q.dtype)).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q.to(keys.dtype), keys) * scale).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype), lse


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from any out and LSE (H, T), in the type of q; infinite LSE makes a row's weights 0, as in the libraries."""
    kind, group = q.dtype, q.shape[1] // k.shape[1]
    dout, q, k, v, out = (x.to(sums(kind)) for x in (dout, q, k, v, out))
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, keys) * scale).masked_fill(~allowed, -torch.inf)
    weights = torch.exp(scores - torch.where(lse.isinf(), torch.inf, lse)[..., None])
    delta = (dout * out).sum(-1).T[..., None]
    ds = weights * (torch.einsum("qhd,khd->hqk", dout, values) - delta) * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", weights, dout)
    dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(2) for x in (dk, dv))
    return torch.einsum("hqk,khd->qhd", ds, keys).to(kind), dk.to(kind), dv.to(kind)


def sequences(cu_q: Tensor, cu_k: Tensor, tokens: tuple[int, int], left: int, right: int) -> Tensor:
    """(Tq, Tk) of sequences with a window, bottom right aligned: ``i + lk - lq - left <= j <= i + lk - lq + right``."""
    table(cu_q, cu_k)
    assert len(cu_q) == len(cu_k)
    assert (int(cu_q[0]), int(cu_k[0])) == (0, 0)
    assert all(int(cu.diff().min()) >= 0 for cu in (cu_q, cu_k)), "offsets do not fall"
    allowed = torch.zeros(tokens, dtype=torch.bool)
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    for q0, q1, k0, k1 in ends:
        at = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0 - (q1 - q0))
        allowed[q0:q1, k0:k1] = (-left <= at) & (at <= right)
    assert cu_q[-1] == tokens[0]
    assert cu_k[-1] == tokens[1]
    return allowed


def longest(cu: Tensor) -> int:
    return int(cu.diff().max())


def whole(*tensors: Tensor) -> None:
    """Queries, keys and the like: one type and device, heads whole in memory, everything at multiples of 16 bytes."""
    for x in tensors:
        assert x.stride(-1) == 1, "the last dimension must be contiguous"
        assert x.dtype == tensors[0].dtype, "one type for all"
        assert x.device == tensors[0].device, "one device for all"
        assert x.shape[-1] % 8 == 0, "head dims are multiples of 8"
        steps = [step for step, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
        assert x.data_ptr() % 16 == 0, "tensors begin at a multiple of 16 bytes"
        assert all(step * x.element_size() % 16 == 0 for step in steps), "strides are multiples of 16 bytes"


def packed(*tensors: Tensor) -> None:
    """The same where the library reads a raw pointer and takes the strides of a packed tensor for granted."""
    whole(*tensors)
    assert all(x.is_contiguous() for x in tensors), "raw pointers are read: every tensor must be contiguous"


def statistics(lse: Tensor, q: Tensor, *shape: int) -> None:
    """LSE: float32, of exactly this shape, read by a raw pointer."""
    assert lse.dtype == sums(q.dtype), "LSE is float32"
    assert lse.device == q.device
    assert tuple(lse.shape) == shape
    assert lse.is_contiguous(), "LSE is read by a raw pointer"


def table(*tensors: Tensor, like: Tensor | None = None) -> None:
    """Offsets, ranges, lists: int32 and contiguous, on one device."""
    for x in tensors:
        assert x.dtype == torch.int32, "int32"
        assert x.is_contiguous(), "contiguous"
        assert x.device == (tensors[0] if like is None else like).device, "one device"


def gradients(dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, found: tuple[Tensor, ...]) -> None:
    """Write gradients into what the caller gave for them."""
    whole(q, dq, dk, dv)
    for into, like, grad in zip((dq, dk, dv), (q, k, v), found, strict=True):
        assert into.shape == like.shape
        into.copy_(grad)


class Operator:
    """A function that a library made an operator of torch (``torch.library.custom_op``): it shows no signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._init_fn, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._init_fn(*args, **kwargs)


# -- flash-attn ------------------------------------------------------------------------------------------------------


def _flash_window(max_k: int, causal: bool, left: int, right: int) -> tuple[int, int]:
    """flash-attn 2 takes a bound of max_k for none, which is wrong with more rows than keys (its issue 895)."""
    right = 0 if causal else right
    if left >= max_k:
        left = -1
    if right >= max_k:
        right = -1
    if left < 0 and right < 0:
        return OPEN, OPEN
    return (max_k if left < 0 else left), (max_k if right < 0 else right)


def flash_attn2() -> dict[str, ModuleType]:
    def _flash_attn_varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
        softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Any = None,
        leftpad_k: Any = None, seqused_k: Any = None, zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
        whole(q, k, v)
        assert dropout_p == 0.0
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert max_seqlen_q > 1, "one query a sequence runs another layout"
        assert max_seqlen_q >= longest(cu_seqlens_q)
        assert max_seqlen_k >= longest(cu_seqlens_k)
        window = _flash_window(max_seqlen_k, causal, window_size_left, window_size_right)
        out, lse = dense(q, k, v, sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window), softmax_scale)
        return out, torch.where(lse == -torch.inf, torch.inf, lse), None, torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float,
        causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
        deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Tensor:  # fmt: skip
        whole(dout, q, k, v, out)
        assert dropout_p == 0.0
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert max_seqlen_q >= longest(cu_seqlens_q)
        assert max_seqlen_k >= max(1, longest(cu_seqlens_k))
        statistics(softmax_lse, q, q.shape[1], q.shape[0])
        window = _flash_window(max_seqlen_k, causal, window_size_left, window_size_right)
        allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window)
        gradients(dq, dk, dv, q, k, v, dense_backward(dout, q, k, v, out, softmax_lse, allowed, softmax_scale))
        return torch.zeros(())

    def batches(q: Tensor, k: Tensor, causal: bool, left: int, right: int) -> Tensor:
        left, right = _flash_window(k.shape[1], causal, left, right)
        at = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        return (-left <= at) & (at <= right)

    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
    ) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
        whole(q, k, v)
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        allowed = batches(q, k, causal, window_size_left, window_size_right)
        found = [dense(*member, allowed, softmax_scale) for member in zip(q, k, v, strict=True)]
        out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
        return out, lse, None, torch.zeros(2)

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        whole(dout, q, k, v, out)
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        statistics(softmax_lse, q, q.shape[0], q.shape[2], q.shape[1])
        allowed = batches(q, k, causal, window_size_left, window_size_right)
        members = zip(dout, q, k, v, out, softmax_lse, strict=True)
        found = [dense_backward(*member, allowed, softmax_scale) for member in members]
        gradients(dq, dk, dv, q, k, v, tuple(torch.stack(parts) for parts in zip(*found, strict=True)))
        return torch.zeros(())

    functions = _flash_attn_varlen_forward, _flash_attn_varlen_backward, _flash_attn_forward, _flash_attn_backward
    found = _modules("flash_attn.flash_attn_interface", *map(Operator, functions))
    package: Any = found["flash_attn"]
    package.__version__, package.flash_attn_func = "2.8.3", None
    return found


def flash_attn3() -> dict[str, ModuleType]:
    def _flash_attn_forward(
        q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, qv: Any = None, out_: Any = None,
        cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
        seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, page_table: Any = None,
        kv_batch_idx: Any = None, leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None,
        seqlens_rotary: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        softmax_scale: Any = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
        attention_chunk: int = 0, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
        whole(q, k, v)
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        assert max_seqlen_q >= longest(cu_seqlens_q)
        assert max_seqlen_k >= longest(cu_seqlens_k)
        left, right = (OPEN if bound < 0 else bound for bound in (window_size_left, 0 if causal else window_size_right))
        allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), left, right)
        return *dense(q, k, v, allowed, softmax_scale), None, None

    def _flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None, sequed_q: Any = None, sequed_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
        dq: Any = None, dk: Any = None, dv: Any = None, softmax_scale: Any = None, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:  # fmt: skip
        whole(dout, q, k, v, out)
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        statistics(softmax_lse, q, q.shape[1], q.shape[0])
        left, right = (OPEN if bound < 0 else bound for bound in (window_size_left, 0 if is_causal else window_size_right))
        allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), left, right)
        gradients(dq, dk, dv, q, k, v, dense_backward(dout, q, k, v, out, softmax_lse, allowed, softmax_scale))
        return torch.zeros(())

    return _modules("flash_attn_interface", *map(Operator, (_flash_attn_forward, _flash_attn_backward)))


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Any = None
    cu_block_idx_offsets: Any = None
    block_size: tuple[int, int] | None = None

    def allowed(self, heads: int, rows: int, columns: int) -> Tensor:
        """(H, rows, columns) of full blocks."""
        assert self.block_size == (128, 128)
        assert self.full_block_cnt is not None
        assert self.full_block_idx is not None
        assert int(self.mask_block_cnt.sum()) == 0
        assert self.full_block_cnt.shape[:2] in ((1, 1), (1, heads))
        table(self.mask_block_cnt, self.mask_block_idx, self.full_block_cnt, self.full_block_idx)
        for count, index in ((self.mask_block_cnt, self.mask_block_idx), (self.full_block_cnt, self.full_block_idx)):
            assert count.shape[2] == -(-rows // 128)
            assert index.shape == (*count.shape, -(-columns // 128))
        found = torch.zeros((heads, rows, columns), dtype=torch.bool)
        for head in range(heads):
            own = head if self.full_block_cnt.shape[1] > 1 else 0
            for row, count in enumerate(self.full_block_cnt[0, own].tolist()):
                listed = self.full_block_idx[0, own, row, :count].tolist()
                assert listed == sorted(set(listed)), "blocks ascend"
                for column in listed:
                    found[head, row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] = True
        return found


def flash_attn4() -> dict[str, ModuleType]:
    def window(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
        if left is not None and right is not None and left < 0 and right < 0:
            left = right = None
        right = 0 if causal else right
        return OPEN if left is None else left, OPEN if right is None else right

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None,
        seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None,
        page_table: Any = None, softmax_scale: Any = None, causal: bool = False, softcap: Any = None,
        window_size_left: int | None = None, window_size_right: int | None = None, *, block_sparse_tensors: Any = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        whole(q, k, v)
        if block_sparse_tensors is not None:
            assert cu_seqlens_q is cu_seqlens_k is max_seqlen_q is max_seqlen_k is None, "batches, not packed sequences"
            allowed = block_sparse_tensors.allowed(q.shape[2], q.shape[1], k.shape[1])
            out, lse = dense(q[0], k[0], v[0], allowed, softmax_scale)
            return out[None], lse[None], None, None, None
        allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window(causal, window_size_left, window_size_right))
        out, lse = dense(q, k, v, allowed, softmax_scale)
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: Any = None, causal: bool = False,
        softcap: float = 0.0, window_size_left: int | None = None, window_size_right: int | None = None, *,
        cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None,
        block_sparse_tensors: Any = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        whole(dout, q, k, v, out)
        statistics(lse, q, *((q.shape[0], q.shape[2], q.shape[1]) if block_sparse_tensors else (q.shape[1], q.shape[0])))
        if block_sparse_tensors is not None:  # lists of query blocks for each block of keys
            allowed = block_sparse_tensors.allowed(q.shape[2], k.shape[1], q.shape[1]).transpose(1, 2)
            return tuple(x[None] for x in dense_backward(dout[0], q[0], k[0], v[0], out[0], lse[0], allowed, softmax_scale))
        allowed = sequences(cu_seqlens_q, cu_seqlens_k, (len(q), len(k)), *window(causal, window_size_left, window_size_right))
        return dense_backward(dout, q, k, v, out, lse, allowed, softmax_scale)

    return _modules("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd) | _modules(
        "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch
    )


# -- cuDNN's -----------------------------------------------------------------------------------------------------------


def transformer_engine(release: str = "2.20") -> dict[str, ModuleType]:
    """Transformer Engine 2.20, or 2.5, whose backward wants a type of gradients and whose functions know no formats of outputs.

    Its C++ takes data pointers and the strides of packed tensors.
    """

    def band(
        q: Tensor, k: Tensor, cu: tuple[Tensor, Tensor], most: tuple[int, int], *, qkv_layout: str, attn_mask_type: str,
        window_size: tuple[int, int], cu_seqlens_q_padded: Any, cu_seqlens_kv_padded: Any, dropout: float,
    ) -> Tensor:  # fmt: skip
        assert qkv_layout == "thd_thd_thd"
        assert dropout == 0.0
        assert cu_seqlens_q_padded is cu[0]
        assert cu_seqlens_kv_padded is cu[1]
        table(*cu, like=q)
        assert all(int(x.diff().min()) > 0 for x in cu), "no sequence without tokens"
        assert most == (max(2, longest(cu[0])), longest(cu[1]))
        left, right = window_size
        if attn_mask_type == "padding":
            assert (left, right) == (-1, -1)
            return sequences(*cu, (len(q), len(k)), OPEN, OPEN)
        assert attn_mask_type == "padding_causal_bottom_right"
        assert right in (0, -1)
        assert most[0] <= max(2, most[1]), "no bottom right mask with more queries than keys"
        return sequences(*cu, (len(q), len(k)), OPEN if left < 0 else left, 0)

    def fused_attn_fwd(
        is_training: bool, max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor,
        v: Tensor, fake_dtype: torch.dtype, fused_attention_backend: Any, attn_bias: Any = None, cu_seqlens_q_padded: Any = None,
        cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0, qkv_layout: str = "sbh3d",
        o_format: str = "sbhd", attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        packed(q, k, v)
        assert is_training
        assert o_format == "thd"
        assert fused_attention_backend == 1
        assert fake_dtype == q.dtype
        allowed = band(
            q, k, (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), qkv_layout=qkv_layout,
            attn_mask_type=attn_mask_type, window_size=window_size, cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded, dropout=dropout,
        )  # fmt: skip
        out, lse = dense(q, k, v, allowed, attn_scale)
        return out, [lse.T.contiguous()[..., None], torch.zeros(2, dtype=torch.int64)]

    def fused_attn_bwd(
        max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor,
        o: Tensor, d_o: Tensor, fake_dtype: torch.dtype, aux_ctx_tensors: list[Tensor], fused_attention_backend: Any,
        cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0,
        qkv_layout: str = "sbh3d", o_format: str = "sbhd", do_format: str = "sbhd", dqkv_layout: str = "sbh3d",
        attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
    ) -> list[Any]:  # fmt: skip
        packed(q, k, v, o, d_o)
        assert (o_format, do_format, dqkv_layout) == ("thd", "thd", "thd_thd_thd")
        assert fused_attention_backend == 1
        assert fake_dtype == q.dtype
        lse, rng_state = aux_ctx_tensors
        statistics(lse, q, len(q), q.shape[1], 1)
        assert (rng_state.dtype, rng_state.numel(), rng_state.device) == (torch.int64, 2, q.device)
        allowed = band(
            q, k, (cu_seqlens_q, cu_seqlens_kv), (max_seqlen_q, max_seqlen_kv), qkv_layout=qkv_layout,
            attn_mask_type=attn_mask_type, window_size=window_size, cu_seqlens_q_padded=cu_seqlens_q_padded,
            cu_seqlens_kv_padded=cu_seqlens_kv_padded, dropout=dropout,
        )  # fmt: skip
        return [*dense_backward(d_o, q, k, v, o, lse[..., 0].T, allowed, attn_scale), None]

    newest = fused_attn_fwd, fused_attn_bwd

    def older_fwd(
        is_training: bool, max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor,
        v: Tensor, fake_dtype: torch.dtype, fused_attention_backend: Any, attn_bias: Any = None, cu_seqlens_q_padded: Any = None,
        cu_seqlens_kv_padded: Any = None, attn_scale: Any = None, dropout: float = 0.0, qkv_layout: str = "sbh3d",
        attn_mask_type: str = "padding", window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        return newest[0](
            is_training, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, fake_dtype, fused_attention_backend,
            attn_bias, cu_seqlens_q_padded, cu_seqlens_kv_padded, attn_scale, dropout, qkv_layout, "thd", attn_mask_type,
            window_size,
        )  # fmt: skip

    def older_bwd(
        max_seqlen_q: int, max_seqlen_kv: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor,
        o: Tensor, d_o: Tensor, fake_dtype: torch.dtype, dqkv_dtype: Any, aux_ctx_tensors: list[Tensor],
        fused_attention_backend: Any, cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, attn_scale: Any = None,
        dropout: float = 0.0, qkv_layout: str = "sbh3d", attn_mask_type: str = "padding",
        window_size: tuple[int, int] = (-1, -1),
    ) -> list[Any]:  # fmt: skip
        assert dqkv_dtype == ("bfloat16" if q.dtype == torch.bfloat16 else "float16")
        return newest[1](
            max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q, k, v, o, d_o, fake_dtype, aux_ctx_tensors,
            fused_attention_backend, cu_seqlens_q_padded, cu_seqlens_kv_padded, attn_scale, dropout, qkv_layout, "thd", "thd",
            "thd_thd_thd", attn_mask_type, window_size,
        )  # fmt: skip

    backends = ModuleType("transformer_engine.pytorch.cpp_extensions.fused_attn")
    backends.FusedAttnBackend = {"F16_arbitrary_seqlen": 1}  # type: ignore[attr-defined]
    compiled = ModuleType("transformer_engine_torch")
    compiled.DType = SimpleNamespace(kBFloat16="bfloat16", kFloat16="float16")  # type: ignore[attr-defined]
    found = _modules("transformer_engine.pytorch.cpp_extensions", *newest)
    if release == "2.5":
        module = found["transformer_engine.pytorch.cpp_extensions"]
        module.fused_attn_fwd, module.fused_attn_bwd = older_fwd, older_bwd  # type: ignore[attr-defined]
    return found | {backends.__name__: backends, compiled.__name__: compiled}


# -- others ------------------------------------------------------------------------------------------------------------


def xformers() -> dict[str, ModuleType]:
    class BlockDiagonalMask:
        def __init__(self, q: list[int], k: list[int], window: tuple[int, int]) -> None:
            self.q, self.k, self.window = q, k, window

        @classmethod
        def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: Any = None) -> Any:
            assert kv_seqlen is not None
            assert all(type(length) is int for length in (*q_seqlen, *kv_seqlen))
            assert device is not None, "without a device its offsets go to the current GPU"
            return cls(q_seqlen, kv_seqlen, (OPEN, OPEN))

        def make_causal_from_bottomright(self) -> Any:
            return BlockDiagonalMask(self.q, self.k, (OPEN, 0))

        def make_local_attention_from_bottomright(self, window_size: int) -> Any:
            assert self.window == (OPEN, 0)
            assert window_size > 0
            assert all(q - window_size < k for q, k in zip(self.q, self.k, strict=True)), "a row sees no key"
            return BlockDiagonalMask(self.q, self.k, (window_size - 1, 0))

        def allowed(self) -> Tensor:
            cu = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (self.q, self.k)]
            return sequences(cu[0], cu[1], (sum(self.q), sum(self.k)), *self.window)

    flash = ModuleType("xformers.ops.fmha.flash")
    flash.FwOp, flash.BwOp = "forward", "backward"  # type: ignore[attr-defined]

    def memory_efficient_attention_forward_requires_grad(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, *, op: Any = None
    ) -> tuple[Tensor, Tensor]:
        whole(query, key, value)
        assert (op, p) == (flash.FwOp, 0.0)
        assert query.shape[0] == key.shape[0] == value.shape[0] == 1, "sequences are packed into a batch of one"
        assert query.shape[2] == key.shape[2], "no groups"
        out, lse = dense(query[0], key[0], value[0], attn_bias.allowed(), scale)
        return out[None], lse[None]

    def memory_efficient_attention_backward(
        grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
        p: float = 0.0, scale: Any = None, *, op: Any = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        whole(query, grad, output, key, value)
        assert (op, p) == (flash.BwOp, 0.0)
        assert query.shape[2] == key.shape[2], "no groups"
        statistics(lse, query, 1, query.shape[2], query.shape[1])
        grads = dense_backward(grad[0], query[0], key[0], value[0], output[0], lse[0], attn_bias.allowed(), scale)
        return tuple(x[None] for x in grads)

    functions = memory_efficient_attention_forward_requires_grad, memory_efficient_attention_backward
    found = _modules("xformers.ops.fmha", *functions)
    found["xformers.ops.fmha"].flash = flash  # type: ignore[attr-defined]
    found["xformers"].__version__ = "0.0.35"  # type: ignore[attr-defined]
    compiled = ModuleType("xformers._cpp_lib")
    compiled._built_with_cuda, compiled._cpp_library_load_exception = True, None  # type: ignore[attr-defined]
    found |= {flash.__name__: flash, compiled.__name__: compiled}
    return _modules("xformers.ops.fmha.attn_bias", BlockDiagonalMask) | found


def flashinfer() -> dict[str, ModuleType]:
    def split_kv(workspace: Tensor, q_heads: int, kv_heads: int, dim: int) -> None:
        """Room for partial results of releases up to 0.6.18 on 132 multiprocessors, two tiles of 128 rows on each."""
        needed = q_heads * (2 * 132 // kv_heads) * 128 * (dim + 1) * 4
        assert workspace.numel() >= needed, "Buffer overflow when allocating memory for batch_prefill_tmp_v"

    class BatchPrefillWithRaggedKVCacheWrapper:
        def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto") -> None:
            assert float_workspace_buffer.dtype == torch.uint8
            assert (kv_layout, backend) == ("NHD", "fa2")
            self.workspace = float_workspace_buffer

        def plan(
            self, qo_indptr: Tensor, kv_indptr: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, *,
            causal: bool = False, window_left: int = -1, sm_scale: float | None = None, q_data_type: Any = "float16",
            kv_data_type: Any = None,
        ) -> None:  # fmt: skip
            assert sm_scale is not None
            assert q_data_type == kv_data_type
            assert isinstance(q_data_type, torch.dtype)
            table(qo_indptr, kv_indptr, like=self.workspace)
            split_kv(self.workspace, num_qo_heads, num_kv_heads, head_dim_qk)
            self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim_qk), q_data_type
            self.cu, self.scale = (qo_indptr, kv_indptr), sm_scale
            self.window = OPEN if window_left < 0 else window_left, 0 if causal else OPEN

        def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
            whole(q, k, v)
            assert return_lse
            assert q.dtype == self.dtype, "the type that was planned"
            assert self.heads == (q.shape[1], k.shape[1], q.shape[2])
            out, lse = dense(q, k, v, sequences(*self.cu, (len(q), len(k)), *self.window), self.scale)
            return out, lse.T / LN2

    class VariableBlockSparseAttentionWrapper:
        def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
            assert float_workspace_buffer.dtype == torch.uint8
            assert backend == "fa2"
            self.workspace = float_workspace_buffer

        def plan(
            self, block_mask_map: Tensor, block_row_sz: Tensor, block_col_sz: Tensor, num_qo_heads: int, num_kv_heads: int,
            head_dim: int, *, sm_scale: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
        ) -> None:  # fmt: skip
            assert block_mask_map.dtype == torch.bool
            assert block_mask_map.any()
            assert len(block_mask_map) == num_kv_heads
            assert block_row_sz.shape == block_mask_map.shape[:2]
            assert block_col_sz.shape == block_mask_map[:, 0].shape
            assert sm_scale is not None
            assert q_data_type == kv_data_type
            assert isinstance(q_data_type, torch.dtype)
            table(block_row_sz, block_col_sz, like=block_mask_map)
            split_kv(self.workspace, num_qo_heads // num_kv_heads, 1, head_dim)
            self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim), q_data_type
            each = num_qo_heads // num_kv_heads
            self.scale, self.allowed = sm_scale or 0.0, torch.stack([
                keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                for keep, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
            ]).repeat_interleave(each, 0)  # fmt: skip

        def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
            packed(q, k, v)  # it reshapes (H, T, D), which would copy anything else
            assert return_lse
            assert q.dtype == self.dtype, "the type that was planned"
            assert self.heads == (q.shape[0], k.shape[0], q.shape[2])
            out, lse = dense(*(x.transpose(0, 1) for x in (q, k, v)), self.allowed, self.scale)
            return out.transpose(0, 1), lse / LN2

    return _modules("flashinfer", BatchPrefillWithRaggedKVCacheWrapper, VariableBlockSparseAttentionWrapper)


def magi_attention() -> dict[str, ModuleType]:
    def cut(tokens: tuple[int, int], q_ranges: Tensor, k_ranges: Tensor, kinds: Tensor) -> Tensor:
        table(q_ranges, k_ranges, kinds)
        assert q_ranges.shape == k_ranges.shape == (len(kinds), 2)
        assert len(kinds), "no call without slices"
        count = torch.zeros(tokens, dtype=torch.int32)
        for (q0, q1), (k0, k1), kind in zip(q_ranges.tolist(), k_ranges.tolist(), kinds.tolist(), strict=True):
            at = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None]
            above, below = at > (k1 - k0) - (q1 - q0), at < 0
            count[q0:q1, k0:k1] += ~((above if kind in (1, 3) else False) | (below if kind in (2, 3) else torch.zeros_like(below)))
        assert count.max() <= 1, "slices overlap"
        return count.bool()

    def flex_flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, q_ranges: Any = None, k_ranges: Any = None, attn_type_map: Any = None, *,
        softmax_scale: Any = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        packed(q, k, v)
        out, lse = dense(q, k, v, cut((len(q), len(k)), q_ranges, k_ranges, attn_type_map), softmax_scale)
        return out, AttnForwardMeta(lse.T.contiguous())

    def _flex_flash_attn_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Any, sink_layout: str, out: Tensor, lse: Tensor, dq: Any, dk: Any,
        dv: Any, dsink: Any, q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor, softmax_scale: float, softcap: float,
        dq_type: Any, dk_type: Any, dv_type: Any, disable_bwd_dkv_atomic_reduction: bool, deterministic: bool, sm_margin: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        packed(dout, q, k, v, out)
        assert sink is dq is dk is dv is dsink is None
        assert sink_layout in ("sh", "ssh", "shd")
        assert dq_type == dk_type == dv_type == torch.float32
        statistics(lse, q, *q.shape[:2])
        allowed = cut((len(q), len(k)), q_ranges, k_ranges, attn_type_map)
        return *dense_backward(dout, q, k, v, out, lse.T, allowed, softmax_scale), None

    class AttnForwardMeta(NamedTuple):
        lse: Tensor
        max_logits: Tensor | None = None

    below = _modules("magi_attention.functional.flex_flash_attn", _flex_flash_attn_backward, AttnForwardMeta)
    return below | _modules("magi_attention.functional", flex_flash_attn_func)


def fastvideo() -> dict[str, ModuleType]:
    def expand(index: Tensor, count: Tensor, sizes: Tensor) -> Tensor:
        table(index, count, sizes)
        assert index.shape == (*count.shape, len(sizes))
        assert set(sizes.tolist()) == {64}
        heads, rows = index.shape[1:3]
        found = torch.zeros((heads, rows * 64, len(sizes) * 64), dtype=torch.bool)
        for head in range(heads):
            for row in range(rows):
                for column in index[0, head, row, : count[0, head, row]].tolist():
                    found[head, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] = True
        return found

    def block_sparse_attn_triton(
        q: Tensor, k: Tensor, v: Tensor, q2k_idx: Tensor, q2k_num: Tensor, variable_block_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        packed(q, k, v)
        assert q.shape == k.shape == v.shape
        allowed = expand(q2k_idx, q2k_num, variable_block_sizes)
        out, lse = dense(*(x[0].transpose(0, 1) for x in (q, k, v)), allowed, q.shape[-1] ** -0.5)
        return out.transpose(0, 1)[None], (lse / LN2)[None]

    def block_sparse_attn_backward_triton(
        grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, q2k_idx: Tensor, q2k_num: Tensor,
        variable_block_sizes: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        packed(grad_output, q, k, v, o)
        statistics(lse, q, *q.shape[:3])
        allowed = expand(q2k_idx, q2k_num, variable_block_sizes)
        members = [x[0].transpose(0, 1) for x in (grad_output, q, k, v, o)]
        grads = dense_backward(*members, lse[0] * LN2, allowed, q.shape[-1] ** -0.5)
        return tuple(x.transpose(0, 1)[None] for x in grads)

    functions = block_sparse_attn_triton, block_sparse_attn_backward_triton
    return _modules("fastvideo_kernel.block_sparse_attn", *map(Operator, functions))


def flashmask_ops(block_q: int = 64, block_k: int = 64) -> Any:
    """What ``torch.ops.flashmask`` holds; the blocks are those of its backward."""

    def bounds(rows: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Of each column: where the lower hidden stretch begins and ends, and the upper one."""
        assert rows.shape == (1, 1, k.shape[1], 4)
        table(rows, like=q)
        return rows[0, 0].T.unbind()

    def visible(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = torch.arange(q.shape[1])[:, None]
        lower, lower_end, upper, upper_end = bounds(rows, q, k)
        return ~((at >= lower) & (at < lower_end) | (at >= upper) & (at < upper_end))

    def walked(rows: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """What backward sees: it walks blocks of rows for each block of columns, and asks the mask near the bounds only."""
        seen, tokens = visible(rows, q, k), q.shape[1]
        used, last = torch.zeros_like(seen), -(-tokens // block_q) - 1
        for begin in range(0, k.shape[1], block_k):
            own = slice(begin, begin + block_k)
            # The blocks of the least and the largest bound; a bound that no column has is in the first block.
            lows, highs = [], []
            for bound in bounds(rows, q, k):
                lows.append(int(bound[own].min()) // block_q)
                highs.append(max(int(bound[own].max()) - 1, 0) // block_q)
            (lower, lower_end, upper, upper_end), (lower_most, lower_end_most, upper_most, upper_end_most) = lows, highs
            computed: list[int] = []

            def walk(
                first: int, stop: int, asks: bool, computed: list[int] = computed, own: slice = own
            ) -> int:  # fmt: skip
                for block in range(first, stop):
                    part = slice(block * block_q, (block + 1) * block_q)
                    used[part, own] = seen[part, own] if asks else True
                    computed.append(block)
                return max(first, stop)

            at = walk(0, min(upper, last + 1), False)
            at = walk(at, upper_most + 1, True)
            at = walk(max(at, upper_end), min(upper_end_most, last) + 1, True)
            at = walk(at, min(lower, last + 1), False)
            at = walk(at, min(lower_most, last) + 1, True)
            at = walk(max(at, lower_end), min(lower_end_most, last) + 1, True)
            walk(at, last + 1, False)
            # The warps that load rows and store dq skip by the bounds alone, and must meet the others at each block.
            loaded = list(range(upper_most + 1))
            loaded += range(max(len(loaded), upper_end), min(lower_most, last) + 1)
            loaded += range(max(loaded[-1] + 1, lower_end), last + 1)
            assert computed == loaded, "its warps wait for each other for ever"
        return used

    def one(*tensors: Tensor) -> list[Tensor]:
        assert all(x.dim() == 4 and len(x) == 1 for x in tensors)
        return [x[0] for x in tensors]

    def fwd(
        q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, q_v: Any = None, out: Any = None,
        cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
        seqused_k: Any = None, max_seqlen_q: int | None = 0, max_seqlen_k: int | None = 0, page_table: Any = None,
        kv_batch_idx: Any = None, leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None, q_descale: Any = None,
        k_descale: Any = None, v_descale: Any = None, softmax_scale: float = 0.0, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        startend_row_indices: Tensor | None = None, block_mask: Any = None, is_rotary_interleaved: bool = True,
        scheduler_metadata: Any = None, num_splits: int = 1, pack_gqa: bool | None = False, sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        whole(q, k, v)
        assert not is_causal
        assert (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
        assert block_mask is None
        assert startend_row_indices is not None
        found, lse = dense(*one(q, k, v), visible(startend_row_indices, q, k), softmax_scale)
        return found[None], lse[None]

    def bwd(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Any = None, dk: Any = None,
        dv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, seqused_q: Any = None, seqused_k: Any = None,
        startend_row_indices: Tensor | None = None, block_mask: Any = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, softmax_scale: float = 0.0, is_causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        whole(dout, q, k, v, out)
        assert not is_causal
        assert (window_size_left, window_size_right, softcap) == (-1, -1, 0.0)
        assert block_mask is dq is dk is dv is None
        assert startend_row_indices is not None
        statistics(softmax_lse, q, 1, q.shape[2], q.shape[1])
        allowed = walked(startend_row_indices, q, k)
        dq, dk, dv = dense_backward(*one(dout, q, k, v, out), softmax_lse[0], allowed, softmax_scale)
        return dq[None], dk[None], dv[None]

    return SimpleNamespace(fwd=fwd, bwd=bwd)


def torch_cuda_ops() -> dict[str, Callable[..., Any]]:
    """torch's CUDA attention operators, by name in ``torch.ops.aten``."""

    def causal(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
        return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if is_causal else torch.ones(1, dtype=torch.bool)

    def each(function: Callable[..., tuple[Tensor, ...]], *batches: Tensor) -> list[Tensor]:
        """Apply to packed members of a batch of (B, H, S, D) tensors."""
        members = [function(*(x.transpose(0, 1) if x.dim() == 3 else x for x in member)) for member in zip(*batches, strict=True)]
        return [torch.stack(parts) for parts in zip(*members, strict=True)]

    def heads_first(tensors: list[Tensor]) -> list[Tensor]:
        return [x.transpose(1, 2) for x in tensors]

    def efficient(q: Tensor, k: Tensor, v: Tensor, bias: Any, compute_lse: bool, dropout: float = 0.0, is_causal: bool = False,
                  *, scale: float) -> tuple[Any, ...]:  # fmt: skip
        whole(q, k, v)
        assert bias is None
        assert compute_lse
        assert dropout == 0.0
        assert q.shape[1] == k.shape[1], "no groups"
        out, lse = each(lambda *m: dense(*m, causal(q, k, is_causal), scale), q, k, v)
        return out.transpose(1, 2), torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf), None, None

    def efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, seed: Tensor,
                           offset: Tensor, dropout: float, wanted: list[bool], is_causal: bool = False, *,
                           scale: float) -> tuple[Any, ...]:  # fmt: skip
        whole(dout, q, k, v, out)
        statistics(lse, q, *q.shape[:2], -(-q.shape[2] // 32) * 32)
        assert seed.dtype == offset.dtype == torch.int64
        assert out.transpose(1, 2).is_contiguous(), "the kernel takes the strides of a packed out for granted"
        assert wanted == [True, True, True, False]
        lse = lse[..., : q.shape[2]]
        grads = each(lambda *m: dense_backward(*m, causal(q, k, is_causal), scale), dout, q, k, v, out, lse)
        return *heads_first(grads), None

    def cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Any, compute_lse: bool, dropout: float = 0.0, is_causal: bool = False,
              debug: bool = False, *, scale: float) -> tuple[Any, ...]:  # fmt: skip
        assert (q.shape[2], k.shape[2]) != (1, 1), "cuDNN Frontend error: s_q = s_kv = 1 is not supported."
        out, lse, *_ = efficient(q, k, v, bias, compute_lse, dropout, is_causal, scale=scale)
        return out, lse[..., : q.shape[2], None], None, None, None, None, None, None, None

    def cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor,
                       bias: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float, is_causal: bool, *,
                       scale: float) -> tuple[Any, ...]:  # fmt: skip
        whole(dout, q, k, v, out)
        assert q.shape[1] == k.shape[1], "no groups"
        assert bias is cu_q is cu_k is None
        assert seed.dtype == offset.dtype == torch.int64
        statistics(lse, q, *q.shape[:3], 1)
        assert (q.shape[2], k.shape[2]) != (1, 1), "cuDNN Frontend error: s_q = s_kv = 1 is not supported."
        assert (max_q, max_k) == (q.shape[2], k.shape[2])
        grads = each(lambda *m: dense_backward(*m, causal(q, k, is_causal), scale), dout, q, k, v, out, lse[..., 0])
        return tuple(heads_first(grads))

    library = flash_attn2()["flash_attn.flash_attn_interface"]

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
              is_causal: bool, debug: bool, *, scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
        forward = library._flash_attn_varlen_forward
        return forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, is_causal, window_size_left, window_size_right)

    def flash_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
                       max_q: int, max_k: int, dropout: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
                       scale: float, window_size_left: int, window_size_right: int) -> Any:  # fmt: skip
        assert rng_state.dtype == unused.dtype == torch.uint64
        assert (rng_state.numel(), unused.numel()) == (2, 0)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        library._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, dropout, scale, is_causal, window_size_left,
            window_size_right, 0.0, None, False,
        )  # fmt: skip
        return grads

    return {
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_cudnn_attention": cudnn, "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_flash_attention_forward": flash, "_flash_attention_backward": flash_backward,
    }  # fmt: skip


def _modules(name: str, *members: Any) -> dict[str, ModuleType]:
    """A module with these members, and its parents."""
    found: dict[str, ModuleType] = {}
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        found[path] = sys.modules.get(path) if path in sys.modules and i < len(parts) else ModuleType(path)  # type: ignore[assignment]
        found[path].__path__ = []  # type: ignore[attr-defined]
        found[path].__spec__ = ModuleSpec(path, None, is_package=True)
    for member in members:
        setattr(found[name], member.__name__, member)
    return found
