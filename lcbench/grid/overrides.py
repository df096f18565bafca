"""What was typed, read as it was meant or refused in one line: Hydra's overrides, before anything is composed.

Names and paths are taken as they were typed: Hydra would make ``sweep=1.10`` the number 1.1. Numbers that it would write in
another way (``1e3``, ``2024_01``) stay text, which ``values`` reads. What Hydra knows and lcbench has no use for is refused with
a word on where it belongs.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from antlr4 import CommonTokenStream, InputStream  # type: ignore[import-untyped]
from antlr4.error.ErrorListener import ErrorListener  # type: ignore[import-untyped]
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, RangeSweep, Sweep
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from lcbench.grid.axes import AXES, GROUPS, RESERVED, renamed
from lcbench.grid.values import listed

RUN_OPTIONS = (
    "sweep", "site", "wait", "output", "force", "pack", "hang", "retry", "budget", "results", "tracking_uri", "mlflow_experiment",
    "experiment", "machine", "fit", "search", "trace",
)  # fmt: skip
# Options whose value is text, and those that name a file of conf/.
TEXT = ("sweep", "results", "tracking_uri", "mlflow_experiment", "output", "fit")
FILES = (*GROUPS, "site", "experiment", "machine", "search", "hydra/launcher", "hydra/sweeper")
LAUNCHER = "hydra/launcher"
# Keys that have options of their own and are typed as one of these.
SHORT = {"trace": "trace.file"}
# Of Hydra's own options: where what they are for is said here. The longest beginning counts.
PLACES = {
    "hydra.launcher": "jobs are what site.<option> says (site.max_minutes, site.partition, site.sbatch.<option>), pack.<option>",
    "hydra.sweeper": "the grid is what the axes say, and params in an experiment's file",
    "hydra/sweeper": "lcbench has a sweeper of its own, which is chosen already",
    "hydra.mode": "a single cell goes the same way as a grid, with -m or without",
    "hydra.run": "where results go is said by results=<folder> and sweep=<name>",
    "hydra.sweep": "where results go is said by results=<folder> and sweep=<name>",
    "hydra.job": "jobs are named by their sweep (sweep=<name>), and their environment is site.env.<NAME>=<value>",
    "hydra": "lcbench runs its plan itself; results, sweep, output, site.*, pack.* and hang.* say how",
}
MOST_CELLS = 100_000
NO_OVERRIDE = "{!r} is no override; write <axis>=<value>[,<value>...], such as seqlen=64k"
PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Words that Hydra reads as something else than text.
READ_OTHERWISE = ("true", "false", "null", "inf", "nan")
NUMBER = re.compile(r"[+-]?[0-9._]*[0-9][0-9._]*([eE][+-]?[0-9_]+)?")


def read(lines: Iterable[str], loader: ConfigLoaderImpl) -> list[Override]:
    """Overrides, each with what it stands for as its ``input_line``.

    Raises:
        ValueError: a line that is no override; names it, the place in it and how to write it.
    """
    parser = OverridesParser.create(config_loader=loader)
    return [_read(parser, line) for line in lines]


def _read(parser: OverridesParser, line: str) -> Override:
    taken = _as_typed(_in_full(line))
    try:
        (override,) = parser.parse_overrides([taken])
    except (HydraException, ValueError, RecursionError) as error:
        raise ValueError(_unread(line, error)) from error
    return override


def key_of(line: str) -> str:
    """The key of an override's text, without what Hydra writes before it."""
    return line.partition("=")[0].lstrip("+~").strip()


def _in_full(line: str) -> str:
    """The override with the option that its key stands for."""
    key = key_of(line)
    return line.replace(key, SHORT[key], 1) if key in SHORT else line


def _as_typed(line: str) -> str:
    """The override with quotes around what Hydra would read as something else than what was typed."""
    left, equals, right = line.partition("=")
    key, value = key_of(line), right.strip()
    if not equals or not value or line.startswith("~"):
        return line
    if key in TEXT:
        if value == "null" or _quoted(value) or "," in value or value[0] in "[{":
            return line
        return f"{left}={_in_quotes(value)}"
    if key in FILES or key.endswith(".file"):
        if re.search(r"""['"\[\]{}()]""", value) and not _is_path(value):
            return line
        return f"{left}={','.join(_word(element.strip()) for element in value.split(','))}"
    simple = re.fullmatch(r"[^'\"\[\]{}()$]*", value)
    if simple:
        return f"{left}={','.join(_number(element.strip()) for element in value.split(','))}"
    return line


def _is_path(value: str) -> bool:
    """Whether a value with quotes or brackets in it is a path all the same, and no list, call or quoted text."""
    return "/" in value and not re.match(r"""\s*['"\[{]|\w+\s*\(""", value) and not re.search(r"""['"]""", value)


def _word(text: str) -> str:
    plain = (PLAIN_WORD.fullmatch(text) and text.lower() not in READ_OTHERWISE) or not text
    return text if plain else _in_quotes(text)


def _number(text: str) -> str:
    """A number that Hydra would not write as it was typed stays text."""
    if not NUMBER.fullmatch(text):
        return text
    for kind in (int, float):
        try:
            return text if str(kind(text)) == text else _in_quotes(text)
        except ValueError:
            continue
    return text


def _quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _in_quotes(text: str) -> str:
    return str(QuotedString(text, Quote.double).with_quotes())


class _Place(Exception):
    """Where reading an override ended."""

    def __init__(self, column: int) -> None:
        self.column = column


class _Listener(ErrorListener):  # type: ignore[misc]
    def syntaxError(self, recognizer: Any, symbol: Any, line: Any, column: int, msg: Any, e: Any) -> None:  # noqa: N802
        raise _Place(column)


def _unread(line: str, error: BaseException) -> str:
    """One line on an override that Hydra cannot read: which, where, and how to write it."""
    key, equals, value = line.partition("=")
    if not equals or not re.fullmatch(r"[+~]{0,2}[\w.@:/$-]+", key.strip()):
        return NO_OVERRIDE.format(line)
    lexer = OverrideLexer(InputStream(line))
    parser: Any = OverrideParser(CommonTokenStream(lexer))
    for reader in (lexer, parser):
        reader.removeErrorListeners()
        reader.addErrorListener(_Listener())
    try:
        parser.override()
    except _Place as place:
        at, found = place.column, line[place.column : place.column + 1]
        word = f"{found!r} at character {at + 1}" if found.strip() else "what comes to its end too early"
        return f"{line}: cannot read {word}; a value with such characters is quoted: {shlex.quote(f'{key}={_in_quotes(value)}')}"
    except RecursionError:
        return f"{line[:60]}...: brackets within brackets, too many to read"
    cause = " ".join(str(error).split()).partition(" See https://")[0]
    return f"{line}: {cause.removeprefix(f'Error parsing override {line!r} ')}"


# -- what is no override of ours ---------------------------------------------------------------------------------------


def check(overrides: list[Override], loader: ConfigLoaderImpl, launchers: Sequence[str]) -> None:
    """Refuse unknown keys, unknown members of a group, and what has no meaning here, before anything is composed.

    Raises:
        ValueError: one line that names the override and what may be written.
    """
    for override in overrides:
        line, root, key = text_of(override), root_of(override), override.key_or_group
        if not root:
            raise ValueError(NO_OVERRIDE.format(line))
        if root not in (*AXES, *RUN_OPTIONS, "hydra"):
            raise ValueError(unknown_key(root))
        if isinstance(values := override.value(), ChoiceSweep) and any(isinstance(v, Sweep) for v in values.list):
            raise ValueError(f"{line}: range() and glob() are a whole value of their own; list the values instead")
        if root == "hydra":
            _check_hydra(override, launchers)
            continue
        if override.package is not None:
            raise ValueError(f"{line}: an axis has one place in a cell; write {root}=... without @")
        if override.is_delete() and (root not in (*GROUPS, "site") or key == root):
            raise ValueError(f"{line} takes away what every sweep needs; set it to a value instead: {key}=<value>")
        named = [part for part in key.split(".")[1:] if part in RESERVED or re.fullmatch(r"_\w+_", part)]
        if root in GROUPS and named:
            raise ValueError(
                f"{line}: what a value of {root} is, its file says; write one of your own, <folder>/{root}/<name>.yaml, "
                f"and {root}=<name> --config-dir <folder>"
            )
        if root == "machine" and key != root:
            raise ValueError(f"{line}: what a machine is, its file in conf/machine says; write machine=<name>")
        if isinstance(values, RangeSweep):
            _check_range(override)
        if not override.is_delete() and key in FILES:
            _check_members(override, sorted(loader.get_group_options(key)))
        elif isinstance(values, Glob):
            raise ValueError(f"{line}: glob() chooses among the files of an axis, and {key} has none; list its values")


def _check_range(override: Override) -> None:
    """Refuse a range that never ends, or has more values than a sweep may have cells."""
    found: Any = override.value()
    start, stop, step = (float(x) if isinstance(x, int | float) else math.nan for x in (found.start, found.stop, found.step))
    if not step or not math.isfinite(start + stop + step):
        raise ValueError(
            f"{text_of(override)}: a range is range(<start>,<stop>[,<step>]), of finite numbers and steps other than 0"
        )
    if (stop - start) / step > MOST_CELLS:
        raise ValueError(f"{text_of(override)}: more than {MOST_CELLS} values, the most cells that a sweep may have")


def _check_hydra(override: Override, launchers: Sequence[str]) -> None:
    line, key = text_of(override), override.key_or_group
    if key.startswith("hydra.sweeper.params.") and not override.is_delete():
        return
    if key == "hydra.mode" and str(override.value()) == "MULTIRUN":
        return
    if key == "hydra/sweeper" and override.value() == "lcbench":
        return
    if key == LAUNCHER and not override.is_delete():
        _check_members(override, launchers)
        return
    place = max((p for p in PLACES if re.match(rf"{re.escape(p)}(\W|$)", key)), key=len)
    raise ValueError(f"{line}: this option of Hydra does nothing here; {PLACES[place]}")


def _check_members(override: Override, options: Sequence[str]) -> None:
    for line in lines_of(override):
        value = line.partition("=")[2].strip("'\"")
        if value not in options:
            raise ValueError(f"{override.key_or_group}={value} is not one of {listed(value, options)}")


def unknown_key(key: str) -> str:
    """One line on a key that is neither axis nor option."""
    if before := renamed(key):
        return before
    known = (*AXES, *RUN_OPTIONS)
    return f"unknown axis {key!r}; axes: {', '.join(AXES)}; run options: {listed(key, RUN_OPTIONS, known)}"


# -- what an override holds ----------------------------------------------------------------------------------------------


def lines_of(override: Override) -> list[str]:
    """The single-valued overrides that a swept one stands for."""
    if not override.is_sweep_override():
        return [text_of(override)]
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line}: an interval has no values to run; list them, or use range()")
    return list(_each(override))


def _each(override: Override) -> Iterator[str]:
    for value in override.sweep_string_iterator():
        text = re.sub(r"\\(.)", r"\1", value) if value.startswith("$\\{") else value  # Hydra would take ${...} for text here
        yield f"{override.get_key_element()}={text}"


def text_of(override: Override) -> str:
    """The override as it is composed."""
    assert override.input_line is not None
    return override.input_line


def root_of(override: Override) -> str:
    """The top-level key that an override touches."""
    return override.key_or_group.split(".")[0].split("/")[0]
