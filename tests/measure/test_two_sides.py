"""Queries against a cache, head dims by role, sinks and softcaps: what the check says is exact is what dense float64 gives."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from lcbench.inputs.drawing import draw, draw_sink
from lcbench.masks.band import BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.measure import reference
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.owners import Owners, owners
from lcbench.measure.probe import Probe, impossible
from lcbench.measure.ranks import EVERY
from lcbench.measure.reference import Exact, Shard, columns, rows, sinks
from lcbench.problem import Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.held import Held, Part
from lcbench.testing.masks import causal_batch
from tests.measure.sides import BATCHES, CPU, SHAPES, dense, owned, problem, shard

CASES = [(batch, shape) for batch in (*BATCHES, "square") for shape in SHAPES]


def masked(batch: str, shape: str) -> tuple[Problem, Mask]:
    if batch == "square":
        return problem(None, shape), causal(90)
    return problem(BATCHES[batch], shape), causal_batch(BATCHES[batch])


def near(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape, name
    error = torch.where(got == want, 0.0, (got - want).abs())
    assert error.max() <= 1e-12 * want[torch.isfinite(want)].abs().amax().clamp_min(1.0), f"{name} is off by {float(error.max())}"


def digest(x: torch.Tensor) -> str:
    return hashlib.blake2b(x.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def test_inputs_are_the_numbers_that_they_always_were() -> None:
    tokens = np.random.default_rng(1).permutation(700)[:300]
    wanted = {
        ("float64", (0, 0)): ["b2bbe7e6abcf2a35", "16cea676882a5306", "a858f495e54ec159", "1c05ea9c0eb337fa"],
        ("float64", (1, 2)): ["703d4c8bc655cb60", "f715392d8f0ca35a", "c4a3f365ffde170b", "fef8c5a65ef2cae9"],
        ("bfloat16", (0, 0)): ["505127063394c7b4", "08ce5c1e5d2cdfbc", "d538ac48ac68197e", "44d139601c3d2ec8"],
        ("bfloat16", (1, 2)): ["1ca2fcf68e10c941", "64ad7453787059e5", "5045aaf4a04f68b7", "15959b2679f23ded"],
    }
    for (dtype, group), want in wanted.items():
        of = Problem(700, Heads(4, 2, 16), Scale(1, 2), dtype, "forward_backward")
        assert [digest(draw(name, tokens, of, 5, CPU, group)) for name in ("q", "k", "v", "dout")] == want


def test_a_rank_that_has_some_heads_draws_the_numbers_of_these() -> None:
    of = problem(BATCHES["mixed"], "MLA, own scale")
    tokens = np.array([3, 80, 81, 2])
    for name in ("q", "k", "v", "dout"):
        whole = draw(name, tokens, of, 5, CPU)
        assert whole.shape == (4, 4, 16 if name in ("v", "dout") else 24)
        assert torch.equal(draw(name, tokens, of, 5, CPU, heads=range(1, 3)), whole[:, 1:3])
    latent = problem(BATCHES["mixed"], "latent")
    assert torch.equal(draw("v", tokens, latent, 5, CPU), draw("k", tokens, latent, 5, CPU)[..., :32])


def test_sinks_are_about_as_heavy_as_the_keys_of_a_row() -> None:
    of = Problem(8, Heads(4096, 1, 8), Scale(1, 1), "bfloat16", "forward", softmax=Softmax(sink=True))
    sink = draw_sink(of, 1000.0, 5, CPU)
    assert sink.shape == (4096,)
    assert sink.dtype == torch.float32
    assert abs(float(sink.mean()) - math.log(1000)) < 0.1
    assert torch.equal(sink, draw_sink(of, 1000.0, 5, CPU))
    assert not torch.equal(sink, draw_sink(of, 1000.0, 6, CPU))


@pytest.mark.parametrize(("batch", "shape"), CASES)
def test_the_reference_is_dense_attention(batch: str, shape: str) -> None:
    of, mask = masked(batch, shape)
    given = shard(of, mask, np.arange(of.queries), np.arange(of.seqlen))
    want = dense(of, mask, given)
    row, column = np.unique(np.arange(0, of.queries, 3)), np.unique(np.arange(0, of.seqlen, 7))
    found = exact(of, mask, given, row, column, want)
    for name, tensor in found.items():
        near(name, tensor.value, want[name] if name == "dsink" else want[name][row if name in ("out", "lse", "dq") else column])
    assert set(found) == set(want)


def exact(
    of: Problem, mask: Mask, given: Shard, row: np.ndarray, column: np.ndarray, want: dict[str, torch.Tensor]
) -> dict[str, Exact]:
    found = rows(mask, of, given, row, EVERY, scores=True)
    found |= columns(mask, of, given, column, EVERY, want["lse"], want["out"], scores=True)
    return found | ({"dsink": sinks(of, given, EVERY, want["lse"], want["out"])} if of.softmax.sink else {})


@pytest.mark.parametrize("shape", ["latent, sink, softcap", "MLA, own scale"])
@pytest.mark.parametrize("heads_at_a_time", [1, 2, 5])
def test_parts_of_heads_give_what_the_whole_gives(shape: str, heads_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many query heads that share a key/value head some are in float64 at a time."""
    of, mask = masked("mixed", shape)
    given = shard(of, mask, np.arange(of.queries), np.arange(of.seqlen))
    want, row, column = dense(of, mask, given), np.arange(0, of.queries, 9), np.arange(0, of.seqlen, 11)
    whole = exact(of, mask, given, row, column, want)
    monkeypatch.setattr(reference, "HEAD_ELEMENTS", heads_at_a_time * of.queries * of.heads.dim)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", {"cpu": 5 * of.seqlen})
    parts = exact(of, mask, given, row, column, want)
    for name, one in whole.items():
        for what in ("value", "spread", "common", "floor", "count"):
            assert torch.allclose(getattr(one, what), getattr(parts[name], what), rtol=1e-12, atol=1e-12), (name, what)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(("batch", "shape"), CASES)
def test_what_a_probe_expects_is_what_dense_attention_gives(batch: str, shape: str, zero: bool) -> None:
    of, mask = masked(batch, shape)
    queries, keys = np.random.default_rng(0).permutation(of.queries), np.random.default_rng(1).permutation(of.seqlen)
    given = shard(of, mask, queries, keys)
    probe = Probe(mask, of, owned(queries, keys), 5, CPU, lambda x: x, zero=zero, keys=mask.density * mask.num_k)
    probe.fill(given)
    if of.heads.latent:
        assert torch.equal(given.v, given.k[..., : of.heads.v])
    q_back, k_back = np.argsort(queries), np.argsort(keys)
    assert given.dout is not None
    whole = Shard(given.held, given.q[q_back], given.k[k_back], given.v[k_back], given.dout[q_back], given.sink)
    want = dense(of, mask, whole)
    for head in range(of.heads.q):
        expected = probe.rows(head)
        near("lse", expected.lse, want["lse"][queries, head])
        near("out", expected.out, want["out"][queries, head])
        near("dq", probe.gradient(head)[0].value, want["dq"][queries, head, probe.scored])
    for head in range(of.heads.kv):
        of_keys = probe.columns(head)
        near("dk", of_keys.dk.value, want["dk"][keys, head, probe.scored])
        dv = want["dk"][..., : of.heads.v] if of.heads.latent else want["dv"]
        near("dv", of_keys.dv.value, dv[keys, head])
    if of.softmax.sink:
        near("dsink", probe.sinks()[0], want["dsink"])


def test_a_problem_without_a_closed_form_says_why() -> None:
    assert impossible(Problem(8, Heads(2, 1, 16, latent=True), Scale(1, 1), "float32", "forward")) == (
        "every number of a key of heads=2x1x16 is one of its value, so none is left for scores that are known"
    )
    huge = Problem(8, Heads(2, 1, 64), Scale(1, 1), "float16", "forward", softmax=Softmax(scale=1000.0))
    assert "which float16 does not hold exactly" in str(impossible(huge))
    assert impossible(problem(BATCHES["decode"], "latent")) is None


def test_flops_are_those_of_products_by_their_dims() -> None:
    assert forward_flops(10.0, Heads(2, 1, 64)) == 4 * 10 * 64
    assert backward_flops(10.0, Heads(2, 1, 64)) == 2.5 * forward_flops(10.0, Heads(2, 1, 64))
    assert forward_flops(10.0, Heads(2, 2, 192, 128)) == 10 * (2 * 192 + 2 * 128)
    # Scores again, dq and dk; dout with values, and weights with dout.
    assert backward_flops(10.0, Heads(2, 2, 192, 128)) == 10 * (3 * 2 * 192 + 2 * 2 * 128)


# -- who holds what ----------------------------------------------------------------------------------------------------


def found(held: Held, mask: Mask, batch: Batch | None = None) -> Owners:
    of = Problem(mask.num_k, Heads(4, 2, 8), Scale(1, 1), "float32", "forward", batch=batch)
    return owners(held, mask, of, CPU, EVERY)


def test_tokens_of_both_sides_are_owned_by_one_rank() -> None:
    batch = Batch((Requests(2, 3, 10),))
    queries, keys, mask = Part(np.arange(6)), Part(np.arange(20)), causal_batch(batch)
    good = found(Held(queries, keys, queries), mask, batch=batch)
    assert (good.wrong, good.queries_once, good.keys_once, good.by_tokens) == (None, True, True, True)
    short = found(Held(queries, Part(np.arange(19)), queries), mask, batch=batch)
    assert short.wrong == "1 of 20 keys are held by no rank, the first of them 19"
    twice = found(Held(queries, Part(np.r_[np.arange(20), 4]), queries), mask, batch=batch)
    assert (twice.wrong, twice.keys_once, twice.by_tokens) == (None, False, False)
    beyond = found(Held(queries, Part(np.arange(21)), queries), mask, batch=batch)
    assert beyond.wrong == "1 keys that ranks hold are not among the 20 of the sequence"
    results = found(Held(queries, keys, Part(np.arange(5))), mask, batch=batch)
    assert results.wrong == "1 of 6 tokens are not owned by exactly one rank; token 5 by 0"
    absent = found(Held(Part(np.arange(1, 6)), keys, queries), mask, batch=batch)
    assert absent.wrong == "1 of 6 queries are held by no rank, the first of them 0"


def test_a_key_that_nobody_sees_need_not_be_held() -> None:
    mask = BandMask.of(8, 8, [(0, 8, 0, 5, -100, 100)])
    own = Part(np.arange(8))
    assert found(Held(own, Part(np.arange(5)), own), mask).wrong is None
    assert found(Held(own, Part(np.arange(4)), own), mask).wrong == "1 of 8 keys are held by no rank, the first of them 4"


def test_every_head_of_a_token_is_owned() -> None:
    own, mask = Part(np.arange(8)), causal(8)
    half = found(Held(own, own, Part(np.arange(8), range(0, 2))), mask)
    assert half.wrong == "8 of 8 tokens of heads 2 to 3 are not owned by exactly one rank; token 0 by 0"
    assert found(Held(own, Part(np.arange(8), range(1, 2)), own), mask).wrong == (
        "8 of 8 keys of heads 0 to 0 are held by no rank, the first of them 0"
    )
    beyond = found(Held(own, own, Part(np.arange(8), range(0, 5))), mask)
    assert beyond.wrong == "8 tokens that ranks own of heads 4 to 4 are not among the 8 of the sequence"
    assert found(Held(own, own, Part(np.arange(8), range(0, 4))), mask).wrong is None
    # Map 0 of two sees no key of the second half.
    maps = block_random(8, heads=Heads(4, 2, 8), seed=(0, 0), density=0.5, block_size=4, sizes="uniform", per="kv_head")
    assert found(Held(own, own, own), maps).wrong is None
