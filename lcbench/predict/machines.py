"""The machines of conf/machine: devices with their links."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lcbench.grid.devices import known_devices
from lcbench.grid.paths import CONF
from lcbench.kernels.base import Platform
from lcbench.measure.cores import usable_cores
from lcbench.measure.gpus import gpus_here
from lcbench.measure.peak import entry_of
from lcbench.schedule.machine import Collective, Link, Machine

HERE = "this"  # the machine of CPU ranks here


def known() -> list[str]:
    """Names of all machines."""
    return sorted(path.stem for path in (CONF / "machine").glob("*.yaml"))


@cache
def machine_of(name: str) -> Machine:
    """Raises:
    ValueError: there is no machine of this name.
    """
    if name not in known():
        raise ValueError(f"machine={name} is none of {', '.join(known())} (conf/machine)")
    entry: dict[str, Any] = dict(OmegaConf.to_container(OmegaConf.load(CONF / "machine" / f"{name}.yaml")))  # type: ignore[arg-type]
    device = next((d for d in known_devices() if d["name"] == entry["device"]), None)
    memory = float(device["memory_gbytes_per_s"]) if device else float(entry["memory_gbytes_per_s"])
    inside, across = (Link(link["latency_s"], link["gbytes_per_s"] * 1e9) for link in (entry["inside"], entry["across"]))
    return Machine(
        name, entry["device"], inside, across,
        memory_bytes=int(device["memory_bytes"]) if device else 0,
        memory_bytes_per_s=memory * float(entry["memory_share"]) * 1e9,
        launch_s=entry["launch_s"], message_s=entry["message_s"],
        collectives={name: Collective(**how) for name, how in entry["collectives"].items()},
        cores=0 if device else usable_cores(),
        nics=entry["nics"], host_bytes_per_s=entry["host_gbytes_per_s"] * 1e9, read_bytes_per_s=memory * 1e9 if device else 0.0,
    )  # fmt: skip


def fit_of(name: str) -> Path | None:
    """The file of the fit that lcbench has of a machine; None where nobody made one."""
    path = CONF / "machine" / f"{name}.fit.json"
    return path if path.exists() else None


def device_of_site(site: Mapping[str, Any]) -> str | None:
    """Name of the GPUs that a site measures on: what it says, or else of those that are here; None: CPUs."""
    device = site.get("device")
    if device is None and (gpus := gpus_here()):
        entry = entry_of(known_devices(), gpus[0]["name"])
        device = entry["name"] if entry else gpus[0]["name"]
    return None if device in (None, "cpu") else str(device)


def machine_of_site(site: Mapping[str, Any]) -> str:
    """Name of the machine that a site measures on: by its device, or, where it names none, by the GPUs that are here.

    Raises:
        ValueError: conf/machine has none with that device.
    """
    device = device_of_site(site)
    name = HERE if device is None else device
    if name not in known():
        raise ValueError(f"conf/machine has no {name}, which site={site.get('name')} measures on; there are {', '.join(known())}")
    return name


def platform_of(machine: Machine) -> Platform:
    """What kernels and strategies are asked about: a device of the machine."""
    device = next((d for d in known_devices() if d["name"] == machine.device), None)
    if device is None:
        return Platform("cpu")
    major, minor = device["capability"]
    return Platform("cuda", (major, minor), device["memory_bytes"])


def peak_flops(machine: Machine, dtype: str) -> float | None:
    """FLOP/s of the device's data sheet; None where there is none."""
    device = next((d for d in known_devices() if d["name"] == machine.device), None)
    peak = device["peak_tflops"].get(dtype) if device else None
    return float(peak) * 1e12 if peak is not None else None
