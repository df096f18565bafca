"""Faults on problems with two sides, put into a sound kernel or run: the real ``measure_cell`` refuses each, and no sound one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from lcbench.cp.base import Place, RankRun, Strategy
from lcbench.cp.none import Local
from lcbench.kernels.base import Kernel, Platform, Prepared, Saved, prepare
from lcbench.kernels.reference import Reference
from lcbench.kernels.sink import with_sink
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.session import Gang
from lcbench.problem import Heads, Problem
from lcbench.schedule.groups import Groups
from lcbench.schedule.held import Held
from lcbench.testing.masks import causal_batch
from lcbench.workloads.attention import Attention
from lcbench.workloads.base import Work
from tests.measure.faults import SETTINGS, refused, without
from tests.measure.sides import BATCHES, CPU, problem

Tensors = tuple[torch.Tensor, ...]
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class Fault:
    """One kind; what is None is sound. ``mask``: what a kernel computes; ``inputs``: q, k, v that it is given; ``arguments``: its
    softmax scale and softcap; ``run``: what is around a rank's run."""

    shape: str
    batches: tuple[str, ...] = tuple(BATCHES)
    mask: Callable[[BandMask], BandMask] | None = None
    inputs: Callable[..., Tensors] | None = None
    arguments: Callable[[dict[str, float]], dict[str, float]] | None = None
    run: type[Around] | None = None
    direction: str = "forward_backward"


@dataclass(frozen=True)
class Faulty(Kernel):
    """The reference kernel with a fault."""

    fault: Fault | None = None
    softcaps: ClassVar[bool] = True

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BandMask)
        changed = self.fault.mask(mask) if self.fault and self.fault.mask else mask
        return FaultyCall(self.fault, prepare(Reference(), changed, heads, dtype, device))


class FaultyCall:
    calls = 1

    def __init__(self, fault: Fault | None, sound: Prepared) -> None:
        self._fault, self._sound = fault, sound

    def _given(self, *inputs: torch.Tensor) -> Tensors:
        return self._fault.inputs(*inputs) if self._fault and self._fault.inputs else inputs

    def _arguments(self, said: dict[str, float]) -> dict[str, float]:
        return self._fault.arguments(said) if self._fault and self._fault.arguments else said

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **said: float) -> Any:
        out, lse = self._sound.forward(*self._given(q, k, v), **self._arguments(said))  # type: ignore[arg-type]
        return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)

    def backward(self, dout: torch.Tensor, saved: Saved, **said: float) -> Any:
        q, k, v, out, lse = saved
        return self._sound.backward(dout, Saved(*self._given(q, k, v), out, lse), **self._arguments(said))  # type: ignore[call-arg,arg-type]


class Around(RankRun):
    """A sound run as it is."""

    def __init__(self, run: RankRun) -> None:
        self._run, self.tokens = run, run.tokens

    @property
    def held(self) -> Held:
        return self._run.held

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        return self._run.forward(q, k, v, sink)

    def backward(self, dout: torch.Tensor, saved: Any) -> Tensors:
        return self._run.backward(dout, saved)

    def lse(self, saved: Any) -> torch.Tensor:
        return self._run.lse(saved)


class SinkTwice(Around):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        assert sink is not None
        _, saved = self._run.forward(q, k, v)
        once = with_sink(saved.out, saved.lse, sink)
        out, lse = with_sink(*once, sink)
        return out, replace(saved, out=out, lse=lse, sink=sink)


class NoSink(Around):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        assert sink is not None
        return super().forward(q, k, v, torch.full_like(sink, -1e30))


class SinkOfTheNextHead(Around):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        assert sink is not None
        return super().forward(q, k, v, sink.roll(1))


class SinkNotInLSE(Around):
    """Out has the sink in it, LSE has not."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> Any:
        out, saved = self._run.forward(q, k, v, sink)
        _, bare = self._run.forward(q, k, v)
        return out, (saved, self._run.lse(bare))

    def backward(self, dout: torch.Tensor, saved: Any) -> Tensors:
        return self._run.backward(dout, saved[0])

    def lse(self, saved: Any) -> torch.Tensor:
        found: torch.Tensor = saved[1]
        return found


class SinkGradient(Around):
    """dsink misses what the last request gives."""

    def backward(self, dout: torch.Tensor, saved: Any) -> Tensors:
        *grads, _ = self._run.backward(dout, saved)
        shorter = dout.clone()
        shorter[-1:] = 0
        return *grads, self._run.backward(shorter, saved)[-1]


class SinkGradientOff(Around):
    def backward(self, dout: torch.Tensor, saved: Any) -> Tensors:
        *grads, dsink = self._run.backward(dout, saved)
        return *grads, dsink * 1.05


class ValuesForgotten(Around):
    """dk of one key of latent heads is off in a number that has dv in it."""

    def backward(self, dout: torch.Tensor, saved: Any) -> Tensors:
        dq, dk, *more = self._run.backward(dout, saved)
        dk = dk.clone()
        dk[len(dk) // 2, :, 0] *= 1.5
        return dq, dk, *more


@dataclass(frozen=True)
class Wrapped(Strategy):
    """One rank's run with something around it."""

    around: type[Around]

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return None

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        return self.around(Local().start(problem, mask, kernel, place))


def keys_lost(count: int) -> Callable[[BandMask], BandMask]:
    """The rows of the first request do not see some of its keys in the middle."""

    def change(mask: BandMask) -> BandMask:
        band = next(iter(mask))
        middle = (band.k0 + band.k1) // 2
        return without(band.q0, band.q1, middle, middle + count, mask)

    return change


def last_page_lost(mask: BandMask) -> BandMask:
    """The last request does not see its last 16 tokens but the new ones."""
    band = list(mask)[-1]
    new = band.q1 - band.q0
    return without(band.q0, band.q1, band.k1 - new - 16, band.k1 - new, mask)


def neighbours_page(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Sixteen tokens are those of another place."""
    order = torch.arange(len(k))
    order[32:48] = torch.arange(8, 24)
    return q, k[order], v[order]


FAULTS = {
    "a block of keys dropped": Fault("GQA, sink", mask=keys_lost(16)),
    "a block of keys dropped, latent": Fault("latent", mask=keys_lost(16)),
    "one key dropped": Fault("MLA, own scale", mask=keys_lost(1)),
    "one key dropped, latent": Fault("latent, sink, softcap", mask=keys_lost(1)),
    "one key dropped, forward": Fault("latent", mask=keys_lost(1), direction="forward"),
    "the last page lost": Fault("values are longer", mask=last_page_lost),
    "the last page lost, forward": Fault("GQA, sink", mask=last_page_lost, direction="forward"),
    "a page of another place": Fault("latent", inputs=neighbours_page),
    "a page of another place, forward": Fault("softcap", inputs=neighbours_page, direction="forward"),
    "scale x1.01": Fault("MLA, own scale", arguments=lambda said: said | {"softmax_scale": said["softmax_scale"] * 1.01}),
    "scale x1.01, latent": Fault("latent", arguments=lambda said: said | {"softmax_scale": said["softmax_scale"] * 1.01}),
    "scale of the keys' dim": Fault("MLA, own scale", arguments=lambda said: said | {"softmax_scale": 24**-0.5}),
    "no softcap": Fault("softcap", arguments=lambda said: {"softmax_scale": said["softmax_scale"]}),
    "softcap x1.1": Fault("softcap", arguments=lambda said: said | {"softcap": said["softcap"] * 1.1}),
    "softcap / scale": Fault(
        "latent, sink, softcap", arguments=lambda said: said | {"softcap": said["softcap"] / said["softmax_scale"]}
    ),
    "key/value heads one further": Fault("GQA, sink", inputs=lambda q, k, v: (q, k.roll(1, 1), v.roll(1, 1))),
    "query heads one further": Fault("MLA, own scale", inputs=lambda q, k, v: (q.roll(1, 1), k, v)),
    "values one number further": Fault("latent", inputs=lambda q, k, v: (q, k, k[..., 1 : v.shape[-1] + 1])),
    "scores without their last numbers": Fault(
        "latent", inputs=lambda q, k, v: (q, torch.cat([v, 0 * k[..., v.shape[-1] :]], -1), v)
    ),
    "a sink twice": Fault("GQA, sink", run=SinkTwice, direction="forward"),
    "no sink": Fault("GQA, sink", run=NoSink),
    "the next head's sink": Fault("GQA, sink", run=SinkOfTheNextHead),
    "a sink that is not in LSE": Fault("latent, sink, softcap", run=SinkNotInLSE),
    "dsink misses a row": Fault("GQA, sink", run=SinkGradient),
    "dsink x1.05": Fault("latent, sink, softcap", run=SinkGradientOff),
    "dv in dk x1.5 for one number of a key": Fault("latent", run=ValuesForgotten),
}  # fmt: skip


def measured(shape: str, batch: str, dtype: str, fault: Fault | None, direction: str = "forward_backward") -> Measured:
    of, mask = problem(BATCHES[batch], shape, dtype, direction), causal_batch(BATCHES[batch])
    strategy = Wrapped(fault.run) if fault and fault.run else Local()
    work = Work(Attention(), of, lambda _: mask, Faulty(fault), strategy, SETTINGS, 1)
    return measure_cell(work, Gang(0, 1, CPU, Groups(), []), lambda _: None)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused(name: str) -> None:
    """In two types and on two batches that change from fault to fault."""
    fault, number = FAULTS[name], list(FAULTS).index(name)
    for turn in range(2):
        dtype = DTYPES[(number + turn) % len(DTYPES)]
        batch = fault.batches[(number // 2 + turn) % len(fault.batches)]
        assert refused(measured(fault.shape, batch, dtype, fault, fault.direction)), f"{name} passes in {dtype} on {batch}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_without_a_fault_passes(dtype: str) -> None:
    shapes = sorted({fault.shape for fault in FAULTS.values()})
    for number, shape in enumerate(shapes):
        batch = list(BATCHES)[number % len(BATCHES)]
        for direction in ("forward", "forward_backward"):
            assert refused(measured(shape, batch, dtype, None, direction)) is None, (shape, batch, direction)
    around = Fault("GQA, sink", run=Around)
    assert refused(measured("GQA, sink", "mixed", dtype, around)) is None


@pytest.mark.slow
def test_what_a_probe_leaves_to_the_reference_is_said() -> None:
    check = measured("latent", "decode", "float32", None).check
    assert check is not None
    assert check.unchecked == {
        "every row of dq": "values are numbers of keys: the first 32 numbers of dq are known to the reference alone"
    }
    assert {"dq", "dk", "out", "lse"} <= set(check.ratios["level"])
    assert set(check.ratios["conserved"]) == {"dk.k = dq.q + dout.out"}
    of_sinks = measured("GQA, sink", "mixed", "float32", None).check
    assert of_sinks is not None
    assert all("dsink" in of_sinks.ratios[part] for part in ("reference", "level", "zero", "last pass"))
    assert of_sinks.errors["dsink"] <= of_sinks.bounds["dsink"]


@pytest.mark.slow
def test_a_mask_without_a_request_of_its_last_rows_is_no_fault_of_theirs() -> None:
    """Rows that see no key have what a sink leaves of them."""
    batch = BATCHES["mixed"]
    whole = causal_batch(batch)
    mask = BandMask.of(whole.num_q, whole.num_k, whole.bands[:-1])
    for shape in ("GQA, sink", "latent"):
        of = problem(batch, shape, "float32")
        work = Work(Attention(), of, lambda _: mask, Faulty(), Local(), SETTINGS, 1)
        assert refused(measure_cell(work, Gang(0, 1, CPU, Groups(), []), lambda _: None)) is None
    assert np.isfinite(whole.density)
