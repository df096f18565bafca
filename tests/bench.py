"""How long planning, the mask algebra and every strategy take: printed, never asserted. ``make bench``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lcbench.cp.allgather import AllGather
from lcbench.cp.base import Passes, Place, RankRun, Scheduled
from lcbench.cp.peers.torch_cp import ROTATIONS, TorchCP
from lcbench.cp.ring import Ring
from lcbench.cp.tokenring import TokenRing
from lcbench.grid.build import build_mask, build_strategy, check_options, with_option
from lcbench.grid.command_line import look
from lcbench.inputs.drawing import draw
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.convert import varlen
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.measure.session import Gang
from lcbench.measure.stopping import Stopping
from lcbench.measure.timing import measure
from lcbench.predict.draws import operations_on
from lcbench.predict.fit import guess
from lcbench.predict.fitted import KernelFit
from lcbench.predict.machines import machine_of
from lcbench.problem import REDUCE_DTYPES, Heads, Problem, Scale
from lcbench.schedule.adjoint import traffic
from lcbench.schedule.groups import Groups
from lcbench.schedule.layout import contiguous
from lcbench.schedule.machine import Machine
from lcbench.schedule.program import Program
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.simulate import Simulated, simulate
from lcbench.schedule.verify import verify
from lcbench.testing.masks import load, names
from lcbench.testing.precision import relative_errors
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.none import NoRecompute
from lcbench.workloads.step import BlockSession


def timed(name: str, run: Callable[[], Any]) -> Any:
    begun, cpu = time.perf_counter(), time.process_time()
    result = run()
    taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
    print(f"{name:<64} {1e3 * taken:10.1f} ms {1e3 * cpu:10.1f} ms CPU", flush=True)
    return result


def fitting(config: dict[str, Any], tokens: int, heads: Heads) -> Mask | None:
    try:
        return build_mask(config, tokens, heads, 0)
    except DoesNotFit as error:
        print(f"    {error}")
        return None


def main() -> None:
    seeds = ",".join(map(str, range(70)))
    lengths = ",".join(f"{n}k" for n in range(1, 13))
    grid = [f"seed={seeds}", f"seqlen={lengths}", "cp=ring,ulysses,usp", "mask=full,causal", "scale=1x8,2x8"]
    timed("plan of 10,080 cells", lambda: look(grid))
    heads = Heads(32, 8, 128)
    for tokens in (1 << 16, 1 << 20, 10 << 20):
        for name in names():
            if name.endswith("_file"):
                continue
            lengths = check_options("lengths", load("lengths", "web_text"))
            config = with_option(check_options("mask", load("mask", name)), "lengths", lengths)
            mask = timed(f"{name}, build, {tokens} tokens", lambda c=config, n=tokens: fitting(c, n, heads))
            if isinstance(mask, BandMask):
                timed(f"{name}, area of {len(mask)} bands", lambda m=mask: m.area)
                timed(f"{name}, tile of rank 0 of 96, merged", lambda m=mask: contiguous(m.num_q, 96).tile(m, 0, 0).merged())
            elif mask is not None and tokens <= 1 << 16:
                timed(f"{name}, draw and area of {mask.maps} maps", lambda m=mask: m.pairs(heads.q))
    documents = causal_document(10 << 20, seed=(0, 0), lengths=Uniform(1, 200))
    timed(f"{len(documents)} causal documents at 10M tokens, area", lambda: documents.area)
    timed("the same, area of 96 contiguous ranks", lambda: contiguous(10 << 20, 96).areas(documents))
    timed("the same, varlen calls", lambda: varlen(documents))
    timed("the same, overlap check", documents.overlap)
    plans()
    simulations()
    for ranks in (2, 4, 8, 16):
        run_ranks(ranks, precision, ranks)
    for ranks in (2, 4):
        run_ranks(ranks, against_torch, ranks)
    for ranks in (1, 2):
        run_ranks(ranks, inside_steps, ranks)


def plans() -> None:
    """What a rank works out before it runs: schedule, its backward, buffers and messages."""
    problem = Problem(1 << 20, Heads(96, 8, 128), Scale(12, 8), "bfloat16", "forward_backward")
    mask = causal_document(1 << 20, seed=(0, 0), lengths=Uniform(1, 8192))
    for name in names("cp"):
        strategy = build_strategy(load("cp", name))
        if not isinstance(strategy, Scheduled) or strategy.unsupported(problem, mask):
            continue

        def plan(strategy: Scheduled = strategy) -> Schedule:
            schedule = strategy.schedule(problem, mask)
            Program(schedule, traffic(schedule, backward=True), problem, 0)
            return schedule

        schedule = timed(f"{name}: plan of a rank, 96 ranks, 1M tokens, causal documents", plan)
        timed(f"{name}: verify the same", lambda s=schedule: verify(s, mask, problem))


def simulations() -> None:
    """Every strategy on every mask, on an H100 cluster that is not here: what ``Predictor.predict`` does once a mask is drawn.

    That is the strategy's refusal and its schedule, the traffic, the collectives, the tiles and the play, without buffers. Wanted:
    under 2 s of CPU on 96 ranks, under a minute on 1,024.
    """
    machine, heads, tokens = machine_of("h100"), Heads(32, 8, 128), 1 << 20
    mere = guess(machine, "bfloat16")
    kernel = KernelFit(kernel="flash_attn3", dtype="bfloat16", forward=mere, backward=mere)
    lengths = check_options("lengths", load("lengths", "web_text"))
    built = {name: build_strategy(load("cp", name)) for name in names("cp")}
    for name in (name for name in names() if not name.endswith("_file")):
        mask = build_mask(with_option(check_options("mask", load("mask", name)), "lengths", lengths), tokens, heads, 0)
        timed(f"{name}, drawn with its pairs, {tokens} tokens", lambda m=mask: m.pairs(heads.q))
        for scale in (Scale(12, 8), Scale(128, 8)):
            problem = Problem(tokens, heads, scale, "bfloat16", "forward_backward")
            for cp, strategy in built.items():
                if isinstance(strategy, Scheduled) and not strategy.unsupported(problem, mask):
                    timed(f"simulate {cp}, {name}, {scale}", partial(simulated, strategy, problem, mask, machine, kernel))


def simulated(strategy: Scheduled, problem: Problem, mask: Mask, machine: Machine, kernel: KernelFit) -> Simulated:
    """What takes time of a prediction, apart from drawing the mask."""
    assert strategy.unsupported(problem, mask) is None
    return simulate(strategy.modelled(problem, mask), machine, kernel, operations=operations_on(machine), memory=False)


def precision(rank: int, ranks: int) -> None:
    """Whether results get worse with more ranks, with sums that travel in float32 and in the inputs' type."""
    for kept in REDUCE_DTYPES:
        for strategy in (Ring(), AllGather(), TokenRing()):
            errors = relative_errors(rank, ranks, strategy, kept)
            if rank == 0:
                shown = "  ".join(f"{name} {error:.2e}" for name, error in errors.items())
                print(f"{type(strategy).__name__:<10} bfloat16, {ranks:>2} ranks, reduce_dtype={kept:<8} {shown}", flush=True)


def against_torch(rank: int, ranks: int) -> None:
    """Forward and backward of every strategy, over its kernels alone and over torch's ring on the same kernel; where collectives
    move its data, messages one by one too."""
    seqlen, device = 4096, torch.device("cpu")
    problem = Problem(seqlen, Heads(8, 4, 64), Scale(1, ranks), "float32", "forward_backward")
    mask, kernel, place = causal(seqlen), SDPAFlash(), Place(rank, device, Groups())
    runs: dict[str, RankRun] = {}
    for rotate in ROTATIONS:
        peer = TorchCP(rotate)  # type: ignore[arg-type]
        runs[f"torch {rotate}"] = peer.start(problem, mask, kernel, place)
    for name in names("cp"):
        strategy = build_strategy(load("cp", name))
        if isinstance(strategy, Scheduled) and not strategy.unsupported(problem, mask):
            runs[name] = run = strategy.start(problem, mask, kernel, place)
            if run.collectives:
                runs[f"{name} p2p"] = replace(strategy, lowering="p2p").start(problem, mask, kernel, place)
    phases: dict[str, Callable[[Any], Any]] = {}
    for name, each in runs.items():
        tensors = [draw(x, each.tokens, problem, 0, device) for x in ("q", "k", "v", "dout")]
        _, saved = each.forward(*tensors[:3])
        phases[name] = partial(both, each, tensors, None)
        if bare := each.replay(compute=True, communicate=False):
            phases[f"{name} compute"] = partial(both, bare, tensors, saved)
    # All take turns within an iteration, so that what else the machine does hits all alike.
    samples, _ = measure(phases, Stopping(7, 7, 600.0, 0.0), 1, device)
    if rank == 0:
        median = {name: float(np.median(seconds)) for name, seconds in samples.slowest.items()}
        peer_s = min(median[f"torch {rotate}"] for rotate in ROTATIONS)
        for name in (name for name in runs if not name.startswith("torch")):
            own, alone = median[name], median[f"{name} compute"]
            print(
                f"{name:<14} {ranks} ranks, causal, {seqlen} tokens: {1e3 * own:8.1f} ms, {own / alone:5.2f} of its kernels alone, "
                f"{own / peer_s:5.2f} of torch's ring ({1e3 * peer_s:.1f} ms)",
                flush=True,
            )


def inside_steps(rank: int, ranks: int) -> None:
    """Attention inside of a training step over the same attention by itself, of one iteration each: it is to be 1."""
    seqlen, device, layers = 4096, torch.device("cpu"), 2
    model = Model(layers, hidden=512, heads_q=8, heads_kv=4, head_dim=64, ffn=1024, vocab=1000, rope_theta=5e5)
    problem = Problem(seqlen, model.heads(), Scale(1, ranks), "float32", "forward_backward")
    gang = Gang(rank, ranks, device, Groups(), [])
    for name in names("cp"):
        strategy = build_strategy(load("cp", name))
        if (
            not isinstance(strategy, Scheduled)
            or strategy.unsupported(problem, causal(seqlen))
            or strategy.one_rank != (ranks == 1)
        ):
            continue
        work = Work(
            Block(model, layers), problem, lambda _: causal(seqlen), SDPAFlash(), strategy, {}, 0, recompute=NoRecompute()
        )  # fmt: skip
        session = work.start(0, gang)
        assert isinstance(session, BlockSession)
        alone = strategy.start(problem, causal(seqlen), SDPAFlash(), gang.place)
        tensors = [draw(x, alone.tokens, problem, 0, device) for x in ("q", "k", "v", "dout")]
        inside: list[float] = []

        def step(_: Any, session: BlockSession = session, inside: list[float] = inside) -> None:
            passed: Any = None
            with session.training.watched() as watch:
                for phase in session.phases().values():
                    passed = phase(passed)
            inside.append(sum(watch.seconds().values()) / layers)

        phases: dict[str, Callable[[Any], Any]] = {"alone": partial(both, alone, tensors, None), "step": step}
        samples, _ = measure(phases, Stopping(11, 11, 600.0, 0.0), 1, device)
        if rank == 0:
            own = np.median(samples.slowest["alone"])  # a rank that is done early waits in the next layer
            ratio = np.array(inside[1:]) / own  # without the warm-up
            low, high = np.percentile(np.array(samples.slowest["alone"]) / own, [20, 80])
            print(
                f"{name:<12} {ranks} ranks, causal, {seqlen} tokens: attention of a layer {1e3 * own * np.median(ratio):8.1f} ms, "
                f"{np.median(ratio):5.2f} of the same alone ({1e3 * own:.1f} ms, 20 to 80 %: {low:.2f} to {high:.2f})",
                flush=True,
            )


def both(run: Passes, tensors: list[torch.Tensor], whole: Any, _: Any) -> None:
    """Forward and backward; ``whole``: what a whole forward saved, for passes whose own means nothing."""
    q, k, v, dout = tensors
    _, saved = run.forward(q, k, v)
    run.backward(dout, saved if whole is None else whole)


if __name__ == "__main__":
    main()
