"""What goes by collectives: found in the data, the same on every rank, with the same results and bytes as messages one by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Scheduled
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.hybrid import Hybrid
from lcbench.cp.lasp import LASP
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.cp.zeco import ZeCO
from lcbench.grid.build import build_strategy
from lcbench.grid.command_line import look
from lcbench.inputs.drawing import draw
from lcbench.kernels.base import Prepared, Saved, prepare
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import TokenSpan
from lcbench.masks.block import BlockMap
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule import lowering, program
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.beside import Member, beside
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.layout import Layout, contiguous
from lcbench.schedule.lowering import OPERATIONS, Lowering, collectives, sets_of
from lcbench.schedule.program import Exchange, Program
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import load, names, small
from lcbench.testing.spawn import run_ranks

CPU = torch.device("cpu")
NCCL = OPERATIONS["nccl"]


def found(strategy: Scheduled, problem: Problem, mask: Mask) -> dict[str, set[str]]:
    """Kinds of transfers that go by each operation."""
    schedule = strategy.schedule(problem, mask)
    moves = traffic(schedule, backward=problem.backward)
    by: dict[str, set[str]] = {}
    for transfer, each in zip(moves.transfers, collectives(schedule, moves, problem, NCCL), strict=True):
        by.setdefault(each.operation if each else "p2p", set()).add(transfer.kind)
    return by


def problem_of(ranks: int, seqlen: int, heads: Heads, reduce_dtype: str = "float32", dtype: str = "bfloat16") -> Problem:
    return Problem(seqlen, heads, Scale(1, ranks), dtype, "forward_backward", reduce_dtype)


EXCHANGED = {"q", "kv", "final", "dout", "final_dq", "final_dkv"}


@pytest.mark.parametrize("ranks", [2, 4, 8, 24])
def test_what_every_rank_of_a_set_sends_to_every_other_is_a_collective(ranks: int) -> None:
    problem, mask = problem_of(ranks, 48 * ranks, Heads(ranks, ranks, 8)), causal(48 * ranks)
    assert found(Ulysses(), problem, mask) == {"all_to_all": EXCHANGED}
    for order in ("zigzag", "contiguous"):
        assert found(AllGather(layout=order), problem, mask) == {"all_gather": {"kv"}, "reduce_scatter": {"dkv"}}  # type: ignore[arg-type]
    # Sums that travel in the inputs' type are added up where they arrive.
    low = problem_of(ranks, 48 * ranks, Heads(ranks, ranks, 8), "input")
    assert found(AllGather(), low, mask) == {"all_gather": {"kv"}, "p2p": {"dkv"}}
    for strategy in (Ring(), TokenRing(), LightSeq(), Hybrid()):
        assert set(found(strategy, problem, mask)) == {"p2p"}, strategy
    assert set(found(GroupCast(), problem, causal_document(48 * ranks, seed=(0, 0), lengths=Explicit([48 * ranks])))) == {"p2p"}


@pytest.mark.parametrize("ranks", [4, 8, 24])
def test_ranks_of_a_head_exchange_are_sets_and_rings_around_them_are_not(ranks: int) -> None:
    problem, mask = problem_of(ranks, 48 * ranks, Heads(ranks, ranks, 8)), causal(48 * ranks)
    for strategy, first in (
        (USP(2), (0, 1)), (USP(2, ulysses="outside"), (0, ranks // 2)), (LoongTrain(2), (0, 1)),
        (LoongTrain(ranks // 2, placement="context_first"), tuple(range(0, ranks, 2))),
    ):  # fmt: skip
        by = found(strategy, problem, mask)
        assert by["all_to_all"] == {"q", "kv", "final", "dout", "final_dq"} | (by["all_to_all"] & {"dkv", "final_dkv"})
        assert "kv" in by["p2p"]  # hops
        schedule = strategy.schedule(problem, mask)
        moves = traffic(schedule, backward=True)
        sets = sets_of(moves, collectives(schedule, moves, problem, NCCL))
        members = [ranks for _, ranks in sets]
        assert members[0] == first
        assert sorted(rank for each in members for rank in each) == list(range(ranks))


@dataclass(frozen=True)
class Idle(Ulysses):
    """Ulysses of a sequence that some ranks have no tokens of."""

    idle: tuple[int, ...] = (1,)

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        made = super().schedule(problem, mask)
        tokens = iter(contiguous(problem.seqlen, problem.scale.world_size - len(self.idle)).shards)
        shards = [(TokenSpan(0, 0),) if rank in self.idle else next(tokens) for rank in range(problem.scale.world_size)]
        side = replace(made.q, shards=Layout(shards))
        return replace(made, q=side, k=side)


def uneven_cases(ranks: int) -> list[tuple[Scheduled, int, Heads]]:
    """Head exchanges (strategy, tokens, heads) whose parts have several sizes, or none."""
    seqlen, heads = 16 * ranks + 3, Heads(4 * ranks, 2 * ranks, 8)
    cases: list[tuple[Scheduled, int, Heads]] = [
        (Ulysses(), seqlen, heads), (Ulysses(stages=2), seqlen, heads), (Ulysses(), seqlen, Heads(4 * ranks, 1, 8)),
        (Ulysses(uneven_heads=True), 16 * ranks, Heads(2 * ranks + 1, 2 * ranks + 1, 8)),
        (Ulysses(uneven_heads=True), seqlen, Heads(2 * ranks + 1, 2 * ranks + 1, 8)),
    ]  # fmt: skip
    if ranks > 2:
        cases += [(Idle(), seqlen, heads), (Idle(idle=(0,)), seqlen, heads), (Idle(idle=(ranks - 1,)), seqlen, heads)]
        cases += [(Hybrid([ranks - 1, 1], [0, 1], within=["ulysses"]), seqlen, Heads(4 * (ranks - 1), ranks - 1, 8))]
    if ranks == 4:
        cases += [
            (USP(2), seqlen, heads), (USP(2, ulysses="outside"), seqlen, heads), (LoongTrain(2), seqlen, heads),
            (Hybrid([2, 2], [0, 1], within=["ulysses"]), seqlen, heads),
            (Hybrid([2, 2], [0, 1], within=["ulysses", "ring"], ranks=[3, 0, 2, 1]), seqlen, heads),
        ]  # fmt: skip
    return cases


def of_two(seqlen: int) -> Mask:
    """Two causal documents, of odd lengths or of one odd length."""
    return causal_document(seqlen, seed=(0, 0), lengths=Explicit([seqlen - 13, 13]))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_parts_of_a_head_exchange_have_the_sizes_that_they_have(ranks: int) -> None:
    for strategy, seqlen, heads in uneven_cases(ranks):
        problem, mask = problem_of(ranks, seqlen, heads), of_two(seqlen)
        assert strategy.unsupported(problem, mask) is None, strategy
        assert "all_to_all" in found(strategy, problem, mask), strategy
        if isinstance(strategy, Ulysses):
            assert set(found(strategy, problem, mask)) == {"all_to_all"}, strategy
        schedule = strategy.schedule(problem, mask)
        report, moves = verify(schedule, mask, problem), traffic(schedule, backward=True)
        programs = [Program(schedule, moves, problem, rank, NCCL) for rank in range(ranks)]
        by: dict[tuple[int, int], list[Exchange]] = {}
        for rank, made in enumerate(programs):
            exchanges = [each for step in made.steps for each in step.exchanges]
            sent = sum(n for e in exchanges for peer, n in zip(e.ranks, e.sent, strict=True) if peer != rank)
            rows = [t.bytes(schedule, problem)[t.rows[:, 0] == rank].sum() for t in moves.transfers]
            alone = sum(int(n) for n, each in zip(rows, made.lowered, strict=True) if each is None)
            assert sent + alone == report.forward_bytes[rank] + report.backward_bytes[rank], strategy
            for each in exchanges:
                for peer in each.ranks:
                    by.setdefault((rank, peer), []).append(each)
        for (rank, peer), exchanges in by.items():  # what one sends is what the other receives, one after the other
            assert [e.sent[e.ranks.index(peer)] for e in exchanges if peer != rank] == [
                e.received[e.ranks.index(rank)] for e in by[peer, rank] if peer != rank
            ], strategy
        for transfer, together in zip(moves.transfers, programs[0].lowered, strict=True):
            if together is not None:
                amounts, size = np.zeros((2, ranks)), transfer.bytes(schedule, problem)
                for column in (0, 1):
                    np.add.at(amounts[column], transfer.rows[:, column], size)
                most = [amounts[:, list(members)].max() / (len(members) - 1) for members in together.sets]
                assert np.allclose(together.blocks, most, rtol=1e-12), strategy
                assert together.even == (len(set(together.blocks)) == 1 and bool((size == together.blocks[0]).all())), strategy


def test_what_differs_and_is_no_head_exchange_goes_from_point_to_point() -> None:
    mask = causal(67)
    assert set(found(AllGather(), problem_of(4, 67, Heads(8, 8, 8)), mask)) == {"p2p"}
    for strategy in (Ring(), TokenRing(), GroupCast(), LightSeq()):
        assert set(found(strategy, problem_of(3, 67, Heads(8, 8, 8)), mask)) == {"p2p"}, strategy
    # All tokens are one rank's: no other has anything to give it.
    assert set(found(Idle(idle=(1, 2)), problem_of(3, 67, Heads(9, 9, 8)), mask)) == {"p2p"}
    # The exchange of ranks beside it is one all the same.
    both = []
    for place, strategy in enumerate((Ulysses(), Idle())):
        schedule = strategy.schedule(problem_of(2, 67, Heads(8, 8, 8)), mask)
        both.append(Member(schedule, np.array([0, 3]) + place * np.array([1, -1]), np.array([[67 * place, 67]])))
    problem, schedule = problem_of(4, 134, Heads(8, 8, 8)), beside(both, 4)
    moves = traffic(schedule, backward=True)
    lowered = collectives(schedule, moves, problem, NCCL)
    assert [each.sets for each in lowered if each] == [((0, 3),)] * len(EXCHANGED)
    assert {transfer.kind for transfer, each in zip(moves.transfers, lowered, strict=True) if each is None} == EXCHANGED


@pytest.mark.parametrize("ranks", [4, 24])
def test_blocks_of_collectives_are_the_bytes_of_the_formulas(ranks: int) -> None:
    """And every message of before is in one of them, or goes by itself."""
    for reduce_dtype in ("float32", "input"):
        problem, mask = problem_of(ranks, 48 * ranks, Heads(2 * ranks, ranks, 8), reduce_dtype), causal(48 * ranks)
        for strategy in (Ulysses(), Ulysses(stages=2), AllGather(), AllGather(heads_per_step=1), USP(2), LoongTrain(2)):
            schedule = strategy.schedule(problem, mask)
            report, moves = verify(schedule, mask, problem), traffic(schedule, backward=True)
            for rank in (0, ranks - 1):
                made = Program(schedule, moves, problem, rank, NCCL)
                exchanges = [e for step in made.steps for e in step.exchanges]
                sent = sum(n for e in exchanges for peer, n in zip(e.ranks, e.sent, strict=True) if peer != rank)
                one_by_one = Program(schedule, moves, problem, rank)
                rows = [t.bytes(schedule, problem)[t.rows[:, 0] == rank].sum() for t in moves.transfers]
                alone = sum(int(n) for n, each in zip(rows, made.lowered, strict=True) if each is None)
                assert sent + alone == report.forward_bytes[rank] + report.backward_bytes[rank], strategy
                assert not any(step.exchanges for step in one_by_one.steps)


@dataclass(frozen=True)
class Strict(SDPAFlash):
    """A kernel that reads k and v as they would lie if they were contiguous, as libraries do that take a pointer."""

    contiguous_kv: ClassVar[bool] = True

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return PreparedStrict(super().prepare(mask, heads, dtype, device))


@dataclass
class PreparedStrict:
    prepared: Prepared
    calls: int = 1

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float) -> Any:
        assert k.is_contiguous()
        assert v.is_contiguous()
        return self.prepared.forward(q, k, v, softmax_scale=softmax_scale)

    def backward(self, dout: torch.Tensor, saved: Saved, *, softmax_scale: float) -> Any:
        assert saved.k.is_contiguous()
        assert saved.v.is_contiguous()
        return self.prepared.backward(dout, saved, softmax_scale=softmax_scale)


def ways(rank: int, ranks: int) -> None:
    """Every way to move the same data gives the same results, to float64, and the bytes of the formula."""
    lowering.OPERATIONS["gloo"] = NCCL  # its reduce-scatter is slow, and right
    program.ROUND = 3  # so that sums that are copied go in two rounds
    direct, through_host = Groups(), Groups(through_host=True)
    everything: dict[str, Way] = {
        "messages": (SDPAFlash(), direct, "p2p"), "collectives": (SDPAFlash(), direct, "auto"),
        "through the host": (SDPAFlash(), through_host, "auto"), "messages through the host": (SDPAFlash(), through_host, "p2p"),
        "contiguous": (Strict(), direct, "auto"), "messages, contiguous": (Strict(), direct, "p2p"),
        "contiguous, through the host": (Strict(), through_host, "auto"),
    }  # fmt: skip
    seqlen = 16 * ranks
    documents = causal_document(seqlen, seed=(0, 0), lengths=Explicit([seqlen // 2 + 3, seqlen // 2 - 3]))
    for heads, mask in ((Heads(8, 8, 8), causal(seqlen)), (Heads(8, 2, 8), documents)):
        problem = problem_of(ranks, seqlen, heads, dtype="float64")
        strategies = [s for name in names("cp") if isinstance(s := build_strategy(load("cp", name)), Scheduled)]
        strategies += [AllGather(layout="contiguous"), AllGather(heads_per_step=1), Ulysses(stages=2), USP(2), LoongTrain(2)]
        for strategy in strategies:
            if not strategy.unsupported(problem, mask):
                all_ways(rank, strategy, problem, mask, everything)
    dist.barrier()


Way = tuple[SDPAFlash, Groups, Lowering]


def all_ways(rank: int, strategy: Scheduled, problem: Problem, mask: Mask, everything: dict[str, Way]) -> set[str]:
    """Run a strategy in some ways and compare it with dense attention; the operations by which something went."""
    schedule, heads = strategy.schedule(problem, mask), problem.heads
    report, own = verify(schedule, mask, problem), schedule.q.tokens(rank)
    q, k, v, dout = (draw(name, np.arange(problem.seqlen), problem, 7, CPU) for name in ("q", "k", "v", "dout"))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
    want = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
    used: set[str] = set()
    for way, (kernel, groups, lowered) in everything.items():
        case = f"{strategy} {way} {heads}"
        run = Executor(schedule, mask, kernel, problem, rank=rank, device=CPU, groups=groups, lowering=lowered)
        assert lowered == "auto" or not run.collectives
        used |= set(run.collectives)
        for _ in range(2):  # buffers are used again
            got_out, saved = run.forward(q[own], k[own], v[own])
            assert run.bytes_sent == report.forward_bytes[rank], case
            got = [got_out, run.lse(saved), *run.backward(dout[own], saved)]
            assert run.bytes_sent == report.backward_bytes[rank], case
        assert [len(x) for x in got] == [len(own)] * len(want), case
        error = max(float((mine - exact[own]).abs().max()) for mine, exact in zip(got, want, strict=True)) if len(own) else 0.0
        assert error <= 1e-12, f"{case}: {error}"
    return used


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_to_move_data_gives_the_same(ranks: int) -> None:
    run_ranks(ranks, ways, ranks)


def uneven_ways(rank: int, ranks: int) -> None:
    """Head exchanges of uneven parts are collectives, with the results and bytes of messages."""
    direct, through_host = Groups(), Groups(through_host=True)
    everything: dict[str, Way] = {
        "messages": (SDPAFlash(), direct, "p2p"), "collectives": (SDPAFlash(), direct, "auto"),
        "contiguous": (Strict(), direct, "auto"), "through the host": (SDPAFlash(), through_host, "auto"),
    }  # fmt: skip
    for strategy, seqlen, heads in uneven_cases(ranks):
        for reduce_dtype in ("float32", "input"):
            problem = problem_of(ranks, seqlen, heads, reduce_dtype, dtype="float64")
            assert all_ways(rank, strategy, problem, of_two(seqlen), everything) == {"all_to_all"}, strategy
    dist.barrier()


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_head_exchanges_of_uneven_parts_give_the_same(ranks: int) -> None:
    run_ranks(ranks, uneven_ways, ranks)


def made_once(rank: int, ranks: int) -> None:
    groups = Groups()
    assert groups.of("main") is dist.group.WORLD
    assert groups.among(tuple(range(ranks))) is groups.of("main")
    pairs = [groups.among((0, 2)), groups.among((1, 3))]
    assert [group is not None for group in pairs] == [rank in (0, 2), rank in (1, 3)]
    own = pairs[rank % 2]
    assert own is not None
    assert dist.get_process_group_ranks(own) == [rank % 2, rank % 2 + 2]
    assert groups.among((2, 0, 2)) is pairs[0]  # the same ranks
    apart = groups.among((0, 2), "peer")
    assert (apart is None) == (rank not in (0, 2))
    assert apart is None or apart is not pairs[0]
    total = torch.tensor([float(rank)])
    dist.all_reduce(total, group=own)
    assert total.item() == 2 * (rank % 2) + 2


@pytest.mark.slow
@pytest.mark.gloo
def test_groups_of_some_ranks_are_made_once_for_each_channel() -> None:
    run_ranks(4, made_once, 4)


def test_a_block_map_on_a_band_kernel_gives_each_map_its_heads_as_the_kernel_wants_them(tmp_path: Path) -> None:
    heads = Heads(4, 4, 8)
    mask = small("block_random", 128, heads, tmp_path, seed=3)
    assert isinstance(mask, BlockMap)
    assert mask.maps > 1
    problem = problem_of(1, 128, heads, dtype="float64")
    q, k, v, dout = (draw(name, np.arange(128), problem, 7, CPU) for name in ("q", "k", "v", "dout"))
    results = []
    for kernel in (SDPAFlash(), Strict()):
        prepared = prepare(kernel, mask, heads, torch.float64, CPU)
        out, lse = prepared.forward(q, k, v, softmax_scale=problem.softmax_scale)
        results.append([out, lse, *prepared.backward(dout, Saved(q, k, v, out, lse), softmax_scale=problem.softmax_scale)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


IDS = {
    "allgather": "ba3bd20b3868", "groupcast": "b9884c43ac16", "hybrid": "80928c95a197", "lightseq": "af276b5602af",
    "loongtrain": "9afacb414c23", "ring": "bdc75a3e967f", "tokenring": "7b82ff86dd71", "ulysses": "5c4fb97ad5cd",
    "usp": "7c9bd758bf00", "torch_cp": "84ddd81fbe56",
}  # fmt: skip
AXES = ["scale=1x4", "seqlen=4k", "mask=causal", "kernel=sdpa_flash"]


@pytest.mark.slow
def test_cells_keep_the_ids_that_they_had_before_there_was_a_choice() -> None:
    for said in ([], ["cp.lowering=auto"]):
        chosen = [name for name in IDS if name != "torch_cp" or not said]
        cells = [planned.cell for name in chosen for planned in look([f"cp={name}", *said, *AXES]).cells]
        assert {cell.config["cp"]["name"]: cell.id for cell in cells} == {name: IDS[name] for name in chosen}
        assert all("lowering" not in cell.config["cp"] for cell in cells)
    (other,) = [planned.cell for planned in look(["cp=ulysses", "cp.lowering=p2p", *AXES]).cells]
    assert other.id != IDS["ulysses"]
    assert build_strategy(other.config["cp"]) == Ulysses(lowering="p2p")
    assert build_strategy(load("cp", "usp")) == USP(lowering="auto")
    with pytest.raises(ValueError, match=r"cp\.lowering=nccl is not one of auto, p2p"):
        look(["cp=usp", "cp.lowering=nccl", *AXES])
    engine = [s for name in names("cp") if isinstance(s := build_strategy(load("cp", name)), Scheduled)]
    # One rank sends nothing, and a chain has no collectives.
    assert {type(each) for each in engine if "lowering" not in signature(type(each)).parameters} == {Local, LASP, ZeCO}
