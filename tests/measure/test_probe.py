"""Probe passes: what they say must come out is what dense float64 attention gives, on every mask, however heads are grouped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lcbench.cp.none import Local
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.measure.numerics import one_pass
from lcbench.measure.owners import Owners
from lcbench.measure.probe import Columns, Probe, magnitudes
from lcbench.measure.reference import Shard
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held, Part
from lcbench.testing.dense import dense_attention, dense_heads
from lcbench.testing.masks import every_mask, small
from lcbench.workloads.attention import Attention, AttentionSession
from lcbench.workloads.base import Work

CPU = torch.device("cpu")
SEQLEN = 97


def owned(tokens: np.ndarray) -> Owners:
    """One rank's tokens of self-attention, as if others had the rest."""
    own = Part(tokens)
    return Owners(Held(own, own, own), None, True, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(8, 2, 24), Heads(1, 1, 16), Heads(3, 3, 1)], ids=str)
def test_what_is_expected_is_what_dense_attention_gives(heads: Heads, zero: bool, tmp_path: Path) -> None:
    problem = Problem(SEQLEN, heads, Scale(1, 1), "float64", "forward_backward")
    tokens = np.random.default_rng(0).permutation(SEQLEN)
    back = np.argsort(tokens)
    for name in every_mask():
        mask = small(name, SEQLEN, heads, tmp_path, seed=3)
        probe = Probe(mask, problem, owned(tokens), 5, CPU, lambda x: x, zero=zero)
        q, dout = (torch.zeros(SEQLEN, heads.q, heads.dim, dtype=torch.float64) for _ in range(2))
        k, v = (torch.zeros(SEQLEN, heads.kv, heads.dim, dtype=torch.float64) for _ in range(2))
        probe.fill(Shard(owned(tokens).held, q, k, v, dout))
        leaves = [x[back].clone().requires_grad_() for x in (q, k, v)]
        out, lse = dense_attention(*leaves, dense_heads(mask, heads.q), problem.softmax_scale)
        dq, dk, dv = (x[tokens] for x in torch.autograd.grad(out, leaves, dout[back]))
        out, lse = out.detach()[tokens], lse.detach()[tokens]
        for head in range(heads.q):
            rows = probe.rows(head)
            assert rows.gradient is not None
            near(rows.lse, lse[:, head], name)
            near(rows.out, out[:, head], name)
            near(rows.gradient.value, dq[:, head], name)
        for head in range(heads.kv):
            columns = probe.columns(head)
            near(columns.dk.value, dk[:, head], name)
            near(columns.dv.value, dv[:, head], name)


def near(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    error = torch.where(got == want, 0.0, (got - want).abs())
    assert error.max() <= 1e-12 * want[torch.isfinite(want)].abs().amax().clamp_min(1.0), name


@pytest.mark.parametrize("dim", [1, 8, 64, 80, 128, 192, 256])
def test_weights_are_powers_of_two_and_inputs_are_exact_in_every_type(dim: int) -> None:
    alpha, beta = magnitudes(dim, dim**-0.5)
    assert 2 * math.sqrt(dim) * alpha * beta == pytest.approx(math.log(2), rel=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        assert [float(torch.tensor(x, dtype=torch.float64).to(dtype)) for x in (alpha, beta, 2 * beta)] == [alpha, beta, 2 * beta]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_long_sequence_stays_in_the_range_of_half_types(dtype: str) -> None:
    from lcbench.masks.causal import causal

    seqlen = 1 << 20
    problem = Problem(seqlen, Heads(1, 1, 16), Scale(1, 1), dtype, "forward_backward")
    tokens = np.unique(np.concatenate([np.arange(64), np.arange(seqlen - 64, seqlen)]))
    probe = Probe(causal(seqlen), problem, owned(tokens), 5, CPU, lambda x: x, zero=False)
    inputs = [torch.zeros(len(tokens), 1, 16, dtype=getattr(torch, dtype)) for _ in range(4)]
    probe.fill(Shard(owned(tokens).held, *inputs))
    for x in inputs:
        assert torch.isfinite(x).all()
        assert (x != 0).all()


@pytest.mark.slow
def test_terms_that_cancel_have_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """dv of a probe of zeros is 0 where four heads share a key; a GPU, which adds in any order, makes it all but 0."""
    exact = Probe.columns

    def rounded(probe: Probe, kv: int) -> Columns:
        found = exact(probe, kv)
        noise = torch.randn(found.dv.value.shape, dtype=torch.float64) * 1e-15
        return replace(found, dv=replace(found.dv, value=found.dv.value + noise * found.dv.spread))

    monkeypatch.setattr(Probe, "columns", rounded)
    for heads in (Heads(4, 1, 16), Heads(8, 2, 32)):
        work = Work(
            Attention(),
            Problem(512, heads, Scale(1, 1), "bfloat16", "forward_backward"),
            lambda _: causal(512),
            SDPAFlash(),
            Local(),
            {},
            0,
        )
        started = AttentionSession(work, 0, Gang(0, 1, torch.device("cpu"), Groups(), []))
        started.examination.first(started.shard, one_pass(started.run, started.shard, work.problem))
        for probe in started.examination.probes:
            started.examination.probe(probe, started.shard)
        check = started.examination.check()
        assert not check.failures
        assert "dv" not in check.ratios["zero, factor"]
        assert check.ratios["level, factor"]["dv"] > 0
