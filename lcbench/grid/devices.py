"""The devices that conf/device describes: peaks, memory, and the words by which one is recognised."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from lcbench.grid.paths import CONF


@cache
def known_devices() -> list[dict[str, Any]]:
    """Every entry of conf/device, by name of its file."""
    return [dict(OmegaConf.to_container(OmegaConf.load(path))) for path in sorted((CONF / "device").glob("*.yaml"))]  # type: ignore[arg-type]
