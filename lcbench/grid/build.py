"""From a cell's config to its objects. The YAML of an axis value names its class or function in ``_target_``."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, cast

from hydra.utils import get_object

from lcbench.cp.base import Strategy
from lcbench.grid.values import parse_tokens
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask

RESERVED = ("name", "_target_")


class Checked(dict[str, Any]):
    """The config of an axis value that ``check_options`` has passed: a grid checks each value once, not once per cell."""


def build_kernel(config: dict[str, Any]) -> Kernel:
    return cast(Kernel, get_object(config["_target_"])(**_options(config)))


def build_strategy(config: dict[str, Any]) -> Strategy:
    return cast(Strategy, get_object(config["_target_"])(**_options(config)))


def build_mask(config: dict[str, Any], seqlen: int, seed: int) -> BandMask:
    """The mask at a length; ``seed`` reaches the masks that draw something."""
    function = get_object(config["_target_"])
    seeded = {"seed": seed} if "seed" in inspect.signature(function).parameters else {}
    return cast(BandMask, function(seqlen, **seeded, **_options(config)))


def check_options(group: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of an axis value with its options checked against what ``_target_`` takes; token counts become integers.

    Raises:
        ValueError: an option that is missing, not set, not a token count where one is wanted, or refused by its owner.
    """
    if isinstance(config, Checked):
        return dict(config)
    name = config.get("name", "?")
    if "_target_" not in config or "name" not in config:
        raise ValueError(f"conf/{group}/{name}.yaml must set name and _target_")
    checked = dict(config)
    for option, (annotation, required) in _parameters(config["_target_"]).items():
        if option in ("seqlen", "seed") and group == "mask":
            continue
        value = config.get(option)
        if value is None or value == "???":
            if required:
                example = "4k" if "int" in annotation else "a value"
                raise ValueError(f"{group}={name} needs {group}.{option}, which is not set; for example {group}.{option}={example}")
            continue
        if group == "mask" and "list[int]" in annotation:
            items = value if isinstance(value, list) else [value]
            checked[option] = [parse_tokens(item, f"{group}.{option}") for item in items]
        elif group == "mask" and "int" in annotation:
            checked[option] = 0 if value == 0 else parse_tokens(value, f"{group}.{option}")
    if group != "mask":
        get_object(config["_target_"])(**_options(checked))  # its own checks
    return checked


@cache
def _parameters(target: str) -> dict[str, tuple[str, bool]]:
    """Options of a target: annotation as text, and whether it has no default."""
    parameters = inspect.signature(get_object(target)).parameters.values()
    return {p.name: (str(p.annotation), p.default is inspect.Parameter.empty) for p in parameters}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in RESERVED}
