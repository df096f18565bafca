"""Which device and which backend a rank takes."""

from __future__ import annotations

import os

import pytest
import torch

from lcbench.measure.cores import usable_cores
from lcbench.measure.environment import describe
from lcbench.predict.machines import machine_of
from lcbench.runs.worker import _backend, _device
from lcbench.schedule.groups import Groups, group_options


def a_node(monkeypatch: pytest.MonkeyPatch, *, gpus: int, ranks: int, rank: int) -> list[torch.device]:
    """A node as torch would see it; the devices that are set."""
    chosen: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        if device.index is not None and device.index >= gpus:
            raise RuntimeError("CUDA error: invalid device ordinal")
        chosen.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    return chosen


def test_ranks_share_a_gpu_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = a_node(monkeypatch, gpus=2, ranks=4, rank=3)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        _device(None, share=False)
    assert not chosen
    device = _device(None, share=True)
    assert chosen == [device] == [torch.device("cuda", 1)]
    assert _backend(device) == "gloo"  # NCCL refuses two ranks on one GPU


def test_ranks_with_a_gpu_each_have_nccl_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (False, True):
        a_node(monkeypatch, gpus=4, ranks=4, rank=3)
        device = _device("NVIDIA H100 80GB HBM3", share=share)
        assert device == torch.device("cuda", 3)
        assert _backend(device) == "nccl"


def test_ranks_on_cpus_have_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for gpus, promised in ((0, None), (4, "cpu")):
        a_node(monkeypatch, gpus=gpus, ranks=2, rank=0)
        device = _device(promised, share=False)
        assert device == torch.device("cpu")
        assert _backend(device) == "gloo"
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_ranks_on_cpus_share_the_cores_that_were_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for cores, ranks, each in ((6, 2, 3), (3, 8, 1), (1, 1, 1)):  # whatever the machine has
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(5, 5 + cores)))
        a_node(monkeypatch, gpus=0, ranks=ranks, rank=0)
        device = _device(None, share=False)
        assert torch.get_num_threads() == each
        # A fit of results from here is for a machine of as many cores.
        assert describe(device)["cpus"] == machine_of.__wrapped__("this").cores == cores
    torch.set_num_threads(threads)


def test_cores_are_all_where_the_system_cannot_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()


def test_messages_of_gpus_go_through_the_host_over_gloo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, device, through in (("gloo", "cuda", True), ("nccl", "cuda", False), ("gloo", "cpu", False)):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        assert Groups().goes_through_host(torch.device(device)) is through


def test_groups_of_nccl_have_streams_of_high_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.high = is_high_priority_stream

    class NCCL:
        pass

    NCCL.Options = Options  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", NCCL, raising=False)
    assert group_options("nccl").high
    assert group_options("gloo") is None
