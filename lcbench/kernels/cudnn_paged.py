"""cuDNN's attention against a cache, by its own frontend: a graph whose keys and values are pages (nvidia-cudnn-frontend).

cuDNN sees one operation: a paged load of keys, one of values, and the attention of what they give ("Scaled Dot Product Attention"
of its frontend's documentation, ``paged_attention_k_table``). A contiguous cache is one of pages of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import OutLse, Platform, Unsupported, accumulation_dtype, dims, half_on_cuda
from lcbench.kernels.cache import Cache, CacheKind
from lcbench.kernels.cudnn import Graph, bounds, cudnn_name
from lcbench.kernels.library import LibraryCall, unfit
from lcbench.kernels.requests import RequestCall, RequestKernel, RequestRun, of_input_type
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

    from lcbench.kernels.requests import PreparedRequests
    from lcbench.masks.mask import Mask

# Its classes are compiled, so most releases show no signature, and then only the names of the two are looked up.
CALLS = (
    LibraryCall("cudnn", "pygraph", 0, ("io_data_type", "intermediate_data_type", "compute_data_type", "handle")),
    LibraryCall("cudnn", "pygraph.sdpa", 1, (
        "q", "k", "v", "name", "generate_stats", "attn_scale", "use_padding_mask", "seq_len_q", "seq_len_kv",
        "diagonal_alignment", "diagonal_band_right_bound", "paged_attention_k_table", "paged_attention_v_table",
        "paged_attention_max_seq_len_kv",
    )),
)  # fmt: skip
LEAST = 91100  # of cuDNN; pages were new in 9.5, and until 9.10.1 they came with limits on head dims and packed queries, and bugs
# Releases that compute single rows wrongly on Blackwell, first and last + 1: pytorch's issue 193893, and the guard in its SDPA.
WRONG_SINGLE_ROWS = (91900, 92600)


class _Run:
    def __init__(self, call: RequestCall) -> None:
        import torch

        self._call = call
        if call.table is None:  # a token is a page
            columns = torch.arange(call.max_k, dtype=torch.int32, device=call.begins.device)
            table = call.begins[:, None] + torch.minimum(columns[None, :], call.lengths[:, None] - 1)
        else:  # exactly as many columns as the longest sequence has pages
            assert call.kind.page is not None
            table = call.table[:, : -(-call.max_k // call.kind.page)]
        self._table = table.contiguous()[:, None, :, None]
        rows = call.sequences.rows
        self._packed = bool((rows != rows[0]).any())
        self._graphs: dict[Any, Graph] = {}

    def forward(self, q: torch.Tensor, cache: Cache, scale: float, softcap: float) -> OutLse:
        assert not softcap
        q, number = q.contiguous(), len(self._call.lengths)
        out = q.new_empty(*q.shape[:2], cache.v.shape[-1])
        shape = q.shape[:2] if self._packed else (number, q.shape[1], self._call.max_q)
        lse = q.new_empty(shape, dtype=accumulation_dtype(q.dtype))
        baked = scale, *((x.shape, x.stride()) for x in (cache.k, cache.v))
        if baked not in self._graphs:
            self._graphs[baked] = self._build(q, cache, scale)
        self._graphs[baked].run(q=q, k=cache.k, v=cache.v, o=out, stats=lse)
        return out, lse if self._packed else lse.transpose(1, 2).flatten(0, 1)

    def _build(self, q: torch.Tensor, cache: Cache, scale: float) -> Graph:
        """The graph of a call. Sequences of equally many rows are a plain batch; others are packed, by offsets in elements."""
        call, made = self._call, Graph(q.dtype)
        number, rows, heads = len(call.lengths), call.max_q, q.shape[1]

        def of_rows(width: int) -> tuple[list[int], list[int]]:
            return [number, heads, rows, width], [rows * heads * width, width, heads * width, 1]

        def placed(tensor: Any, width: int) -> Any:
            if self._packed:
                tensor.set_ragged_offset(made.constant(call.cu_q.long() * heads * width))
            return tensor

        def container(name: str, x: torch.Tensor) -> Any:
            """(pages, Hk, tokens of a page, D), as it lies."""
            pages = (x if x.dim() == 4 else x[:, None]).transpose(1, 2)
            return made.graph.tensor(name=name, dim=list(pages.shape), stride=list(pages.stride()), data_type=made.kind)

        sizes, strides = of_rows(q.shape[2])
        given = placed(made.graph.tensor(name="q", dim=sizes, stride=strides, data_type=made.kind), q.shape[2])
        tables = [made.held(made.graph.tensor_like(self._table), self._table) for _ in "kv"]
        handles = {"q": given, "k": container("k", cache.k), "v": container("v", cache.v)}
        out, stats = made.graph.sdpa(
            **handles, name="forward", generate_stats=True, attn_scale=scale, use_padding_mask=True,
            seq_len_q=made.constant(call.cu_q.diff().int()), seq_len_kv=made.constant(call.lengths),
            paged_attention_k_table=tables[0], paged_attention_v_table=tables[1], paged_attention_max_seq_len_kv=call.max_k,
            **bounds((-1, 0) if call.causal else (-1, -1)),
        )  # fmt: skip
        # A batch's LSE lies by heads, which cuDNN before 9.26 needs; a packed one by tokens.
        sizes, strides = of_rows(1)
        strides = strides if self._packed else [heads * rows, rows, 1, 1]
        stats.set_output(True).set_dim(sizes).set_stride(strides).set_data_type(made.single)
        sizes, strides = of_rows(cache.v.shape[-1])
        out.set_output(True).set_dim(sizes).set_stride(strides).set_data_type(made.kind)
        made.handles = handles | {"o": placed(out, cache.v.shape[-1]), "stats": placed(stats, 1)}
        return made.build(q.device)


@dataclass(frozen=True)
class CudnnPaged(RequestKernel):
    """cuDNN's paged attention from compute capability 9.0 on, half types, head dims up to 256, forward only.

    Pages have a power of two of tokens, and the type of queries; softcaps and latent heads are not in its graph.
    """

    called: ClassVar[str] = "cuDNN's paged attention"
    libraries: ClassVar[tuple[str, ...]] = ("nvidia-cudnn-frontend",)
    softcaps: ClassVar[bool] = False
    contiguous_kv: ClassVar[bool] = True

    def refused_heads(self, heads: Heads) -> str | None:
        if heads.latent:
            return f"{self.called} takes keys and values that are stored apart, not latent ones of {dims(heads)}"
        return None

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, self.called, least=(9, 0))

    def missing(self) -> str | None:
        import torch

        version = torch.backends.cudnn.version()
        if version is not None and version < LEAST:
            return f"{self.called} has limits and bugs in cuDNN {cudnn_name(version)}; {cudnn_name(LEAST)} and later run"
        return unfit(*CALLS)

    def reads(self, kind: CacheKind, problem: Problem, platform: Platform) -> str | None:
        if kind.page is not None and kind.page & (kind.page - 1):
            return f"{self.called} takes pages of a power of two of tokens, not of {kind.page}"
        if kind.storage == "float8":
            return f"{self.called} reads float8 keys with float8 queries only, and a problem's queries are {problem.dtype}"
        return of_input_type(self.called, kind, problem)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> PreparedRequests:
        import torch

        version, (first, fixed) = torch.backends.cudnn.version() or 0, WRONG_SINGLE_ROWS
        blackwell = device.type == "cuda" and Platform.of(device).capability >= (10, 0)
        if blackwell and first <= version < fixed and any(group.rows.max() == 1 for group, _ in self._groups(mask)):
            raise Unsupported(
                f"cuDNN {cudnn_name(version)} computes single rows wrongly on this device, as all from {cudnn_name(first)} on do"
                f" before {cudnn_name(fixed)}"
            )
        return super().prepare(mask, heads, dtype, device)

    def ready(self, call: RequestCall, heads: Heads, dtype: torch.dtype) -> RequestRun:
        return _Run(call)
