"""Where lcbench's own files are: in a checkout, or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = (PACKAGE / "conf").is_dir()  # a wheel has conf/ inside of the package, a checkout beside it
# Below it are what commands make by default and what a site file writes as ${repository:}: the checkout, or, where lcbench is
# installed, the folder in which the command was typed. Nothing is written among installed packages.
REPOSITORY = Path.cwd() if INSTALLED else PACKAGE.parent
CONF = (PACKAGE if INSTALLED else REPOSITORY) / "conf"
