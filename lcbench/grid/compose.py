"""What Hydra makes of overrides: a whole config, or the value of one axis.

Hydra takes a fifth of a second for a whole config, most of it for its own settings and for the files of other axes. The value of an
axis can come from its own file, the site and an experiment only, so Hydra reads nothing else for it.
"""

from __future__ import annotations

import os
import pickle
import re
import time
from dataclasses import replace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from lcbench.grid import overrides
from lcbench.grid.axes import AXES, plain_axes
from lcbench.grid.overrides import RUN_OPTIONS
from lcbench.grid.paths import REPOSITORY
from lcbench.grid.run_options import OPTION_GROUPS

CONFIG = "config"
# What an axis may not look at: everything but the site. An axis is composed under site and experiment alone.
HIDDEN = tuple(key for key in (*AXES, *RUN_OPTIONS) if key != "site")

_STARTED = time.localtime()
# What was composed, pickled, by what it was asked, and with the variables of the environment that interpolations wanted.
_composed: dict[tuple[str | None, tuple[str, ...], ConfigLoaderImpl], list[tuple[dict[str, str | None], bytes]]] = {}
_asked: dict[str, str | None] = {}


class ReachesOut(ValueError):
    """An interpolation wants another axis."""


def _another_axis(axis: str) -> None:
    raise ReachesOut(axis)


def _hydra(key: str) -> None:
    raise ValueError(f"${{hydra:{key}}} has no value in a plan; write it out, or use ${{now:%Y-%m-%d}} or ${{oc.env:NAME}}")


def _environment(name: str, *default: Any) -> Any:
    _asked[name] = os.environ.get(name)
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
# For site files: paths that do not depend on where the command was typed.
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("another_axis", _another_axis, replace=True)
# What Hydra's own application knows: one time for all of a command.
OmegaConf.register_new_resolver("now", lambda pattern: time.strftime(pattern, _STARTED), replace=True)
OmegaConf.register_new_resolver("hydra", _hydra, replace=True)
# What the help text of the command lists.
OmegaConf.register_new_resolver("plain_axes", plain_axes, replace=True)
OmegaConf.register_new_resolver(
    "run_options", lambda: ", ".join(f"{o}.*" if o in OPTION_GROUPS else o for o in RUN_OPTIONS), replace=True
)


def compose(lines: list[str], loader: ConfigLoaderImpl) -> dict[str, Any]:
    """One whole config as Hydra composes it, as plain values; ``hydra`` holds the sweeper's parameters and the chosen files only.

    Raises:
        ValueError: what Hydra refuses, and an interpolation into an axis from outside of it.
    """
    plain: dict[str, Any] = _kept(None, lines, loader)
    plain["site"] = OmegaConf.create(plain["site"])
    return plain


def compose_axis(axis: str, lines: list[str], loader: ConfigLoaderImpl) -> tuple[Any, str | None]:
    """The value of one axis in the config that ``compose`` makes, and the file that it is chosen from, if it has files.

    Raises:
        ValueError: as ``compose`` does.
    """
    found: tuple[Any, str | None] = _kept(axis, lines, loader)
    return found


def _kept(axis: str | None, lines: list[str], loader: ConfigLoaderImpl) -> Any:
    """What is made of these lines, the value of an axis or the whole (None): plans ask for the same again and again."""
    kept = _composed.setdefault((axis, tuple(lines), loader), [])
    made = next((made for asked, made in kept if asked == {name: os.environ.get(name) for name in asked}), None)
    if made is None:
        _asked.clear()
        try:
            made = pickle.dumps(_whole(lines, loader) if axis is None else _axis(axis, lines, loader))
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(one_line(error)) from error
        kept.append((dict(_asked), made))
    return pickle.loads(made)


def _whole(lines: list[str], loader: ConfigLoaderImpl) -> dict[str, Any]:
    """Of ``compose``, whose site is plain as well."""
    config = loader.load_configuration(CONFIG, lines, run_mode=RunMode.RUN)
    assert isinstance(config, DictConfig)
    params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    choices = dict(config.hydra.runtime.choices)
    _open(config)
    del config["hydra"]
    plain: dict[str, Any] = {str(k): _plain_value(config, str(k), lines) for k in config}
    plain["hydra"] = {"params": params, "choices": choices}
    return plain


def _axis(axis: str, lines: list[str], loader: ConfigLoaderImpl) -> tuple[Any, str | None]:
    """Of ``compose_axis``: as Hydra loads a configuration, without Hydra's own."""
    repository = _About(loader.repository, axis)
    parsed = OverridesParser.create().parse_overrides(lines)
    defaults = create_defaults_list(repository, CONFIG, parsed, prepend_hydra=False, skip_missing=False)
    config = loader._compose_config_from_defaults_list(defaults.defaults, repository)
    OmegaConf.set_struct(config, True)
    loader._apply_overrides_to_config(defaults.config_overrides, config)
    _open(config)
    return _plain_value(config, axis, lines), defaults.overrides.known_choices.get(axis)


class _About(CachingConfigRepository):
    """Files of conf/ for the value of one axis: no other file is chosen but the site's and what is asked for by name."""

    def __init__(self, repository: Any, axis: str) -> None:
        super().__init__(repository)
        self.groups = {axis, "site"}

    def load_config(self, config_path: str) -> ConfigResult | None:
        """What a file holds, its defaults list without choices of other groups."""
        found = super().load_config(config_path)
        if found is None or found.defaults_list is None or config_path.partition("/")[0] not in (CONFIG, "experiment"):
            return found
        mine = [d for d in found.defaults_list if not isinstance(d, GroupDefault) or self._is_mine(d)]
        return replace(found, defaults_list=mine)

    def _is_mine(self, default: GroupDefault) -> bool:
        assert default.group is not None
        group = default.group.removeprefix("/")
        return group in self.groups or group == "experiment"


def _open(config: DictConfig) -> None:
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)


def _plain_value(config: DictConfig, key: str, lines: list[str]) -> Any:
    """The resolved value of a top-level key."""
    node = config._get_node(key)
    if not _interpolates(node):
        return OmegaConf.to_container(node) if OmegaConf.is_config(node) else config[key]
    alone = OmegaConf.create({})
    hidden = {*(HIDDEN if key in AXES else AXES)} - {key}
    for other in {*map(str, config), *hidden}:  # a config in which every other axis refuses to be looked at
        alone[other] = f"${{another_axis:{other}}}" if other in hidden else config._get_node(other)
    try:
        value = alone[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ValueError(_unresolved(error, key, lines)) from error
    except RecursionError as error:
        raise ValueError(f"{key}: an interpolation that leads back to itself has no value") from error


def _interpolates(node: Any) -> bool:
    return "${" in str(OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value())


def _unresolved(error: BaseException, key: str, lines: list[str]) -> str:
    """One line on an interpolation that has no value: the override that it is in, and why."""
    where = next((line for line in reversed(lines) if overrides.key_of(line).split(".")[0] == key and "${" in line), key)
    said = one_line(error).partition(" full_key:")[0]
    if reached := re.fullmatch(rf"{ReachesOut.__name__} raised while resolving interpolation: (\w+)", said):
        return (
            f"{where}: {key} refers to {reached[1]} by an interpolation; no value depends on {reached[1]}, "
            f"so write the values of {key} out"
        )
    return f"{where}: {re.sub(r'^[A-Za-z]*Error raised while resolving interpolation: ', '', said)}"


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
