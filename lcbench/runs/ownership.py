"""Whose sweep it is: what a results folder holds is data, and only its owner's word starts jobs without a question.

A sweep belongs to a person if its folder, its manifest, its packs and the folders of its jobs do. Where a piece is somebody
else's (a colleague's sweep, a pack put into a shared folder later), looking at it is fine, and acting on it needs a yes.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcbench.redact import redacted, redacted_uri, secrets_of
from lcbench.runs.squeue import LOCATING, site_variables
from lcbench.runs.store import Sweep
from lcbench.runs.users import user_name


def others(sweep: Sweep) -> list[str]:
    """Names of the other people who own pieces of a sweep; empty if all of it belongs to the person who calls."""
    uids = {uid for path in _pieces(sweep) if (uid := _owner(path)) is not None} - {os.geteuid()}
    if uids:  # a file system may show one's own files as somebody else's
        uids -= {_uid_of_new_files(sweep.folder)}
    return sorted(map(user_name, uids))


def mine(path: Path) -> bool:
    """Whether a file belongs to the person who calls."""
    owner = _owner(path)
    return owner in (os.geteuid(), None) or owner == _uid_of_new_files(path.parent)


def trusted_site(site: dict[str, Any], own: bool) -> dict[str, Any]:
    """The site that says where Slurm is: that of a sweep of one's own, else the caller's own of that name. What somebody else's
    files name is not where the caller's commands look: a slurm.conf loads plugins.
    """
    from lcbench.grid.site import site_of_caller

    return site if own else site_of_caller(str(site.get("name")))


def here_instead(site: dict[str, Any]) -> dict[str, Any]:
    """Somebody else's site whose jobs go to the caller's own Slurm."""
    own = site_variables(trusted_site(site, own=False))
    env = {k: v for k, v in site_variables(site).items() if k not in LOCATING}
    return {**site, "env": {**env, **{k: v for k, v in own.items() if k in LOCATING}}}


def only_shown(sweep: Sweep, people: list[str]) -> str:
    """Why a sweep is looked at and nothing else."""
    command = f"python -m lcbench.collect {shlex.quote(sweep.name)} --as-mine"
    return f"{whose(sweep, people)}: it is only shown; {command} goes on with it"


def whose(sweep: Sweep, people: list[str]) -> str:
    """Whose a sweep is that is not the caller's own."""
    return f"sweep {sweep.name} is, wholly or in part, of {', '.join(people)}"


def what_it_runs(launch: dict[str, Any] | None) -> str:
    """What acting on a sweep runs in the name of the person who acts, from what the sweep says of how it was launched."""
    settings = (launch or {}).get("settings")
    site = settings.get("site") if isinstance(settings, dict) else None
    keys = ("setup", "container", "env", "partition", "account", "qos", "sbatch", "srun_args", "collector")
    site = site if isinstance(site, dict) else {}
    named = {k: site[k] for k in keys if site.get(k)}
    uri = settings.get("tracking_uri") if isinstance(settings, dict) else None
    secret = secrets_of(site.get("env")).values()
    said = [f"site.{k}={redacted(json.dumps(v, default=str), secret)}" for k, v in named.items()]
    # JSON keeps control characters of strangers off the terminal.
    return ", ".join([*said, *([f"tracking_uri={json.dumps(redacted_uri(str(uri)))}"] if uri else [])]) or "nothing of its own"


def _pieces(sweep: Sweep) -> Iterator[Path]:
    yield sweep.folder
    yield sweep.manifest_path
    for name in ("packs", "jobs"):
        folder = sweep.folder / name
        yield folder
        for piece in folder.glob("*"):
            yield piece
            if name == "packs":
                yield piece / "pack.json"
                yield piece / "job.json"


def _owner(path: Path) -> int | None:
    """Its uid, of a link that of the link; None where there is no such file."""
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def _uid_of_new_files(folder: Path) -> int:
    """As whom the person who calls appears on a file system, where it can be tried."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return os.geteuid()
