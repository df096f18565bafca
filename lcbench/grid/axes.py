"""Names that changed. One place reads what an earlier version stored, and one writes the text that a cell's id is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """A name of before and its name now: an axis, or an option of an axis value (``cp.order``).

    Attributes:
        targets: only values whose ``_target_`` begins so have the name; another's option of the same name is its own.
    """

    old: str
    new: str
    targets: str = ""


RENAMED = (
    Renamed("transit", "reduce_dtype"),
    Renamed("cp.order", "cp.layout", targets="lcbench.cp."),
    Renamed("mask.draws", "mask.samples"),
)


def with_present_names(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's config, of this version or an earlier one, with the names of this version."""
    for name in RENAMED:
        config = _moved(config, name.old, name.new, name.targets)
    return config


def with_first_names(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's config with the first name that each thing ever had: ids are made of these, so no renaming changes an id."""
    for name in RENAMED:
        config = _moved(config, name.new, name.old, name.targets)
    return config


def _moved(config: dict[str, Any], source: str, to: str, targets: str) -> dict[str, Any]:
    group, _, option = source.rpartition(".")
    if not group:
        return {to if key == source else key: value for key, value in config.items()}
    value = config.get(group)
    if not isinstance(value, dict) or option not in value or not str(value.get("_target_", "")).startswith(targets):
        return config
    return {**config, group: _moved(value, option, to.rpartition(".")[2], "")}


def renamed(key: str) -> str | None:
    """One line on a key as it was typed before; None for any other."""
    new = next((name.new for name in RENAMED if name.old == key), None)
    return new and f"{key} is called {new} now; write {new}=<value>"
