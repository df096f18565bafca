"""What a layer of a model takes on the ranks of a pipeline stage, by how it is run: the space that a plan is searched in.

A way is a degree of tensor parallelism, a degree and a strategy of context parallelism, whether weights are sharded (ZeRO stage 3,
as FSDP2 does) and what backward computes again; what is left of the ranks is data parallel. It is Galvatron's space of a layer
(arXiv 2211.13878, section 3; 2307.02031), with the strategies and policies that lcbench measures. Times are those of
``workload=block`` as ``lcbench.predict`` foresees them, and memory is by the same formulas. As there, nothing is an embedding's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.refusals import approximates, skip_reason
from lcbench.predict.predictor import CannotPredict, Prediction, Predictor
from lcbench.problem import ALONE, Mesh, Scale
from lcbench.workloads.block import Block
from lcbench.workloads.block_parts import MOMENTS
from lcbench.workloads.parts import Share
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.recompute.sizes import head_bytes, layer_bytes

NOT_AGAIN = "none"  # the policy that computes nothing again
STEP_ENDS = ("reduce", "optimizer")  # phases that a step has once, however many micro-batches it has


@dataclass(frozen=True)
class Way:
    """How a layer may be run on the ranks of a stage. Seconds and bytes are of the slowest, or fullest, rank and of one sequence of
    each replica.

    Attributes:
        tp, cp, dp: degrees, whose product is the ranks of the stage.
        strategy: of context parallelism, ``none`` where cp is 1.
        zero: 3 where weights, gradients and the optimizer's states are sharded over the ranks with the same weights, else 0.
        recompute: name of the policy.
        order: which tokens lie on which rank, as a key: between layers of another order activations move.
        cell: a layer and the head, as ``workload=block`` measures them.
        x_bytes: of the activations between layers.
        forward_s, backward_s: of a layer.
        end_s: what a layer adds to what a step ends with: sums of gradients, the optimizer.
        head_s, head_end_s: the same of what is behind the last layer.
        steady: weights and states of the optimizer.
        gradient: of the weights.
        kept: of a layer, from its forward to its backward.
        inputs: of ``kept``, what is the layer's input.
        given: what the first layer of a stage is given, and the labels.
        moment: the most that a layer's backward takes besides, without its result and the gradient of that.
        head_steady, head_gradient, head_moment: the same of the head.
        computing_s, exposed_s, again_s: of forward and backward: what the busiest rank computes that it has not computed before,
            what it waits for messages, and what it does again.
        flops, head_flops: of one sequence, over all ranks, that have not been done before.
        error: relative half-width of the 95 % interval of the times.
        basis: what they rest on, in words.
    """

    tp: int
    cp: int
    dp: int
    strategy: str
    zero: int
    recompute: str
    order: str
    cell: Cell
    x_bytes: float
    forward_s: float
    backward_s: float
    end_s: float
    head_s: float
    head_end_s: float
    steady: float
    gradient: float
    kept: float
    inputs: float
    given: float
    moment: float
    head_steady: float
    head_gradient: float
    head_moment: float
    computing_s: float
    exposed_s: float
    again_s: float
    flops: float
    head_flops: float
    error: float
    basis: str

    @property
    def degrees(self) -> tuple[int, int]:
        return self.tp, self.cp

    def passes(self, sequences: int) -> int:
        """Sequences of a micro-batch that each replica computes, one after the other."""
        return sequences // self.dp

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp


@dataclass(frozen=True)
class Asked:
    """What a plan is made for.

    Attributes:
        cells: of ``workload=block`` on all ranks, one of each strategy and policy; alike in all else.
        scale: all ranks.
        batch: sequences of a step.
        budget: bytes that a rank may have.
        most: largest degrees, by ``tp``, ``cp`` and ``pp``; all where a name is missing.
    """

    cells: tuple[Cell, ...]
    scale: Scale
    batch: int
    budget: float
    most: Mapping[str, int]

    @cached_property
    def block(self) -> Block:
        """The model with how it is trained."""
        found = build.build_workload(self.cells[0].config["workload"])
        assert isinstance(found, Block)
        return found

    @property
    def layers(self) -> int:
        return self.block.model.layers

    def allows(self, name: str, degree: int) -> bool:
        return degree <= self.most.get(name, degree)


def stage_scale(scale: Scale, stages: int) -> Scale | None:
    """The ranks of one of so many equal pipeline stages, adjacent ones; None where they do not lie evenly on nodes."""
    if scale.world_size % stages:
        return None
    ranks, per_node = scale.world_size // stages, scale.gpus_per_node
    if ranks % per_node == 0:
        return Scale(ranks // per_node, per_node)
    return Scale(1, ranks) if per_node % ranks == 0 else None


def ways(asked: Asked, scale: Scale, predictor: Predictor, refused: dict[str, str]) -> list[Way]:
    """All ways to run a layer on the ranks of a stage.

    Args:
        refused: gets why a strategy is out at some degree, by words.
    """
    found: list[Way] = []
    for tp, cp in _degrees(asked, scale.world_size):
        dp = scale.world_size // (tp * cp)
        mesh = Mesh(tp, dp)
        for strategy in _strategies(asked.cells, cp):
            cells = [cell for cell in asked.cells if cell.config["cp"] == strategy]
            try:
                found += _ways(cells, scale, mesh, cp, predictor)
            except _Refused as error:
                refused.setdefault(str(error), f"tp={tp} cp={cp} on {scale.world_size} ranks")
    return found


class _Refused(ValueError):
    """Why a way cannot run."""


def _degrees(asked: Asked, ranks: int) -> Iterator[tuple[int, int]]:
    """Degrees of tensor and context parallelism whose product divides the ranks and leaves no more replicas than sequences."""
    for tp in _divisors(ranks):
        for cp in _divisors(ranks // tp):
            replicas = ranks // (tp * cp)
            if asked.allows("tp", tp) and asked.allows("cp", cp) and asked.batch % replicas == 0:
                yield tp, cp


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _strategies(cells: Sequence[Cell], cp: int) -> list[dict[str, Any]]:
    """Configs of strategies, each once. On one rank all are alike, so that ``none``, or else the first, stands for them."""
    every: list[dict[str, Any]] = []
    for cell in cells:
        if cell.config["cp"] not in every:
            every.append(cell.config["cp"])
    alone = [config for config in every if config["name"] == "none"]
    return (alone or every[:1]) if cp == 1 else [config for config in every if config["name"] != "none"]


def _ways(cells: Sequence[Cell], scale: Scale, mesh: Mesh, cp: int, predictor: Predictor) -> list[Way]:
    """Ways of one strategy at some degrees, by policy and sharding.

    Raises:
        _Refused: a kernel, a strategy or the workload cannot do that, or nothing is known of how it does.
    """
    depth = cells[0].config["workload"]["model"]["layers"]
    base = _cell(cells[0], scale, mesh, fsdp=False, layers=1)
    try:
        reason = skip_reason(base) or predictor.refusal(base)
    except ValueError as error:  # a mesh that does not fit the heads or the nodes
        raise _Refused(str(error)) from error
    if reason or approximates(base):
        raise _Refused(reason or f"cp {base.words['cp']}: results are not those of the mask")
    wanted = [(cell, fsdp) for cell in cells for fsdp in (False, True)[: 1 + (mesh.dp * cp > 1)]]
    variants = [_cell(cell, scale, mesh, fsdp=fsdp, layers=layers) for cell, fsdp in wanted for layers in (1, depth)]
    plain = [_without_recompute(_cell(cells[0], scale, mesh, fsdp=fsdp, layers=1)) for fsdp in (False, True)]
    try:
        *predictions, unsharded, sharded = predictor.predict_alike([*variants, *plain])
    except CannotPredict as error:
        raise _Refused(f"cp {base.words['cp']}: {error}") from error
    return [
        _way(one, every, sharded if fsdp else unsharded, cp)
        for (_, fsdp), one, every in zip(wanted, predictions[::2], predictions[1::2], strict=True)
    ]


def _cell(cell: Cell, scale: Scale, mesh: Mesh, *, fsdp: bool, layers: int) -> Cell:
    config = {**cell.config, "scale": str(scale), "workload": {**cell.config["workload"], "fsdp": fsdp, "layers": layers}}
    config.pop("mesh", None)
    if mesh != ALONE:
        config["mesh"] = {"tp": mesh.tp, "dp": mesh.dp, "order": mesh.order}
    return Cell.from_config(config)


def _without_recompute(cell: Cell) -> Cell:
    """The same cell under the default policy, which computes nothing again and is left out of configs."""
    return Cell.from_config({axis: value for axis, value in cell.config.items() if axis != "recompute"})


def _way(one: Prediction, every: Prediction, plain: Prediction, cp: int) -> Way:
    """Of a layer and of all layers, each with the head, and of a layer of which nothing is computed again."""
    cell, share = one.cell, one.share
    assert share is not None
    block, policy = build.build_workload(cell.config["workload"]), build.build_recompute(cell.config)
    assert isinstance(block, Block)
    assert isinstance(policy, Recompute)
    forward, backward = one.phases["forward"], one.phases["backward"]
    first, last = (sum(p.phases[name].seconds for name in STEP_ENDS if name in p.phases) for p in (one, every))
    depth = block.model.layers
    end = (last - first) / (depth - 1) if depth > 1 else first
    again = max(0.0, backward.seconds - plain.phases["backward"].seconds)
    exposed = min(forward.exposed_s + plain.phases["backward"].exposed_s, forward.seconds + plain.phases["backward"].seconds)
    flops = {name: one.flops[name] / share.mesh.dp for name in ("forward", "backward", "head")}
    return Way(
        share.mesh.tp, cp, share.mesh.dp, cell.config["cp"]["name"], 3 * block.fsdp, cell.words.get("recompute", NOT_AGAIN),
        _order(one), cell, **_memory(block, policy, share, one),
        forward_s=forward.seconds, backward_s=backward.seconds, end_s=end,
        head_s=one.phases["head"].seconds, head_end_s=first - end,
        computing_s=forward.seconds + plain.phases["backward"].seconds - exposed, exposed_s=exposed, again_s=again,
        flops=flops["forward"] + flops["backward"], head_flops=flops["head"], error=one.error, basis=one.basis,
    )  # fmt: skip


def _order(prediction: Prediction) -> str:
    """Which tokens of which sequence lie on which rank, as a key."""
    mesh, queries = prediction.cell.mesh, prediction.queries
    assert queries is not None
    text = f"{mesh} {queries.owner.tolist()} {queries.shards.begins.tolist()} {queries.shards.spans.tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _memory(block: Block, policy: Recompute, share: Share, prediction: Prediction) -> dict[str, float]:
    """Bytes of a rank, by names of ``Way``: the terms of ``sizes.step_peak`` and of the block's ``Room``, layer by layer."""
    problem, own = share.problem, block.model.divided(share.mesh.tp)
    size, tokens = problem.itemsize, share.tokens
    saved = layer_bytes(own, tokens, problem.dtype, fused_norms=share.fused, finals=share.finals, buffers=share.buffers)
    held, heads = policy.kept(saved), own.heads()
    shards = problem.scale.world_size * share.mesh.dp if block.fsdp else 1
    states = 1 + MOMENTS[block.optimizer]
    weights, head = own.layer_parameters() * size, own.head_parameters() * size
    buffers = max(draw.buffer_bytes for draw in prediction.draws)
    kernel = int(prediction.made.held) + max(draw.peak_bytes for draw in prediction.draws)
    # In the MLP's backward: gradients of down's output and input, gate and up, and the first of the weights.
    mlp = held.working + tokens * size * (own.hidden + (3 if held.buffered else 2) * own.ffn) + own.ffn * own.hidden * size
    between = held.attending + tokens * size * (own.hidden + 2 * (heads.q + heads.kv) * heads.dim) if held.attending else 0
    whole = 0 if shards == 1 else weights + weights // size * max(size, 4) // 2
    attention = (held.attending or held.working - (0 if held.buffered else saved.after.bytes)) + weights + kernel
    logits = held.passing + head_bytes(own, problem.dtype, min(tokens, block.loss_chunk))
    return {
        "x_bytes": saved.x.bytes, "steady": states * weights / shards, "gradient": weights / shards,
        "kept": held.device, "inputs": held.inputs, "given": block.input_bytes(problem),
        "moment": max(max(mlp, between) + whole + buffers, attention),
        "head_steady": states * head / shards, "head_gradient": head / shards,
        "head_moment": logits + head * (1 + (shards > 1)) + buffers,
    }  # fmt: skip
