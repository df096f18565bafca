# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for cuDNN's frontend (nvidia-cudnn-frontend): graphs of attention over ragged tensors, read by offsets and strides."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from lcbench.testing.fake_libraries.common import OPEN, Tensor, dense, dense_backward, sums


class Node:
    """A tensor of a graph: described, and given or wanted when it is executed."""

    def __init__(self, dim: list[int] | None = None, stride: list[int] | None = None, data_type: str = "") -> None:
        self.dim, self.stride, self.data_type, self.output = dim, stride, data_type, False
        self.offset: Node | None = None

    def set_ragged_offset(self, offset: Node) -> Node:
        self.offset = offset
        return self

    def set_output(self, output: bool) -> Node:
        self.output = output
        return self

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        self.stride = stride
        return self

    def set_data_type(self, data_type: str) -> Node:
        self.data_type = data_type
        return self

    def sequences(self, given: dict[Node, Tensor], lengths: list[int]) -> list[Tensor]:
        """Views (l, H, width) of each sequence."""
        x = given[self]
        assert x.is_contiguous(), "raw pointers are read: every tensor must be contiguous"
        assert (x.dtype == sums(x.dtype)) or self.data_type in ("bfloat16", "half")
        assert self.dim is not None
        assert self.stride is not None
        assert self.offset is not None
        offsets = given[self.offset]
        assert (offsets.dtype, offsets.shape) == (torch.int64, (len(lengths) + 1, 1, 1, 1))
        assert self.dim[0] == len(lengths)
        assert self.dim[2] >= max(lengths)
        assert int(offsets[-1]) == x.numel()
        steps = self.stride[2], self.stride[1], self.stride[3]
        return [
            x.view(-1)[int(begin) :].as_strided((length, self.dim[1], self.dim[3]), steps)
            for begin, length in zip(offsets[:-1].flatten(), lengths, strict=True)
            if length
        ]


class pygraph:  # noqa: N801
    def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Any) -> None:
        assert intermediate_data_type == compute_data_type == "float"
        assert handle == "handle"
        self.steps: list[str] = []

    def tensor_like(self, x: Tensor) -> Node:
        return Node(list(x.shape), list(x.stride()))

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Node:
        return Node(dim, stride, data_type)

    def _options(
        self, *, attn_scale: float, use_padding_mask: bool, seq_len_q: Node, seq_len_kv: Node,
        diagonal_alignment: str | None = None,
        diagonal_band_right_bound: int | None = None, diagonal_band_left_bound: int | None = None,
    ) -> None:  # fmt: skip
        assert use_padding_mask
        assert diagonal_alignment == ("bottom right" if diagonal_band_right_bound is not None else None)
        assert diagonal_band_right_bound in (0, None)
        assert diagonal_band_left_bound is None or diagonal_band_left_bound > 0, "a window counts the token itself"
        self.scale, self.lengths = attn_scale, (seq_len_q, seq_len_kv)
        self.window = diagonal_band_left_bound, diagonal_band_right_bound

    def sdpa(self, *, q: Node, k: Node, v: Node, generate_stats: bool, name: str, **options: Any) -> tuple[Node, Node]:
        assert generate_stats
        self._options(**options)
        self.inputs, self.outputs = [q, k, v], [Node(), Node()]
        return self.outputs[0], self.outputs[1]

    def sdpa_backward(
        self, *, q: Node, k: Node, v: Node, o: Node, dO: Node, stats: Node, name: str, max_total_seq_len_q: int,  # noqa: N803
        max_total_seq_len_kv: int, **options: Any,
    ) -> tuple[Node, Node, Node]:  # fmt: skip
        self._options(**options)
        self.totals = max_total_seq_len_q, max_total_seq_len_kv
        self.inputs, self.outputs = [q, k, v, o, dO, stats], [Node(), Node(), Node()]
        return self.outputs[0], self.outputs[1], self.outputs[2]

    def validate(self) -> None:
        wanted = self.outputs
        q, k, v = self.inputs[:3]
        assert all(node.output and node.dim and node.stride and node.data_type for node in wanted)
        assert [q.dim[3], v.dim[1]] == [k.dim[3], k.dim[1]]  # type: ignore[index]
        like = [[*q.dim[:3], v.dim[3]], [*q.dim[:3], 1]] if len(wanted) == 2 else [q.dim, k.dim, v.dim]  # type: ignore[index]
        assert [node.dim for node in wanted] == like

    def build_operation_graph(self) -> None:
        self.steps.append("graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["A", "FALLBACK"]

    def check_support(self) -> None:
        self.steps.append("support")

    def build_plans(self) -> None:
        assert self.steps == ["graph", "support"]
        self.steps.append("plans")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, given: dict[Node, Tensor], workspace: Tensor, *, handle: Any) -> None:
        assert self.steps[-1] == "plans"
        assert workspace.dtype == torch.uint8
        assert set(given) >= {*self.inputs, *self.outputs, *self.lengths}
        assert all(given[node].dtype == torch.int32 for node in self.lengths)
        lengths_q, lengths_k = (given[node].flatten().tolist() for node in self.lengths)
        of_keys = {self.inputs[1], self.inputs[2], *self.outputs[1:]} if len(self.outputs) == 3 else set(self.inputs[1:3])
        columns = [
            node.sequences(given, lengths_k if node in of_keys else lengths_q) for node in (*self.inputs, *self.outputs)
        ]  # fmt: skip
        left, right = self.window
        for q, k, v, *rest in zip(*columns, strict=True):
            at = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
            allowed = (at >= (-OPEN if left is None else 1 - left)) & (at <= (OPEN if right is None else right))
            if len(rest) == 2:
                out, lse = dense(q, k, v, allowed, self.scale)
                found = [out, lse.T[..., None]]
            else:
                out, dout, stats = rest[:3]
                found = [*dense_backward(dout, q, k, v, out, stats[..., 0].T, allowed, self.scale)]
            for into, value in zip(rest[-len(found) :], found, strict=True):
                into.copy_(value)


def create_handle() -> str:
    return "handle"


def set_stream(*, handle: Any, stream: int) -> None:
    assert handle == "handle"


def modules() -> dict[str, ModuleType]:
    """The library's modules by name, for ``sys.modules``."""
    found = ModuleType("cudnn")
    found.data_type = SimpleNamespace(BFLOAT16="bfloat16", HALF="half", FLOAT="float")  # type: ignore[attr-defined]
    found.diagonal_alignment = SimpleNamespace(BOTTOM_RIGHT="bottom right")  # type: ignore[attr-defined]
    found.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")  # type: ignore[attr-defined]
    found.pygraph, found.create_handle, found.set_stream = pygraph, create_handle, set_stream  # type: ignore[attr-defined]
    return {"cudnn": found}
