"""What peers say they can run, and that one that is not here is an honest skip."""

from __future__ import annotations

import pytest
import torch

from lcbench.cp.base import Peer
from lcbench.cp.peers.library import Segments, segments
from lcbench.grid.build import build_strategy
from lcbench.masks.attention_sink import attention_sink
from lcbench.masks.band import Band, BandMask
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.masks import load, names

PEERS = [n for n in names("cp") if isinstance(build_strategy(load("cp", n)), Peer)]
LENGTHS = Explicit([30, 1, 33])


def problem_of(seqlen: int, dtype: str = "bfloat16") -> Problem:
    return Problem(seqlen, Heads(8, 4, 64), Scale(1, 4), dtype, "forward_backward")


def peer_of(name: str) -> Peer:
    peer = build_strategy(load("cp", name))
    assert isinstance(peer, Peer)
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
    tokens = sorted(t for rank in range(4) for t in peer.tokens(problem_of(64), rank).tolist())
    assert tokens == list(range(64))


@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch_cp"])
def test_peers_that_cannot_run_here_say_why(name: str) -> None:
    peer = peer_of(name)
    assert "runs on CUDA devices only" in str(peer.unavailable(problem_of(64), torch.device("cpu")))
    assert "takes bfloat16 and float16, not float32" in str(peer.unavailable(problem_of(64, "float32"), torch.device("cuda")))
    assert "cannot be imported" in str(peer.unavailable(problem_of(64), torch.device("cuda")))


def test_options_of_peers_name_themselves() -> None:
    for name, option in (("te_p2p", "comm"), ("ring_flash_attn_zigzag", "variant"), ("yunchang_usp", "ulysses_degree")):
        with pytest.raises(ValueError, match=rf"cp\.{option}="):
            build_strategy({**load("cp", name), option: "nothing"})
