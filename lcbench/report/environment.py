"""Where results come from, in a form in which two sets of them can be laid beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median

from lcbench.runs.attempt import Attempt

Environment = dict[str, set[str]]  # name -> values that occur

LINK = " GB/s"  # ends the names under which the check of the nodes keeps what links carry


def environment_of(attempts: Iterable[Attempt]) -> Environment:
    """Commit, device, nodes, versions (driver, NCCL, torch and so on) and clocks of attempts."""
    found: Environment = {}
    for attempt in attempts:
        for name, value in _facts(attempt):
            found.setdefault(name, set()).add(value)
    return found


def links_of(attempts: Iterable[Attempt]) -> dict[str, float]:
    """GB/s of every class of links between two ranks, the median over the checks of the nodes."""
    found: dict[str, list[float]] = {}
    for attempt in attempts:
        for name, value in (attempt.provenance.get("check") or {}).items():
            if name.endswith(LINK) and not name.startswith("allreduce"):
                found.setdefault(name.removesuffix(LINK), []).append(value["median"])
    return {name: median(values) for name, values in found.items()}


def _facts(attempt: Attempt) -> Iterator[tuple[str, str]]:
    provenance = attempt.provenance
    if made := attempt.prediction:
        for name in ("machine", "fit", "basis", "lcbench"):
            yield name if name != "lcbench" else "lcbench that predicted", str(made.get(name) or "none")
        return
    git = provenance.get("git") or {}
    commit, sources = git.get("commit"), f"sources {str(git.get('sources_sha256') or 'unknown')[:12]}"
    changes = f" with changes ({sources})" if git.get("sources_sha256") else " with changes"
    yield "lcbench", f"{str(commit)[:12]}{changes if git.get('dirty') else ''}" if commit else f"no commit, {sources}"
    for package, digest in (provenance.get("modules") or {}).items():
        yield package, f"sources {str(digest)[:12]}"
    for key in ("device", "nodes", "platform", "threads"):
        if provenance.get(key) is not None:
            yield key, str(provenance[key])
    for name, version in (provenance.get("versions") or {}).items():
        yield name, str(version)
    facts = (provenance.get("check") or {}).get("facts") or {}
    for gpu in (gpu for node in facts.values() for gpu in node.get("gpus") or []):
        yield "max clock MHz", str(gpu["max_clock_mhz"])
