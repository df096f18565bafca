# mypy: disable-error-code="call-arg, arg-type"
"""A stand-in for cuDNN's frontend (nvidia-cudnn-frontend): graphs of attention, forward over pages too, by offsets and strides.

What it refuses of pages is what ``validate_sdpa_support_surface`` and ``PagedCacheLoadNode`` refuse, and what cuDNN is known to do
wrongly: other layouts of a batch's LSE before 9.26, and a packed LSE of single rows whose heads share keys (its issue 1083).
"""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from lcbench.testing.fake_libraries.caches import in_pages
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
        assert self.dim[0] == len(lengths)
        assert self.dim[2] >= max(lengths)
        if self.offset is None:
            assert x.numel() == math.prod(self.dim)
            begins = [i * self.stride[0] for i in range(len(lengths))]
        else:
            offsets = given[self.offset]
            assert (offsets.dtype, offsets.shape) == (torch.int64, (len(lengths) + 1, 1, 1, 1))
            assert int(offsets[-1]) == x.numel()
            begins = offsets[:-1].flatten().tolist()
        steps = self.stride[2], self.stride[1], self.stride[3]
        return [
            x.view(-1)[begin:].as_strided((length, self.dim[1], self.dim[3]), steps)
            for begin, length in zip(begins, lengths, strict=True)
            if length
        ]

    def pages(self, given: dict[Node, Tensor], table: Node, lengths: list[int]) -> list[Tensor]:
        """(l, Hk, width) of each sequence: this is a container (pages, Hk, tokens of a page, width)."""
        x, rows = given[self], given[table]
        assert self.dim is not None
        assert self.stride is not None
        assert (rows.dtype, list(rows.shape), rows.is_contiguous()) == (torch.int32, table.dim, True)
        last = sum((n - 1) * step for n, step in zip(self.dim, self.stride, strict=True))
        assert x.untyped_storage().nbytes() // x.element_size() > x.storage_offset() + last, (
            "the container ends before its last page"
        )
        container = x.as_strided(self.dim, self.stride).transpose(1, 2)
        return [in_pages(container, row.flatten(), length) for row, length in zip(rows, lengths, strict=True)]


class pygraph:  # noqa: N801
    def __init__(self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: Any) -> None:
        assert intermediate_data_type == compute_data_type == "float"
        assert handle == "handle"
        self.steps: list[str] = []
        self.tables: list[Node] = []
        self.most_keys: int | None = None

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

    def sdpa(
        self, *, q: Node, k: Node, v: Node, generate_stats: bool, name: str, paged_attention_k_table: Node | None = None,
        paged_attention_v_table: Node | None = None, paged_attention_max_seq_len_kv: int | None = None, **options: Any,
    ) -> tuple[Node, Node]:  # fmt: skip
        assert generate_stats
        given = paged_attention_k_table, paged_attention_v_table
        self.tables = [table for table in given if table is not None]
        assert len(self.tables) in (0, 2), "keys and values are in pages, or neither"
        assert paged_attention_max_seq_len_kv is None or type(paged_attention_max_seq_len_kv) is int
        assert (paged_attention_max_seq_len_kv is not None) == bool(self.tables), "the most keys are said of pages only"
        self.most_keys = paged_attention_max_seq_len_kv
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
        if self.tables:
            self._validate_pages()

    def _validate_pages(self) -> None:
        q, k, v = self.inputs
        out, stats = self.outputs
        assert self.most_keys is not None
        for container, table in zip((k, v), self.tables, strict=True):
            number, _, page, _ = container.dim  # type: ignore[misc]
            assert number > 0
            assert page & (page - 1) == 0, "pages have a power of two of tokens"
            assert table.dim == [q.dim[0], 1, -(-self.most_keys // page), 1], "table size must equal ceil(s_kv/block_size)"  # type: ignore[index]
            assert container.stride[3] == 1  # type: ignore[index]
            assert container.offset is None
        assert k.dim[1] == v.dim[1]  # type: ignore[index]
        assert q.dim[1] % k.dim[1] == 0  # type: ignore[index]
        assert all(x.dim[3] % 8 == 0 and x.dim[3] <= 256 for x in (q, v)), "hidden_dim should be multiple of 8"  # type: ignore[index, operator]
        assert len({q.offset is None, out.offset is None, stats.offset is None}) == 1, "queries and results are packed, or none"
        _, heads, rows, _ = q.dim  # type: ignore[misc]
        if stats.offset is None:
            assert stats.stride == [heads * rows, rows, 1, 1], "a batch's statistics lie by heads before cuDNN 9.26"
        else:
            assert rows > 1 or heads == k.dim[1], "packed statistics of single rows are left out where heads share keys"  # type: ignore[index]

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
        assert set(given) >= {*self.inputs, *self.outputs, *self.lengths, *self.tables}
        assert all(given[node].dtype == torch.int32 for node in self.lengths)
        lengths_q, lengths_k = (given[node].flatten().tolist() for node in self.lengths)
        of_keys = {self.inputs[1], self.inputs[2], *self.outputs[1:]} if len(self.outputs) == 3 else set(self.inputs[1:3])
        in_pages = dict(zip(self.inputs[1:3], self.tables, strict=True)) if self.tables else {}
        assert self.most_keys is None or max(lengths_k) <= self.most_keys
        columns = [
            node.pages(given, in_pages[node], lengths_k) if node in in_pages
            else node.sequences(given, lengths_k if node in of_keys else lengths_q)
            for node in (*self.inputs, *self.outputs)
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
