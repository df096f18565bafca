"""Real libraries for tests, unpacked into a folder of the test, without what they depend on: torch stays the one that is here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

PATIENCE_S = 240.0


def install(folder: Path, *requirements: str, python: str | None = None) -> str | None:
    """Unpack these wheels and no others into a folder, for ``site.addsitedir``; None, or why that did not work.

    pip's own ``--target`` loses files of distributions that share a package. ``python``: take the wheels of this version, 3.12,
    whose Python files are read; what is compiled in them does not load in another.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=0", "--dest", str(folder), *requirements]
    command += ["--python-version", python] if python else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"pip did not end within {PATIENCE_S:.0f} s"
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word from pip"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        return f"pip cannot download {' '.join(requirements)}: {errors[-1]}"
    for wheel in folder.glob("*.whl"):
        with ZipFile(wheel) as files:
            files.extractall(folder)
        wheel.unlink()
    return None
