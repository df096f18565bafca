"""Batches, softmax and heads by role in a plan: what is typed, what it means, what it refuses and who refuses it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.advice.frameworks.base import Cannot, exported
from lcbench.advice.sizing import AtLengths, break_even
from lcbench.cp.peers.library import LibraryStrategy, refused_problem
from lcbench.grid.axes import CELL_GROUPS, value_of
from lcbench.grid.build import build_strategy, cell_mask
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.refusals import mask_of, pairs
from lcbench.grid.search import at
from lcbench.grid.values import MOST_NUMBER, parse_batch, parse_heads, parse_softmax
from lcbench.masks.band import BandMask
from lcbench.predict.predictor import Predictor
from lcbench.problem import PLAIN, Batch, Heads, Mesh, Problem, Requests, Scale, Softmax
from lcbench.report.page import _about
from lcbench.runs.passes import exchanged_bytes, flops, passes_on
from lcbench.testing.masks import load, names

BASE = ["cp=ring", "kernel=sdpa_math", "mask=causal", "heads=8x4x64", "scale=1x2", "site=plain", "direction=forward"]
MIXED = "2q2k_32q1s8k"
UNEQUAL, LATENT = Heads(16, 16, 192, 128), Heads(16, 1, 576, 512, latent=True)


def cells(*words: str) -> list[Cell]:
    return [each.cell for each in look([*BASE, *words]).cells]


def refused(*words: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        look([*BASE, *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is typed -------------------------------------------------------------------------------------------------------


sizes = st.one_of(st.integers(1, 5000), st.sampled_from([1 << 10, 1 << 20, 3 << 20, 1 << 16]))
groups = st.tuples(st.integers(1, 40), sizes, sizes).map(lambda found: Requests(found[0], min(found[1:]), max(found[1:])))
numbers = st.floats(0, MOST_NUMBER, exclude_min=True, allow_subnormal=True)


@given(st.lists(groups, min_size=1, max_size=6).map(lambda found: Batch(tuple(found))))
def test_a_batch_is_what_its_text_says(batch: Batch) -> None:
    if batch.tokens <= 1 << 30:
        assert parse_batch(str(batch)) == batch
    else:
        with pytest.raises(ValueError, match="at most 1024m"):
            parse_batch(str(batch))


@given(st.builds(Softmax, st.booleans(), st.one_of(st.just(0.0), numbers), st.one_of(st.none(), numbers)))
def test_a_softmax_is_what_its_text_says(softmax: Softmax) -> None:
    assert parse_softmax(str(softmax)) == softmax
    assert re.fullmatch(r"[a-z0-9._-]+", str(softmax)), "a word that needs no quotes"


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 600), st.integers(1, 600))
def test_heads_are_what_their_text_says(kv: int, each: int, dim: int, dim_v: int) -> None:
    heads = Heads(kv * each, kv, dim, dim_v, latent=kv == 1 and dim_v < dim)
    assert parse_heads(str(heads)) == heads
    assert (parse_heads(f"{kv * each}x{kv}x{dim}:{dim}"), heads.v) == (Heads(kv * each, kv, dim), dim_v)


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("32Q1S1048576", "32q1s1m"), ("1q8s64k", "q8s64k"), ("q4k_q4k_q4096", "3q4k"), ("2q8s8", "2q8"), ("q1s1536", "q1s1536"),
        ("q2k_32q1s8k_q2k", "q2k_32q1s8k_q2k"),
    ],
)  # fmt: skip
def test_one_batch_is_one_cell(typed: str, kept: str) -> None:
    (one,), (two,) = cells(f"batch={typed}"), cells(f"batch={kept}")
    assert one.id == two.id
    assert one.config["batch"] == kept


@pytest.mark.parametrize("word", ["sink_scale0.1", "scale.1_sink", "SINK_SCALE1e-1"])
def test_one_softmax_is_one_cell(word: str) -> None:
    word = word.replace("scale.1", "scale0.10")
    assert parse_softmax(word) == Softmax(sink=True, scale=0.1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["batch=8k"], "batch=8k is no batch of requests; write [count]q<new>[s<total>], several joined by _, such as 32q1s128k"),
        (["batch=32q0s8k"], "batch=32q0s8k: 32 requests of 0 new tokens are none"),
        (["batch=0q1s8k"], "batch=0q1s8k: 0 requests of 1 new tokens are none"),
        (["batch=q8s4"], "batch=q8s4: a request of 4 tokens in all cannot have 8 new ones"),
        (["batch=q8s"], "batch=q8s is no batch"),
        (["batch=q8__q8"], "batch=q8__q8 is no batch"),
        (["batch=[1,2]"], "is no batch"),
        (["batch=100000q1s2"], "has 100000 requests, and a batch has at most 65536"),
        (["batch=2000q1s1m"], "has 2097152000 tokens, and a batch has at most 1024m"),
        (["batch=none"], "batch=none is no batch"),
        (["batch=q8s64k", "seqlen=64k"], "seqlen=64k and batch=q8s64k are two ways to say one length; write one of them"),
        (["batch=q8s64k", "seqlen_per_rank=4k"], "seqlen_per_rank=4k and batch=q8s64k are two ways to say one length"),
        (["batch=null,q8s64k"], "no length is said: seqlen, seqlen_per_rank, batch are null; write one of them"),
        (["batch=null,q8s64k", "seqlen=64k"], "seqlen=64k and batch=q8s64k are two ways"),
        (["batch=q8s64k", "search=max_seqlen"], "search=max_seqlen looks for the longest sequence, and batch=q8s64k has its own"),
        (["softmax=hard"], "softmax=hard is neither plain nor some of sink, softcap<number> and scale<number> joined by _"),
        (["softmax=softcap0"], "softmax=softcap0 is neither plain"),
        (["softmax=scale"], "softmax=scale is neither plain"),
        (["softmax=scale1e99"], "numbers are above 0 and up to 1e+15"),
        (["softmax=plain_sink"], "softmax=plain_sink is neither plain"),
        (["softmax=sink_sink"], "softmax=sink_sink says sink twice; write it once"),
        (["heads=4x2x8:0"], "heads=4x2x8:0 is not <query>x<key/value>x<dim> or <query>x<key/value>x<key dim>:<value dim>"),
        (["heads=4x2x8:99999"], "heads and their dimensions are at most 65536 each"),
        (["heads=4x3x8:4"], "4 query heads are no multiple of 3 key/value heads"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_one_line(words: list[str], says: str) -> None:
    assert says in refused(*words)


def test_values_wider_than_keys_are_no_latent() -> None:
    assert parse_heads("4x2x8:16") == Heads(4, 2, 8, 16)
    assert parse_heads("4x1x8:16") == Heads(4, 1, 8, 16)
    assert parse_heads("128x1x576:512") == Heads(128, 1, 576, 512, latent=True)
    assert parse_heads("128x128x192:128") == Heads(128, 128, 192, 128)


# -- what it means -------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_length() -> None:
    (cell,) = cells(f"batch={MIXED}")
    assert cell.config["seqlen"] == 2 * 2048 + 32 * 8192
    problem = cell.problem
    assert (problem.seqlen, problem.queries, problem.rectangular) == (266240, 4128, True)
    assert problem.batch == Batch((Requests(2, 2048, 2048), Requests(32, 1, 8192)))
    assert problem.plane == 2 * 2048**2 + 32 * 8192
    assert cell.label == f"ring sdpa_math causal 260k 1x2 batch={MIXED}"
    assert [c.problem.queries for c in cells("batch=q8s64k,4q1s64k,2q4k")] == [8, 4, 8192]
    assert [c.problem.rectangular for c in cells("batch=q8s64k,2q4k")] == [True, False]


def test_cells_without_them_are_those_of_before() -> None:
    (before,) = cells("seqlen=4k")
    assert cells("seqlen=4k", "batch=null", "softmax=plain") == [before]
    assert not {"batch", "softmax"} & set(before.config)
    assert (before.problem.batch, before.problem.softmax) == (None, PLAIN)
    assert cells("seqlen=4k", "heads=8x4x64:64") == [before]
    (other,) = cells("seqlen=4k", "softmax=sink_softcap30")
    assert other.problem.softmax == Softmax(sink=True, softcap=30)
    assert other.id != before.id
    assert other.label == f"{before.label} softmax=sink_softcap30"


def test_numbers_of_a_cell_tell_its_batch_and_its_heads() -> None:
    (batch,), (sequence,) = cells("batch=2q4s64_q8", "heads=8x4x64:32"), cells("batch=null", "seqlen=4k")
    flat = batch.flat
    assert (flat["batch"], flat["softmax"], flat["requests"], flat["queries"], flat["seqlen"]) == ("2q4s64_q8", "plain", 3, 16, 136)
    assert (flat["head_dim"], flat["head_dim_v"]) == (64, 32)
    flat = sequence.flat
    assert (flat["batch"], flat["requests"], flat["queries"]) == ("null", 1, flat["seqlen"])


@pytest.mark.slow
def test_a_command_line_takes_the_place_of_an_experiments_way_to_say_the_length(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "lengths.yaml").write_text("# @package _global_\nhydra: {sweeper: {params: {seqlen: '1k,2k'}}}\n")
    (folder / "shares.yaml").write_text("# @package _global_\nseqlen_per_rank: 1k\n")
    (folder / "served.yaml").write_text("# @package _global_\nbatch: 4q1s64\n")

    def lengths(*words: str) -> list[int]:
        return [cell.config["seqlen"] for cell in cells(f"--config-dir={tmp_path}", *words)]

    assert lengths("+experiment=lengths", "batch=2q1s64") == [128]
    assert lengths("+experiment=shares", "batch=2q1s64") == [128]
    assert lengths("+experiment=served") == [256]
    assert lengths("+experiment=served", "seqlen=8k") == [8192]
    assert lengths("+experiment=served", "seqlen_per_rank=8k") == [16384]
    says = refused(f"--config-dir={tmp_path}", "+experiment=served", "search=max_seqlen")
    assert "search=max_seqlen looks for the longest sequence, and batch=4q1s64 has its own" in says


def test_every_replica_has_a_batch_and_every_tensor_parallel_rank_the_whole_latent() -> None:
    (cell,) = cells("batch=4q1s64", "mesh.dp=2", "mesh.tp=2", "scale=1x8", "heads=16x1x576:512")
    assert (cell.problem.batch, cell.problem.seqlen) == (cell.batch, 256)
    assert cell.problem.heads == Heads(8, 1, 576, 512, latent=True)
    assert Mesh(tp=4).heads(UNEQUAL) == Heads(4, 4, 192, 128)
    with pytest.raises(ValueError, match=re.escape("mesh.tp=3 does not divide the 16 query heads of heads=16x1x576:512")):
        Mesh(tp=3).heads(LATENT)
    with pytest.raises(ValueError, match="does not divide the 1 key/value heads"):
        Mesh(tp=2).heads(Heads(16, 1, 64))


def test_the_mask_is_that_of_the_batch() -> None:
    (cell,) = cells("batch=3q4s16_q8")
    mask = mask_of(cell)
    assert (mask.num_q, mask.num_k) == (20, 56)
    assert pairs(cell) == 8 * (3 * (13 + 14 + 15 + 16) + 36)
    assert flops(cell) == 4 * 64 * pairs(cell)
    (two,) = cells("batch=4q4s14")  # as many tokens, another batch
    assert two.config["seqlen"] == cell.config["seqlen"]
    assert mask_of(two).num_q == 16


def test_requests_have_documents_of_their_own_and_draws_are_others() -> None:
    (cell,) = cells("batch=3q64s64", "mask=causal_document", "lengths=uniform", "lengths.high=16", "mask.samples=2")
    drawn = [cell_mask(cell, number) for number in (0, 1, 0)]
    assert all(isinstance(mask, BandMask) for mask in drawn)
    first, second, again = (mask.crop(0, 192, 0, 192).bands.tolist() for mask in drawn if isinstance(mask, BandMask))
    assert first == again != second
    starts = [{band[0] % 64 for band in first if band[0] // 64 == request} for request in range(3)]
    assert starts[0] != starts[1] != starts[2]
    # The first request is drawn as the sequence alone is.
    (alone,) = cells("seqlen=64", "mask=causal_document", "lengths=uniform", "lengths.high=16")
    mask = cell_mask(alone)
    assert isinstance(mask, BandMask)
    assert mask.bands.tolist() == [band for band in first if band[0] < 64]


def test_a_request_that_has_no_such_mask_is_named() -> None:
    plan = look([*BASE, "mask=star_attention", "batch=2q1s4k_q8s64"])
    (planned,) = plan.cells
    assert planned.skip == "mask star_attention: request 3 of 3, q8s64: query=128 is longer than seqlen=64"


def test_a_mask_of_ones_own_is_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_requests.py").write_text(
        "from lcbench.masks.band import Band, BandMask\n\n\n"
        "def near(seqlen: int, *, reach: int = 2) -> BandMask:\n"
        "    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, -reach, 0)])\n\n\n"
        "def wrong(seqlen: int) -> BandMask:\n"
        "    return BandMask.of(8, 8, [Band(0, 8, 0, 8)])\n"
    )
    (tmp_path / "mask").mkdir()
    for name in ("near", "wrong"):
        (tmp_path / "mask" / f"{name}.yaml").write_text(f"_target_: own_requests.{name}\nname: {name}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (cell,) = cells(f"--config-dir={tmp_path}", "mask=near", "batch=2q2s8_q4")
    assert mask_of(cell).pairs(1) == 2 * 6 + (1 + 2 + 3 + 3)
    says = refused(f"--config-dir={tmp_path}", "mask=wrong", "batch=q1s8_q1s9")
    assert "gives a mask of 8 x 8 tokens at seqlen=9" in says


# -- who takes it --------------------------------------------------------------------------------------------------------


def test_a_training_step_takes_neither() -> None:
    words = ["workload=block", "model=tiny", "heads=null", "direction=forward_backward", "dtype=float32"]
    base = [word for word in BASE if not word.startswith(("heads", "direction"))]
    for word, says in (
        ("batch=2q64", "batch=2q64: a training step is of one sequence, all of whose tokens are computed"),
        ("softmax=sink", "softmax=sink: layers of its models have a plain softmax"),
    ):
        (planned,) = look([*base, *(w for w in words if w != "heads=null"), word]).cells
        assert planned.skip == f"workload block: {says}"


@pytest.mark.parametrize("name", [n for n in names("cp") if isinstance(build_strategy(load("cp", n)), LibraryStrategy)])
def test_a_library_takes_what_it_knows(name: str) -> None:
    peer = build_strategy(load("cp", name))
    problem = Problem(4096, Heads(16, 16, 128), Scale(2, 4), "bfloat16", "forward_backward")
    (cell,) = cells("batch=4q1k")
    square = replace(problem, batch=cell.batch)
    full = BandMask.of(4096, 4096, [(0, 4096, 0, 4096, -4096, 4096)])
    served = replace(problem, batch=Batch((Requests(4, 8, 1024),)))
    assert "batch=4q8s1k has keys without queries" in str(peer.unsupported(served, full))
    assert "keys without queries" not in str(peer.unsupported(square, mask_of(cell)))
    assert "are numbers of one latent" in str(peer.unsupported(replace(problem, heads=LATENT), full))
    says = str(peer.unsupported(replace(problem, heads=UNEQUAL), full))
    assert ("has 192 and 128" in says) is (name not in ("te_p2p", "torch_cp"))
    assert peer.unsupported(replace(problem, softmax=Softmax(scale=0.1)), full) == peer.unsupported(problem, full)
    for softmax in (Softmax(sink=True), Softmax(softcap=30.0)):
        assert f"softmax={softmax}" in str(peer.unsupported(replace(problem, softmax=softmax), full))


def test_a_plain_problem_is_refused_by_nobodys_rule() -> None:
    problem = Problem(64, Heads(4, 2, 8), Scale(1, 2), "bfloat16", "forward")
    assert refused_problem(problem, value_dims=False) is None
    assert refused_problem(replace(problem, heads=Heads(4, 2, 8, 16)), value_dims=True) is None


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("batch=4q1k", "batch=4q1k is requests, and what is exported is plain attention of whole sequences"),
        ("softmax=sink", "softmax=sink is more than a plain softmax"),
        ("heads=8x4x64:32", "heads=8x4x64:32 has values of another dimension than its keys"),
    ],
)
def test_what_frameworks_are_not_told_is_refused(word: str, says: str) -> None:
    base = [each for each in BASE if not each.startswith(("heads", "scale", "kernel"))]
    (planned,) = look([*base, "kernel=sdpa_math", "scale=1x1", "cp=none", word]).cells
    if planned.skip is not None:
        pytest.skip(planned.skip)  # by its kernel, on which the rest does not depend
    with pytest.raises(Cannot, match=re.escape(says)):
        exported(planned.cell, "te")


# -- what is computed from sizes -----------------------------------------------------------------------------------------


def test_keys_without_queries_are_predicted_and_estimated_alike() -> None:
    (served, whole) = cells("batch=16q1s4k,16q4k", "cp=none", "scale=1x1")
    predictor = Predictor.of("h100")
    times = [predictor.predict(cell, memory=False).seconds for cell in (served, whole)]
    assert 0 < times[0] < times[1]
    expected = passes_on(None).of(served)
    assert expected.simulated
    assert expected.flops == 4 * 64 * 8 * 16 * 4096
    assert 0 < expected.seconds < passes_on(None).of(whole).seconds


def test_bytes_that_move_are_of_keys_and_values_as_they_are_stored() -> None:
    problem = Problem(1 << 10, UNEQUAL, Scale(1, 4), "bfloat16", "forward")
    assert exchanged_bytes(problem) == 768 * 16 * (192 + 128) * 2
    assert exchanged_bytes(replace(problem, heads=LATENT)) == 768 * 576 * 2


def test_cells_of_a_batch_have_no_other_length() -> None:
    (cell,) = cells("batch=4q64", "cp=none", "scale=1x1")
    for ask in (lambda: at(cell, 128), lambda: break_even(cell, cell, AtLengths(Predictor.of("h100")))):
        with pytest.raises(ValueError, match="batch=4q64 has its lengths: its cells have no other length"):
            ask()


def test_bounds_of_a_batch_add_up() -> None:
    batch = parse_batch(MIXED)
    assert batch is not None
    assert np.diff(batch.q_bounds).tolist() == [2048, 2048] + [1] * 32
    assert (batch.q_bounds[-1], batch.k_bounds[-1]) == (batch.queries, batch.tokens)
    assert batch.plane == int((batch.new * batch.total).sum())


def test_a_page_tells_the_batch_that_all_cells_have() -> None:
    def about(*words: str) -> str:
        rows = [
            {
                **cell.flat,
                "mesh": value_of(cell.config, "mesh"),
                **{f"what_{g}": value_of(cell.config, g) for g in CELL_GROUPS},
            }
            for cell in cells(*words)
        ]
        return _about(pd.DataFrame(rows), {})[0]

    served = about("batch=4q1s64", "cp=ring,ulysses", "softmax=sink", "mesh.dp=2")
    assert served.endswith("heads 8x4x64, batch 4q1s64, mesh dp=2, softmax sink")
    assert "batch" not in about("batch=4q1s64,8q1s64")
    assert about("seqlen=4k").endswith("heads 8x4x64")
