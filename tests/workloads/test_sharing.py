"""A model shared among ranks learns what one rank would: FSDP2, tensor parallelism, replicas, sums of gradients, the optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lcbench.cp.base import Strategy
from lcbench.grid.build import build, build_kernel, build_strategy
from lcbench.inputs.drawing import draw_rows
from lcbench.masks.causal import causal
from lcbench.measure.session import Gang
from lcbench.problem import ALONE, Mesh, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.masks import load
from lcbench.testing.spawn import run_ranks
from lcbench.workloads import sharing
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.loss import ChunkedLoss, labels_of
from lcbench.workloads.models import Model
from lcbench.workloads.sharing import Sharing, local, whole
from lcbench.workloads.step import BlockSession
from lcbench.workloads.training import Training
from lcbench.workloads.transformer import Head, give_weights
from tests.turns import due

CPU = torch.device("cpu")
# Four ranks divide neither the heads' norms (6), nor the vocabulary, nor what a chunk of the loss leaves over.
MODEL = Model(layers=2, hidden=24, heads_q=4, heads_kv=2, head_dim=6, ffn=20, vocab=30, rope_theta=1e4, qk_norm=True)
SEQLEN, CHUNK, SEED = 64, 12, 5
RANKS = 4
SIZES = {  # of each module whose weights are gathered together, the shapes of its weights
    "before": [(24,), (24, 24), (12, 24), (12, 24), (6,), (6,)], "after": [(24, 24), (24,), (20, 24), (20, 24), (24, 20)],
    "head": [(24,), (30, 24)],
}  # fmt: skip
UNITS = [*("before", "after") * MODEL.layers, "head"]
OPTIONS = {"token_wise": {"fraction": 0.5}}
# mesh, strategy, recompute, whether weights are sharded
CASES = [
    (ALONE, "ring", "none", False), (ALONE, "ring", "full", True), (ALONE, "ulysses", "none", True),
    (Mesh(tp=2), "ring", "full", False), (Mesh(tp=2), "ring", "none", True),
    (Mesh(tp=2, order="cp-tp-dp"), "ulysses", "attention_out", True),
    (Mesh(dp=2), "ulysses", "selective", False), (Mesh(dp=2), "ring", "full", True), (Mesh(tp=2, dp=2), "none", "full", True),
    (ALONE, "ring", "token_wise", True), (Mesh(tp=2), "ulysses", "token_wise", True), (Mesh(tp=2), "ring", "offload", True),
]  # fmt: skip


def strategy_of(name: str) -> Strategy:
    return build_strategy(load("cp", name))


def session_of(
    gang: Gang,
    mesh: Mesh,
    scale: Scale,
    strategy: str,
    recompute: str,
    seqlen: int = SEQLEN,
    dtype: str = "float64",
    **options: Any,
) -> BlockSession:
    block = Block(**{"model": MODEL, "layers": None, "loss_chunk": CHUNK, **options})
    problem = Problem(seqlen, mesh.heads(block.model.heads()), mesh.group_scale(scale), dtype, "forward_backward")
    work = Work(
        block, problem, lambda _: causal(seqlen), build_kernel(load("kernel", "naive")), strategy_of(strategy), {}, SEED,
        recompute=build(load("recompute", recompute) | OPTIONS.get(recompute, {})), mesh=mesh, scale=scale,
    )  # fmt: skip
    return BlockSession(block, work, 0, work.arranged(gang))


def step(training: Training) -> tuple[torch.Tensor, torch.Tensor, dict[str, dict[str, int]]]:
    """dx, the loss, and bytes by phase and kind."""
    passed, sent = None, {}
    for name, phase in training.phases().items():
        with training.counting() as traffic:
            passed = phase(passed)
        sent[name] = traffic.sent
    assert passed is not None
    return *passed, sent


def alone(sequence: int, **options: Any) -> dict[str, torch.Tensor]:
    """Loss, dx and gradients of all weights on one rank that has everything."""
    session = session_of(Gang(0, 1, CPU, Groups(), []), ALONE, Scale(1, 1), "none", "none", **options)
    training, tokens = session.training, session.training.stack.attention.run.tokens
    training.x = draw_rows("x", tokens, (MODEL.hidden,), torch.float64, SEED, CPU, (sequence, 0))
    training.loss.labels = labels_of(tokens, MODEL.vocab, SEED, CPU, (sequence, 0))
    dx, loss, sent = step(training)
    assert not any(sent[phase] for phase in sent)
    return {"loss": loss, "dx": dx} | {name: weight.grad for name, weight in training.weights().items()}


@pytest.mark.slow
@pytest.mark.gloo
def test_shared_weights_change_no_result(tmp_path: Path) -> None:
    torch.save([alone(0), alone(1)], tmp_path / "alone.pt")
    run_ranks(RANKS, shared, tmp_path)


def shared(rank: int, folder: Path) -> None:
    sequences = torch.load(folder / "alone.pt")
    gang, scale = Gang(rank, RANKS, CPU, Groups(), []), Scale(1, RANKS)
    for mesh, strategy, recompute, fsdp in due(CASES):
        case = f"{mesh} {strategy} {recompute} fsdp={fsdp}"
        session = session_of(gang, mesh, scale, strategy, recompute, fsdp=fsdp, optimizer="adamw")
        training, arranged = session.training, gang.arranged(mesh, scale)
        before = {name: local(weight).detach().clone() for name, weight in training.weights().items()}
        names = [*training.phases()]
        assert names == ["forward", "head", "backward", *([] if fsdp or mesh.tp == RANKS else ["reduce"]), "optimizer"], case
        step(training)  # of a layer that a policy has run by itself FSDP2 expects a backward, so the first step gathers once more
        dx, loss, sent = step(training)
        # The mean over sequences of a mean over tokens, of which each context-parallel group has its own sequence.
        want = {key: sum(each[key] for each in sequences[: mesh.dp]) / mesh.dp for key in sequences[0] if key != "dx"}
        want["dx"] = sequences[arranged.dp_index]["dx"][torch.from_numpy(training.stack.attention.run.tokens)] / mesh.dp
        dist.all_reduce(loss)
        got = {"loss": loss / mesh.tp, "dx": dx} | {name: whole(weight.grad) for name, weight in training.weights().items()}
        for name, exact in want.items():
            error = float((got[name] - exact).abs().max() / exact.abs().max())
            assert error < 1e-11, f"{case}: {name} {error}"
        for name, weight in training.weights().items():
            assert torch.equal(local(weight).view(torch.int64), before[name].view(torch.int64)), f"{case}: {name} moved"
        again = step(training)
        assert torch.equal(again[0], dx), case
        assert again[2] == sent, case
        assert all(torch.equal(whole(weight.grad), got[name]) for name, weight in training.weights().items()), case
        check_bytes(sent, mesh, recompute, fsdp, case)
        check_memory(training, mesh, fsdp, case)
    check_16_bit(gang, scale)


def check_16_bit(gang: Gang, scale: Scale) -> None:
    """Gradients in bfloat16 are summed in float32, with FSDP and without."""
    gradients = []
    for fsdp in (False, True):
        training = session_of(gang, ALONE, scale, "ring", "none", dtype="bfloat16", fsdp=fsdp).training
        step(training)
        _, _, sent = step(training)
        gradients.append({name: whole(weight.grad).double() for name, weight in training.weights().items()})
        layers, head = (sum(sum(parts(unit, ALONE, fsdp)) for unit in units) for units in (UNITS[:-1], UNITS[-1:]))
        total, others = sum(phase["weights"] for phase in sent.values()), RANKS - 1
        if fsdp:
            assert total == others * (2 * (2 * layers + head) + 4 * (layers + head))
        else:
            assert total == sent["reduce"]["weights"] == 2 * others * 4 * (layers + head) // RANKS
    for name, one in gradients[0].items():
        assert float((one - gradients[1][name]).abs().max()) <= 2**-6 * float(one.abs().max()), name


def parts(unit: str, mesh: Mesh, fsdp: bool) -> list[int]:
    """Elements that a rank has of each weight of a unit, with what pads it to equal shards."""
    same = RANKS // mesh.tp if fsdp else 1
    found = []
    for number, shape in enumerate(SIZES[unit]):
        divided = mesh.tp if len(shape) == 2 else 1
        by_rows = (unit, number) not in {("after", 0), ("after", 4)}  # o and down are divided along their inputs
        rows = shape[0] // divided if by_rows else shape[0]
        columns = math.prod(shape[1:]) // (1 if by_rows else divided)
        found.append(math.ceil(rows / same) * columns)
    return found


def check_bytes(sent: dict[str, dict[str, int]], mesh: Mesh, recompute: str, fsdp: bool, case: str) -> None:
    same, tokens = RANKS // mesh.tp, SEQLEN * mesh.tp * mesh.dp // RANKS
    if same > 1:
        every = 8 * sum(sum(parts(unit, mesh, fsdp)) for unit in UNITS)
        total = sum(phase["weights"] for phase in sent.values())
        if fsdp:
            # Layers are gathered for forward and for backward, the head once; all are reduced once. The first gathering of backward
            # begins beside the head.
            head = 8 * sum(parts("head", mesh, fsdp))
            assert sent["forward"]["weights"] == (same - 1) * (every - head), case
            assert total == (same - 1) * (3 * (every - head) + 2 * head), case
        else:
            assert total == sent["reduce"]["weights"] == round(2 * (same - 1) / same * every), case
    if mesh.tp > 1:
        hidden = 8 * tokens * MODEL.hidden  # all-reduced among two: each sends as much as there is
        assert sent["forward"]["tp"] == 2 * MODEL.layers * hidden, case
        norms = 8 * 2 * MODEL.head_dim * MODEL.layers
        # Of what is computed again, the last sum is of no use to anyone.
        again = {"none": 0, "offload": 0, "full": 1}.get(recompute)
        if again is not None:
            assert sent["backward"]["tp"] == (2 + again) * MODEL.layers * hidden + norms, case
        # Of each token: the gradient of the head's input, the largest logit, the sum of exponentials, the label's logit.
        assert sent["head"]["tp"] == hidden + 3 * 8 * tokens, case


def check_memory(training: Training, mesh: Mesh, fsdp: bool, case: str) -> None:
    memory = training.memory()
    elements = sum(sum(parts(unit, mesh, fsdp)) for unit in UNITS)
    assert memory["weights"] == 8 * elements, case
    assert memory["gradients"] == 8 * elements, case
    count = sum(len(SIZES[unit]) for unit in UNITS)
    moments = 2 * 8 * sum(local(weight).numel() for weight in training.weights().values())
    assert memory["optimizer"] == moments + 4 * count, case  # and the number of each weight's steps


@pytest.mark.slow
def test_activations_are_what_backward_needs() -> None:
    model = replace(MODEL, hidden=256, heads_q=4, heads_kv=2, head_dim=64, ffn=320, layers=3)
    gang, seqlen = Gang(0, 1, CPU, Groups(), []), 256
    for recompute in ("none", "full"):
        training = session_of(gang, ALONE, Scale(1, 1), "none", recompute, seqlen=seqlen, model=model, loss_chunk=seqlen).training
        training.memory()  # what is made at first use is none of it
        saved: dict[int, int] = {}

        def keep(x: torch.Tensor, into: dict[int, int] = saved) -> torch.Tensor:
            into[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            x, y = training.forward()
        held = {x.untyped_storage().data_ptr() for x in (*training.weights().values(), *training.stack.rope, training.x)}
        want = sum(size for pointer, size in saved.items() if pointer not in held and pointer != y.untyped_storage().data_ptr())
        want += y.numel() * y.element_size()
        if recompute == "full":
            assert want == 3 * seqlen * 256 * 8  # the input of each layer but the first, and the output
        del x, y
        got = training.memory()["activations"]
        # The graph that autograd keeps is a hundred kilobytes whatever the length.
        assert abs(got - want) < 0.02 * want + 2**17, f"{recompute}: {got} of {want}"


def test_gradients_of_chunks_are_summed_wide() -> None:
    """256 chunks of one token, in bfloat16: as exact as one chunk of all, which a sum in bfloat16 would not be."""
    model = replace(MODEL, vocab=8)
    heads = [Head(model, torch.bfloat16, CPU) for _ in range(2)]
    y = torch.randn(256, model.hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels = torch.zeros(256, dtype=torch.int64)
    grads = []
    for head, chunk in zip(heads, (1, 256), strict=True):
        give_weights(head, "head", SEED)
        ChunkedLoss(head, labels, chunk, 1 / 256, Sharing())(y)
        assert head.logits.weight.grad is not None
        assert head.logits.weight.grad.dtype == torch.bfloat16
        grads.append(head.logits.weight.grad.double())
    assert float((grads[0] - grads[1]).abs().max()) <= 2**-7 * float(grads[1].abs().max())


def test_a_rank_without_tokens_has_gradients_of_zero() -> None:
    head = Head(MODEL, torch.float64, CPU)
    dy, loss = ChunkedLoss(head, torch.zeros(0, dtype=torch.int64), CHUNK, 1.0, Sharing())(torch.zeros(0, MODEL.hidden).double())
    assert dy.shape == (0, MODEL.hidden)
    assert loss == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in head.parameters())


@given(st.lists(st.integers(0, 23), max_size=8))
def test_buckets_hold_everything_once(lengths: list[int]) -> None:
    whole, begin = torch.arange(sum(lengths)), 0
    flat = [whole[(begin := begin + length) - length : begin] for length in lengths]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sharing, "BUCKET", 10)
        buckets = list(sharing._buckets(flat))
    assert all(sum(map(len, bucket)) == 10 for bucket in buckets[:-1])
    assert all(0 < sum(map(len, bucket)) <= 10 for bucket in buckets)
    assert torch.equal(torch.cat([x for bucket in buckets for x in bucket]) if buckets else whole[:0], whole)


def test_an_optimizer_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"workload\.optimizer=sgd is none of none, adamw"):
        Block(MODEL, optimizer="sgd")
