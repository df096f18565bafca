"""cuDNN's attention by its own frontend (nvidia-cudnn-frontend): sequences of many lengths with a causal bound and a left window.

A graph is built once per call of a mask and for each direction. Tensors are ragged: a sequence's rows begin where its offset says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, Unsupported, accumulation_dtype, half_on_cuda, importable
from lcbench.kernels.varlen import CAUSAL, Style, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


class Graph:
    """A graph under way, and built: run it with tensors by name.

    Attributes:
        graph: cuDNN's; operations are added to it.
        kind: the type of inputs and results, as cuDNN names it.
        single: that of statistics and of what lies between.
        handles: tensors of the graph by name, which ``run`` is given.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        import cudnn
        import torch

        self.kind = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
        self.single = cudnn.data_type.FLOAT
        types = {"io_data_type": self.kind, "intermediate_data_type": self.single, "compute_data_type": self.single}
        self.graph = cudnn.pygraph(**types, handle=_handle())
        self.handles: dict[str, Any] = {}
        self._constants: dict[Any, torch.Tensor] = {}
        self._workspace: torch.Tensor | None = None

    def constant(self, values: torch.Tensor) -> Any:
        """A tensor that every run has: numbers of sequences, (n, 1, 1, 1)."""
        values = values.reshape(-1, 1, 1, 1).contiguous()
        return self.held(self.graph.tensor_like(values), values)

    def held(self, tensor: Any, values: torch.Tensor) -> Any:
        """Give a tensor of the graph the same values in every run."""
        self._constants[tensor] = values
        return tensor

    def build(self, device: torch.device) -> Graph:
        """Itself, ready to run."""
        import cudnn
        import torch

        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        self._workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=device)
        return self

    def run(self, **tensors: torch.Tensor) -> None:
        import cudnn
        import torch

        handle = _handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        named = {self.handles[name]: x for name, x in tensors.items()}
        self.graph.execute({**named, **self._constants}, self._workspace, handle=handle)


@dataclass
class _Run:
    call: VarlenCall
    _graphs: dict[tuple[str, float], Graph] = field(default_factory=dict)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:

        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
        self._graph("forward", q, k, v, scale).run(q=q, k=k, v=v, o=out, stats=lse)
        return out, lse.T

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        dout, q, k, v, out = (x.contiguous() for x in (dout, q, k, v, out))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        graph = self._graph("backward", q, k, v, scale)
        graph.run(q=q, k=k, v=v, o=out, dO=dout, stats=lse.T.contiguous(), dQ=dq, dK=dk, dV=dv)
        return dq, dk, dv

    def _graph(self, direction: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Graph:
        if (direction, scale) not in self._graphs:
            self._graphs[direction, scale] = _build(direction, self.call, q, k, v, scale)
        return self._graphs[direction, scale]


@dataclass(frozen=True)
class Cudnn(VarlenKernel):
    """cuDNN's ragged attention, from compute capability 9.0 on, half types, head dims up to 128 and 192:128 (``cudnn_dims``)."""

    style: ClassVar[Style] = CAUSAL
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("nvidia-cudnn-frontend",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        named = "cuDNN's ragged attention"
        return half_on_cuda(problem, platform, named, least=(9, 0), head_dim=128, besides=cudnn_dims(platform))

    def missing(self) -> str | None:
        return importable("cudnn") or refused_cudnn()

    def ready(self, call: VarlenCall, heads: Heads, dtype: torch.dtype) -> VarlenRun:
        too_old_for_dims(heads, call.cu_q.device)
        return super().ready(call, heads, dtype)


DEEPSEEK = (192, 128)  # head dims of keys and of values: DeepSeek's prefill


def cudnn_dims(platform: Platform) -> tuple[tuple[int, int], ...]:
    """Head dims beyond 128 that cuDNN is called with, of those that its frontend takes for backward from 9.0 on
    (``SDPA_backward_attributes.validate_sdpa_support_surface``)."""
    return (DEEPSEEK,) if platform.capability >= (9, 0) else ()


def too_old_for_dims(heads: Heads, device: torch.device) -> None:
    """On Blackwell, cuDNN knows 192:128 since 9.11, as Transformer Engine states (``nvte_get_fused_attn_backend``).

    Raises:
        Unsupported: the cuDNN that torch has loaded is older.
    """
    import torch

    version = torch.backends.cudnn.version()
    blackwell = device.type == "cuda" and Platform.of(device).capability >= (10, 0)
    if blackwell and (heads.dim, heads.v) == DEEPSEEK and version is not None and version < 91100:
        raise Unsupported(f"cuDNN {cudnn_name(version)} takes no head dims 192:128 on this device; 9.11 and later do")


def refused_cudnn() -> str | None:
    """Why the cuDNN that torch has loaded cannot run packed sequences of any length that are aligned to the bottom right.

    The limits are those that Transformer Engine states for it (its ``nvte_get_fused_attn_backend``).
    """
    import torch

    version = torch.backends.cudnn.version()
    if version is None:
        return None
    name = cudnn_name(version)
    if version < 90700:
        return f"cuDNN {name} aligns a causal mask to the bottom right for lengths of whole 64 only; 9.7 and later do for any"
    if version in (91000, 91001):
        return f"cuDNN {name} has known bugs in attention of half types; other releases since 9.7 run"
    return None


def cudnn_name(version: int) -> str:
    """9.10.1 for 91001."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def bounds(window: tuple[int, int]) -> dict[str, Any]:
    """A window as options of a graph: causal, or open."""
    import cudnn

    if window == (-1, -1):
        return {}
    options = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
    if window[0] >= 0:
        options["diagonal_band_left_bound"] = window[0] + 1  # counts the token itself
    return options


def _build(direction: str, call: VarlenCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Graph:
    number, made = len(call.lengths), Graph(q.dtype)
    graph, kind, single, constant = made.graph, made.kind, made.single, made.constant
    cu_q, cu_k = call.cu_q.long(), call.cu_k.long()
    lengths = {"seq_len_q": constant(cu_q.diff().int()), "seq_len_kv": constant(cu_k.diff().int())}
    # (heads, longest sequence, width of a head) of each kind of tensor; the LSE has one number per head.
    sizes = {
        "q": (q.shape[1], call.max_q, q.shape[2]), "o": (q.shape[1], call.max_q, v.shape[2]), "stats": (q.shape[1], call.max_q, 1),
        "k": (k.shape[1], call.max_k, k.shape[2]), "v": (k.shape[1], call.max_k, v.shape[2]),
    }  # fmt: skip
    # Offsets count elements.
    offsets = {side: constant((cu_k if side in ("k", "v") else cu_q) * sizes[side][0] * sizes[side][2]) for side in sizes}

    def layout(side: str) -> tuple[list[int], list[int]]:
        heads, tokens, width = sizes[side]
        return [number, heads, tokens, width], [tokens * heads * width, width, heads * width, 1]

    def given(name: str, side: str) -> Any:
        dims, strides = layout(side)
        tensor = graph.tensor(name=name, dim=dims, stride=strides, data_type=single if side == "stats" else kind)
        tensor.set_ragged_offset(offsets[side])
        return tensor

    def wanted(tensor: Any, side: str) -> Any:
        dims, strides = layout(side)
        tensor.set_output(True).set_dim(dims).set_stride(strides).set_data_type(single if side == "stats" else kind)
        tensor.set_ragged_offset(offsets[side])
        return tensor

    options: dict[str, Any] = {"attn_scale": scale, "use_padding_mask": True, **lengths, **bounds(call.window)}
    handles = {name: given(name, name) for name in "qkv"}
    if direction == "forward":
        out, stats = graph.sdpa(**handles, generate_stats=True, name="forward", **options)
        handles |= {"o": wanted(out, "o"), "stats": wanted(stats, "stats")}
    else:
        handles |= {"o": given("o", "o"), "dO": given("dO", "o"), "stats": given("stats", "stats")}
        totals = {"max_total_seq_len_q": q.shape[0], "max_total_seq_len_kv": k.shape[0]}
        dq, dk, dv = graph.sdpa_backward(**handles, name="backward", **totals, **options)
        handles |= {"dQ": wanted(dq, "q"), "dK": wanted(dk, "k"), "dV": wanted(dv, "v")}
    made.handles = handles
    return made.build(q.device)


_handles: list[Any] = []


def _handle() -> Any:
    """One handle per process: a rank has one device."""
    if not _handles:
        import cudnn

        _handles.append(cudnn.create_handle())
    return _handles[0]
