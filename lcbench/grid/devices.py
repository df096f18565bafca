"""The devices that conf/device describes: peaks, memory, links, and the whole names (``names``) by which one is known."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import OmegaConf

from lcbench.grid.paths import CONF


@cache
def known_devices() -> list[dict[str, Any]]:
    """Every entry of conf/device, by name of its file."""
    return [dict(OmegaConf.to_container(OmegaConf.load(path))) for path in sorted((CONF / "device").glob("*.yaml"))]  # type: ignore[arg-type]
