"""How commands come to a launcher: by its file in conf/hydra/launcher, whose ``_target_`` is the class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate

from lcbench.grid.command_line import loader_of
from lcbench.grid.expand import launchers_of
from lcbench.grid.overrides import LAUNCHER
from lcbench.runs.launch import Launches


def launcher_named(name: str, folders: Sequence[Path] = ()) -> Launches:
    """The launcher of ``hydra/launcher/<name>.yaml`` in conf/ or in one of the user's own folders.

    Raises:
        ValueError: there is none of this name; names those that exist.
    """
    loaders = [loader_of(None), *(loader_of(str(folder)) for folder in folders)]
    known = {launcher: loader for loader in loaders for launcher in launchers_of(loader)}
    if name not in known:
        raise ValueError(f"there is no launcher {name!r}; write --launcher {', '.join(sorted(known))}")
    found = known[name].repository.load_config(f"{LAUNCHER}/{name}")
    assert found is not None
    launcher: Launches = instantiate(found.config)
    return launcher
