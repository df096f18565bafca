"""Plan a grid of cells and run it: ``python -m lcbench.sweep -m cp=ring,ulysses seqlen=64k,1m``.

Overrides are Hydra's. They are looked at before Hydra starts, so that bad input is one clear line and exit code 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path

from lcbench.arguments import bad_input
from lcbench.grid.expand import GROUPS, Plan, expand, remember
from lcbench.grid.paths import CONF

COMPLETION = Path(__file__).parent / "completion.bash"
# With these Hydra explains itself and runs nothing.
EXPLAINS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def app(_: Any) -> None:
    raise AssertionError("cells run in jobs, not in the command")


def main(arguments: list[str]) -> None:
    if "install=bash" in arguments:
        print(COMPLETION.read_text(), end="")
        return
    site = os.environ.get("LCBENCH_SITE")
    if site and not any(a.startswith("site=") for a in arguments):
        arguments = [*arguments, f"site={site}"]
    if not any(a.split("=")[0] in EXPLAINS for a in arguments):
        with bad_input():
            plan = look(arguments)
        # Hydra gets the launcher and its own options; the grid is planned already. (It would try the options of swept values,
        # as in mask=a,b mask.draws=2, on the default value, and refuse them.)
        remember(plan)
        dirs = _config_dirs(arguments)
        arguments = [a for a in arguments if a.lstrip("+~").startswith(("-", "hydra")) or a in dirs]
        if not any(a.startswith("hydra/launcher=") for a in arguments):
            arguments = [*arguments, f"hydra/launcher={plan.site['launcher']}"]
    sys.argv = [sys.argv[0], *arguments]
    app()


def look(arguments: list[str]) -> Plan:
    """The plan of a command line, composed outside of the Hydra application."""
    overrides = [a for a in arguments if ("=" in a.lstrip("-") and not a.startswith("-")) or a.startswith("~")]
    folders = [Path(f).absolute() for f in _config_dirs(arguments)]
    stray = [a for a in arguments if not a.startswith(("-", "~")) and a not in overrides and a not in _config_dirs(arguments)]
    if stray:
        raise ValueError(f"{stray[0]!r} is no override; write <axis>=<value>[,<value>...], the axes {', '.join(GROUPS)} and so on")
    search_path = create_config_search_path(str(CONF))
    for folder in folders:
        search_path.prepend("command-line", f"file://{folder}")
    return expand([o for o in overrides if not o.startswith("hydra/")], ConfigLoaderImpl(search_path))


def _config_dirs(arguments: list[str]) -> list[str]:
    """Values of --config-dir, in either of its spellings."""
    found = []
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = here.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(value or following)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
