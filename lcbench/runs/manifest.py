"""The manifest of a sweep: its cells, those that cannot run with the reason, and how they are launched."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

from lcbench.grid.axes import CELL_GROUPS, value_of
from lcbench.grid.cell import Cell
from lcbench.grid.search import Search
from lcbench.grid.trace import Trace
from lcbench.grid.values import parse_direction, parse_dtype, parse_reduce_dtype
from lcbench.measure.blocks import blocks_of
from lcbench.runs.attempt import Numbers
from lcbench.runs.files import BROKEN, SCHEMA, check_names, check_schema


@dataclass(frozen=True)
class Entry:
    """A cell of a sweep as the manifest has it; ``skip`` says why it cannot run, if so. ``predicted``: it was asked for to be
    predicted only, so nobody measures it unasked.
    """

    cell: Cell
    skip: str | None = None
    predicted: bool = False


def new_manifest(name: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "sweep": name, "id": secrets.token_hex(8), "created_at": time.time(), "commands": [], "launch": None,
        "cells": {},
    }  # fmt: skip


def search_of(manifest: dict[str, Any]) -> Search | None:
    """The search for the longest length that a sweep was begun or gone on with, its cap that which it had; None: it was none."""
    return Search.from_note(manifest["search"]) if manifest.get("search") else None


def traces_of(manifest: dict[str, Any]) -> tuple[Trace, ...]:
    """The traces of a server whose batches are cells of a sweep, in the order in which they were asked for."""
    return tuple(Trace.from_note(note) for note in manifest.get("traces", ()))


def checked_manifest(data: dict[str, Any]) -> dict[str, Any]:
    check_schema(data)
    if not all(isinstance(entry["config"], dict) for entry in data["cells"].values()):
        raise ValueError("a cell without its config")
    if not isinstance(data["created_at"], Numbers) or not all(isinstance(w, str) for line in data["commands"] for w in line):
        raise TypeError("commands that are no words")
    launch = data["launch"]
    if launch is not None and not (isinstance(launch["launcher"], str) and isinstance(launch["settings"]["site"], dict)):
        raise TypeError("a launch without its site")
    if data.get("search") is not None:
        Search.from_note(data["search"])
    traces_of(data)
    keys = ("schema", "sweep", "id", "created_at", "commands", "launch", "cells")
    return {key: data[key] for key in keys} | {key: data[key] for key in ("search", "traces") if data.get(key)}


def entries_of(manifest: dict[str, Any]) -> dict[str, Entry]:
    """The cells of a manifest by id, in the order in which they were asked for; those that mean nothing here are left out."""
    strange = strange_cells(manifest)
    cells = manifest["cells"].items()
    return {
        cell_id: Entry(Cell.from_config(e["config"]), e.get("skip"), e.get("predicted") is True)
        for cell_id, e in cells if cell_id not in strange
    }  # fmt: skip


def strange_cells(manifest: dict[str, Any]) -> dict[str, str]:
    """Cells that cannot be read here, and why: another version's, or no cells at all."""
    found = {}
    for cell_id, entry in manifest["cells"].items():
        try:
            check_names(cell_id)
            _check_cell(Cell.from_config(entry["config"]))
            if not isinstance(entry.get("skip"), str | None):
                raise TypeError(f"skip is {entry['skip']!r}")
        except BROKEN as error:
            found[cell_id] = f"no cell of this version: {type(error).__name__}: {error}"
    return found


@cache
def _check_cell(cell: Cell) -> None:
    config, problem = cell.config, cell.problem
    if not all(isinstance(value_of(config, group), str) for group in CELL_GROUPS):
        raise TypeError("a name that is none")
    if not all(isinstance(config[key], int) for key in ("seqlen", "seed")):
        raise TypeError("a length or a seed that is no whole number")
    parse_dtype(problem.dtype), parse_direction(problem.direction), parse_reduce_dtype(problem.reduce_dtype)
    draws, blocks = int(config["mask"].get("samples", 1)), blocks_of(config["measure"])
    if not cell.label or not draws or not blocks:
        raise ValueError("nothing to measure")
