"""Commands run as other users of this machine."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.stage import ROOT

# Users that Debian has; the last has no name.
ALICE, BOB, NOBODY = "games", "daemon", "12345"
needs_users = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare", "mount"))),
    reason="needs root, setpriv, unshare and mount",
)
# Python may lie in a home that only its owner may enter (pyenv does). In a mount namespace of its own such a home is covered, and
# what is needed of it put back.
ENTER = r"""
set -e
while [ "$1" != -- ]; do
    place=$(mktemp -d); mount --bind "$1" "$place"; places+=("$1" "$place"); shift
done
[ -z "$COVER" ] || mount -t tmpfs -o mode=755 none "$COVER"
for ((i = 0; i < ${#places[@]}; i += 2)); do
    mkdir -p "${places[i]}"; mount --bind "${places[i + 1]}" "${places[i]}"; umount -l "${places[i + 1]}"; rmdir "${places[i + 1]}"
done
shift
umask "$MASK"
exec setpriv --reuid="$WHO" --regid="$GROUP" "$GROUPS_OPTION" "$@"
"""


def run(who: str, script: str, *, here: Path, umask: str = "022", group: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script of bash as a user, in a folder, with ``python`` as ours; ``group``: one more group, whose member the user is."""
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix), ROOT, *(Path(p) for p in sys.path if "site-packages" in p)}
    closed = [top for path in needed for top in reversed(path.parents) if not top.stat().st_mode & stat.S_IXOTH]
    cover = min(closed, key=lambda p: len(p.parts), default=None)
    binds = [str(p) for p in sorted(needed) if cover and cover in p.parents]
    if cover is not None and here.is_relative_to(cover):
        pytest.skip(f"{here} lies below {cover}, which other users may not enter")
    own = subprocess.run(["id", "-g", who], capture_output=True, text=True).stdout.strip() or who
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8", "MASK": umask, "WHO": who, "GROUP": own, "COVER": str(cover or ""), "MPLCONFIGDIR": str(here),
        "GROUPS_OPTION": f"--groups={group}" if group else "--clear-groups", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["unshare", "--mount", "bash", "-c", ENTER, "enter", *binds, "--", "bash", "-c", f"cd {here} && {script}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done
