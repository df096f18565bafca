"""Where a number comes from: code, versions, device, host, job. Enough to run it again and to doubt it."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "flash-attn", "transformer-engine", "triton", "hydra-core", "submitit", "mlflow")
REPOSITORY = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """Provenance of this rank's process; rank 0's is stored with the attempt."""
    return {
        "git": git_state(),
        "versions": versions(device),
        "device": device_name(device),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": _cuda(device) if device.type == "cuda" else None,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()),
        "argv": [word.removeprefix(f"{REPOSITORY}/") for word in sys.argv],
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def node_name() -> str:
    """This node, as Slurm calls it where it does."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def git_state() -> dict[str, Any]:
    """Commit of the checkout, whether it is dirty, and a hash of the uncommitted diff."""
    commit = _output("git", "rev-parse", "HEAD")
    diff = _output("git", "diff", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    return {
        "cudnn": torch.backends.cudnn.version(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        "nvidia_smi": {"query": query, "values": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")},
        "topology": _output("nvidia-smi", "topo", "-m"),
    }


def versions(device: torch.device) -> dict[str, str]:
    """What may differ between two nodes though it should not: Python, packages, and on CUDA its runtime, NCCL and driver."""
    found = {"python": platform.python_version()}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        found["driver"] = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0]
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=REPOSITORY, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
