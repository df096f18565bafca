"""Sparse context parallelism: heads dealt out by their work, keys that go only where they are critical, and both on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.sparse_heads import SparseHeads
from lcbench.cp.sparse_hybrid import SparseHybrid
from lcbench.cp.sparse_sequence import SparseSequence
from lcbench.inputs.drawing import draw
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.predict.machines import machine_of
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.lowering import OPERATIONS, collectives
from lcbench.schedule.machine import Floats, Tiles
from lcbench.schedule.schedule import HeadGroup
from lcbench.schedule.simulate import Modelled, simulate
from lcbench.schedule.sparse import dealt_heads
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.spawn import run_ranks

BOUND = 1e-12


def uneven(
    seed: int, seqlen: int, maps: int, *, block: int = 8, densities: Sequence[float] | None = None, within: BandMask | None = None
) -> BlockMap:
    """Blocks of various sizes, whose density is of each map's own: from none at all to all of them, or those given."""
    random = np.random.default_rng(seed)

    def edges() -> Ints:
        inner = np.cumsum(random.integers(1, 2 * block, 1 + seqlen))
        return np.concatenate([[0], inner[inner < seqlen], [seqlen]]).astype(np.int64)

    q_edges, k_edges = edges(), edges()
    shares = random.beta(0.5, 1.0, maps) if densities is None else np.array(densities)
    kept = [random.random((len(q_edges) - 1, len(k_edges) - 1)) < share for share in shares]
    return BlockMap(q_edges, k_edges, maps, kept.__getitem__, within)


def problem_of(ranks: int, seqlen: int, heads: Heads, nodes: int = 1, direction: str = "forward_backward") -> Problem:
    return Problem(seqlen, heads, Scale(nodes, ranks // nodes), "float64", direction)


def every_strategy(ranks: int) -> list[Scheduled]:
    found: list[Scheduled] = [SparseHeads(), SparseSequence(), SparseSequence(1), SparseHybrid()]
    found += [GroupCast(chunks_per_rank=3, stages=3, by_head=True)]
    return found + [SparseHybrid(degree) for degree in range(2, ranks) if ranks % degree == 0]


# -- proofs without processes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), ranks=st.sampled_from([1, 2, 3, 4, 6, 8]), kv=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]), sharing=st.sampled_from(["all", "kv", "q"]), seqlen=st.integers(16, 150), cut=st.booleans(),
)  # fmt: skip
def test_every_pair_is_computed_once_whatever_the_maps(
    seed: int, ranks: int, kv: int, group: int, sharing: str, seqlen: int, cut: bool
) -> None:
    heads = Heads(kv * group, kv, 8)
    mask = uneven(seed, seqlen, {"all": 1, "kv": kv, "q": heads.q}[sharing], within=causal(seqlen) if cut else None)
    problem = problem_of(ranks, seqlen, heads)
    for strategy in every_strategy(ranks):
        assert strategy.unsupported(problem, mask) is None
        report = verify(strategy.schedule(problem, mask), mask, problem)
        assert report.rank_pairs.sum() == mask.pairs(heads.q)
        assert report.buffer_bytes(ranks - 1, OPERATIONS["gloo"]) >= 0


def critical(mask: Mask, heads: Heads, tokens: Sequence[Ints]) -> tuple[int, int]:
    """Keys, by key/value head, that a rank's queries see and it does not own, over all ranks; and the same where what some head
    sees is of all of them."""
    seen, found, union = dense_heads(mask, heads.q), 0, 0
    for own in tokens:
        keys = seen[:, own].any(axis=1).reshape(heads.kv, heads.q // heads.kv, -1).any(axis=1)
        keys[:, own] = False
        found += int(keys.sum())
        union += heads.kv * int(keys.any(axis=0).sum())
    return found, union


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), ranks=st.sampled_from([2, 3, 5, 8]), per=st.sampled_from([1, 2, 8]),
    stages=st.sampled_from([1, 2, 3]), cut=st.booleans(),
)  # fmt: skip
def test_keys_that_are_sent_are_the_distinct_critical_ones(seed: int, ranks: int, per: int, stages: int, cut: bool) -> None:
    heads, seqlen = Heads(8, 2, 8), 211
    mask, problem = uneven(seed, seqlen, per, within=causal(seqlen) if cut else None), problem_of(ranks, seqlen, heads)
    token, cast = 2 * heads.dim * 8, GroupCast(stages=stages)
    for strategy in (SparseSequence(stages), replace(cast, by_head=True), cast):
        report = verify(strategy.schedule(problem, mask), mask, problem)
        by_head, union = critical(mask, heads, [report.schedule.q.tokens(rank) for rank in range(ranks)])
        expected = union if strategy == cast else by_head
        assert report.forward_bytes.sum() == expected * token
        assert report.backward_bytes.sum() == 2 * expected * token  # values again, and gradients


@pytest.mark.parametrize("name", ["causal", "documents"])
def test_masks_of_bands_are_those_of_all_heads(name: str) -> None:
    documents = causal_document(211, seed=(0, 0), lengths=Explicit([100, 11, 60, 40]))
    mask = causal(211) if name == "causal" else documents
    heads, ranks = Heads(6, 3, 8), 6
    problem = problem_of(ranks, 211, heads)
    for strategy in every_strategy(ranks):
        assert verify(strategy.schedule(problem, mask), mask, problem).rank_pairs.sum() == mask.pairs(heads.q)
    report = verify(SparseSequence().schedule(problem, mask), mask, problem)
    found, _ = critical(mask, heads, [report.schedule.q.tokens(rank) for rank in range(ranks)])
    assert report.forward_bytes.sum() == found * 2 * heads.dim * 8


def test_a_settled_group_cast_holds_what_it_holds_for_the_whole_mask() -> None:
    heads, ranks, whole = Heads(4, 2, 8), 4, causal(211)
    problem, strategy = problem_of(ranks, 211, heads), GroupCast(chunks_per_rank=4, by_head=True)
    before, settled = strategy.schedule(problem, whole), strategy.settled(problem, whole)
    assert settled.unsupported(problem, whole) is None
    alone = 0
    for seed in range(3):
        part = uneven(seed, 211, 4, within=whole)
        schedule = settled.schedule(problem, part)
        assert verify(schedule, part, problem).rank_pairs.sum() == part.pairs(heads.q)
        same = [np.array_equal(schedule.q.tokens(rank), before.q.tokens(rank)) for rank in range(ranks)]
        assert all(same)
        others = strategy.schedule(problem, part).q
        alone += any(not np.array_equal(others.tokens(rank), before.q.tokens(rank)) for rank in range(ranks))
    assert alone  # by itself it would deal them out otherwise


# -- heads ---------------------------------------------------------------------------------------------------------------


def test_heads_are_dealt_longest_first_and_close_to_the_best_possible() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        pairs, columns = random.integers(1, 1000, 9), 3
        busiest = max(pairs[list(each)].sum() for each in dealt_heads(pairs[:, None], columns))
        codes = np.array(np.unravel_index(np.arange(columns**9), (columns,) * 9))
        best = min(np.stack([(pairs[:, None] * (codes == c)).sum(axis=0) for c in range(columns)]).max(axis=0))
        assert best <= busiest <= best * (4 / 3 - 1 / (3 * columns))  # Graham's bound


def test_heads_of_equal_work_stay_together_as_in_ulysses() -> None:
    assert dealt_heads(np.full((8, 1), 5), 4) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert dealt_heads(np.zeros((4, 1), dtype=np.int64), 2) == [(0, 1), (2, 3)]
    assert dealt_heads(np.array([[9], [1], [1], [1]]), 2) == [(0,), (1, 2, 3)]
    assert dealt_heads(np.array([[3], [2]]), 3) == [(0,), (1,), ()]


@pytest.mark.parametrize("count", [8, 3, 2])  # and fewer heads than ranks: some rank has none
def test_heads_of_a_rank_are_exchanged_by_one_all_to_all_of_uneven_parts(count: int) -> None:
    heads, ranks = Heads(count, count, 16), 4
    mask = uneven(5, 256, count, densities=[0.9, 0.1, 0.1, 0.1, 0.4, 0.05, 0.3, 0.2][:count])
    problem = problem_of(ranks, 256, heads)
    schedule = SparseHeads().schedule(problem, mask)
    assert len(schedule.heads) < ranks or len({len(group) for group in schedule.heads}) > 1  # ranks have other numbers of heads
    report = verify(schedule, mask, problem)
    found = collectives(schedule, report.traffic, problem, OPERATIONS["nccl"])
    assert all(each is not None and each.operation == "all_to_all" for each in found)
    # Of every rank's heads all tokens but its own come, and their results go.
    assert report.forward_bytes.sum() == heads.q * (256 - 64) * 16 * 8 * 4


def test_a_key_value_head_is_copied_once_to_a_rank_that_has_some_of_its_query_heads() -> None:
    heads, ranks = Heads(8, 2, 16), 3
    mask = uneven(5, 96, 8, densities=[0.9, 0.1, 0.3, 0.1, 0.4, 0.05, 0.3, 0.2])
    problem = problem_of(ranks, 96, heads)
    schedule = SparseHeads().schedule(problem, mask)
    tiles = schedule.steps[1].tiles[:, :2].tolist()
    of_rank = [{head for rank, group in tiles if rank == own for head in schedule.heads[group].q} for own in range(ranks)]
    assert sorted(h for each in of_rank for h in each) == list(range(8))
    copies = sum(len({h // 4 for h in each}) for each in of_rank)
    assert copies > heads.kv
    assert verify(schedule, mask, problem).forward_bytes.sum() == (8 * 2 + copies * 2) * 64 * 16 * 8


def test_a_head_group_has_the_maps_of_its_heads() -> None:
    heads = Heads(8, 2, 16)
    for maps in (1, 2, 4, 8):
        mask = uneven(maps, 60, maps)
        dense = dense_heads(mask, heads.q)
        for members in ((0, 1, 2, 3), (1, 3), (0, 5), (0, 1, 6, 7), (2,), (0, 2, 3, 5, 7)):
            group = HeadGroup.of(heads, members)
            each = len(group) // len(group.kv)
            assert [group.kv[i // each] for i in range(len(group))] == [h // 4 for h in members]
            assert np.array_equal(dense_heads(group.part(mask, heads.q), len(group)), dense[list(members)])


# -- real ranks ----------------------------------------------------------------------------------------------------------


def check_ranks(rank: int, ranks: int, cases: list[tuple[Heads, int, int]]) -> None:
    groups, device = Groups(), torch.device("cpu")
    collectives_of: dict[Scheduled, set[str]] = {}
    for heads, per, seed in cases:
        seqlen = 67
        problem = problem_of(ranks, seqlen, heads)
        everything = np.arange(seqlen)
        q, k, v, dout = (draw(name, everything, problem, 7, device) for name in ("q", "k", "v", "dout"))
        for mask in (uneven(seed, seqlen, per), uneven(seed, seqlen, per, within=causal(seqlen)), causal(seqlen)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
            expected = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
            for number, strategy in enumerate(every_strategy(ranks)):
                case = f"{strategy} {heads} {per} {type(mask).__name__} P={ranks}"
                schedule = strategy.schedule(problem, mask)
                own = schedule.q.tokens(rank)
                assert np.array_equal(own, schedule.k.tokens(rank))
                run = Executor(schedule, mask, SDPAFlash(), problem, rank=rank, device=device, groups=groups)
                got, saved = run.forward(*(x[own] for x in (q, k, v)))
                sent = run.bytes_sent
                grads = run.backward(dout[own], saved)
                if number % ranks == rank:  # ranks share the work of counting
                    report = verify(schedule, mask, problem)
                    assert (sent, run.bytes_sent) == (report.forward_bytes[rank], report.backward_bytes[rank]), case
                    assert run.pairs == report.rank_pairs[rank], case
                    assert run.buffer_bytes == report.buffer_bytes(rank, OPERATIONS["gloo"]), case
                collectives_of.setdefault(strategy, set()).update(run.collectives)
                for mine, want in zip([got, run.lse(saved), *grads], expected, strict=True):
                    both = torch.isinf(mine) & torch.isinf(want[own])
                    error = torch.where(both, 0.0, mine - want[own]).abs().max()
                    assert error <= BOUND, f"{case}: {error}"
    assert collectives_of[SparseHeads()] == ({"all_to_all"} if ranks > 1 else set())
    dist.barrier()


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (1, [(Heads(4, 2, 8), 4, 0)]),
        (2, [(Heads(4, 2, 8), 4, 1), (Heads(6, 6, 8), 6, 2)]),
        (3, [(Heads(8, 2, 8), 8, 3), (Heads(2, 1, 8), 2, 4)]),  # and fewer heads than ranks
        (4, [(Heads(8, 4, 8), 8, 5), (Heads(8, 8, 8), 4, 6)]),
    ],
    ids=lambda value: f"P={value}" if isinstance(value, int) else None,
)
def test_results_and_gradients_are_those_of_dense_attention(ranks: int, cases: list[tuple[Heads, int, int]]) -> None:
    run_ranks(ranks, check_ranks, ranks, cases)


# -- the choice of a grid ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """A kernel at a rate of its pairs, and 2.5 times as long in backward."""

    flops: float

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        found: Floats = 4.0 * problem.heads.dim * tiles.pairs * tiles.q_heads / self.flops * (2.5 if backward else 1)
        return found

    def calls(self, tiles: Tiles) -> Ints:
        return np.ones(len(tiles), dtype=np.int64)

    def workspace_bytes(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        return np.zeros(len(tiles))


def patterned(seed: int, seqlen: int, heads: Heads, block: int) -> BlockMap:
    """Heads of a kind each, as heads are: nearly dense ones, local ones with sinks, vertical lines, and scattered blocks."""
    random = np.random.default_rng(seed)
    count = seqlen // block
    row, column = np.arange(count)[:, None], np.arange(count)
    kinds = random.choice(4, heads.q, p=random.dirichlet([0.5] * 4))
    kept = []
    for kind in kinds.tolist():
        share = random.uniform(0.02, 0.5)
        local = (column >= row - int(share * count / 2)) | (column < 1)
        found = [
            random.random((count, count)) < 0.6 + share / 2, local, local | (random.random(count) < share),
            random.random((count, count)) < share,
        ][kind]  # fmt: skip
        kept.append((found | (row == column)) & (column <= row))
    edges = np.arange(count + 1) * block
    return chosen(np.stack(kept), edges, edges, causal(seqlen))


SCALES = (Scale(1, 8), Scale(1, 16), Scale(2, 8), Scale(4, 8))
MACHINES = ("a100", "h100", "b200")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))  # of ten draws: every machine and scale in both directions
def test_the_grid_that_is_chosen_is_never_slower_than_heads_or_sequence_alone(part: int) -> None:
    heads = Heads(16, 8, 128)
    for seed in range(10 * part, 10 * part + 10):
        name, scale = MACHINES[seed % 3], SCALES[seed // 3 % 4]
        machine, seqlen = machine_of(name), 16384 if seed % 2 else 4096
        problem = Problem(seqlen, heads, scale, "bfloat16", "forward_backward" if seed % 5 else "forward")
        mask = patterned(seed, seqlen, heads, 64)
        tflops = {"a100": 180.0, "h100": 450.0, "b200": 1100.0}[name]
        hybrid = SparseHybrid(
            tflops=tflops, inside_gbytes_per_s=machine.inside.bytes_per_s / 1e9,
            across_gbytes_per_s=machine.across.bytes_per_s / 1e9, memory_gbytes_per_s=machine.memory_bytes_per_s / 1e9,
        )  # fmt: skip
        seconds = []
        for strategy in (hybrid, SparseHeads(), SparseSequence()):
            modelled = Modelled(strategy.schedule(problem, mask), mask, problem)
            found = simulate(modelled, machine, Roofline(tflops * 1e12), operations=OPERATIONS["nccl"], memory=False)
            seconds.append(sum(phase.seconds for phase in found.phases.values()))
        assert seconds[0] <= min(seconds[1:]), (seed, seconds)
