"""The table of metrics: every key that an attempt holds is in it once, and docs/metrics.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.cp.displaced import Displaced
from lcbench.cp.none import Local
from lcbench.cp.ring import Ring
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.measure.blocks import with_block
from lcbench.measure.cell import measure_cell
from lcbench.measure.metrics import METRICS, metric_of, table
from lcbench.planners.none import NoPlanner
from lcbench.problem import Heads, Problem, Scale
from lcbench.selectors.adaspa import AdaSpa
from lcbench.testing.costs import Quadratic
from lcbench.workloads.base import Work
from lcbench.workloads.batch import Batch
from lcbench.workloads.block import Block
from lcbench.workloads.chunked_prefill import ChunkedPrefill
from lcbench.workloads.denoise import Denoise
from lcbench.workloads.models import Model
from lcbench.workloads.recompute.token_wise import TokenWise
from lcbench.workloads.recurrent_memory import RecurrentMemory
from lcbench.workloads.sparse_attention import SparseAttention
from tests.measure.test_cell import GANG, SETTINGS, measured

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def of_a_step() -> set[str]:
    """Keys of a training step that has all that is counted on one rank."""
    model = Model(3, hidden=32, heads_q=4, heads_kv=2, head_dim=16, ffn=48, vocab=64, rope_theta=1e4)
    block = Block(model, layers=2, optimizer="adamw", labelled=0.5, vision=0.5)
    problem = Problem(600, model.heads(), Scale(1, 1), "float32", "forward_backward")
    work = Work(block, problem, lambda _: causal(600), SDPAFlash(), Local(), SETTINGS, 5, recompute=TokenWise(fraction=0.5))
    found = measure_cell(work, GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


def of_denoising() -> set[str]:
    """Keys of steps of denoising that begin with a synchronous one."""
    problem = Problem(64, Heads(4, 2, 8), Scale(1, 1), "float32", "forward")
    work = Work(Denoise(steps=2, layers=1), problem, lambda _: causal(64), SDPAFlash(), Displaced(warmup=1), SETTINGS, 5)
    found = measure_cell(work, GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


def of_chunks() -> set[str]:
    """Keys of a prompt in chunks, which has those of a cache too."""
    problem = Problem(64, Heads(4, 2, 8), Scale(1, 1), "float32", "forward")
    work = Work(ChunkedPrefill(chunk=24), problem, lambda _: causal(64), SDPAFlash(), Local(), SETTINGS, 5)
    found = measure_cell(work, GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


def of_batches() -> set[str]:
    """Keys of a batch of documents."""
    problem, mask = Problem(150, Heads(4, 2, 8), Scale(1, 1), "float32", "forward_backward"), causal(150)
    work = Work(Batch(capacity=150, gradient_bytes=64), problem, lambda _: mask, SDPAFlash(), Ring(), SETTINGS, 5,
                planner=NoPlanner(), cost=lambda: Quadratic((1,)))  # fmt: skip
    found = measure_cell(work, GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


def of_selection() -> set[str]:
    """Keys of attention that chooses its mask, by a selector that is given what an earlier step left."""
    problem = Problem(128, Heads(2, 1, 8), Scale(1, 1), "float32", "forward_backward")
    work = Work(SparseAttention(), problem, lambda _: causal(128), SDPAFlash(), Local(), SETTINGS, 5,
                selector=AdaSpa(q_block=32, k_block=32))  # fmt: skip
    found = measure_cell(work, GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


def of_memory() -> set[str]:
    """Keys of layers with a memory."""
    model = Model(2, hidden=32, heads_q=4, heads_kv=2, head_dim=8, ffn=48, vocab=64, rope_theta=1e4)
    memory = RecurrentMemory(model, layers=2, segment=8, memory_tokens=3, memory_dim=6, nu=2)
    problem = Problem(24, model.heads(), Scale(1, 1), "float32", "forward_backward")
    found = measure_cell(Work(memory, problem, lambda _: causal(24), SDPAFlash(), Local(), SETTINGS, 5), GANG, lambda _: None)
    assert found.stands, found.check
    return {metric_of(key).key for key in found.metrics}


@pytest.mark.slow
def test_every_key_of_a_cell_is_in_the_table_and_every_key_of_that_in_some_cell(tmp_path: Path) -> None:
    of_steps = of_a_step() | of_denoising() | of_chunks() | of_batches() | of_selection() | of_memory()
    for draws in (1, 2):
        first = measured("causal_document", 150, "float32", tmp_path, draws=draws)
        metrics, _ = with_block(first.metrics, first.samples, first)
        found = {metric_of(key).key for key in metrics}
        # What is in the table and not here needs several ranks, several groups of them, or several draws.
        absent = {metric.key for metric in METRICS} - found - of_steps
        assert {key for key in absent if key.startswith("chunk/")} == {"chunk/bubble", "chunk/least_bubble"}
        assert {key.split("/")[0] for key in absent} == {"overlap", "mesh", "chunk", *(["draws"] if draws == 1 else [])}
        samples = {"draw_area", "draw_forward_median_s", "draw_backward_median_s", "draw_total_median_s"}
        assert {key for key in first.samples if key.startswith("draw_")} == (samples if draws > 1 else set())


def test_a_key_that_nobody_declared_is_an_error() -> None:
    with pytest.raises(KeyError, match="time/lunch_s is no metric"):
        metric_of("time/lunch_s")


def test_the_docs_show_the_table() -> None:
    """After a change: put what ``python -m lcbench.measure.metrics`` prints into docs/metrics.md."""
    assert table() in DOCS.read_text()
