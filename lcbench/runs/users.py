"""Names of the users of this machine."""

from __future__ import annotations

import getpass
import os
import pwd
from contextlib import suppress
from pathlib import Path


def user_name(uid: int | None = None) -> str:
    """A user's name, by default that of whoever runs this; the uid where no list of users has the name."""
    if uid is None:
        with suppress(KeyError, OSError):
            return getpass.getuser()
        uid = os.geteuid()
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def owner_of(path: Path) -> str:
    """Whose a file is."""
    try:
        return user_name(path.stat().st_uid)
    except OSError:
        return "somebody else"
