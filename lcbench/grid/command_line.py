"""From the words of a command line to a plan: its flags and overrides, and Hydra's loader of conf/ and of the user's folder."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from lcbench.grid import own
from lcbench.grid.axes import AXES
from lcbench.grid.compose import CONFIG
from lcbench.grid.expand import Plan, expand
from lcbench.grid.paths import CONF
from lcbench.measure.gpus import gpus_here

RANKS_ON_CPUS = 2
# Flags of Hydra's that would have it run something else than the plan, and what to write instead.
OTHERS = {
    "config_name": "a config of your own is <folder>/experiment/<name>.yaml: write --config-dir <folder> +experiment=<name>",
    "config_path": "files of your own are beside lcbench's, not in their place: write --config-dir <folder>",
    "run": "a command runs its plan, a single cell as well as a grid; leave it out",
    "experimental_rerun": "python -m lcbench.rerun <cell> runs a cell again",
}


@cache
def scale_here() -> str:
    """This machine's GPUs as a scale; two ranks where there are none."""
    return f"1x{len(gpus_here() or ()) or RANKS_ON_CPUS}"


OmegaConf.register_new_resolver("scale_here", scale_here, replace=True)  # for site files


def look(arguments: Sequence[str]) -> Plan:
    """The plan of a command line that shows cells and runs none, composed outside of the Hydra application.

    Raises:
        ValueError: bad input, in one line; a search for lengths too.
    """
    flags = read_flags(arguments)
    return expand(flags.overrides, loader_of(flags.config_dir)).with_lengths()


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; python -m lcbench.sweep --help lists what there is")


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, and its ``overrides``.

    Raises:
        ValueError: an unknown flag, one that does nothing here, or a word that is neither flag nor override.
    """
    parser = _Flags(add_help=False, allow_abbrev=False)
    for names in (("--multirun", "-m"), ("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",), ("--run", "-r")):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for names in (("--package", "-p"), ("--config-name", "-cn"), ("--config-path", "-cp"), ("--experimental-rerun",)):
        parser.add_argument(*names)
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--fit", action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    flags, rest = parser.parse_known_intermixed_args(list(arguments))
    if rest:
        parser.error(f"{next((word for word in rest if word.startswith('-')), rest[0])!r} is no flag of this command")
    for name, word in OTHERS.items():
        if getattr(flags, name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: {word}")
    if (flags.resolve or flags.package) and not flags.cfg:
        raise ValueError(f"--{'resolve' if flags.resolve else 'package'} goes with --cfg job, which shows the config of a cell")
    if flags.cfg and flags.info:
        raise ValueError("--cfg and --info each show something; write one of them")
    if len(flags.config_dir) > 1:
        raise ValueError(f"--config-dir is given {len(flags.config_dir)} times; put the files into one folder")
    flags.config_dir = flags.config_dir[0] if flags.config_dir else None
    if len(flags.fit) + sum(word.startswith("fit=") for word in flags.overrides) > 1:
        raise ValueError("several fits are named, by --fit or fit=; a fit is one file")
    flags.overrides += [f"fit={file}" for file in flags.fit]
    for word in flags.overrides:
        if "=" not in word and not word.startswith("~"):
            raise ValueError(f"{word!r} is no override; write <axis>=<value>[,<value>...], the axes {', '.join(AXES)} and so on")
    return flags


class _ReadOnce(CachingConfigRepository):
    """Reads each file of conf/ once for a plan: Hydra's own cache ends with each config that it composes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadOnce:
        return self

    def load_config(self, config_path: str) -> ConfigResult | None:
        """What a file holds, for this composition alone: overrides are written into it."""
        found = super().load_config(config_path)
        return None if found is None else replace(found, config=copy.deepcopy(found.config))


def loader_of(folder: str | None) -> ConfigLoaderImpl:
    """Hydra's loader of conf/ and, before it, of the user's own folder.

    Raises:
        ValueError: no folder, or one whose config would stand in for lcbench's.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise ValueError(f"--config-dir {folder} is no folder")
        if (Path(folder) / f"{CONFIG}.yaml").exists():
            raise ValueError(
                f"--config-dir {folder} has a {CONFIG}.yaml, which would replace lcbench's own; make it experiment/<name>.yaml "
                "there, and write +experiment=<name>"
            )
    return _loader(None if folder is None else str(Path(folder).absolute()))


@cache
def _loader(folder: str | None) -> ConfigLoaderImpl:
    try:
        search_path = create_config_search_path(str(CONF))
    except Exception as error:  # Hydra imports all that lies in hydra_plugins, and so a launcher of the user's
        raise ValueError(f"a module in hydra_plugins cannot be imported: {own.where(error, ())}: {own.in_words(error)}") from error
    if folder is not None:
        search_path.prepend("command-line", f"file://{folder}")
    loader = ConfigLoaderImpl(search_path)
    loader.repository = _ReadOnce(loader.repository)  # type: ignore[assignment]
    return loader
