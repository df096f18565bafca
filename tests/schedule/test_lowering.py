"""What goes by collectives: found in the data, the same on every rank, with the same results and bytes as messages one by one."""

from __future__ import annotations

from dataclasses import dataclass
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
from lcbench.cp.lightseq import LightSeq
from lcbench.cp.loongtrain import LoongTrain
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.cp.ulysses import Ulysses
from lcbench.cp.usp import USP
from lcbench.grid.build import build_strategy
from lcbench.grid.command_line import look
from lcbench.kernels.base import Prepared, Saved, prepare
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.block import BlockMap
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.lengths import Explicit
from lcbench.masks.mask import Mask
from lcbench.measure.inputs import draw
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule import lowering, program
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.lowering import OPERATIONS, collectives, sets_of
from lcbench.schedule.program import Program
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


def test_sizes_that_differ_go_from_point_to_point() -> None:
    for ranks, seqlen, heads, strategy in (
        (4, 67, Heads(8, 8, 8), Ulysses()),
        (4, 67, Heads(8, 8, 8), AllGather()),
        (3, 48, Heads(7, 7, 8), Ulysses(uneven_heads=True)),
    ):
        assert set(found(strategy, problem_of(ranks, seqlen, heads), causal(seqlen))) == {"p2p"}, strategy


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
                sent = sum(e.block * (len(e.ranks) - 1) for step in made.steps for e in step.exchanges)
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
    everything = {
        "messages": (SDPAFlash(), direct, "p2p"), "collectives": (SDPAFlash(), direct, "auto"),
        "through the host": (SDPAFlash(), through_host, "auto"), "messages through the host": (SDPAFlash(), through_host, "p2p"),
        "contiguous": (Strict(), direct, "auto"), "messages, contiguous": (Strict(), direct, "p2p"),
        "contiguous, through the host": (Strict(), through_host, "auto"),
    }  # fmt: skip
    seqlen = 16 * ranks
    documents = causal_document(seqlen, seed=(0, 0), lengths=Explicit([seqlen // 2 + 3, seqlen // 2 - 3]))
    for heads, mask in ((Heads(8, 8, 8), causal(seqlen)), (Heads(8, 2, 8), documents)):
        problem = problem_of(ranks, seqlen, heads, dtype="float64")
        tensors = [draw(name, np.arange(seqlen), problem, 7, CPU) for name in ("q", "k", "v", "dout")]
        dout = tensors.pop()
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
        want = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]
        strategies = [s for name in names("cp") if isinstance(s := build_strategy(load("cp", name)), Scheduled)]
        strategies += [AllGather(layout="contiguous"), AllGather(heads_per_step=1), Ulysses(stages=2), USP(2), LoongTrain(2)]
        for strategy in strategies:
            if strategy.unsupported(problem, mask):
                continue
            schedule = strategy.schedule(problem, mask)
            report, own = verify(schedule, mask, problem), schedule.q.tokens(rank)
            for way, (kernel, groups, lowered) in everything.items():
                case = f"{strategy} {way} {heads}"
                run = Executor(
                    schedule, mask, kernel, problem, rank=rank, device=CPU, groups=groups, lowering=lowered  # type: ignore[arg-type]
                )  # fmt: skip
                for _ in range(2):  # buffers are used again
                    got_out, saved = run.forward(*(x[own] for x in tensors))
                    assert run.bytes_sent == report.forward_bytes[rank], case
                    got = [got_out, run.lse(saved), *run.backward(dout[own], saved)]
                    assert run.bytes_sent == report.backward_bytes[rank], case
                error = max(float((mine - exact[own]).abs().max()) for mine, exact in zip(got, want, strict=True))
                assert error <= 1e-12, f"{case}: {error}"
    dist.barrier()


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_to_move_data_gives_the_same(ranks: int) -> None:
    run_ranks(ranks, ways, ranks)


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
    # One rank sends nothing.
    assert {type(each) for each in engine if "lowering" not in signature(type(each)).parameters} == {Local}
