"""Asynchronous Ulysses: the results and bytes of Ulysses bit by bit, and exchanges that begin before the next projection runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcbench.cp.base import Strategy
from lcbench.cp.ulysses import Ulysses
from lcbench.grid.build import build, build_kernel
from lcbench.grid.command_line import look
from lcbench.masks.causal import causal
from lcbench.measure.session import Gang
from lcbench.problem import ALONE, Heads, Mesh, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.block import Block
from lcbench.workloads.models import Model
from lcbench.workloads.step import BlockSession
from tests.turns import due

CPU = torch.device("cpu")
SEQLEN, SEED, RANKS = 48, 5, 4
# Four ranks replicate two key/value heads, so that gradients of replicas are summed.
MODELS = {
    "gqa": Model(layers=2, hidden=24, heads_q=4, heads_kv=2, head_dim=6, ffn=20, vocab=30, rope_theta=1e4, qk_norm=True),
    "mha": Model(layers=2, hidden=24, heads_q=4, heads_kv=4, head_dim=6, ffn=20, vocab=30, rope_theta=1e4),
    "six": Model(layers=2, hidden=24, heads_q=6, heads_kv=3, head_dim=6, ffn=20, vocab=30, rope_theta=1e4),  # not even over four
}
PROJECTIONS = ("q", "k", "v")


def session_of(
    gang: Gang, model: Model, strategy: Strategy, recompute: str, *, mesh: Mesh = ALONE, dtype: str = "float64",
    kernel: str = "naive", **options: Any,
) -> BlockSession:  # fmt: skip
    scale, block = Scale(1, RANKS), Block(model, loss_chunk=7, **options)
    problem = Problem(SEQLEN, mesh.heads(model.heads()), mesh.group_scale(scale), dtype, "forward_backward")
    policy = build(load("recompute", recompute) | ({"fraction": 0.5} if recompute == "token_wise" else {}))
    work = Work(
        block, problem, lambda _: causal(SEQLEN), build_kernel(load("kernel", kernel)), strategy, {}, SEED, recompute=policy,
        mesh=mesh, scale=scale,
    )  # fmt: skip
    return BlockSession(block, work, 0, work.arranged(gang))


def step(session: BlockSession) -> tuple[dict[str, torch.Tensor], int]:
    """Results of a step on this rank, and bytes that its attention sent."""
    session.run.take()
    passed: Any = None
    for phase in session.training.phases().values():
        passed = phase(passed)
    dx, loss = passed
    grads = {name: weight.grad for name, weight in session.training.weights().items()}
    return {"dx": dx, "loss": loss} | grads, session.run.take().bytes


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def check_same(rank: int) -> None:
    gang = Gang(rank, RANKS, CPU, Groups(), [])
    cases: list[tuple[str, str, dict[str, Any]]] = [("gqa", recompute, {}) for recompute in names("recompute")]
    cases += [("mha", "none", {"dtype": "bfloat16"}), ("gqa", "none", {"dtype": "float32"}), ("mha", "full", {"fsdp": True})]
    cases += [("gqa", "none", {"lowering": "p2p"}), ("gqa", "selective", {"mesh": Mesh(tp=2)}), ("six", "none", {"uneven": True})]
    assert len(cases) == len(names("recompute")) + 6
    for model, recompute, options in due(cases):
        lowering, uneven = options.pop("lowering", "auto"), options.pop("uneven", False)
        found = []
        for apart in (False, True):
            strategy = Ulysses(async_projections=apart, uneven_heads=uneven, lowering=lowering)
            session = session_of(gang, MODELS[model], strategy, recompute, **options)
            assert session.refused is None
            assert session.run.gives == apart
            step(session)
            found.append(step(session))
        (one, sent), (other, sent_apart) = found
        case = f"{model} {recompute} {options} {lowering}"
        assert sent == sent_apart > 0, f"{case}: {sent} bytes and {sent_apart}"
        different = [name for name in one if not torch.equal(local(one[name]), local(other[name]))]
        assert not different, f"{case}: {different} differ"


@pytest.mark.gloo
@pytest.mark.slow
def test_results_and_bytes_are_those_of_ulysses() -> None:
    run_ranks(RANKS, check_same)


def check_order(rank: int) -> None:
    """What runs in which order, in the first layer."""
    gang = Gang(rank, RANKS, CPU, Groups(), [])
    session = session_of(gang, MODELS["mha"], Ulysses(async_projections=True), "none")
    layer, events = session.training.stack.layers[0], []
    for name in PROJECTIONS:
        module = getattr(layer.before, name)

        def hook(module: Any, args: Any, result: torch.Tensor, name: str = name) -> None:
            events.append(f"project {name}")
            result.register_hook(lambda grad: events.append(f"back through {name}"))

        module.register_forward_hook(hook)
    executor: Any = session.run.run
    post, give, gradient = executor._post, executor.give, executor.gradient

    def noted(step: Any, turn: int, kinds: Any = None) -> None:
        events.append("post" if kinds is None else f"post {sorted(kinds)}")
        post(step, turn, *([] if kinds is None else [kinds]))

    executor._post = noted
    executor.give = lambda kind, x: (events.append(f"give {kind}"), give(kind, x))[1]
    executor.gradient = lambda kind: (gradient(kind), events.append(f"gradient {kind}"))[0]
    _, y = session.training.forward()
    forward = [event for event in events if event != "post"]
    own = forward[:9]
    assert own == [
        event for name in PROJECTIONS for event in (f"project {name}", f"give {name}", f"post ['{name}']")
    ], own  # fmt: skip
    events.clear()
    y.backward(torch.ones_like(y))
    backward = [event for event in events if event != "post"]
    posts = [f"post {sorted([f'd{name}', f'final_d{name}'])}" for name in "vkq"]
    waits = [event for name in "vkq" for event in (f"gradient {name}", f"back through {name}")]
    assert backward == [*posts, *waits[::2], *posts, *waits], backward  # only the first layer's projections are watched


@pytest.mark.slow
@pytest.mark.gloo
def test_each_exchange_begins_before_the_next_projection_runs() -> None:
    run_ranks(RANKS, check_order)


def check_session(rank: int) -> None:
    session = session_of(Gang(rank, RANKS, CPU, Groups(), []), MODELS["gqa"], Ulysses(async_projections=True), "none")
    session.first_pass()
    session.check_first(lambda text: None)
    session.check_last()
    assert not session.check().failures, session.check()


@pytest.mark.slow
@pytest.mark.gloo
def test_a_step_passes_its_check() -> None:
    run_ranks(RANKS, check_session)


def test_refusals() -> None:
    problem = Problem(64, Heads(4, 4, 8), Scale(1, 2), "float64", "forward_backward")
    mask = causal(64)
    staged = Ulysses(stages=2, async_projections=True)
    assert staged.unsupported(problem, mask) == "cp.async_projections=true exchanges all heads at once: cp.stages=2 is not 1"
    words = [
        "cp=ulysses",
        "kernel=naive",
        "mask=causal",
        "seqlen=64",
        "scale=1x2",
        "heads=4x4x8",
        "cp.async_projections=true,false",
    ]
    cells = look([*words, "cp.async_projections=true,false"]).cells
    reasons = {each.cell.config["cp"].get("async_projections", False): each.skip for each in cells}
    assert reasons == {True: "cp ulysses: cp.async_projections=true needs the projections of a layer: workload=block", False: None}
