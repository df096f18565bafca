"""What the commands share: how they are asked, and which sweep or cell is meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcbench.redact import redacted
from lcbench.runs.store import Sweep, find_cell, sweeps

BAD_INPUT = 2  # argparse's exit code too


@contextmanager
def bad_input() -> Iterator[None]:
    """A ValueError in here is about what the command was asked: one line says it, and the command ends with exit code 2."""
    try:
        yield
    except ValueError as error:
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def command_parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """The parser of ``python -m lcbench.<name>``; its help ends with examples, one per line."""
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    return argparse.ArgumentParser(
        prog=f"python -m lcbench.{name}", description=description, epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_sweep_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The arguments of every command about one sweep."""
    where = "name of the sweep, or 'last'" + ("; without it: the sweeps there are" if optional else "")
    parser.add_argument("sweep", nargs="?" if optional else None, help=where)
    add_results_argument(parser)


def add_results_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: results)")


def chosen_sweep(options: argparse.Namespace) -> Sweep:
    """The sweep that a command names.

    Raises:
        ValueError: there is none; names those that exist.
    """
    return find_sweep(options.results.absolute(), options.sweep)


def find_sweep(root: Path, name: str) -> Sweep:
    """The sweep of that name; ``last`` is the newest.

    Raises:
        ValueError: there is none; names those that exist.
    """
    names = sweeps(root)
    if name == "last" and names:
        name = names[-1]
    if name not in names:
        raise ValueError(f"no sweep {name!r} below {root}; there are: {', '.join(names) or 'none'}")
    return Sweep(root, name)


def chosen_cell(root: Path, cell: str | None) -> tuple[Sweep, str]:
    """The sweep and the id of a cell named by the beginning of its id, or as ``<sweep>/<cell id>``.

    Raises:
        ValueError: there is none, or more than one; names them.
    """
    if not cell:
        raise ValueError("which cell? write its id; python -m lcbench.status <sweep> lists them")
    name, _, cell_id = cell.rpartition("/")
    found = list(find_cell(root, cell_id, find_sweep(root, name).name if name else None))
    ids = sorted({entry.cell.id for _, entry in found})
    if not found:
        raise ValueError(f"no cell {cell!r} below {root}; python -m lcbench.status <sweep> lists them")
    if len(ids) > 1:
        raise ValueError(f"cell {cell!r} is ambiguous: {', '.join(ids)}")
    if len(found) > 1:
        raise ValueError(f"several sweeps hold cell {ids[0]}; write one of {', '.join(f'{s.name}/{ids[0]}' for s, _ in found)}")
    return found[0][0], ids[0]
