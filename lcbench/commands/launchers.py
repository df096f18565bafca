"""How commands come to a launcher: by its file in conf/hydra/launcher, whose ``_target_`` is the class."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import OmegaConf

from lcbench.grid import own
from lcbench.grid.command_line import loader_of
from lcbench.grid.expand import launchers_of
from lcbench.grid.overrides import LAUNCHER
from lcbench.runs.launch import Launches

NEEDS = ("name", "queue", "submit", "launch_plan", "launch_cells")  # of what runs plans, unlike Hydra's own launchers


def launcher_named(name: str, folders: Sequence[Path] = ()) -> Launches:
    """The launcher of ``hydra/launcher/<name>.yaml`` in conf/ or in one of the user's own folders.

    Raises:
        ValueError: there is none of this name, or its file names no launcher; one line.
    """
    loaders = [loader_of(None), *(loader_of(str(folder)) for folder in folders)]
    known = {launcher: loader for loader in loaders for launcher in launchers_of(loader)}
    if name not in known:
        raise ValueError(
            f"there is no launcher {name!r}: there are {', '.join(sorted(known))}, and in a folder of yours with --config-dir"
        )
    found = known[name].repository.load_config(f"{LAUNCHER}/{name}")
    assert found is not None
    target, file = str(OmegaConf.select(found.config, "_target_")), f"{found.path.removeprefix('file://')}/{LAUNCHER}/{name}.yaml"
    try:
        import_module(target.rpartition(".")[0])
        launcher: Launches = instantiate(found.config)
    except Exception as error:
        raise ValueError(f"{file}: {target} is no launcher: {own.where(error, [target])}: {own.in_words(error)}") from error
    if lacks := [need for need in NEEDS if not hasattr(launcher, need)]:
        raise ValueError(f"{file}: {target} is no launcher: it has no {lacks[0]}")
    return launcher
