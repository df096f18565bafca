"""cuDNN's attention by its own frontend (nvidia-cudnn-frontend): sequences of many lengths with a causal bound and a left window.

A graph is built once per call of a mask and for each direction. Tensors are ragged: a sequence's rows begin where its offset says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.kernels.base import Gradients, OutLse, Platform, Saved, half_on_cuda, importable
from lcbench.kernels.varlen import CAUSAL, Style, VarlenCall, VarlenKernel, VarlenRun
from lcbench.problem import Problem

if TYPE_CHECKING:
    import torch


@dataclass
class _Graph:
    """A built graph: run it with tensors by name."""

    graph: Any
    handles: dict[str, Any]
    constants: dict[Any, torch.Tensor]
    workspace: torch.Tensor

    def run(self, **tensors: torch.Tensor) -> None:
        import cudnn
        import torch

        handle = _handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        named = {self.handles[name]: x for name, x in tensors.items()}
        self.graph.execute({**named, **self.constants}, self.workspace, handle=handle)


@dataclass
class _Run:
    call: VarlenCall
    _graphs: dict[tuple[str, float], _Graph] = field(default_factory=dict)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> OutLse:
        import torch

        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._graph("forward", q, k, scale).run(q=q, k=k, v=v, o=out, stats=lse)
        return out, lse.T

    def backward(self, dout: torch.Tensor, saved: Saved, scale: float) -> Gradients:
        import torch

        q, k, v, out, lse = saved
        dout, q, k, v, out = (x.contiguous() for x in (dout, q, k, v, out))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        graph = self._graph("backward", q, k, scale)
        graph.run(q=q, k=k, v=v, o=out, dO=dout, stats=lse.T.contiguous(), dQ=dq, dK=dk, dV=dv)
        return dq, dk, dv

    def _graph(self, direction: str, q: torch.Tensor, k: torch.Tensor, scale: float) -> _Graph:
        if (direction, scale) not in self._graphs:
            self._graphs[direction, scale] = _build(direction, self.call, q, k, scale)
        return self._graphs[direction, scale]


@dataclass(frozen=True)
class Cudnn(VarlenKernel):
    """cuDNN's ragged attention, from compute capability 9.0 on, half types, head dims up to 128."""

    style: ClassVar[Style] = CAUSAL
    contiguous_kv: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("nvidia-cudnn-frontend",)
    run: ClassVar[Callable[[VarlenCall], VarlenRun]] = _Run

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "cuDNN's ragged attention", least=(9, 0), head_dim=128)

    def missing(self) -> str | None:
        return importable("cudnn") or refused_cudnn()


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


def _bounds(window: tuple[int, int]) -> dict[str, Any]:
    """A window as options of a graph: causal, or open."""
    import cudnn

    if window == (-1, -1):
        return {}
    options = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
    if window[0] >= 0:
        options["diagonal_band_left_bound"] = window[0] + 1  # counts the token itself
    return options


def _build(direction: str, call: VarlenCall, q: torch.Tensor, k: torch.Tensor, scale: float) -> _Graph:
    import cudnn
    import torch

    number, dim = len(call.lengths), q.shape[2]
    kind = cudnn.data_type.BFLOAT16 if q.dtype == torch.bfloat16 else cudnn.data_type.HALF
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=kind, intermediate_data_type=single, compute_data_type=single, handle=_handle())
    constants: dict[Any, torch.Tensor] = {}

    def constant(values: torch.Tensor) -> Any:
        values = values.reshape(-1, 1, 1, 1).contiguous()
        tensor = graph.tensor_like(values)
        constants[tensor] = values
        return tensor

    cu_q, cu_k = call.cu_q.long(), call.cu_k.long()
    lengths = {"seq_len_q": constant(cu_q.diff().int()), "seq_len_kv": constant(cu_k.diff().int())}
    # Offsets count elements: a token has heads * dim of them in a tensor, heads in the LSE.
    offsets = {
        "q": constant(cu_q * q.shape[1] * dim), "kv": constant(cu_k * k.shape[1] * dim), "stats": constant(cu_q * q.shape[1])
    }  # fmt: skip

    def layout(side: str) -> tuple[list[int], list[int]]:
        heads, tokens, width = (k.shape[1], call.max_k, dim) if side == "kv" else (q.shape[1], call.max_q, dim)
        width = 1 if side == "stats" else width
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

    options: dict[str, Any] = {"attn_scale": scale, "use_padding_mask": True, **lengths, **_bounds(call.window)}
    handles = {"q": given("q", "q"), "k": given("k", "kv"), "v": given("v", "kv")}
    if direction == "forward":
        out, stats = graph.sdpa(**handles, generate_stats=True, name="forward", **options)
        handles |= {"o": wanted(out, "q"), "stats": wanted(stats, "stats")}
    else:
        handles |= {"o": given("o", "q"), "dO": given("dO", "q"), "stats": given("stats", "stats")}
        totals = {"max_total_seq_len_q": q.shape[0], "max_total_seq_len_kv": k.shape[0]}
        dq, dk, dv = graph.sdpa_backward(**handles, name="backward", **totals, **options)
        handles |= {"dQ": wanted(dq, "q"), "dK": wanted(dk, "kv"), "dV": wanted(dv, "kv")}
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    return _Graph(graph, handles, constants, workspace)


_handles: list[Any] = []


def _handle() -> Any:
    """One handle per process: a rank has one device."""
    if not _handles:
        import cudnn

        _handles.append(cudnn.create_handle())
    return _handles[0]
