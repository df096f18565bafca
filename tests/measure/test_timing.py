"""When the clock starts: on a stand-in of CUDA, whose device works through what the host has launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lcbench.measure import timing
from lcbench.measure.stopping import Stopping
from lcbench.measure.timing import CYCLES_PER_S, FIRST_SLEEP_S, LONGEST_SLEEP_S, SLEEP_FACTOR, measure

CUDA = torch.device("cuda", 0)
THREE = Stopping(3, 3, 100.0, 0.0)
KERNEL_S = 1e-3


class Machine:
    """A host with a clock and a device with a stream: what is launched begins when the host has launched it and what is before it
    is done.
    """

    def __init__(self, patch: pytest.MonkeyPatch, ranks: int, backend: str) -> None:
        self.host_s = self.device_s = 0.0
        self.calls: list[str] = []
        self.sleeps: list[float] = []
        for name in ("synchronize", "_sleep"):
            patch.setattr(torch.cuda, name, getattr(self, name.strip("_")))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        patch.setattr(timing.time, "perf_counter", lambda: self.host_s)  # type: ignore[attr-defined]
        patch.setattr(dist, "is_initialized", lambda: ranks > 1)
        patch.setattr(dist, "get_world_size", lambda: ranks)
        patch.setattr(dist, "get_backend", lambda: backend)
        patch.setattr(dist, "barrier", lambda: self.calls.append("barrier"))
        patch.setattr(dist, "all_reduce", lambda *a, **k: self.calls.append("all_reduce"))
        zeros, tensor = torch.zeros, torch.tensor
        patch.setattr(torch, "zeros", lambda size, device: zeros(size))
        patch.setattr(torch, "tensor", lambda values, dtype, device: tensor(values, dtype=dtype))

    def launch(self, host_s: float, device_s: float) -> None:
        self.host_s += host_s
        self.device_s = max(self.device_s, self.host_s) + device_s

    def synchronize(self, device: object = None) -> None:
        self.calls.append("synchronize")
        self.host_s = max(self.host_s, self.device_s)

    def sleep(self, cycles: int) -> None:
        self.calls.append("sleep")
        self.sleeps.append(cycles / CYCLES_PER_S)
        self.launch(1e-5, self.sleeps[-1])


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.at = machine, 0.0

    def record(self) -> None:
        self.machine.calls.append("record")
        self.machine.launch(1e-6, 0.0)
        self.at = self.machine.device_s

    def synchronize(self) -> None:
        self.machine.host_s = max(self.machine.host_s, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def phases(machine: Machine, gap_s: float, waits: bool = False) -> dict[str, Any]:
    """Forward is two kernels, backward four; the host needs ``gap_s`` to launch each."""

    def launch(name: str, kernels: int) -> None:
        machine.calls.append(name)
        for _ in range(kernels):
            machine.launch(gap_s, KERNEL_S)
            if waits:
                machine.host_s = max(machine.host_s, machine.device_s)

    return {"forward": lambda _: launch("forward", 2), "backward": lambda _: launch("backward", 4)}


@pytest.mark.parametrize("gap_s", [1e-5, 3 * KERNEL_S])
def test_launch_gaps_are_no_kernel_time(gap_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1, "nccl")
    found, _ = measure(phases(machine, gap_s), THREE, 1, CUDA)
    assert found.own["forward"] == pytest.approx([2 * KERNEL_S] * 3, abs=1e-5)
    assert found.own["backward"] == pytest.approx([4 * KERNEL_S] * 3, abs=1e-5)
    assert machine.sleeps[:2] == [FIRST_SLEEP_S] * 2
    assert machine.sleeps[2:4] == pytest.approx([SLEEP_FACTOR * n * gap_s for n in (2, 4)], rel=0.2)
    assert found.slowest == found.own


def test_a_phase_that_waits_for_its_kernels_is_timed_as_without_a_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    gap_s = 5 * KERNEL_S
    machine = Machine(monkeypatch, 1, "nccl")
    found, _ = measure(phases(machine, gap_s, waits=True), Stopping(12, 12, 1e6, 0.0), 0, CUDA)
    assert found.own["forward"] == pytest.approx([KERNEL_S * 2 + gap_s] * 12, abs=KERNEL_S + gap_s)
    assert min(found.own["backward"]) >= 4 * KERNEL_S + 3 * gap_s
    assert max(machine.sleeps) <= LONGEST_SLEEP_S


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_ranks_sleep_before_their_devices_meet_and_the_clock_starts_last(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2, backend)
    measure(phases(machine, 1e-5), Stopping(1, 1, 100.0, 0.0), 0, CUDA)
    meet = ["all_reduce"] if backend == "nccl" else []  # the host waits in gloo's
    before = ["barrier", "synchronize", "sleep", *meet, "record"]
    assert machine.calls == [*before, "forward", "record", *before, "backward", "record", "all_reduce"]
