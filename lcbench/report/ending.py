"""How a command ends: its exit code, and one line on stderr that says why."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lcbench.redact import redacted
from lcbench.report.inert import printable
from lcbench.runs.files import Unreadable
from lcbench.runs.users import owner_of, user_name

OK, SOME_FAILED, INTERRUPTED = 0, 1, 130
BAD_INPUT = 2  # argparse's exit code too
REFUSED = 3  # by the file system, or by a scheduler


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command and exit with its code. A file that cannot be read or written is one line on stderr that names it, and Ctrl-C
    is one line too.
    """
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # as after ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, Unreadable) as error:
        say_error(error)
        code = REFUSED
    sys.exit(code)


def say_error(error: Exception) -> None:
    """One line on stderr."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror + (f": {error.filename}" if error.filename else "")
        if isinstance(error, PermissionError) and error.filename and (there := _nearest(Path(str(error.filename)))):
            said += f" ({there} belongs to {owner_of(there)}, and this is {user_name()})"
    print(f"error: {printable(redacted(' '.join(said.split())))}", file=sys.stderr)


def _nearest(path: Path) -> Path | None:
    """A file, or the folder where it would be."""
    return next((p for p in (path, path.parent) if os.path.lexists(p)), None)


@contextmanager
def bad_input() -> Iterator[None]:
    """Report a ValueError in here, which is about the command's input, in one line, and exit with code 2."""
    try:
        yield
    except Unreadable as error:
        say_error(error)
        sys.exit(REFUSED)
    except ValueError as error:
        say_error(error)
        sys.exit(BAD_INPUT)


@contextmanager
def left_with(words: Callable[[], str]) -> Iterator[None]:
    """Around what follows or waits: Ctrl-C is the way to leave it. What goes on, and how to come back, is said on stderr, and the
    command ends with exit code 130.

    Args:
        words: asked only then.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{words()}", file=sys.stderr)
        sys.exit(INTERRUPTED)
