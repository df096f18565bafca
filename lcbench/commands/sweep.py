"""Plan a grid of cells and run it: ``python -m lcbench.sweep -m cp=ring,ulysses seqlen=64k,1m``.

Overrides are Hydra's. They are looked at before Hydra starts, so that bad input is one clear line and exit code 2.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lcbench.commands.launchers import launcher_named
from lcbench.grid.command_line import loader_of, read_flags
from lcbench.grid.compose import CONFIG
from lcbench.grid.expand import expand, remember, single_lines
from lcbench.grid.overrides import key_of
from lcbench.grid.paths import CONF
from lcbench.report.ending import bad_input

COMPLETION = Path(__file__).parent / "completion.bash"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name=CONFIG)
def app(_: Any) -> None:
    raise AssertionError("cells run in jobs, not in the command")


def main(arguments: list[str]) -> int:
    if "install=bash" in arguments:
        print(COMPLETION.read_text(), end="")
        return 0
    if {"-sc", "--shell-completion"} & set(arguments):
        _enter(arguments)
        return 0
    with bad_input():
        flags = read_flags(arguments)
        lines = with_site(flags.overrides)
        dirs = [f"--config-dir={flags.config_dir}"] if flags.config_dir else []
        if flags.help or flags.hydra_help or flags.version:
            _explain(
                [*dirs, *(f"--{name.replace('_', '-')}" for name in ("help", "hydra_help", "version") if getattr(flags, name))]
            )
            return 0
        loader = loader_of(flags.config_dir)
        plan = expand(lines, loader)
        if flags.cfg or flags.info:
            words = [f"--{name}={value}" for name in ("cfg", "info", "package") if (value := getattr(flags, name))]
            _explain([*dirs, *words, *(["--resolve"] if flags.resolve else []), *single_lines(lines, loader)])
            return 0
        launcher_named(plan.launcher, [Path(flags.config_dir)] if flags.config_dir else [])  # Hydra's words are a traceback
    # Hydra gets the launcher; the grid is planned already. (It would try the options of swept values, as in mask=a,b
    # mask.samples=2, on the default value, and refuse them.)
    remember(plan)
    _enter([*dirs, f"hydra/launcher={plan.launcher}"])
    return 0


def with_site(overrides: list[str]) -> list[str]:
    """The overrides, and the site of the environment where they name none."""
    site = os.environ.get("LCBENCH_SITE")
    return [*overrides, f"site={site}"] if site and not any(key_of(line) == "site" for line in overrides) else overrides


def _explain(arguments: list[str]) -> None:
    """Have Hydra show what it knows.

    Raises:
        ValueError: it cannot, in its words.
    """
    words = StringIO()
    try:
        with redirect_stderr(words):
            _enter(arguments)
    except SystemExit as ended:
        if ended.code:
            said = " ".join(words.getvalue().split())
            raise ValueError(said.partition(" Set the environment variable HYDRA_FULL_ERROR")[0]) from ended
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _enter(arguments: list[str]) -> None:
    sys.argv = [sys.argv[0], *arguments]
    app()
