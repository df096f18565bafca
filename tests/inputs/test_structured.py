"""Inputs with structure: rows are those of one tensor, and dense softmax finds what the generator states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.ring import Ring
from lcbench.inputs import marks
from lcbench.inputs.base import Inputs, Wanted
from lcbench.inputs.gaussian import Gaussian
from lcbench.inputs.marks import PARTS, Plan
from lcbench.inputs.structured import Structured
from lcbench.kernels.reference import Reference
from lcbench.masks.band import BandMask
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.measure.cell import measure_cell
from lcbench.measure.session import Gang
from lcbench.problem import Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.measure.faults import CPU, SETTINGS, refused

SEQLEN, ROWS, SEED = 4096, 96, 3
HEADS = Heads(8, 4, 64)
STRUCTURED = Structured()


def problem(seqlen: int = SEQLEN, heads: Heads = HEADS, dtype: str = "float64", batch: Batch | None = None) -> Problem:
    return Problem(seqlen, heads, Scale(1, 1), dtype, "forward_backward", batch=batch)


def drawn(name: str, of: Problem, tokens: np.ndarray, inputs: Inputs = STRUCTURED, **more: object) -> torch.Tensor:
    return inputs.draw(Wanted(name, tokens, of, SEED, CPU, **more))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Dense:
    """Softmax of some rows of the second half under a causal mask, (Hq, rows, keys)."""

    rows: np.ndarray
    weights: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def of(cls, inputs: Inputs, of: Problem, step: int = 0) -> Dense:
        rows = np.linspace(of.seqlen // 2, of.seqlen - 1, ROWS).astype(np.int64)
        q, k = drawn("q", of, rows, inputs, step=step), drawn("k", of, np.arange(of.seqlen), inputs, step=step)
        k = k.repeat_interleave(of.heads.q // of.heads.kv, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * of.softmax_scale
        if of.softmax.softcap:
            scores = of.softmax.softcap * torch.tanh(scores / of.softmax.softcap)
        scores = scores.masked_fill(torch.arange(of.seqlen) > torch.from_numpy(rows)[:, None], -torch.inf)
        return cls(rows, scores.softmax(-1), scores.logsumexp(-1))

    def share(self) -> torch.Tensor:
        """(Hq,): the share of a row's keys that hold 90 % of its weight."""
        heaviest = self.weights.sort(-1, descending=True).values.cumsum(-1)
        return (((heaviest < 0.9).sum(-1) + 1) / torch.from_numpy(self.rows + 1)).mean(-1)

    @property
    def distance(self) -> torch.Tensor:
        return torch.from_numpy(self.rows)[:, None] - torch.arange(self.weights.shape[-1])


@cache
def dense() -> Dense:
    return Dense.of(STRUCTURED, problem())


@cache
def plan() -> Plan:
    return STRUCTURED.plan(problem(), SEED)


# -- one tensor ------------------------------------------------------------------------------------------------------


BATCH = Batch((Requests(2, 40, 300), Requests(1, 200, 200)))


@cache
def whole(name: str, dtype: str, batch: Batch | None) -> torch.Tensor:
    of = problem(BATCH.tokens, Heads(6, 3, 24), dtype, batch)
    return drawn(name, of, np.arange(of.queries if name in ("q", "dout") else of.seqlen), step=1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["q", "k", "v", "dout"]),
    dtype=st.sampled_from(["float64", "bfloat16"]),
    batch=st.sampled_from([None, BATCH]),
    data=st.data(),
)
def test_rows_of_some_heads_are_those_of_the_whole_bit_for_bit(
    name: str, dtype: str, batch: Batch | None, data: st.DataObject
) -> None:
    of, every = problem(BATCH.tokens, Heads(6, 3, 24), dtype, batch), whole(name, dtype, batch)
    tokens = np.array(data.draw(st.lists(st.integers(0, len(every) - 1), min_size=1, max_size=50)))
    first = data.draw(st.integers(0, every.shape[1] - 1))
    heads = range(first, data.draw(st.integers(first + 1, every.shape[1])))
    assert torch.equal(drawn(name, of, tokens, heads=heads, step=1), every[tokens][:, heads.start : heads.stop])


@pytest.mark.slow
def test_a_row_costs_the_same_however_long_the_sequence_is(monkeypatch: pytest.MonkeyPatch) -> None:
    of = problem(1 << 20, Heads(2, 1, 16))
    STRUCTURED.plan(of, SEED)  # calibration is once
    looked: list[int] = []
    made = Plan._block
    monkeypatch.setattr(Plan, "_block", lambda self, block: looked.append(block) or made(self, block))
    fresh = replace(STRUCTURED.plan(of, SEED), blocks={})
    fresh.put("k", np.arange(700_000, 700_100), range(1), torch.zeros(100, 1, 16))
    assert looked == [700_000 // 256, 700_000 // 256 + 1][: len(looked)]
    assert looked


@pytest.mark.slow
def test_groups_layers_and_seeds_have_other_heads() -> None:
    of = problem(600)
    plans = [STRUCTURED.plan(of, 1), STRUCTURED.plan(of, 2), STRUCTURED.plan(of, 1, (0, 1)), STRUCTURED.plan(of, 1, layer=1)]
    assert len({each.heads for each in plans}) == len(plans)
    assert STRUCTURED.plan(of, 1).heads == plans[0].heads


# -- what is stated is what is there ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_share_of_critical_keys_is_what_is_stated() -> None:
    stated, found = np.array([head.share for head in plan().heads]), dense().share().numpy()
    np.testing.assert_allclose(found, stated, rtol=0.4)
    assert found.mean() == pytest.approx(STRUCTURED.critical, rel=0.15)
    assert found.max() / found.min() > 4  # heads differ
    even = Dense.of(Gaussian(), problem()).share()
    assert (even > 0.5).all()  # as independent numbers have it, which no selector can do anything with


@pytest.mark.slow
@pytest.mark.parametrize("critical", [0.03, 0.3])
def test_another_share_may_be_asked_for(critical: float) -> None:
    inputs = Structured(critical=critical, spread=0.3)
    assert Dense.of(inputs, problem(2048)).share().mean() == pytest.approx(critical, rel=0.25)


@pytest.mark.slow
def test_parts_have_the_weight_that_is_stated_and_was_aimed_at() -> None:
    made, found = plan(), dense()
    told = made.marks(np.arange(SEQLEN))
    for number, head in enumerate(made.heads):
        kv, weights = number // 2, found.weights[number]
        ask = torch.from_numpy(made.marks(found.rows).ask[:, kv])[:, None]
        topic = torch.from_numpy(told.topic[:, kv])
        near = (found.distance[..., None] - torch.tensor(head.slashes or [-SEQLEN])).abs().amin(-1) <= head.width
        of = {
            "sink": torch.arange(SEQLEN) < 4,
            "vertical": torch.from_numpy(told.vertical[:, kv] > 0),
            "local": found.distance < head.local,
            "slash": near & bool(head.slashes),
            "topic": ((topic - ask) % made.topics < head.topics) & (topic >= 0),
        }
        for part, mass, share in zip(PARTS, head.masses, head.parts, strict=True):
            assert float((weights * of[part]).sum(-1).mean()) == pytest.approx(mass, abs=0.15), (number, head.kind, part)
            assert share == 0 or mass > 0.25 * share, (number, head.kind, part)


def test_lines_are_found_where_they_are_stated() -> None:
    """By the weights alone: columns and diagonals that are stated carry many times what others do."""
    made, found = plan(), dense()
    vertical = made.marks(np.arange(SEQLEN)).vertical > 0
    seen = found.distance >= 0
    for number, head in enumerate(made.heads):
        if head.kind != "vertical_slash":
            continue
        weights, columns = found.weights[number], vertical[:, number // 2]
        mean = weights.sum(0) / seen.sum(0).clamp_min(1)
        assert mean[columns].mean() > 10 * mean[~columns].mean()
        plain = seen & torch.from_numpy(~columns) & (torch.arange(SEQLEN) >= 4)
        near = (found.distance[..., None] - torch.tensor(head.slashes)).abs().amin(-1) <= 2 * head.width
        off = weights[plain & ~near & (found.distance > 2 * head.local)].mean()
        for line in head.slashes:
            assert weights[plain & (found.distance == line)].mean() > 3 * off, (number, line)
    kinds = {head.kind for head in made.heads}
    assert kinds == set(marks.SHARES)


def test_first_tokens_are_sinks_and_only_of_their_request() -> None:
    of = problem(BATCH.tokens, Heads(6, 3, 24), batch=BATCH)
    sink = STRUCTURED.plan(of, SEED).marks(np.arange(of.seqlen)).sink
    assert np.flatnonzero(sink).tolist() == [0, 1, 2, 3, 300, 301, 302, 303, 600, 601, 602, 603]


def test_query_heads_of_a_group_attend_to_other_keys() -> None:
    weights = dense().weights
    for first in range(0, HEADS.q, 2):
        overlap = torch.minimum(weights[first], weights[first + 1]).sum(-1).mean()
        assert overlap < 0.6
        assert plan().heads[first] != plan().heads[first + 1]


@pytest.mark.slow
def test_a_sample_of_a_long_row_says_what_all_keys_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "WHOLE", 256)
    given = (0.1, 0.7, problem().requests, HEADS, Softmax(), SEED, (0, 0), 0)
    sampled = marks.plan.__wrapped__(*given)
    assert sampled.heads != plan().heads
    own = replace(STRUCTURED)
    monkeypatch.setattr(Structured, "plan", lambda self, *_: sampled)
    np.testing.assert_allclose(Dense.of(own, problem()).share().numpy(), [head.share for head in sampled.heads], rtol=0.45)
    assert Dense.of(own, problem()).share().mean() == pytest.approx(0.1, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("softmax", [Softmax(softcap=15.0), Softmax(scale=0.5)], ids=str)
def test_it_knows_how_scores_become_weights(softmax: Softmax) -> None:
    of = replace(problem(2048), softmax=softmax)
    assert Dense.of(STRUCTURED, of).share().mean() == pytest.approx(STRUCTURED.critical, rel=0.3)


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_drift_and_keep_their_lines() -> None:
    of = problem(1024)
    first, second, later = (Dense.of(STRUCTURED, of, step) for step in (0, 1, 12))
    near, far = ((other.lse - first.lse).abs().mean() for other in (second, later))
    assert 0 < near < 0.2 < far
    heaviest = first.weights.topk(20, -1).indices
    assert second.weights.gather(-1, heaviest).sum() > 0.9 * first.weights.gather(-1, heaviest).sum()
    still = Structured(drift=0.0)
    assert torch.equal(drawn("q", of, np.arange(64), still, step=5), drawn("q", of, np.arange(64), still))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"critical": 0}, {"critical": 0.7}, {"spread": -1}, {"spread": 3}, {"drift": -0.1}, {"drift": 2}]
)
def test_an_option_that_is_none_is_named(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"inputs.{name}={value} is no"):
        Structured(**options)


@pytest.mark.slow
def test_heads_without_room_and_latent_ones_are_refused() -> None:
    assert "keys of 8 numbers" in str(STRUCTURED.unsupported(problem(heads=Heads(2, 1, 8))))
    assert "latent" in str(STRUCTURED.unsupported(problem(heads=Heads(4, 1, 72, 64, latent=True))))
    for dim in (16, 24, 72, 128):
        of = problem(64, Heads(2, 2, dim))
        assert STRUCTURED.unsupported(of) is None
        assert drawn("k", of, np.arange(64)).isfinite().all()


# -- cells -----------------------------------------------------------------------------------------------------------


def cell(rank: int, ranks: int, dtype: str, mask: BandMask) -> None:
    of = Problem(mask.num_q, Heads(4, 2, 32), Scale(1, ranks), dtype, "forward_backward")
    work = Work(Attention(), of, lambda _: mask, Reference(), Ring("zigzag"), SETTINGS, SEED, inputs=STRUCTURED)
    found = measure_cell(work, Gang(rank, ranks, CPU, Groups(), []), lambda _: None)
    assert refused(found) is None, (dtype, refused(found))
    assert found.notes["inputs"] == STRUCTURED.states(of, SEED)
    assert len(found.notes["inputs"]["heads"]) == 4


def on_ranks(rank: int, ranks: int) -> None:
    for dtype, mask in (("float64", full(256)), ("bfloat16", causal(256))):
        cell(rank, ranks, dtype, mask)


@pytest.mark.slow
@pytest.mark.gloo
def test_cells_on_two_ranks_pass_their_check() -> None:
    run_ranks(2, on_ranks, 2)
