"""The simulator: small cases worked out by hand, what must hold of any schedule, and its tiles against the proof's."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.none import Local
from lcbench.cp.peers.library import LibraryStrategy
from lcbench.cp.peers.te import TransformerEngine
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.grid.build import build_strategy
from lcbench.masks.band import BandMask, Ints
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Mesh, Problem, Scale
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.layout import contiguous
from lcbench.schedule.lowering import OPERATIONS
from lcbench.schedule.machine import Floats, Link, Machine, Tiles
from lcbench.schedule.program import Program
from lcbench.schedule.schedule import NO_ROWS, Move, Schedule, Step, head_groups, rows, singles
from lcbench.schedule.simulate import Groups, Modelled, Simulated, play, prepare, simulate
from lcbench.schedule.tiling import tiling
from lcbench.schedule.verify import verify
from lcbench.testing.masks import every_mask, load, names, small

FREE = Link(0.0, math.inf)
NOTHING = Machine("nothing", "none", FREE, FREE, 0, math.inf, 0.0, 0.0)
HEADS = Heads(4, 2, 4)
NCCL = OPERATIONS["nccl"]


@dataclass(frozen=True)
class PerPair:
    """A kernel that takes a time per pair and head, twice that backward, and holds ``inside`` bytes, as often."""

    pair_s: float
    inside: float = 0.0

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        found: Floats = tiles.pairs * tiles.q_heads * self.pair_s * (1 + backward)
        return found

    def calls(self, tiles: Tiles) -> Ints:
        return np.ones(len(tiles), dtype=np.int64)

    def workspace_bytes(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        return np.where(tiles.pairs > 0, self.inside * (1 + backward), 0.0)


def problem(seqlen: int, scale: Scale, heads: Heads = HEADS, *, backward: bool = False) -> Problem:
    return Problem(seqlen, heads, scale, "float32", "forward_backward" if backward else "forward")


def played(strategy: Scheduled, of: Problem, mask: Mask, machine: Machine, pair_s: float, *, lowered: bool = True) -> Simulated:
    modelled = Modelled(strategy.schedule(of, mask), mask, of)
    return simulate(modelled, machine, PerPair(pair_s), operations=NCCL if lowered else (), memory=False)


# -- by hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair_s", [0.001, 0.01])
def test_a_ring_of_two_waits_for_its_one_message_or_hides_it(pair_s: float) -> None:
    # A shard has 4 tokens of 1 key/value head: 4 x 2 x 4 elements of 4 bytes are 128 bytes, 0.128 s, and 0.01 s of latency. A tile
    # has 16 pairs of 2 query heads.
    machine = replace(NOTHING, inside=Link(0.01, 1000.0))
    found = played(Ring(layout="contiguous"), problem(8, Scale(1, 2), Heads(2, 1, 4)), full(8), machine, pair_s)
    tile = 32 * pair_s
    assert found.phases["forward"].seconds == pytest.approx(max(0.138, tile) + tile)
    assert found.phases["forward"].exposed_s == pytest.approx(max(0.138 - tile, 0))
    assert found.phases["forward"].compute_s == pytest.approx(2 * tile)


def test_a_ring_of_four_hides_what_its_tiles_are_long_enough_for_and_shows_the_link_between_nodes() -> None:
    # 2 tokens a shard, 1 head: 64 bytes; inside a node 0.64 s, across 6.4 s. The ring crosses nodes, so each of 3 hops is 6.4 s on
    # some rank, and every rank waits for it in the end.
    machine = replace(NOTHING, inside=Link(0.0, 100.0), across=Link(0.0, 10.0))
    of = problem(8, Scale(2, 2), Heads(1, 1, 4))
    found = played(Ring(layout="contiguous"), of, full(8), machine, 0.25).phases["forward"]
    assert found.seconds == pytest.approx(3 * 6.4 + 1)
    inside = played(Ring(layout="contiguous"), replace(of, scale=Scale(1, 4)), full(8), machine, 0.25).phases["forward"]
    assert inside.seconds == pytest.approx(4 * 1.0)  # tiles of 1 s hide hops of 0.64 s
    assert inside.exposed_s == 0


def test_an_exchange_of_heads_goes_inside_the_node_and_out_of_it_at_once() -> None:
    # 4 tokens a rank and 1 head for each: blocks of q and out 4 x 4 x 4 = 64 bytes, of k and v 128. Out of the node go 2 blocks, to
    # the neighbour 1. q, then k and v, then out after the only tile of 16 x 16 pairs.
    machine = replace(NOTHING, inside=Link(0.0, 64.0), across=Link(0.0, 64.0))
    of = problem(16, Scale(2, 2), Heads(4, 4, 4))
    found = played(Ulysses(), of, full(16), machine, 0.01).phases["forward"]
    assert found.seconds == pytest.approx(2 + 4 + 2.56 + 2)
    slow_inside = replace(machine, inside=Link(0.0, 16.0))
    assert played(Ulysses(), of, full(16), slow_inside, 0.01).phases["forward"].seconds == pytest.approx(4 + 8 + 2.56 + 4)


def test_an_exchange_of_uneven_parts_takes_as_long_as_what_the_busiest_rank_sends() -> None:
    # 5 and 4 tokens of a head each: 80 bytes of q and out, 160 of k and v. A tile has 9 x 9 pairs.
    machine = replace(NOTHING, inside=Link(0.0, 80.0))
    found = played(Ulysses(), problem(9, Scale(1, 2), Heads(2, 2, 4)), full(9), machine, 0.01).phases["forward"]
    assert found.seconds == pytest.approx(1 + 2 + 0.81 + 1)


def test_an_all_gather_is_a_ring_over_all_network_links_of_a_node() -> None:
    # 2 tokens a rank: blocks of k and v of 1 head of 64 bytes, 3 of them by 2 links of 32 bytes/s.
    machine = replace(NOTHING, across=Link(0.0, 32.0))
    of = problem(8, Scale(2, 2), Heads(1, 1, 4))
    found = played(AllGather(layout="contiguous"), of, full(8), machine, 0.0).phases["forward"]
    assert found.seconds == pytest.approx(3 * 64 / 64)


@pytest.mark.parametrize(("nics", "order", "seconds"), [(0, "tp-cp-dp", 4.0), (1, "tp-cp-dp", 8.0), (1, "cp-tp-dp", 1.0)])
def test_groups_on_one_network_link_wait_for_one_another(nics: int, order: str, seconds: float) -> None:
    # Two groups of two ranks on two nodes. A shard of 64 bytes: 4 s across, 1 s inside. Strided, both groups leave their nodes, by
    # one NIC in turn or by one each; blocked, neither does.
    machine = replace(NOTHING, inside=Link(0.0, 64.0), across=Link(0.0, 16.0), nics=nics)
    mesh, scale = Mesh(tp=2, order=order), Scale(2, 2)
    of = problem(4, mesh.group_scale(scale), Heads(1, 1, 4))
    ranks = mesh.groups(scale).reshape(2, 2)
    for strategy, operations in ((Ring(layout="contiguous"), ()), (AllGather(layout="contiguous"), NCCL)):
        prepared = prepare(Modelled(strategy.schedule(of, full(4)), full(4), of), operations)
        found = play(prepared, machine, PerPair(0.0), memory=False, groups=Groups(ranks, 2))
        assert found.phases["forward"].seconds == pytest.approx(seconds)
        assert found.times.shape[0] == 2, "of the first group"
        alone = play(prepared, machine, PerPair(0.0), memory=False)
        assert alone.phases["forward"].seconds == pytest.approx(1.0 if order == "cp-tp-dp" else 4.0)


def test_a_message_that_may_take_long_shares_its_link_with_the_others() -> None:
    # Both messages take 1 s alone. The short one is there after 2 s, as it has half of the link; the long one then too.
    moves = (Move("kv", rows(0, 1, 0, 0)), Move("kv", rows(0, 1, 1, 0), steps=2, channel="outer"))
    steps = (Step(NO_ROWS, moves), Step(rows(1, 0, 2, 0)), Step(rows(1, 0, 2, 1)), Step(rows([0, 0], 0, [0, 1], [0, 1])))
    schedule = Schedule.of(2, contiguous(6, 3), np.array([0, 0, 1]), head_groups(Heads(1, 1, 4), 1), singles(3), steps)
    of, machine = problem(6, Scale(2, 1), Heads(1, 1, 4)), replace(NOTHING, across=Link(0.0, 64.0))
    found = simulate(Modelled(schedule, full(6), of), machine, PerPair(0.0), memory=False)
    assert found.times[1, :, 3].tolist() == pytest.approx([2.0, 2.0, 2.0, 2.0])
    alone = replace(schedule, steps=(Step(NO_ROWS, moves[:1]), *steps[1:]))
    assert simulate(Modelled(alone, full(6), of), machine, PerPair(0.0), memory=False).times[1, 0, 3] == pytest.approx(1.0)


def test_a_host_goes_ahead_of_its_device_and_a_cpu_is_its_own_host() -> None:
    of = problem(8, Scale(1, 1))
    launches = replace(NOTHING, launch_s=1.0)
    assert played(Local(), of, full(8), launches, 0.001).phases["forward"].seconds == pytest.approx(1.0)
    assert played(Local(), of, full(8), launches, 0.1).phases["forward"].seconds == pytest.approx(64 * 4 * 0.1)
    ring = problem(8, Scale(1, 2))
    slow = replace(NOTHING, message_s=1.0)  # one message: on a device it leaves while the host has nothing else to do
    assert played(Ring(), ring, full(8), replace(slow, device="cpu"), 0.1).phases["forward"].exposed_s == pytest.approx(1.0)


def test_a_merge_reads_two_results_and_writes_one() -> None:
    # 4 tokens a rank of 4 heads: 4 x 4 x 4 x 4 bytes are 256 bytes. Of two tiles the second is merged; q is converted at the end, k
    # and v packed at the begin: 2 x 256 and 2 x 256.
    machine = replace(NOTHING, memory_bytes_per_s=256.0)
    found = played(Ring(), problem(8, Scale(1, 2)), full(8), machine, 0.0).phases["forward"]
    assert found.overhead_s == pytest.approx(found.seconds) == pytest.approx(3 + 2 + 2)


def test_sums_of_many_ranks_leave_in_rounds_and_those_of_a_ring_in_one() -> None:
    ranks = 24
    of = problem(2 * ranks, Scale(1, ranks), Heads(1, 1, 4), backward=True)
    mask = full(of.seqlen)
    schedule = Ring().schedule(of, mask)
    moves = traffic(schedule, backward=True)
    assert {step.rounds for step in Program(schedule, moves, of, 0).steps} == {1}
    machine = replace(NOTHING, inside=Link(0.0, 1000.0))
    hidden = played(Ring(), of, mask, machine, 1.0).phases["backward"]
    assert hidden.exposed_s < 0.5  # the first fetch and the last sum
    cast = played(AllGather(), of, mask, machine, 1.0, lowered=False).phases["backward"]
    assert cast.exposed_s > 1.0  # of 23 sums 8 leave while tiles are computed


# -- of any schedule -----------------------------------------------------------------------------------------------------


STRATEGIES: tuple[Scheduled, ...] = (
    Ring(), Ring(layout="striped"), TokenRing(), Ulysses(), USP(), LoongTrain(), AllGather(), GroupCast(chunks_per_rank=2),
)  # fmt: skip
SCALES = (Scale(1, 2), Scale(2, 2), Scale(2, 1), Scale(1, 4))
links = st.builds(Link, st.floats(0, 0.01), st.floats(1e3, 1e7))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(STRATEGIES), st.sampled_from(SCALES), st.sampled_from([causal, full]), st.integers(16, 60), links, links,
    st.floats(0, 1e-4), st.booleans(),
)  # fmt: skip
def test_a_phase_adds_up_is_no_shorter_than_its_work_and_its_bytes_and_no_longer_on_faster_links(
    strategy: Scheduled, scale: Scale, family: Any, seqlen: int, inside: Link, across: Link, pair_s: float, lowered: bool
) -> None:
    of = problem(seqlen, scale, Heads(4, 4, 4), backward=True)
    mask = family(seqlen)
    machine = replace(NOTHING, inside=inside, across=across, memory_bytes_per_s=1e7, launch_s=1e-4, message_s=1e-4)
    found = played(strategy, of, mask, machine, pair_s, lowered=lowered)
    cost = verify(strategy.schedule(of, mask), mask, of)
    pairs = {"forward": cost.rank_pairs.max() * pair_s, "backward": 2 * cost.rank_pairs.max() * pair_s}
    sent = {"forward": cost.forward_bytes.max(), "backward": cost.backward_bytes.max()}
    faster = replace(machine, inside=Link(inside.latency_s / 2, inside.bytes_per_s * 2), across=replace(across, latency_s=0.0))
    quick = played(strategy, of, mask, faster, pair_s, lowered=lowered)
    for name, phase in found.phases.items():
        parts = (phase.compute_s, phase.imbalance_s, phase.exposed_s, phase.overhead_s)
        assert min(parts) >= -1e-12
        assert sum(parts) == pytest.approx(phase.seconds)
        assert phase.seconds >= pairs[name] - 1e-9
        # Each rank sends over both links at once, and the network links of a node carry what a collective sends for all its ranks.
        assert phase.seconds >= sent[name] / (inside.bytes_per_s + scale.gpus_per_node * across.bytes_per_s) - 1e-9
        assert quick.phases[name].seconds <= phase.seconds + 1e-9
    assert (np.diff(found.times.reshape(scale.world_size, -1), axis=1) >= -1e-12).all()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_where_nothing_costs_anything_nothing_takes_time(strategy: Scheduled) -> None:
    found = played(strategy, problem(32, Scale(2, 2), Heads(4, 4, 4), backward=True), causal(32), NOTHING, 0.0)
    assert {phase.seconds for phase in found.phases.values()} == {0.0}


@pytest.mark.parametrize("name", every_mask())
@pytest.mark.slow
def test_tiles_have_the_pairs_that_the_proof_counts(name: str, tmp_path: Path) -> None:
    of = problem(203, Scale(2, 2), Heads(8, 4, 16))
    mask = small(name, of.seqlen, of.heads, tmp_path)
    built = [build_strategy(load("cp", each)) for each in names("cp")]
    for strategy in [*(each for each in built if isinstance(each, Scheduled)), *STRATEGIES]:
        if strategy.unsupported(of, mask):
            continue
        schedule = strategy.schedule(of, mask)
        made, want = tiling(schedule, mask), verify(schedule, mask, of).step_pairs
        found = np.zeros(want.shape)
        np.add.at(found, (made.step, made.rank), made.tiles.pairs * made.tiles.q_heads)
        assert found == pytest.approx(want), strategy
        assert (made.tiles.covered >= made.tiles.pairs - 1e-6).all()
        assert ((made.tiles.pieces > 0) == (made.tiles.pairs > 0)).all()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_pieces_are_those_of_the_tile_that_a_kernel_gets(strategy: Scheduled, tmp_path: Path) -> None:
    of = problem(113, Scale(1, 4), Heads(4, 4, 4))
    mask = small("causal_document", of.seqlen, of.heads, tmp_path)
    assert isinstance(mask, BandMask)
    schedule = strategy.schedule(of, mask)
    every = np.concatenate([step.tiles for step in schedule.steps])
    both = ((schedule.q, 2), (schedule.k, 3))
    want = [len(mask.tile(*(side.runs(side.bundles[tile[c]]) for side, c in both))) for tile in every.tolist()]
    assert tiling(schedule, mask).tiles.pieces.tolist() == want


def test_buffers_are_those_of_the_rank_with_most() -> None:
    of = problem(96, Scale(2, 2), Heads(4, 4, 4), backward=True)
    mask = causal(96)
    schedule = GroupCast().schedule(of, mask)
    found = simulate(Modelled(schedule, mask, of), NOTHING, PerPair(0.0), operations=NCCL)
    moves = traffic(schedule, backward=True)
    looked_at = [Program(schedule, moves, of, rank, NCCL).buffer_bytes for rank in range(4)]
    assert found.buffer_bytes in looked_at
    assert found.buffer_bytes >= min(looked_at)
    assert found.peak_bytes > found.buffer_bytes


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_a_kernel_holds_inside_comes_on_top_where_most_is_held(strategy: Scheduled) -> None:
    of = problem(96, Scale(2, 2), Heads(4, 4, 4), backward=True)
    modelled = Modelled(strategy.schedule(of, causal(96)), causal(96), of)
    found = {inside: simulate(modelled, NOTHING, PerPair(0.0, inside), operations=NCCL) for inside in (0.0, 1.0, 1e6, 2e6)}
    assert {each.own_bytes for each in found.values()} == {found[0.0].peak_bytes}
    assert found[0.0].peak_bytes <= found[1.0].peak_bytes <= found[0.0].peak_bytes + 2
    assert found[2e6].peak_bytes - found[1e6].peak_bytes == 2_000_000, "backward holds most, and twice as much of it"
    assert found[1e6].buffer_bytes == found[0.0].buffer_bytes


def test_a_peer_that_sums_in_the_inputs_type_is_modelled_so() -> None:
    of = replace(problem(120, Scale(1, 4), Heads(4, 4, 4), backward=True), dtype="bfloat16")
    for comm in ("p2p", "a2a"):
        found = TransformerEngine(comm=comm).modelled(of, causal(of.seqlen))
        assert found is not None
        assert found.problem.reduce_dtype == ("input" if comm == "p2p" else of.reduce_dtype)


@pytest.mark.parametrize("name", [n for n in names("cp") if isinstance(build_strategy(load("cp", n)), LibraryStrategy)])
def test_every_peer_is_modelled_by_a_schedule_that_is_proven(name: str) -> None:
    of = replace(problem(64, Scale(2, 2), Heads(8, 4, 16), backward=True), dtype="bfloat16")
    mask = causal(64)
    strategy = build_strategy(load("cp", name))
    assert strategy.unsupported(of, mask) is None
    found = strategy.modelled(of, mask)
    assert found is not None
    verify(found.schedule, found.mask, found.problem)
