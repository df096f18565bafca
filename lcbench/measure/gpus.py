"""The GPUs of this machine as nvidia-smi lists them: without torch, so that a plan can ask."""

from __future__ import annotations

import os
import shutil
import subprocess

QUERY = {
    "index": "index", "uuid": "uuid", "name": "name", "driver": "driver_version", "memory_used_mib": "memory.used",
    "clock_mhz": "clocks.sm", "max_clock_mhz": "clocks.max.sm", "throttled": "clocks_throttle_reasons.active",
    "temperature_c": "temperature.gpu", "mig": "mig.mode.current",
}  # fmt: skip


def gpus_here() -> list[dict[str, str]] | None:
    """The GPUs that this job may use, as nvidia-smi sees them; None where it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    listed = [dict(zip(QUERY, (v.strip() for v in line.split(",")), strict=True)) for line in text.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        mine = visible.split(",")
        listed = [gpu for gpu in listed if gpu["index"] in mine or any(gpu["uuid"].startswith(m) for m in mine if "-" in m)]
    return listed
