"""The devices that conf/device describes: peaks, memory, and the words by which one is recognised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "device"


def known_devices() -> list[dict[str, Any]]:
    """Every entry of conf/device, by name of its file."""
    return [dict(OmegaConf.to_container(OmegaConf.load(path))) for path in sorted(FOLDER.glob("*.yaml"))]  # type: ignore[arg-type]
