"""What peers say they can run, and that one that is not here is an honest skip."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from lcbench.cp.base import Place
from lcbench.cp.peers.library import LibraryStrategy, Segments, segments
from lcbench.cp.peers.torch_cp import ROTATIONS, TorchCP
from lcbench.grid.build import build_strategy
from lcbench.grid.command_line import look
from lcbench.grid.expand import Planned
from lcbench.kernels.base import Platform, refusal
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.attention_sink import attention_sink
from lcbench.masks.band import Band, BandMask
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit
from lcbench.masks.sliding_window import sliding_window
from lcbench.predict.machines import machine_of
from lcbench.predict.predictor import CannotPredict, Predictor
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.fake_libraries import flash_attn2
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from tests.cp.test_regressions import dense, errors, results, tensors

PEERS = [n for n in names("cp") if isinstance(build_strategy(load("cp", n)), LibraryStrategy)]
CUDA = Platform("cuda", (9, 0), 80 << 30)
LENGTHS = Explicit([30, 1, 33])


def problem_of(seqlen: int, dtype: str = "bfloat16") -> Problem:
    return Problem(seqlen, Heads(8, 4, 64), Scale(1, 4), dtype, "forward_backward")


def peer_of(name: str) -> LibraryStrategy:
    peer = build_strategy(load("cp", name))
    assert isinstance(peer, LibraryStrategy)
    return peer


def test_segments_are_found_and_nothing_else() -> None:
    assert segments(full(64)) == Segments([0, 64], False)
    assert segments(causal(64)) == Segments([0, 64], True)
    assert segments(causal_document(64, seed=(0, 0), lengths=LENGTHS)) == Segments([0, 30, 31, 64], True)
    assert segments(document(64, seed=(0, 0), lengths=LENGTHS)) == Segments([0, 30, 31, 64], False)
    assert segments(sliding_window(64, left=8, right=0)) is None
    assert segments(attention_sink(64, sink=2, left=8)) is None
    assert segments(BandMask.of(64, 64, [Band(0, 32, 0, 32, hi=0), Band(32, 64, 32, 64)])) is None  # one of each kind
    assert segments(BandMask.of(64, 64, [Band(0, 32, 0, 32, hi=0)])) is None  # half of the rows see nothing


@pytest.mark.parametrize("name", PEERS)
def test_peers_refuse_masks_that_they_would_drop(name: str) -> None:
    peer = peer_of(name)
    assert peer.unsupported(problem_of(64), causal(64)) is None or name == "te_a2a_p2p"
    for mask in (sliding_window(64, left=8, right=0), attention_sink(64, sink=2, left=8)):
        assert "only" in str(peer.unsupported(problem_of(64), mask))
    documents = causal_document(64, seed=(0, 0), lengths=LENGTHS)
    assert (peer.unsupported(problem_of(64), documents) is None) == (name == "ring_flash_attn_llama3")
    assert "60" in str(peer.unsupported(problem_of(60), causal(60)))
    # Every token has one owner.
    tokens = sorted(t for rank in range(4) for t in peer.layout(problem_of(64)).tokens(rank).tolist())
    assert tokens == list(range(64))


@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch_cp"])
def test_peers_that_cannot_run_here_say_why(name: str) -> None:
    peer = peer_of(name)
    assert "runs on CUDA devices only" in str(refusal(peer, problem_of(64), torch.device("cpu")))
    assert "runs on CUDA devices only" in str(peer.unavailable(problem_of(64), Platform("cpu")))
    assert "takes bfloat16 and float16, not float32" in str(peer.unavailable(problem_of(64, "float32"), CUDA))
    # What is installed here is another question than what a machine can do.
    assert peer.unavailable(problem_of(64), CUDA) is None
    assert "cannot be imported" in str(peer.missing())


@pytest.mark.parametrize("name", PEERS)
def test_a_prediction_does_not_ask_what_is_installed_and_respects_what_a_library_refuses(name: str) -> None:
    words = [f"cp={name}", "mask=causal", "scale=2x4", "heads=16x8x64", "kernel=flash_attn3", "seqlen=48k"]

    def cell(*more: str) -> Planned:
        (found,) = look([*words, *more]).cells
        return found

    h100 = Predictor.of("h100")
    assert cell().skip is None
    assert h100.refusal(cell().cell) is None
    assert h100.predict(cell().cell, memory=False).seconds > 0
    if peer_of(name).own_kernel:
        assert "cp" in str(replace(h100, machine=machine_of("this")).refusal(cell("kernel=sdpa_math").cell))
        refused = h100.refusal(cell("kernel=sdpa_math", "dtype=float32").cell)
        assert refused == f"cp {name}: {peer_of(name).unavailable(problem_of(64, 'float32'), CUDA)}"
    window = cell("mask=sliding_window")
    assert window.skip is not None
    with pytest.raises(CannotPredict, match="only"):
        h100.predict(window.cell)


def check_values_of_another_dimension(rank: int, ranks: int) -> None:
    problem = Problem(64, Heads(4, 2, 24, 16), Scale(1, ranks), "float64", "forward_backward")
    inputs, groups = tensors(problem), Groups()
    for rotate, mask in product(ROTATIONS, (causal(64), full(64))):
        peer = TorchCP(rotate=rotate)  # type: ignore[arg-type]
        assert peer.unsupported(problem, mask) is None
        run = peer.start(problem, mask, SDPAFlash(), Place(rank, torch.device("cpu"), groups))
        found = errors(results(run, run.tokens, inputs), dense(problem, mask, inputs), run.tokens)
        assert max(found.values()) <= 1e-12, (rotate, found)


@pytest.mark.slow
@pytest.mark.gloo
def test_torch_runs_values_of_another_dimension_on_a_kernel_that_adds_zeros() -> None:
    """On CPU ``sdpa_flash`` knows one head dim, so the peer has to prepare it as all strategies do."""
    run_ranks(2, check_values_of_another_dimension, 2)


class DotProductAttention(torch.nn.Module):
    """Transformer Engine's, as far as its context parallelism is given to it."""

    given: ClassVar[list[Any]] = []

    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None, attention_dropout: float = 0.0,
        qkv_format: str = "sbhd", attn_mask_type: str = "causal", softmax_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert (qkv_format, attention_dropout) == ("bshd", 0.0)

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: list[int] | None, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        self.given.append((cp_group, cp_global_ranks))


def check_groups_of_transformer_engine(rank: int, ranks: int) -> None:
    module: Any = ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = DotProductAttention
    sys.modules.update({"transformer_engine": ModuleType("transformer_engine"), module.__name__: module})
    torch.cuda.Stream = lambda: None  # type: ignore[assignment, misc]
    groups, found = Groups(), {}
    for name in (*(name for name in PEERS if name.startswith("te_")), "te_p2p", "te_a2a_p2p"):
        comm = load("cp", name)["comm"]
        nodes = 2 if comm == "a2a+p2p" else 1
        problem = Problem(64, Heads(8, 4, 64), Scale(nodes, ranks // nodes), "bfloat16", "forward_backward")
        peer = peer_of(name)
        assert peer.unsupported(problem, causal(64)) is None
        assert peer.unavailable(problem, CUDA) is None
        assert peer.missing() is None
        peer.start(problem, causal(64), SDPAFlash(), Place(rank, torch.device("cpu"), groups))
        given, numbers = DotProductAttention.given.pop()
        assert numbers == [0, 1, 2, 3]
        members = [dist.get_process_group_ranks(group) for group in (given if isinstance(given, list) else [given])]
        # The exchange of heads is first, among neighbours.
        assert members == (
            [[rank - rank % 2, rank - rank % 2 + 1], [rank % 2, rank % 2 + 2]] if comm == "a2a+p2p" else [[0, 1, 2, 3]]
        )
        if name in found:
            assert found[name] == given, "communicators are kept"
        found[name] = given
    # The default group, one of all ranks, two pairs of neighbours and two rings.
    assert len(dist.distributed_c10d._world.pg_names) <= 6
    # One of two context-parallel groups gets its own, and its ranks as all are counted.
    problem = Problem(64, Heads(8, 4, 64), Scale(1, 2), "bfloat16", "forward_backward")
    place = Place(rank // 2, torch.device("cpu"), groups.within([(0, 2), (1, 3)]))
    peer_of("te_p2p").start(problem, causal(64), SDPAFlash(), place)
    given, numbers = DotProductAttention.given.pop()
    assert dist.get_process_group_ranks(given) == numbers == [rank % 2, rank % 2 + 2]


@pytest.mark.slow
@pytest.mark.gloo
def test_transformer_engine_gets_the_same_communicators_in_every_cell() -> None:
    run_ranks(4, check_groups_of_transformer_engine, 4)


def test_ring_flash_attention_is_imported_without_its_adapter_for_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own ``__init__`` imports an adapter, which asks transformers for names that are gone."""
    package = tmp_path / "ring_flash_attn"
    (package / "adapters").mkdir(parents=True)
    functions = "ring_flash_attn_func", "zigzag_ring_flash_attn_func", "stripe_flash_attn_func"
    written = [f"def {name}(q, k, v, softmax_scale=None, causal=False, group=None): pass" for name in functions]
    written += [
        "def llama3_flash_attn_prepare_cu_seqlens(cu, causal, rank, ranks): pass",
        "def llama3_flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, heads_k_stride, local_k_slice, "
        "softmax_scale=None, causal=False, group=None): pass",
        "from .adapters import substitute_hf_flash_attn, update_ring_flash_attn_params",
    ]
    (package / "__init__.py").write_text("\n".join(written))
    (package / "adapters" / "__init__.py").write_text("from transformers.modeling_flash_attention_utils import gone_long_ago")
    monkeypatch.syspath_prepend(tmp_path)
    for name, module in flash_attn2.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("ring_flash_attn", "ring_flash_attn.adapters"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    for name in (name for name in PEERS if name.startswith("ring_flash_attn")):
        assert peer_of(name).missing() is None
    # Another release, whose function takes other arguments.
    library = sys.modules["ring_flash_attn"]
    monkeypatch.setattr(library, "stripe_flash_attn_func", lambda q, k, v, dropout_p=0.0, causal=False: None)
    assert "softmax_scale" in str(peer_of("ring_flash_attn_stripe").missing())


def test_options_of_peers_name_themselves() -> None:
    for name, option in (("te_p2p", "comm"), ("ring_flash_attn_zigzag", "variant"), ("yunchang_usp", "ulysses_degree")):
        with pytest.raises(ValueError, match=rf"cp\.{option}="):
            build_strategy({**load("cp", name), option: "nothing"})
