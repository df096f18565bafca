"""Several context-parallel groups at once on real gloo ranks: each computes what it alone would, and a wrong one is found."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcbench.cp.base import Place, Scheduled, Strategy
from lcbench.cp.groupcast import GroupCast
from lcbench.cp.none import Local
from lcbench.cp.peers.torch_cp import TorchCP
from lcbench.cp.ring import Ring
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build_strategy
from lcbench.inputs.drawing import draw
from lcbench.kernels.base import Kernel
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.block import BlockMap
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import ALONE, Heads, Mesh, Problem, Scale
from lcbench.schedule.execute import Executor
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.schedule.lowering import OPERATIONS
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.verify import verify
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.faulty import Faulty
from lcbench.testing.masks import load, names, small
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.turns import due

CPU = torch.device("cpu")
HEADS = Heads(8, 4, 8)  # of all tensor-parallel ranks
SCALE = Scale(2, 4)
# Groups of 2 ranks on a node, of 2 on two nodes, and of 2 x 2.
MESHES = (Mesh(2, 2), Mesh(2, 2, "tp-dp-cp"), Mesh(2, 1), Mesh(1, 2, "dp-cp-tp"))
SETTINGS = {"warmup": 1, "min_iterations": 3, "max_iterations": 3, "budget_s": 1.0, "precision": 0.02, "timeline": False}


def problem_of(mesh: Mesh, scale: Scale, seqlen: int, dtype: str = "float64", heads: Heads = HEADS) -> Problem:
    return Problem(seqlen, mesh.heads(heads), mesh.group_scale(scale), dtype, "forward_backward")


def strategies() -> list[Strategy]:
    """Every strategy of ours, as its file has it, on messages too; and torch's."""
    named = [s for name in names("cp") if isinstance(s := build_strategy(load("cp", name)), Scheduled) and not isinstance(s, Local)]
    return [*named, Ulysses(lowering="p2p"), TorchCP(), TorchCP(rotate="alltoall")]


def engine(rank: int, folder: Path) -> None:
    """Every strategy in every group at once, against dense float64 of that group's inputs and heads; bytes by kind of link."""
    OPERATIONS["gloo"] = OPERATIONS["nccl"]  # so that sets of every operation are groups within groups
    seqlen, all_of_gang = 64, Gang(rank, 8, CPU, Groups(), [])
    for mesh in MESHES:
        gang = all_of_gang.arranged(mesh, SCALE)
        problem = problem_of(mesh, SCALE, seqlen)
        # Of maps that heads have for themselves a tensor-parallel rank has a part; such groups have different schedules.
        masks = {"causal": causal(seqlen), "block_random": small("block_random", seqlen, HEADS, folder, per="kv_head")}
        for name, whole in masks.items():
            mask = gang.own_heads(whole, problem.heads.q)
            where = slice(gang.tp_index * problem.heads.q, (gang.tp_index + 1) * problem.heads.q)
            dense = dense_heads(whole, HEADS.q)[where]
            tensors = [
                draw(each, np.arange(seqlen), problem, 7, CPU, (gang.dp_index, gang.tp_index)) for each in ("q", "k", "v", "dout")
            ]
            leaves = [x.clone().requires_grad_() for x in tensors[:3]]
            out, lse = dense_attention(*leaves, dense, problem.softmax_scale)
            want = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors[3])]
            for strategy in due(strategies()):
                if strategy.unsupported(problem, mask):
                    continue
                case = f"{strategy} {name} {mesh}"
                run = strategy.start(problem, mask, SDPAFlash(), gang.place)
                own = run.tokens
                got_out, saved = run.forward(*(x[own] for x in tensors[:3]))
                if isinstance(strategy, Scheduled):
                    check_bytes(run, strategy.schedule(problem, mask), mask, problem, gang.cp_rank, case)  # type: ignore[arg-type]
                got = [got_out, run.lse(saved), *run.backward(tensors[3][own], saved)]
                for mine, exact in zip(got, want, strict=True):
                    both = torch.isinf(mine) & torch.isinf(exact[own])
                    error = float(torch.where(both, 0.0, mine - exact[own]).abs().max())
                    assert error <= 1e-12, f"{case}: {error}"


def check_bytes(run: Executor, schedule: Schedule, mask: Mask, problem: Problem, rank: int, case: str) -> None:
    report, counters = verify(schedule, mask, problem), run.counters()
    assert counters.bytes_sent == report.forward_bytes[rank], case
    assert counters.bytes_between_nodes == report.forward_bytes_out[rank], case


def joint(rank: int, folder: Path) -> None:
    """What a gang tells a workload of its mesh."""
    groups = Groups()
    every = Gang(rank, 8, CPU, groups, [])
    mesh = MESHES[1]
    gang = every.arranged(mesh, SCALE)
    grid = mesh.groups(SCALE)
    assert grid[gang.dp_index, gang.tp_index, gang.cp_rank] == rank
    for dims, members in (
        (("tp",), grid[gang.dp_index, :, gang.cp_rank]), (("dp",), grid[:, gang.tp_index, gang.cp_rank]),
        (("dp", "cp"), grid[:, gang.tp_index, :]), (("cp",), grid[gang.dp_index, gang.tp_index]),
    ):  # fmt: skip
        group = gang.communicator(*dims)
        assert dist.get_process_group_ranks(group) == sorted(members.ravel().tolist()), dims
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=group)
        assert total.item() == members.sum()
    device_mesh = gang.device_mesh
    assert device_mesh is not None
    assert device_mesh.mesh_dim_names == ("dp_cp", "tp")
    for name, dims in (("tp", ("tp",)), ("dp_cp", ("dp", "cp"))):
        group = device_mesh[name].get_group()
        assert group is gang.communicator(*dims)
        assert device_mesh[name].get_local_rank() == group.rank()
    assert gang.arranged(mesh, SCALE).device_mesh is device_mesh  # the next cell's
    assert every.device_mesh is not None
    assert every.device_mesh.mesh_dim_names == ("dp_cp",)
    assert every.device_mesh.get_group() is not dist.group.WORLD
    assert gang.groups.of("main") is not dist.group.WORLD
    assert every.arranged(ALONE, SCALE).groups.of("main") is dist.group.WORLD
    assert gang.of_groups(f"{gang.dp_index}{gang.tp_index}") == ["00", "01", "10", "11"]
    with pytest.raises(ValueError, match="scale=2x2 is not the scale of these 8 ranks"):
        every.arranged(ALONE, Scale(2, 2))


def work_of(mesh: Mesh, scale: Scale, strategy: Strategy, kernel: Kernel, mask: Mask) -> Work:
    problem = problem_of(mesh, scale, mask.num_q, "float32")
    return Work(Attention(), problem, lambda _: mask, kernel, strategy, SETTINGS, seed=0, mesh=mesh, scale=scale)


def cells(rank: int, folder: Path) -> None:
    """Cells that are measured in a mesh: what each says is written down by rank 0."""
    os.environ["RANK"] = str(rank)
    gang, seqlen = Gang(rank, 8, CPU, Groups(), []), 96
    (folder / "broken").touch()
    dist.barrier()
    whole, blocks = causal(seqlen), small("block_random", seqlen, HEADS, folder, per="q_head")
    assert isinstance(blocks, BlockMap)
    sound = SDPAFlash()
    found = {
        name: told(measure_cell(work_of(mesh, SCALE, strategy, kernel, mask), gang, lambda _: None))
        for name, mesh, strategy, kernel, mask in (
            ("near", MESHES[0], Ring(), sound, whole),
            ("far", MESHES[1], Ring(), sound, whole),
            ("alone", ALONE, Ring(), sound, whole),
            ("maps", MESHES[2], GroupCast(), sound, blocks),
            ("library", MESHES[0], TorchCP(), sound, whole),
            ("wrong", MESHES[0], Ring(), Faulty("wrong", str(folder / "broken"), 5), whole),
            ("blind", MESHES[1], Ring(), Faulty("blind", str(folder / "broken"), 6), whole),
            ("misowned", MESHES[0], Half(broken=7), sound, whole),
        )
    }
    if rank == 0:
        found["area"] = {"maps": blocks.pairs(HEADS.q) / HEADS.q}
        (folder / "found").write_text(json.dumps(found))


def told(result: Measured) -> dict[str, object]:
    assert result.check is not None
    return {"failures": result.check.failures, "metrics": result.metrics, "ranks": result.samples.get("rank_forward_median_s")}


@dataclass(frozen=True)
class Half(Ring):
    """A ring in which one rank of all says that it owns a token less than it does."""

    broken: int = 0

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> Executor:
        run = super().start(problem, mask, kernel, place)
        if dist.get_rank() == self.broken:
            own = Part(run.tokens[1:])
            run.tokens, run.held = own.tokens, Held(own, own, own)
        return run


def eight(rank: int, folder: Path) -> None:
    engine(rank, folder)
    joint(rank, folder)
    cells(rank, folder)


@pytest.mark.gloo
@pytest.mark.slow
def test_groups_of_a_mesh_compute_what_each_alone_would_and_are_measured_together(tmp_path: Path) -> None:
    run_ranks(8, eight, tmp_path)
    found = json.loads((tmp_path / "found").read_text())
    area = 96 * 97 / 2
    assert [name for name in ("near", "far", "alone", "maps", "library") if found[name]["failures"]] == []
    for name in ("near", "far", "maps", "library"):
        metrics = found[name]["metrics"]
        for phase in ("forward", "backward", "total"):
            alone, slowdown = metrics[f"mesh/{phase}/alone_s"], "mesh/slowdown" if phase == "total" else f"mesh/{phase}/slowdown"
            assert metrics[slowdown] * alone == pytest.approx(metrics[f"time/{phase}/median_s"])
    for name, groups in (("near", 4), ("far", 4), ("alone", 1)):
        metrics, mesh = found[name]["metrics"], ALONE if groups == 1 else Mesh(2, 2)
        assert metrics["mask/area"] == area
        for phase, flops in (("forward", forward_flops), ("backward", backward_flops)):
            every = groups * flops(area * mesh.heads(HEADS).q, HEADS)
            rate = metrics[f"compute/{phase}/tflops_per_gpu"] * 8 * 1e12 * metrics[f"time/{phase}/median_s"]
            assert rate == pytest.approx(every)
        assert len(found[name]["ranks"]) == 8
    maps = found["maps"]["metrics"]
    assert maps["mask/area"] == pytest.approx(found["area"]["maps"])
    assert not any(key.startswith("mesh/") for key in found["alone"]["metrics"])
    # A ring of two ranks sends keys and values of half of the tokens once, in a node or between two.
    sent = 2 * 48 * 2 * 8 * 4
    for name, within, between in (("near", sent, 0), ("far", 0, sent)):
        metrics = found[name]["metrics"]
        assert (metrics["comm/forward/within_node_bytes"], metrics["comm/forward/between_nodes_bytes"]) == (within, between)
        assert metrics["comm/forward/bytes"] == sent
    metrics = found["alone"]["metrics"]
    # Ranks 3 and 7 send to the other node, six others within theirs; each sends as much.
    assert metrics["comm/forward/within_node_bytes"] == metrics["comm/forward/between_nodes_bytes"] == metrics["comm/forward/bytes"]
    assert not any(key.startswith("comm/") for key in found["library"]["metrics"])
    # Rank 5 of tp-cp-dp is in the second replica, and has the second half of the heads; rank 6 of tp-dp-cp is in it with the first.
    for fault, group in (("wrong", "group dp=1 tp=1: "), ("blind", "group dp=1 tp=0: ")):
        assert found[fault]["failures"]
        assert {failure[: len(group)] for failure in found[fault]["failures"]} == {group}
        assert not any(key.startswith("time/total") for key in found[fault]["metrics"])
    (failure,) = found["misowned"]["failures"]
    assert failure.startswith("owners: group dp=1 tp=1: 1 of 96 tokens are not owned by exactly one rank")


def single(rank: int, folder: Path) -> None:
    """Two replicas of a rank each."""
    gang, mesh, scale = Gang(rank, 2, CPU, Groups(), []), Mesh(dp=2), Scale(1, 2)
    result = measure_cell(work_of(mesh, scale, Local(), SDPAFlash(), causal(64)), gang, lambda _: None)
    os.environ["RANK"] = str(rank)
    (folder / "broken").touch()
    dist.barrier()
    kernel = Faulty("wrong", str(folder / "broken"), 1)
    broken = measure_cell(work_of(mesh, scale, Local(), kernel, causal(64)), gang, lambda _: None)
    if rank == 0:
        (folder / "found").write_text(json.dumps([told(result), told(broken)]))


@pytest.mark.slow
@pytest.mark.gloo
def test_replicas_of_one_rank_each(tmp_path: Path) -> None:
    run_ranks(2, single, tmp_path)
    sound, broken = json.loads((tmp_path / "found").read_text())
    assert not sound["failures"]
    assert sound["metrics"]["mesh/slowdown"] > 0
    assert "overlap/forward/efficiency" not in sound["metrics"]
    assert sound["metrics"]["comm/bytes"] == 0
    assert broken["failures"]
    assert all(failure.startswith("group dp=1 tp=0: ") for failure in broken["failures"])


def test_groups_have_other_inputs_and_the_first_has_those_of_a_group_alone() -> None:
    problem, tokens = Problem(300, Heads(2, 1, 8), Scale(1, 1), "float32", "forward_backward"), np.arange(300)
    alone = draw("q", tokens, problem, 3, CPU)
    assert torch.equal(draw("q", tokens, problem, 3, CPU, (0, 0)), alone)
    # As they were before there were groups.
    assert alone[299, 1, :3].tolist() == pytest.approx([1.5136460065841675, 1.9780566692352295, -0.967186450958252])
    every = [draw("q", tokens, problem, 3, CPU, (dp, tp)) for dp in range(2) for tp in range(2)]
    assert all(not torch.equal(one, other) for i, one in enumerate(every) for other in every[:i])
