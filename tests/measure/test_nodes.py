"""What makes a node fall out: GPUs that are missing, foreign, taken or throttled, other versions, slow links."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcbench.grid.devices import known_devices
from lcbench.measure.nodes import _partner, check_gang, gpu_problems, judge, too_few
from lcbench.testing.spawn import run_ranks

DEVICES = {entry["name"]: entry for entry in known_devices()}
H100 = DEVICES["h100"]


def gpu(index: int, **more: str) -> dict[str, str]:
    return {
        "index": str(index), "uuid": f"GPU-{index}", "name": "NVIDIA H100 80GB HBM3", "driver": "580.1", "memory_used_mib": "4",
        "clock_mhz": "1980", "max_clock_mhz": "1980", "throttled": "0x0000000000000001", "temperature_c": "30",
        "mig": "Disabled", **more,
    }  # fmt: skip


def test_a_healthy_node_has_no_problems() -> None:
    assert gpu_problems([gpu(i) for i in range(8)], H100, 8) == []
    assert gpu_problems([gpu(0, throttled="0x0000000000000004")], H100, 1) == []  # a power cap under load is no fault


@pytest.mark.parametrize(
    ("gpus", "word"),
    [
        ([gpu(0)], "1 of 2 GPUs"),
        ([gpu(0), gpu(1, name="NVIDIA A100-SXM4-80GB")], "GPU 1 is NVIDIA A100-SXM4-80GB, not h100"),
        ([gpu(0), gpu(1, name="NVIDIA H100 PCIe")], "GPU 1 is NVIDIA H100 PCIe, not h100"),
        ([gpu(0), gpu(1, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")], "GPU 1 is NVIDIA H100 80GB HBM3 MIG 1g.10gb, not h100"),
        ([gpu(0), gpu(1, mig="Enabled")], "GPU 1 is cut into MIG slices, not a whole h100"),
        ([gpu(0), gpu(1, memory_used_mib="40000")], "GPU 1 is in use: 40000 MiB taken"),
        (
            [gpu(0), gpu(1, throttled="0x0000000000000048", clock_mhz="345")],
            "GPU 1 is throttled: hardware slowdown, hardware thermal ",
        ),
    ],
)
def test_what_is_wrong_with_a_node_is_said(gpus: list[dict[str, str]], word: str) -> None:
    (problem,) = gpu_problems(gpus, H100, 2)
    assert problem.startswith(word)


def test_a_site_gets_the_variant_that_it_promises() -> None:
    """Each entry knows its own names, and none of another's."""
    for name, device in DEVICES.items():
        for other in DEVICES.values():
            problems = [p for known in other["names"] for p in gpu_problems([gpu(0, name=known, mig="[N/A]")], device, 1)]
            assert problems == [] if other["name"] == name else len(problems) == len(other["names"])


def rank(node: str, link: float | None, **more: Any) -> dict[str, Any]:
    said = {
        "node": node,
        "device": "H100",
        "versions": {"torch": "2", "driver": "580"},
        "facts": None,
        "gpu": node,
        "backend": "nccl",
        "links": {"between nodes": link},
    }
    return said | more


def test_the_node_that_differs_or_is_slow_is_named() -> None:
    well = [rank("n1", 40.0), rank("n2", 42.0), rank("n3", 41.0)]
    assert judge(well, "cuda").fallen == {}
    assert judge(well, "cuda").found["between nodes GB/s"] == {"median": 41.0, "worst": 40.0, "worst_node": "n1"}
    slow = judge([*well[:2], rank("n3", 3.0)], "cuda")
    assert slow.fallen == {"n3": "between nodes: 3.0 GB/s where the median node has 40.0"}
    assert judge([*well[:2], rank("n3", 3.0)], "cpu").fallen == {}  # ranks that share cores say nothing of links
    other = judge([*well[:2], rank("n3", None, versions={"torch": "2", "driver": "570"})], "cuda")
    assert other.fallen == {"n3": "versions: driver 570 where others have 580"}
    # A node's first rank tells them for all of its ranks.
    assert judge([r | more for r in well for more in ({}, {"versions": None})], "cuda").fallen == {}
    mixed = judge([rank("n1", None), rank("n2", None), rank("n2", None, device="A100"), rank("n1", None)], "cuda")
    assert mixed.fallen == {"n2": "device: A100 where others have H100"}


def test_ranks_on_one_gpu_are_counted_node_by_node() -> None:
    apart = [rank(node, None, gpu=f"GPU-{gpu}") for node in ("n1", "n2") for gpu in (0, 1)]
    assert "no_speed" not in judge(apart, "cuda").found
    assert "no_speed" not in judge([rank("n1", 1.0, backend="gloo"), rank("n1", 1.0, backend="gloo")], "cpu").found
    assert judge([*apart, *apart[3:], *apart[2:]], "cuda").found["no_speed"] == "3 ranks shared a GPU"
    by_gloo = [r | {"backend": "gloo"} for r in apart]
    assert judge(by_gloo, "cuda").found["no_speed"] == "messages between GPUs went through the host (gloo)"
    assert "no_speed" not in judge(by_gloo[:1], "cuda").found


def test_ranks_beyond_the_gpus_need_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for here, ranks, few in ((0, 2, False), (1, 1, False), (8, 8, False), (1, 2, True), (3, 8, True)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda here=here: here)
        assert bool(too_few(ranks)) == few
    assert "3 of 8 GPUs; site.share_gpu=true" in str(too_few(8))


def test_partners_are_mutual() -> None:
    for places in range(2, 9):
        for place in range(places):
            other = _partner(place, places, 8, 3)
            if other is not None:
                assert _partner((other - 3) // 8, places, 8, 3) == 3 + 8 * place


@pytest.mark.gloo
@pytest.mark.slow
def test_real_ranks_measure_their_links() -> None:
    run_ranks(6, links_of_three_nodes)


def links_of_three_nodes(rank: int) -> None:
    check = check_gang(torch.device("cpu"), 2, {"rank": rank})
    assert not check.fallen
    for link in ("allreduce", "within a node", "between nodes"):
        assert check.found[f"{link} GB/s"]["worst"] > 0
