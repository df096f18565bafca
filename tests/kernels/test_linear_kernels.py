"""Kernels of linear attention against the float64 recurrence, token by token."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.kernels import chunked
from lcbench.kernels.base import Platform
from lcbench.kernels.chunked import Chunked
from lcbench.kernels.fla import FLA
from lcbench.kernels.linear import PreparedScan, Rule, Summary, Tokens
from lcbench.kernels.triton_chunk import TritonChunk
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.fake_libraries import fla as fake_fla
from lcbench.testing.masks import names, softmax_kernels
from lcbench.testing.recurrence import RULES, draw, recurrence, recurrence_backward

SCALE = 0.3
CPU = torch.device("cpu")


def random_like(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def applied(summary: Summary, state: torch.Tensor) -> torch.Tensor:
    """What a stretch makes of a state, by its summary."""
    if summary.transition.dim() == 2:
        return summary.state + summary.transition[..., None] * state
    return summary.state + summary.transition @ state


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference by the largest number; infinite where a number is none, or shapes differ."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300)) if wanted.numel() else 0.0


def errors(
    scan: PreparedScan, rule: Rule, x: Tokens, heads: Heads, *, zero: bool = False, oracle: Tokens | None = None
) -> dict[str, float]:
    """Of all that a kernel gives, against the recurrence on the same tokens (or on ``oracle``), from random states or from zero."""
    state, dstate = (None if zero else random_like(heads.kv, heads.dim, heads.v, seed=i).to(x.decay.dtype) for i in (2, 3))
    dout = random_like(len(x.q), heads.q, heads.v, seed=4).to(x.q.dtype)
    inputs = [part for part in (*x, dout, state, dstate) if part is not None]
    exact = oracle or x
    out, end = recurrence(rule, exact, scale=SCALE, state=state)
    grads, begin = recurrence_backward(rule, exact, dout, scale=SCALE, state=state, dstate=dstate)
    before = [part.clone() for part in inputs]
    summary = scan.summary(x)
    got, got_end, saved = scan.forward(x, state)
    again, again_end, _ = scan.forward(x, state, scan.local(x))
    back = scan.summary_backward(dout, saved)
    got_grads, got_begin = scan.backward(dout, saved, dstate)
    assert all(map(torch.equal, before, inputs)), "an input was written to"
    assert got.dtype == x.q.dtype
    zeros = torch.zeros_like(end)
    found = {
        "out": error(got, out), "end": error(got_end, end), "out after local": error(again, out),
        "end after local": error(again_end, end), "summary": error(applied(summary, zeros if state is None else state), end),
        "summary_backward": error(applied(back, zeros if dstate is None else dstate), begin), "begin": error(got_begin, begin),
    }  # fmt: skip
    for name, grad, wanted in zip(Tokens._fields, got_grads, grads, strict=True):
        if grad is not None and wanted is not None:
            assert grad.dtype == getattr(x, name).dtype
            found[f"d{name}"] = error(grad, wanted)
    return found


def scan_of(rule: Rule, heads: Heads, chunk: int = 64, dtype: torch.dtype = torch.float64) -> PreparedScan:
    return Chunked(chunk=chunk).scan(rule, heads, dtype, CPU, scale=SCALE)


def test_rules_are_all_here() -> None:
    assert get_args(Rule) == RULES == Chunked.rules


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 150),
    chunk=st.sampled_from([1, 7, 16, 40, 64]),
    heads=st.sampled_from([Heads(2, 2, 8), Heads(4, 2, 8, 6), Heads(3, 1, 4, 16), Heads(1, 1, 1, 1)]),
    strength=st.sampled_from([0.01, 1.0, 60.0]),
    zero=st.booleans(),
    seed=st.integers(0, 5),
)
def test_chunked_is_the_recurrence(
    rule: Rule, count: int, chunk: int, heads: Heads, strength: float, zero: bool, seed: int
) -> None:
    """It is the recurrence at any length and chunk, with groups, values of another dim, and decays from none to all."""
    x = draw(rule, count, heads, seed=seed, strength=strength)
    found = errors(scan_of(rule, heads, chunk), rule, x, heads, zero=zero)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("rule", RULES)
def test_decays_of_any_strength(rule: Rule) -> None:
    """A sum of decays that swallows another would show in the tokens behind it; -inf forgets, and makes no NaN."""
    heads = Heads(4, 2, 8, 6)
    x = draw(rule, 140, heads)
    x.decay[[3, 20, 70]], x.decay[[4, 21, 100]], x.decay[30:33] = -1e30, -torch.inf, 0.0
    found = errors(scan_of(rule, heads), rule, x, heads)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("rule", RULES)
def test_chunks_that_are_worked_on_by_parts(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few chunks memory has room for, numbers are the same."""
    heads = Heads(4, 2, 8, 6)
    x = draw(rule, 300, heads, strength=0.1)
    whole = scan_of(rule, heads, 16).forward(x, None)[:2]
    monkeypatch.setattr(chunked, "TOGETHER", 1)
    parts = scan_of(rule, heads, 16)
    assert error(parts.forward(x, None)[0], whole[0]) < 1e-14
    found = errors(parts, rule, x, heads)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(rule: Rule, dtype: torch.dtype) -> None:
    """Sums are of float32; half types round out and gradients once."""
    heads = Heads(4, 2, 32, 16)
    x = draw(rule, 130, heads, dtype=dtype, strength=20)
    bound = 2e-5 if dtype == torch.float32 else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    found = errors(scan_of(rule, heads, dtype=dtype), rule, x, heads)
    assert max(found.values()) < bound, found


@pytest.mark.parametrize("rule", RULES)
def test_stretches_by_their_summaries(rule: Rule) -> None:
    """What ranks do: every stretch from its own tokens and the state before it, by the summaries alone, and back."""
    heads, cuts = Heads(4, 2, 8, 6), (0, 5, 5, 70, 133, 200)
    x, dout = draw(rule, cuts[-1], heads), random_like(cuts[-1], heads.q, heads.v)
    scan = scan_of(rule, heads, 16)
    out, _ = recurrence(rule, x, scale=SCALE)
    grads, _ = recurrence_backward(rule, x, dout, scale=SCALE)
    stretches = [Tokens(*(p if p is None else p[a:b] for p in x)) for a, b in pairwise(cuts)]
    state, dstate = (torch.zeros(heads.kv, heads.dim, heads.v, dtype=torch.float64) for _ in range(2))
    kept = []
    for (a, b), own in zip(pairwise(cuts), stretches, strict=True):
        got, _, saved = scan.forward(own, state)
        assert error(got, out[a:b]) < 1e-12
        kept.append((slice(a, b), saved))
        state = applied(scan.summary(own), state)
    for part, saved in reversed(kept):
        for grad, wanted in zip(scan.backward(dout[part], saved, dstate)[0], grads, strict=True):
            if grad is not None and wanted is not None:
                assert error(grad, wanted[part]) < 1e-12
        dstate = applied(scan.summary_backward(dout[part], saved), dstate)


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> FLA:
    for name, module in fake_fla.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    kernel = FLA()
    assert kernel.missing() is None
    return kernel


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [Heads(2, 2, 8), Heads(6, 2, 8, 16)])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_fla(fla: FLA, rule: Rule, heads: Heads, count: int) -> None:
    scan = fla.scan(rule, heads, torch.float64, CPU, scale=SCALE)
    for zero in (False, True):
        found = errors(scan, rule, draw(rule, count, heads), heads, zero=zero)
        assert max(found.values()) < 1e-12, found
    half = fla.scan(rule, heads, torch.bfloat16, CPU, scale=SCALE)
    found = errors(half, rule, draw(rule, count, heads, dtype=torch.bfloat16), heads)
    assert max(found.values()) < 2.0**-7, found


def test_fla_of_another_release_says_so(fla: FLA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fla"], "__version__", "0.3.2")
    assert fla.missing() == "flash-linear-attention 0.3.2 is older than 0.4"
    monkeypatch.setattr(sys.modules["fla.ops.gla"], "chunk_gla", lambda q, k, v, g, scale: None)
    assert "chunk_gla of this version is another" in str(fla.missing())
    monkeypatch.undo()
    assert "fla.ops.gla cannot be imported" in str(fla.missing())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("count", "heads", "dtype", "strength", "bound"),
    [
        (0, Heads(4, 2, 8, 6), torch.float64, 1.0, 1e-12),
        (1, Heads(1, 1, 1), torch.float64, 1.0, 1e-12),
        (70, Heads(4, 2, 20, 6), torch.float64, 1.0, 1e-12),
        (131, Heads(1, 1, 8, 40), torch.float64, 0.01, 1e-12),
        (70, Heads(1, 1, 40, 16), torch.float32, 60.0, 1e-3),
        (70, Heads(2, 1, 16), torch.float16, 1.0, 2.0**-10),
    ],
)
@pytest.mark.slow
def test_triton_chunk(rule: Rule, count: int, heads: Heads, dtype: torch.dtype, strength: float, bound: float) -> None:
    """Under the interpreter: chunks that end early, groups, dims that are no powers of two, programs that share values and keys.
    A float32 error of 1e-4 or more is that of gradients of strong decays, which are a difference of sums."""
    scan = TritonChunk().scan(rule, heads, dtype, CPU, scale=SCALE)
    found = errors(scan, rule, draw(rule, count, heads, dtype=dtype, strength=strength), heads, zero=heads.v == 40)
    assert max(found.values()) < (1e-4 if rule == "gla" and dtype == torch.float32 else bound), found
    if dtype == torch.float32:
        assert max(value for name, value in found.items() if name != "ddecay") < 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_triton_chunk_takes_decays_of_any_strength(rule: Rule) -> None:
    """Some in every block of a chunk, and in two chunks."""
    heads = Heads(2, 1, 8, 6)
    x = draw(rule, 75, heads)
    x.decay[[3, 20, 70]], x.decay[[4, 40, 71]], x.decay[30:33] = -1e30, -torch.inf, 0.0
    found = errors(TritonChunk().scan(rule, heads, torch.float64, CPU, scale=SCALE), rule, x, heads)
    assert max(found.values()) < 1e-12, found


@pytest.mark.slow
def test_triton_chunk_where_keys_are_alike() -> None:
    """One key for all tokens, which each erase nearly all: powers of the system have numbers up to 1e18, its inverse up to 1."""
    heads = Heads(1, 1, 8)
    x = draw("gated_delta_rule", 64, heads, dtype=torch.float32)
    assert x.beta is not None
    x.k[:], x.decay[:], x.beta[:] = x.k[0].clone(), -1e-3, 0.999
    scan = TritonChunk().scan("gated_delta_rule", heads, torch.float32, CPU, scale=SCALE)
    found = errors(scan, "gated_delta_rule", x, heads)
    assert max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_triton_chunk_reads_any_strides(rule: Rule) -> None:
    heads = Heads(2, 1, 8)

    def laid(part: torch.Tensor) -> torch.Tensor:
        """The same numbers, head after head, every other one of what lies there."""
        return torch.stack([part, part], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]

    x = Tokens(*(None if part is None else laid(part) for part in draw(rule, 20, heads)))  # type: ignore[arg-type]
    assert not any(part.is_contiguous() for part in x if part is not None)
    found = errors(TritonChunk().scan(rule, heads, torch.float64, CPU, scale=SCALE), rule, x, heads)
    assert max(found.values()) < 1e-12, found
    halves = Tokens(*(None if part is None else torch.cat([part, part], 1)[:, : part.shape[1]] for part in x))  # type: ignore[arg-type]
    again = TritonChunk().scan(rule, heads, torch.float64, CPU, scale=SCALE)
    assert torch.equal(again.forward(halves, None)[0], again.forward(x, None)[0])


def test_triton_chunk_says_what_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(heads: Heads, dtype: str, platform: Platform) -> str | None:
        return TritonChunk().unavailable(Problem(64, heads, Scale(1, 1), dtype, "forward"), platform)

    h200, cpu = Platform("cuda", (9, 0)), Platform("cpu")
    assert refused(Heads(4, 2, 256), "bfloat16", h200) is None
    assert refused(Heads(4, 2, 64, 264), "bfloat16", h200) == "triton_chunk takes head dims up to 256, not 64:264"
    assert "multiplies no bfloat16" in str(refused(Heads(4, 2, 64), "bfloat16", cpu))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "under TRITON_INTERPRET=1 only" in str(refused(Heads(4, 2, 64), "float32", cpu))


def test_every_linear_kernel_is_tested_here() -> None:
    assert set(names("kernel")) - set(softmax_kernels()) == {"chunked", "fla", "triton_chunk"}
