"""What the commands share: their arguments, and which sweep or cell is meant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from lcbench.redact import redacted
from lcbench.report.ending import BAD_INPUT
from lcbench.report.inert import printable
from lcbench.runs.files import Unreadable
from lcbench.runs.manifest import Entry
from lcbench.runs.ownership import others, what_it_runs, whose
from lcbench.runs.store import Sweep, sweeps
from lcbench.runs.users import owner_of, user_name

LAST = "last"  # the newest sweep
MANY = 12  # sweeps that an error names


class CommandParser(argparse.ArgumentParser):
    """Takes options before, between and behind other words; what it does not take is one line, and exit code 2."""

    def parse_args(  # type: ignore[override]  # without the overloads for a namespace of one's own
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        if self.usage is None:  # argparse, before Python 3.13, keeps it meanwhile, and stumbles over a "%" in it
            self.usage = self.format_usage().removeprefix("usage: ").replace("%", "%%")
        words = sys.argv[1:] if args is None else args
        # Of two passes the second no longer knows what stood behind "--".
        parse = self.parse_known_args if "--" in words else self.parse_known_intermixed_args
        options, rest = parse(words, namespace)
        if rest:
            word = next((word for word in rest if word.startswith("-")), rest[0])
            self.error(f"{word!r} is no argument of this command{self._meant(word)}")
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"error: {printable(redacted(message))}; {self.prog} --help says more\n")

    def _meant(self, word: str) -> str:
        """What somebody meant who wrote an option as an override, or misspelt it."""
        name, sign, value = word.lstrip("-").partition("=")
        near = get_close_matches(f"--{name}", self._option_string_actions, n=1, cutoff=0.75)
        return f" (did you mean {near[0]}{f' {value}' if sign else ''}?)" if near else ""


def command_parser(name: str, description: str | None, examples: str) -> CommandParser:
    """The parser of ``python -m lcbench.<name>``; its help ends with examples, one per line."""
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    return CommandParser(
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


def add_plan_arguments(parser: argparse.ArgumentParser, overrides: str, *, folder: str = "") -> None:
    """The arguments of commands that look at a plan; ``overrides`` and ``folder`` say more in the help."""
    parser.add_argument("overrides", nargs="*", help=f"as for a sweep: {overrides}")
    said = f"files of your own beside those of conf/, as for a sweep{folder}"
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="FOLDER", help=said)


def plan_words(options: argparse.Namespace) -> list[str]:
    """What ``add_plan_arguments`` took, as the words of a sweep."""
    return [*options.overrides, *(f"--config-dir={folder}" for folder in options.config_dir)]


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that submit what is left of a sweep, by its own launcher, which may be outside of conf/."""
    add_as_mine_argument(parser)
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], metavar="FOLDER",
        help="files of your own beside those of conf/, which name the launcher of the sweep",
    )  # fmt: skip


def add_as_mine_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as-mine", action="store_true", help="act on a sweep of somebody else, in your name; without it you are asked"
    )


def agree_to_act(sweep: Sweep, doing: str, *, as_mine: bool) -> bool:
    """Whether the sweep is somebody else's; then only after a yes to ``doing``, which is told what it runs in the caller's name.

    Raises:
        ValueError: there is no yes.
    """
    people = others(sweep)
    if not people:
        return False
    runs = f"{whose(sweep, people)}; {doing}, in your name, with what it says: {what_it_runs(sweep.manifest()['launch'])}"
    if as_mine:
        print(runs, file=sys.stderr)
    elif not sys.stdin.isatty():
        raise ValueError(f"{runs}; if you want that, add --as-mine")
    elif not _says_yes(f"{runs}\nDo that? [y/N] "):
        raise ValueError("nothing was done")
    return True


def _says_yes(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


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
    if name == LAST and names:
        name = names[-1]
    if name not in names:
        folder = root / name
        if "/" not in name and folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(f"{folder} belongs to {owner_of(folder)}, and {user_name()} may not read it")
        raise ValueError(f"no sweep {name!r} below {root}; {_there_are(name, names)}")
    return Sweep(root, name)


def _there_are(name: str, names: Sequence[str]) -> str:
    """The newest sweeps, and which of all was meant if that can be guessed."""
    close = get_close_matches(name, [LAST, *reversed(names)], n=1) if names else []
    meant = f"did you mean {close[0]}? " if close else ""
    shown = [*(["..."] if len(names) > MANY else []), *names[-MANY:]]
    return f"{meant}there are: {', '.join(shown) or 'none'}"


def chosen_cell(root: Path, cell: str | None) -> tuple[Sweep, str]:
    """The sweep and the id of a cell named by the beginning of its id, or as ``<sweep>/<cell id>``.

    Raises:
        ValueError: there is none, or more than one; names them.
    """
    if not cell:
        raise ValueError("which cell? write its id; python -m lcbench.status <sweep> lists them")
    name, _, cell_id = cell.rpartition("/")
    found = list(find_cell(root, cell_id, find_sweep(root, name) if name else None))
    ids = sorted({entry.cell.id for _, entry in found})
    if not found:
        raise ValueError(f"no cell {cell!r} below {root}; python -m lcbench.status <sweep> lists them")
    if len(ids) > 1:
        raise ValueError(f"cell {cell!r} is ambiguous: {', '.join(ids)}")
    if len(found) > 1:
        raise ValueError(f"several sweeps hold cell {ids[0]}; write one of {', '.join(f'{s.name}/{ids[0]}' for s, _ in found)}")
    return found[0][0], ids[0]


def chosen_either(root: Path, what: str) -> tuple[Sweep, str]:
    """The sweep of that name, with no cell, or else the sweep and the id of a cell.

    Raises:
        ValueError: there is neither; names the sweeps that there are.
    """
    names = sweeps(root)
    if what == LAST or what in names:
        return find_sweep(root, what), ""
    try:
        return chosen_cell(root, what)
    except Unreadable:
        raise
    except ValueError as error:
        raise ValueError(f"{error}; nor is there such a sweep: {_there_are(what, names)}") from error


def find_cell(root: Path, cell_id: str, sweep: Sweep | None = None) -> Iterator[tuple[Sweep, Entry]]:
    """Every sweep, or this one, that holds a cell whose id starts so; one that cannot be read is left out, by name."""
    for candidate in [sweep] if sweep else (Sweep(root, name) for name in sweeps(root)):
        try:
            entries = candidate.entries()
        except Unreadable as error:
            if sweep:
                raise
            print(f"left out: {printable(error)}", file=sys.stderr)
            continue
        yield from ((candidate, entry) for known, entry in entries.items() if known.startswith(cell_id))
