"""Real libraries for tests, installed into a folder of the test, without what they depend on: torch stays the one that is here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PATIENCE_S = 240.0


def install(folder: Path, *requirements: str) -> str | None:
    """Install these wheels and nothing else into a folder; None, or why that did not work."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=0", "--target", str(folder), *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"pip did not end within {PATIENCE_S:.0f} s"
    lines = (
        [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no word from pip"]
    )
    return f"pip cannot install {' '.join(requirements)}: {lines[-1]}" if done.returncode else None
