"""The command ``lcbench``: ``lcbench <command> ...`` does what ``python -m lcbench.<command> ...`` does."""

from __future__ import annotations

import ast
import runpy
import sys
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules

import lcbench

BAD_INPUT = 2
GUARD = 'if __name__ == "__main__":'


def commands() -> dict[str, Path]:
    """The file behind every ``python -m lcbench.<command>``, by the command's name. Imports none of them."""
    found = {}
    for root in map(Path, lcbench.__path__):
        for module in iter_modules([str(root)]):
            path = root / module.name / "__main__.py" if module.ispkg else root / f"{module.name}.py"
            if module.name != "__main__" and path.is_file() and (module.ispkg or GUARD in path.read_text()):
                found[module.name] = path
    return dict(sorted(found.items()))


def usage() -> str:
    """The commands, each with the first sentence of its docstring."""
    lines = [f"  {name:<9}{_summary(name, path)}" for name, path in commands().items()]
    return "\n".join(["usage: lcbench <command> ...", "", *lines, "", "lcbench <command> --help says more."])


def _summary(name: str, path: Path) -> str:
    """The first sentence of the module that does the work, which may be ``lcbench/commands/<name>.py``."""
    works = Path(__file__).parent / "commands" / f"{name}.py"
    said = " ".join((ast.get_docstring(ast.parse((works if works.is_file() else path).read_text())) or "").split())
    return said.partition(": ``")[0].partition(". ")[0].rstrip(".")


def main() -> None:
    """Run the command that the first argument names; exit code 2 where there is none of this name."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help", *_]:
            print(usage())
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
