"""No wrong number passes: every kind of fault of ``tests.measure.faults`` is refused, and sound cells are not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcbench.cp.none import Local
from lcbench.kernels.base import Kernel, Platform, Prepared
from lcbench.masks.causal_document import causal_document
from lcbench.masks.full import full
from lcbench.masks.lengths import Uniform
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.measure import sound
from tests.measure.faults import (
    CPU,
    DTYPES,
    FAULTS,
    LONG,
    SETTINGS,
    Fault,
    Faulty,
    InFloat32,
    State,
    measured,
    refused,
    shifted,
    tile,
)
from tests.turns import due

TOKENS = 384
MILLION = 1 << 20
ONE_HEAD = Heads(1, 1, 16)


def test_there_are_as_many_kinds_as_promised() -> None:
    assert len(FAULTS) >= 60
    assert set(LONG) <= set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused(name: str) -> None:
    """In the roughest type in which it is one, and in another that changes from fault to fault."""
    dtypes = FAULTS[name].dtypes
    for dtype in {dtypes[-1], dtypes[list(FAULTS).index(name) % len(dtypes)]}:
        found = measured(name, dtype, TOKENS, 1)
        assert refused(found), f"{name} passes in {dtype}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_the_same_kernel_without_a_fault_passes(dtype: str) -> None:
    for seed in range(2):
        assert refused(measured(None, dtype, TOKENS, seed)) is None


@pytest.mark.slow
def test_a_factor_that_a_few_large_columns_hide_is_refused_at_16k() -> None:
    """The first columns of a window have far larger gradients than all others, and torch sums gradients of half types in these."""
    assert "dk" in str(refused(measured("dk x1.01", "bfloat16", 1 << 14, 0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one document of many begins one key late", "bfloat16"),
        ("a block forgotten", "float32"),
        ("tile 64 x 64 left out", "float16"),
        ("one row of dk x1.5", "bfloat16"),
    ],
)
def test_a_local_fault_is_refused_at_64k(name: str, dtype: str) -> None:
    assert refused(measured(name, dtype, 1 << 16, 0, heads=ONE_HEAD, base=InFloat32()))


class Nothing(Kernel):
    """Gives zeros and an LSE guessed from the length of q, at once."""

    calls_made = 0

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        return self  # type: ignore[return-value]

    calls = 1  # type: ignore[assignment]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        guess = torch.log(torch.tensor(float(len(k)))) + q.float().square().sum(-1) / q.shape[-1] / 2
        return torch.zeros_like(q), guess


def at_a_million(kernel: Kernel, mask: Mask) -> Measured:
    problem = Problem(MILLION, ONE_HEAD, Scale(1, 1), "bfloat16", "forward")
    work = Work(Attention(), problem, lambda _: mask, kernel, Local(), SETTINGS, 0)
    return measure_cell(work, Gang(0, 1, CPU, Groups(), []), lambda _: None)


@pytest.mark.slow
def test_at_a_million_tokens_a_kernel_that_computes_nothing_is_refused() -> None:
    assert refused(at_a_million(Nothing(), full(MILLION)))


@pytest.mark.slow
def test_at_a_million_tokens_one_tile_and_one_boundary_are_seen() -> None:
    documents = causal_document(MILLION, seed=(0, 0), lengths=Uniform(1, 1000))
    state = State(MILLION, ONE_HEAD, 0)
    assert refused(at_a_million(Faulty(Fault(mask=tile(256)), state), documents))
    assert refused(at_a_million(Faulty(Fault(mask=shifted("document")), state), documents))


@pytest.mark.slow
def test_no_sound_cell_is_refused(tmp_path: Path) -> None:
    """Some of those that ``make bench`` runs 2,000 of, at half their lengths."""
    for long in due(itertools.islice((c for c in sound.cells(1) if c.seqlen <= 1000), 48)):
        cell = replace(long, seqlen=long.seqlen // 2)
        check = sound.examined(cell, tmp_path)
        if check is not None:
            assert not check.failures, (cell, check.failures)
            assert check.of_bound < 0.95, (cell, check.ratios)
