# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for fastvideo-kernel's block-sparse Triton attention."""

from __future__ import annotations

from types import ModuleType

import torch

from lcbench.testing.fake_libraries.common import (
    LN2,
    Tensor,
    dense,
    dense_backward,
    operators,
    packed,
    statistics,
    table,
)


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
    assert (k.shape, *q.shape[:2], q.shape[3]) == (v.shape, *k.shape[:2], k.shape[3])
    allowed = expand(q2k_idx, q2k_num, variable_block_sizes)
    out, lse = dense(*(x[0].transpose(0, 1) for x in (q, k, v)), allowed, q.shape[-1] ** -0.5)
    return out.transpose(0, 1)[None], (lse / LN2)[None]


def block_sparse_attn_backward_triton(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, q2k_idx: Tensor, q2k_num: Tensor,
    variable_block_sizes: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    packed(grad_output, q, k, v, o)
    assert grad_output.shape == q.shape == o.shape
    assert k.shape == v.shape
    statistics(lse, q, *q.shape[:3])
    allowed = expand(q2k_idx, q2k_num, variable_block_sizes)
    members = [x[0].transpose(0, 1) for x in (grad_output, q, k, v, o)]
    grads = dense_backward(*members, lse[0] * LN2, allowed, q.shape[-1] ** -0.5)
    return tuple(x.transpose(0, 1)[None] for x in grads)


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    functions = block_sparse_attn_triton, block_sparse_attn_backward_triton
    return operators("fastvideo_kernel.block_sparse_attn", *functions)
