"""How much of its node's memory a rank may take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/proc/meminfo")
GROUPS = Path("/sys/fs/cgroup")  # version 2; version 1 has a folder per controller in it
OWN_GROUPS = Path("/proc/self/cgroup")
SHARE = 0.8  # of what is free; the rest is for all that the ranks do besides


def free_bytes() -> int:
    """Memory of this node that this process could still take: what the kernel calls available, and what the limits of its control
    groups leave (a job's share of the node)."""
    fields = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    return max(0, min([int(fields["MemAvailable"].split()[0]) * 1024, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = GROUPS if not controllers else GROUPS / "memory"
        limit, used, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            if not group.is_relative_to(top):
                break
            if (group / limit).exists() and (allowed := (group / limit).read_text().strip()) != "max":
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield int(allowed) - int((group / used).read_text()) + int(stat[cache])


def room(need: int) -> tuple[int, str | None]:
    """Bytes that every rank may take, and why its ``need`` of them is too much for the memory of some node; None if it is not.
    Collective, the same on all ranks."""
    from lcbench.measure.environment import node_name  # with torch, which planning does without
    from lcbench.measure.ranks import EVERY

    ranks: list[tuple[str, int, int]] = EVERY.all_gather_object((node_name(), need, free_bytes()))
    shares, refused = [], None
    for node in sorted({node for node, _, _ in ranks}):
        needs = [need for name, need, _ in ranks if name == node]
        free = int(min(free for name, _, free in ranks if name == node) * SHARE)
        shares.append(free // len(needs))
        if sum(needs) > free:
            refused = refused or (
                f"activations of {sum(needs) / 2**30:.2f} GiB go to the memory of a host that has room for {free / 2**30:.2f} GiB"
            )
    return min(shares), refused
