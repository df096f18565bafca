"""The command ``lcbench``: ``lcbench <command> ...`` does what ``python -m lcbench.<command> ...`` does."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

BAD_INPUT = 2


def commands() -> dict[str, Path]:
    """The file that does the work of every ``python -m lcbench.<command>``, by the command's name. Imports none of them."""
    files = sorted((Path(__file__).parent / "commands").glob("*.py"))
    return {path.stem: path for path in files if "\ndef main(" in path.read_text()}


def usage() -> str:
    """The commands, each with the first sentence of its docstring."""
    lines = [f"  {name:<9}{_summary(path)}" for name, path in commands().items()]
    return "\n".join(["usage: lcbench <command> ...", "", *lines, "", "lcbench <command> --help says more."])


def _summary(path: Path) -> str:
    said = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return said.partition(": ``")[0].partition(". ")[0].rstrip(".")


def main() -> None:
    """Run the command that the first argument names; exit code 2 where there is none of this name."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help", *_]:
            try:
                print(usage(), flush=True)
            except BrokenPipeError:  # as after ``| head``
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        case ["--version", *_]:
            print(f"lcbench {version('lcbench')}")
        case [name, *_] if name in commands():
            del sys.argv[1]
            runpy.run_module(f"lcbench.{name}", run_name="__main__", alter_sys=True)
        case [name, *_]:
            near = get_close_matches(name, commands(), n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            print(f"error: {name!r} is no command of lcbench; {meant}there are {', '.join(commands())}", file=sys.stderr)
            sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
