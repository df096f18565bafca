"""KV parallelism and prefill context parallelism, every option: on real gloo ranks against dense float64, and bytes by formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lcbench.cp.base import Scheduled
from lcbench.cp.kvp import KVP
from lcbench.cp.pcp import PCP
from lcbench.grid.build import build_strategy
from lcbench.masks.causal import causal
from lcbench.problem import Batch, Heads, Problem, Requests, Scale, Softmax
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.lowering import OPERATIONS, collectives
from lcbench.schedule.verify import verify
from lcbench.testing.masks import load
from lcbench.testing.spawn import run_ranks
from tests.cp.batches import BATCHES, CPU, HEADS, NAIVE, SEES, dense, drawn, mask_of, near, seen

STRATEGIES: list[Scheduled] = [
    KVP(), KVP(tokens_per_rank=8), KVP(interleave=1), KVP(interleave=1, tokens_per_rank=10), KVP(interleave=4, lowering="p2p"),
    PCP(), PCP("ring"), PCP(interleave=1), PCP("ring", interleave=1), PCP("ring", interleave=3),
]  # fmt: skip


def check(rank: int, ranks: int) -> None:
    groups = Groups()
    for number, (batch_name, heads_name) in enumerate((b, h) for b in BATCHES for h in HEADS):
        batch, mask_name = BATCHES[batch_name], list(SEES)[number % len(SEES)]
        family, sees = SEES[mask_name]
        softmax = Softmax(sink=number % 2 == 0)
        of = Problem(batch.tokens, HEADS[heads_name], Scale(1, ranks), "float64", "forward", batch=batch, softmax=softmax)
        inputs, mask = drawn(of), mask_of(batch, family)
        want = dense(of, seen(batch, sees), inputs)
        for place, strategy in enumerate(STRATEGIES):
            if ranks > 2 and (number + place) % 2:  # each strategy meets half of the cases
                continue
            case = f"{strategy} {batch_name} {heads_name} {mask_name} P={ranks}"
            schedule = strategy.schedule(of, mask)
            run = Executor(schedule, mask, NAIVE, of, rank=rank, device=CPU, groups=groups, lowering=strategy.lowering)
            queries, keys = run.held.q.tokens, run.held.kv.tokens
            k = inputs["k"][keys]
            v = k[..., : of.heads.v] if of.heads.latent else inputs["v"][keys]
            out, saved = run.forward(inputs["q"][queries], k, v, inputs["sink"] if softmax.sink else None)
            near(f"{case}: out", out, want[0][queries])
            near(f"{case}: lse", run.lse(saved), want[1][queries])
            if number % ranks == rank:
                report = verify(schedule, mask, of)
                assert run.bytes_sent == report.forward_bytes[rank], case
                assert run.pairs == report.rank_pairs[rank], case


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_results_are_those_of_dense_attention(ranks: int) -> None:
    run_ranks(ranks, check, ranks)


def test_bytes_of_a_decoded_token_do_not_depend_on_the_context() -> None:
    heads = Heads(16, 2, 128)
    for strategy, ranks_of_it in ((KVP(), lambda total: 8), (KVP(tokens_per_rank=64 << 10), lambda total: -(-total // (64 << 10)))):
        for total in (4 << 10, 256 << 10, 1 << 20):
            batch = Batch((Requests(5, 1, total),))
            of = Problem(batch.tokens, heads, Scale(1, 8), "bfloat16", "forward", batch=batch)
            mask = mask_of(batch, causal)
            sent = int(verify(strategy.schedule(of, mask), mask, of).forward_bytes.sum())
            others = min(8, ranks_of_it(total)) - 1
            assert sent == 5 * others * 16 * (128 * 2 + 128 * 4 + 4), (strategy, total)


@pytest.mark.parametrize("strategy", [PCP(), PCP("ring"), PCP(interleave=16)], ids=str)
def test_prefill_sends_every_key_to_every_other_rank_once(strategy: PCP) -> None:
    for batch in (Batch((Requests(2, 64, 512),)), Batch((Requests(1, 1024, 1024),))):
        of = Problem(batch.tokens, Heads(8, 1, 24, 16, latent=True), Scale(1, 4), "bfloat16", "forward", batch=batch)
        mask = mask_of(batch, causal)
        report = verify(strategy.schedule(of, mask), mask, of)
        assert report.forward_bytes.tolist() == [3 * batch.tokens // 4 * 24 * 2] * 4


def test_groups_grow_with_the_context_and_requests_spread() -> None:
    batch = Batch((Requests(4, 1, 100), Requests(1, 1, 350), Requests(1, 1, 1)))
    of = Problem(batch.tokens, Heads(2, 2, 8), Scale(1, 8), "float32", "forward", batch=batch)
    schedule = KVP(tokens_per_rank=100).schedule(of, mask_of(batch, causal))
    held = [schedule.k.tokens(rank) for rank in range(8)]
    ranks = [[r for r in range(8) if ((a <= held[r]) & (held[r] < b)).any()] for a, b in zip(*_ends(batch), strict=True)]
    assert [len(each) for each in ranks] == [1, 1, 1, 1, 4, 1]
    assert len({rank for each in ranks[:5] for rank in each}) == 8
    assert max(map(len, held)) <= 101
    owners = [next(r for r in range(8) if query in schedule.q.tokens(r)) for query in range(batch.queries)]
    assert all(owner in each for owner, each in zip(owners, ranks, strict=True))


def _ends(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.k_bounds[:-1].tolist(), batch.k_bounds[1:].tolist()


def test_new_tokens_are_owned_in_turn() -> None:
    batch = Batch((Requests(16, 1, 64), Requests(1, 8, 80)))
    of = Problem(batch.tokens, Heads(2, 2, 8), Scale(1, 8), "float32", "forward", batch=batch)
    schedule = KVP().schedule(of, mask_of(batch, causal))
    assert [len(schedule.q.tokens(rank)) for rank in range(8)] == [3] * 8
    assert len(schedule.steps) == 3, "queries leave together, and results"


def test_whole_groups_move_by_collectives() -> None:
    """Where every rank owns as many queries and has some of every cache."""
    batch = Batch((Requests(8, 1, 64),))
    of = Problem(batch.tokens, Heads(2, 2, 8), Scale(1, 4), "float32", "forward", batch=batch)
    mask = mask_of(batch, causal)
    for strategy, want in ((KVP(), ["all_gather", "all_to_all", "all_to_all"]), (PCP(), ["all_gather"])):
        schedule = strategy.schedule(of, mask)
        found = collectives(schedule, verify(schedule, mask, of).traffic, of, OPERATIONS["nccl"])
        assert sorted(each.operation for each in found if each is not None) == want, strategy


def test_prompts_are_balanced_and_lie_as_decoding_wants_them() -> None:
    batch = Batch((Requests(3, 256, 256), Requests(1, 128, 1024)))
    of = Problem(batch.tokens, Heads(2, 2, 8), Scale(1, 4), "float32", "forward", batch=batch)
    mask = mask_of(batch, causal)
    for interleave in (None, 1, 16):
        schedule = PCP(interleave=interleave).schedule(of, mask)
        assert verify(schedule, mask, of).imbalance < 1.01
        held = np.array([len(schedule.k.tokens(rank)) for rank in range(4)])
        assert (held == batch.tokens // 4).all()
        first = schedule.k.tokens(1)[:3].tolist()
        assert first == ([64, 65, 66] if interleave is None else [1, 5, 9] if interleave == 1 else [16, 17, 18])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("kvp", {"tokens_per_rank": 0}, "cp.tokens_per_rank=0 is no number of at least 1"),
        ("kvp", {"interleave": 0}, "cp.interleave=0 is no number of at least 1"),
        ("pcp", {"interleave": -4}, "cp.interleave=-4 is no number of at least 1"),
        ("pcp", {"exchange": "ulysses"}, "cp.exchange=ulysses is not one of allgather, ring"),
    ],
)
def test_bad_options_name_the_value(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_strategy({**load("cp", name), **options})


@pytest.mark.parametrize("strategy", [KVP(), PCP()], ids=str)
def test_what_serves_computes_no_gradients(strategy: Scheduled) -> None:
    of = Problem(64, Heads(4, 4, 8), Scale(1, 4), "float32", "forward_backward")
    assert strategy.unsupported(of, causal(64)) == "is for inference and has no backward; direction=forward runs it"
    assert strategy.unsupported(replace(of, direction="forward"), causal(64)) is None
