"""The check of a pack's nodes, before its first cell: are the devices there, idle and at full clocks, do versions agree, and what
do the links carry? A number from a node that is not well is worth less than none.

``node_facts`` is asked by each node's agent, before any worker starts; ``check_gang`` by the workers, all together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lcbench.measure.environment import device_name, node_name, versions
from lcbench.measure.gpus import gpus_here
from lcbench.measure.peak import entry_of
from lcbench.schedule.messages import wait_all

# Bits of the throttle reasons (NVML) that cost speed against one's will: hardware slowdown, software and hardware thermal
# slowdown, power brake. A power cap under load (bit 2) is no fault, and idle (bit 0) no throttling.
THROTTLED = {0x08: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake"}
# What a driver and an idle context take; more belongs to somebody.
IDLE_MIB = 1024
MESSAGE_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
REPEATS = 3
# A node whose link carries less than this share of the median node's falls out. Of CPU ranks, which share cores, nothing follows.
SLOW = 0.5


@dataclass
class NodesCheck:
    """What the check found. ``fallen``: why, by name of the node."""

    fallen: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


def node_facts(device: dict[str, Any] | None, gpus: int) -> tuple[dict[str, Any], list[str]]:
    """This node's GPUs, and what is wrong with them.

    Args:
        device: the ``conf/device`` entry that the site promises; None where it promises CPU ranks or nothing.
        gpus: how many workers will run here, one per GPU.
    """
    listed = gpus_here()
    facts: dict[str, Any] = {"node": node_name(), "gpus": listed}
    if device is None:
        return facts, []
    if listed is None:
        return facts, [f"nvidia-smi does not answer, though the site promises {device['name']}"]
    return facts, gpu_problems(listed, device, gpus)


def too_few(ranks: int) -> str | None:
    """What is wrong where torch finds GPUs on this node, and fewer than ranks: for a site that promises nothing."""
    here = torch.cuda.device_count()
    if not 0 < here < ranks:
        return None
    return f"{here} of {ranks} GPUs; site.share_gpu=true has ranks share one, and site.device=cpu takes none"


def gpu_problems(listed: Sequence[dict[str, str]], device: dict[str, Any], gpus: int) -> list[str]:
    """What is wrong with a node's GPUs."""
    problems = []
    if len(listed) < gpus:
        problems.append(f"{len(listed)} of {gpus} GPUs")
    for gpu in listed:
        name = f"GPU {gpu['index']}"
        found = entry_of([device], gpu["name"])
        if found is None or found["name"] != device["name"]:
            problems.append(f"{name} is {gpu['name']}, not {device['name']}")
        elif gpu["mig"] == "Enabled":
            problems.append(f"{name} is cut into MIG slices, not a whole {device['name']}")
        if _number(gpu["memory_used_mib"]) > IDLE_MIB:
            problems.append(f"{name} is in use: {gpu['memory_used_mib']} MiB taken")
        bits = int(gpu["throttled"], 16) if gpu["throttled"].startswith("0x") else 0
        reasons = [reason for bit, reason in THROTTLED.items() if bits & bit]
        if reasons:
            problems.append(f"{name} is throttled: {', '.join(reasons)} at {gpu['clock_mhz']} of {gpu['max_clock_mhz']} MHz")
    return problems


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return 0.0


def check_gang(device: torch.device, local_size: int, facts: dict[str, Any]) -> NodesCheck:
    """Versions and links of all nodes. Collective over all ranks, which are numbered node by node.

    Args:
        facts: what this rank's node said of itself (``node_facts``).
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    first = rank % local_size == 0
    mine = {
        "node": node_name(), "device": device_name(device), "gpu": _gpu(device), "backend": dist.get_backend(),
        # Of a node, once: its ranks have one environment, and looking takes each of them a second of a shared core.
        "versions": versions(device) if first else None, "facts": facts if first else None,
    }  # fmt: skip
    links: dict[str, float | None] = {}
    if carries := device.type == "cpu" or dist.get_backend() == "nccl":  # gloo goes through the host, whatever the links are
        links["allreduce"] = _allreduce(device)
    if carries and local_size > 1:
        links["within a node"] = _exchange(device, _partner(rank % local_size, local_size, 1, rank - rank % local_size))
    if carries and size > local_size:
        # Every rank with the rank of its number on the next node.
        links["between nodes"] = _exchange(device, _partner(rank // local_size, size // local_size, local_size, rank % local_size))
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, {**mine, "links": links})
    return judge(everyone, device.type)


def judge(everyone: Sequence[dict[str, Any]], kind: str) -> NodesCheck:
    """What follows from what all ranks said, rank 0 first; ``kind`` is cpu or cuda."""
    check = NodesCheck()
    for what in ("device", "versions"):
        told = [r for r in everyone if r[what] is not None]
        values = [r[what] for r in told]
        usual = max(values, key=values.count)
        for other in (r for r in told if r[what] != usual):
            check.fallen.setdefault(other["node"], f"{what}: {_difference(other[what], usual)}")
    if kind == "cuda" and (why := _no_speed(everyone)):
        check.found["no_speed"] = why
    check.found["nodes"] = list(dict.fromkeys(r["node"] for r in everyone))
    check.found["versions"] = everyone[0]["versions"]
    check.found["facts"] = {r["node"]: r["facts"] for r in everyone if r["facts"]}
    for link in everyone[0]["links"]:
        slowest: dict[str, float] = {}
        for r in everyone:
            if r["links"][link] is not None:
                slowest[r["node"]] = min(r["links"][link], slowest.get(r["node"], float("inf")))
        if not slowest:
            continue
        median = sorted(slowest.values())[len(slowest) // 2]
        worst = min(slowest, key=lambda node: slowest[node])
        check.found[f"{link} GB/s"] = {"median": median, "worst": slowest[worst], "worst_node": worst}
        if kind == "cuda" and slowest[worst] < SLOW * median:
            check.fallen.setdefault(worst, f"{link}: {slowest[worst]:.1f} GB/s where the median node has {median:.1f}")
    return check


def _no_speed(everyone: Sequence[dict[str, Any]]) -> str:
    """Why times of these ranks say nothing about GPUs; empty if they do."""
    most = max(Counter((r["node"], r["gpu"]) for r in everyone).values())
    if most > 1:
        return f"{most} ranks shared a GPU"
    through_host = len(everyone) > 1 and everyone[0]["backend"] != "nccl"
    return f"messages between GPUs went through the host ({everyone[0]['backend']})" if through_host else ""


def _gpu(device: torch.device) -> str | None:
    """Which GPU of its node a rank has; None for a CPU rank."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _difference(value: Any, usual: Any) -> str:
    if not isinstance(value, dict):
        return f"{value} where others have {usual}"
    parts = [
        f"{k} {value.get(k)} where others have {usual.get(k)}" for k in sorted({*value, *usual}) if value.get(k) != usual.get(k)
    ]
    return ", ".join(parts)


def _partner(place: int, places: int, stride: int, base: int) -> int | None:
    """The rank with which the one at ``place`` exchanges: 0 with 1, 2 with 3; an odd one out with nobody."""
    other = place ^ 1
    return base + other * stride if other < places else None


def _exchange(device: torch.device, partner: int | None) -> float | None:
    """GB/s that this rank sends to its partner while it receives as much; None for a rank without one. Collective."""
    buffers = [torch.zeros(MESSAGE_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2)]

    def once() -> None:
        if partner is not None:
            ops = [dist.P2POp(dist.isend, buffers[0], partner), dist.P2POp(dist.irecv, buffers[1], partner)]
            wait_all(dist.batch_isend_irecv(ops))

    seconds = _best_s(once, device)
    return None if partner is None else MESSAGE_BYTES[device.type] / seconds / 1e9


def _allreduce(device: torch.device) -> float | None:
    """Bus bandwidth of an all-reduce over all ranks, GB/s: 2 (P-1)/P of the bytes over the time, as nccl-tests counts it."""
    size = dist.get_world_size()
    if size == 1:
        return None
    data = torch.zeros(MESSAGE_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    return 2 * (size - 1) / size * MESSAGE_BYTES[device.type] / _best_s(lambda: dist.all_reduce(data), device) / 1e9


def _best_s(once: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        dist.barrier()
        begun = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
