"""Where a number comes from: code, versions, device, host, job. Enough to run it again and to doubt it."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import platform
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import all_suffixes
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lcbench.cp.peers
import lcbench.kernels
from lcbench.measure.cores import usable_cores

# Modules whose classes say which libraries they use (``libraries``), as do those that cells name from outside of lcbench.
USERS = (lcbench.kernels, lcbench.cp.peers)
REPOSITORY = Path(__file__).resolve().parents[2]
# What numbers depend on, as far as it is there: an installed wheel has lcbench only, with conf/ inside.
SOURCES = ("lcbench", "conf", "launchers")
# Of files that git ignores these count all the same: they are imported, or composed.
LOADED = (*all_suffixes(), ".yaml")
# No other repository around the checkout, no program that a configuration names, nothing written.
GIT_SETTINGS = ("-c", f"safe.directory={REPOSITORY}", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true")
DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--binary", "--full-index", "--src-prefix=a/", "--dst-prefix=b/")


def describe(device: torch.device, targets: Iterable[str] = ()) -> dict[str, Any]:
    """Provenance of this rank's process; rank 0's is stored with the attempt.

    Args:
        targets: what cells name as ``_target_`` from outside of lcbench.
    """
    return {
        "git": git_state(),
        "modules": modules_of(targets),
        "versions": versions(device, targets),
        "device": device_name(device),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": usable_cores(),
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
    """Which code this is.

    ``commit``: of this checkout and no other, or None, and then ``why_no_commit`` says why. ``dirty``: whether anything differs
    from it: changes, and files of ``SOURCES`` that it does not have; None without a commit. ``diff_sha256``: hash of these changes
    and files. ``sources_sha256``: hash of what lies in ``SOURCES`` now, the same in a checkout and in a tarball of it.
    """
    sources = _tree_sha256(REPOSITORY, SOURCES)
    state: dict[str, Any] = {"commit": None, "dirty": None, "diff_sha256": None, "sources_sha256": sources}
    try:
        return state | _compared_to_commit()
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().partition("\n")[0] or f"git ended with {error.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        why = f"git does not run: {error}"
    return state | {"why_no_commit": f"{why}; sources_sha256 says which code it was"}


def _compared_to_commit() -> dict[str, Any]:
    """Raises:
    OSError, subprocess.SubprocessError: git is not here, or this is no checkout.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A fresh index: that of the checkout may be told to overlook changes (assume-unchanged), and is not to be written.
        index = str(Path(folder) / "index")
        commit = _git("rev-parse", "--verify", "HEAD^{commit}").decode().strip()
        _git("read-tree", commit, index=index)
        diff = _git(*DIFF, commit, index=index)
        there = [":(glob)*.py", *(name for name in SOURCES if (REPOSITORY / name).exists())]  # the first: python -m imports them
        listing = ("ls-files", "--others", "-z")
        every, seen = (
            {os.fsdecode(name) for name in _git(*listing, *more, "--", *there, index=index).split(b"\0") if name}
            for more in ((), ("--exclude-standard",))
        )
    untracked = {n for n in every if "__pycache__" not in Path(n).parts and (n in seen or n.endswith(("/", *LOADED)))}
    changed = bool(diff or untracked)
    digest = hashlib.sha256(diff + _tree_sha256(REPOSITORY, sorted(untracked)).encode()).hexdigest()
    return {"commit": commit, "dirty": changed, "diff_sha256": digest if changed else None}


def _git(*arguments: str, index: str | None = None) -> bytes:
    """What git says of this checkout, whatever the user's environment names."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    own |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_CEILING_DIRECTORIES": str(REPOSITORY.parent), "LC_ALL": "C"}
    own |= {"GIT_INDEX_FILE": index} if index else {}
    command = ("git", *GIT_SETTINGS, *arguments)
    return subprocess.run(command, capture_output=True, timeout=20, cwd=REPOSITORY, check=True, env=own).stdout


def modules_of(targets: Iterable[str]) -> dict[str, str]:
    """Hash of the Python files of every package outside of lcbench that cells take a kernel, strategy or mask from."""
    found = {}
    for package in sorted({target.partition(".")[0] for target in targets} - {"lcbench"}):
        spec = find_spec(package)
        places = [*(spec.submodule_search_locations or ()), spec.origin or ""][:1] if spec else []
        found[package] = "".join(_tree_sha256(Path(place).parent, [Path(place).name], only=".py") for place in places)
    return found


def _tree_sha256(root: Path, names: Iterable[str], only: str = "") -> str:
    """Hash of the names and contents of all files below ``root / name``, without caches and hidden ones."""
    digest = hashlib.sha256()
    for name in names:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            left_out = any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(top).parts)
            if not left_out and path.suffix.endswith(only) and path.is_file():
                digest.update(os.fsencode(path.relative_to(root)) + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _cuda(device: torch.device) -> dict[str, Any]:
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    return {
        "cudnn": torch.backends.cudnn.version(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        "nvidia_smi": {"query": query, "values": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")},
        "topology": _output("nvidia-smi", "topo", "-m"),
    }


def versions(device: torch.device, targets: Iterable[str] = ()) -> dict[str, str]:
    """What numbers depend on and may differ between two nodes though it should not.

    Python; torch and everything else that lcbench depends on; every library of a kernel or peer that is installed, whether a cell
    uses it or not; cuDNN as it is loaded; on CUDA its runtime, NCCL and driver. A library installed from a repository has the
    commit beside its version.
    """
    found = {"python": platform.python_version()}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        found["driver"] = (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0]
    return found | {name: installed for name in sorted({*_requirements(), *libraries(targets)}) if (installed := _version(name))}


def libraries(targets: Iterable[str] = ()) -> set[str]:
    """Names of the distributions that kernels and peers say they use, of lcbench and of those that ``targets`` name."""
    modules = [f"{package.__name__}.{found.name}" for package in USERS for found in pkgutil.iter_modules(package.__path__)]
    found = {"torch"}
    for name in (*modules, *sorted({target.rpartition(".")[0] for target in targets})):
        if name.endswith(".__main__"):
            continue
        try:
            module = import_module(name)
        except Exception:
            if name in modules:
                raise
            continue  # its cell fails by itself and says why
        for member in vars(module).values():
            if isinstance(member, type) and member.__module__ == name:
                found |= set(getattr(member, "libraries", ()))
    return found


def _requirements() -> list[str]:
    """Names of the distributions that lcbench itself depends on, without extras: as its checkout says, else as its wheel does."""
    project = REPOSITORY / "pyproject.toml"
    try:
        stated = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else requires("lcbench") or []
    except PackageNotFoundError:
        return []
    return [found[0] for line in stated if "extra ==" not in line and (found := re.match(r"[\w.-]+", line))]


def _version(name: str) -> str | None:
    """The version of a distribution, with the commit where it was installed from a repository; None where it is not installed."""
    try:
        there = distribution(name)
    except PackageNotFoundError:
        return None
    try:
        origin = json.loads(there.read_text("direct_url.json") or "{}")
    except ValueError:
        origin = {}
    commit = (origin.get("vcs_info") or {}).get("commit_id")
    return f"{there.version} at {commit[:12]}" if commit else there.version


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
