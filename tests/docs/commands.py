"""What README, docs and --help tell people to type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from omegaconf import OmegaConf

from tests.slurm.stage import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Every command with examples in its help: all but the sweep, whose help is Hydra's.
COMMANDS = sorted(p.stem for p in (ROOT / "lcbench" / "commands").glob("*.py") if "\nEXAMPLES = " in p.read_text())
LINE = re.compile(r"^\s*((?:\.venv/bin/)?python -m lcbench\.\S.*|make [a-z].*|eval .*)$")
INLINE = re.compile(r"`((?:python -m lcbench\.|make |eval )[^`]*)`")


def told() -> Iterator[tuple[str, str]]:
    """(where, command) of every command; comments behind them are taken off."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            found = LINE.match(line)
            for command in [found[1]] if found else INLINE.findall(line):
                yield page.name, without_comment(command)
    for name in COMMANDS:
        for line in import_module(f"lcbench.commands.{name}").EXAMPLES.strip().splitlines():
            yield f"{name} --help", line
    for line in OmegaConf.load(ROOT / "conf" / "config.yaml").hydra.help.footer.splitlines():
        if "python -m" in line and not line.startswith("Completion"):
            yield "sweep --help", line.strip()


def without_comment(command: str) -> str:
    return re.sub(r"\s+# .*", "", command).strip()


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(file or "bash", text) of a page's fenced blocks; a file is named in the line before its block."""
    text = page.read_text()
    for found in re.finditer(r"(?:^`([\w/.]+)`\n\n)?^```(\w+)\n(.*?)^```$", text, re.M | re.S):
        yield found[1] or found[2], found[3]
