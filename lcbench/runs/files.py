"""JSON files that appear whole or not at all, and what becomes of those that cannot be read.

A file is written under a temporary name, synced and renamed. One that cannot be read all the same (a full disk, a broken file
system, an editor) is renamed to ``<name>.corrupt``. One that may not be read, or that a later lcbench wrote, stays as it is.

Files have the mode that the umask gives, so that a folder can be shared; what only its owner may read is written with ``private``.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lcbench.runs.users import owner_of, user_name

SCHEMA = 1
CORRUPT = ".corrupt"
# What reading something that is no such file may raise.
BROKEN = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)
T = TypeVar("T")


class Unreadable(ValueError):
    """A file of the store that cannot be used and stays as it is: it may not be read, or another version of lcbench wrote it."""


@dataclass(frozen=True)
class Damaged:
    """A file that was set aside because it could not be read, or one that is left out and stays as it is."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{'set aside' if self.path.name.endswith(CORRUPT) else 'left out'}: {self.path}: {self.reason}"


def _text(data: Any, margin: str = "\n") -> str:
    """JSON with a line for each member, but for lists of plain values: a record has thousands of times, which no one reads by line,
    and Python's own encoder writes lines far more slowly than a text without them."""
    within = f"{margin} "
    if isinstance(data, dict) and data:
        keys = (key if isinstance(key, str) else json.dumps(key) for key in data)
        members = (f"{within}{json.dumps(key)}: {_text(value, within)}" for key, value in zip(keys, data.values(), strict=True))
        return f"{{{','.join(members)}{margin}}}"
    if isinstance(data, (list, tuple)) and any(isinstance(one, (dict, list, tuple)) for one in data):
        return f"[{','.join(f'{within}{_text(one, within)}' for one in data)}{margin}]"
    return json.dumps(data)


def write_json(path: Path, data: Any, *, new: bool = False, private: bool = False) -> None:
    """Write atomically: the file holds the old content or the new one, whole, whatever dies when.

    ``private``: for its owner only, whatever the umask says.

    Raises:
        FileExistsError: with ``new``, if it is there; of several who try at once one succeeds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(_text(data))
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(temporary, path)
            os.unlink(temporary)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: Path) -> Any:
    """Raises:
    OSError: it is not there, or may not be read.
    ValueError: it is no JSON, or no file: one would wait for a pipe for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no file")
    with os.fdopen(descriptor, encoding="utf-8") as file:
        try:
            return json.load(file)
        except RecursionError as error:
            raise ValueError("it is nested without end") from error


def read_or_set_aside(path: Path, make: Callable[[Any], T]) -> T | None:
    """What a file holds; None where there is none, where it cannot be read, and then it is renamed, or where it may not be read
    or is of a later version, and then it stays.
    """
    try:
        return read_or_raise(path, make)
    except Unreadable:
        return None


def read_or_raise(path: Path, make: Callable[[Any], T]) -> T | None:
    """Raises:
    Unreadable: it may not be read, or is of a later version.
    """
    try:
        return make(read_json(path))
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise Unreadable(f"{path}: {_denied(path)}") from error
    except Unreadable as error:
        raise Unreadable(f"{path}: {error}") from error
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ELOOP:
            raise
        with suppress(OSError):  # somebody else's file, or somebody was faster
            path.rename(path.with_name(path.name + CORRUPT))
        return None


def why_unreadable(path: Path) -> str:
    """Why a file that was set aside, or left out, cannot be read."""
    try:
        check_schema(read_json(path))
    except PermissionError:
        return _denied(path)
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return "its content is not what such a file holds"


def _denied(path: Path) -> str:
    try:
        mode = f", mode {stat.S_IMODE(path.stat().st_mode):o}"
    except OSError:
        mode = ""
    return f"it belongs to {owner_of(path)}{mode}, and {user_name()} may not read it"


def check_schema(data: dict[str, Any]) -> None:
    if isinstance(number := data.get("schema"), int) and number > SCHEMA:
        raise Unreadable(f"a later lcbench wrote it (schema {number}; this one reads {SCHEMA})")


def check_names(*names: str) -> None:
    """That these are names of files and no paths to elsewhere."""
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\0"):
            raise ValueError(f"{name!r} is no name")


def names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        return []
