"""TAB in a real bash: names of files are words, whatever is in them, and nothing of them is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcbench.__main__ import commands
from lcbench.commands.sweep import COMPLETION

NAMES = (
    "plain.json", "a b.json", "$(touch PWNED).json", "`touch PWNED`.json", ";touch PWNED;.json", "&touch PWNED.json", "st*r.json",
    "q'uote.json", 'd"ouble.json', "[x].json", "{a,b}.json", "umlaut-\u00e4.json", "back\\slash.json", "!history.json",
)  # fmt: skip
UNSEEN = ("line\n$(touch PWNED).json", "esc\x1b[2J.json")
SCRIPT = r"""
source "$1"; shift
source "$COMPLETION"  # twice: it must not call itself
for word in "$@"; do
    COMP_WORDS=(python -m lcbench.sweep "$word") COMP_CWORD=3 COMP_LINE="python -m lcbench.sweep $word"
    _lcbench_sweep python
    printf '%s\0' "${#COMPREPLY[@]}"
    for found in "${COMPREPLY[@]}"; do printf '%s\0' "$found"; done
done
COMP_WORDS=(python other.py) COMP_CWORD=1 COMP_LINE="python other.py"
_lcbench_sweep python && printf 'done\0'
"""


def test_names_of_files_are_words_and_run_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    (folder / "sub dir").mkdir(parents=True)
    for name in (*NAMES, *UNSEEN):
        (folder / name).touch()
    # What was typed, quoted in the ways that people quote, and how many names it can become.
    typed = {
        "mask.file=./": len(NAMES) + 1, "mask.file=./a\\ ": 1, "mask.file=./$": 1, "mask.file=./'$(touch'": 1, "mask.file=./\\`": 1,
        "mask.file=./st*": 1, "mask.file=./plain.json,./s": 2, 'mask.file="./a': 0, "mask.file='./": 0, "mask.file=./nothing": 0,
        f"mask.file={folder}/": len(NAMES) + 1, "mask.file=~/": len(NAMES) + 1,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "--norc", "-c", SCRIPT, "bash", str(COMPLETION), *typed], cwd=folder, capture_output=True, text=True,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "COMPLETION": str(COMPLETION)},
    )  # fmt: skip
    assert not done.stderr
    said = iter(done.stdout.split("\0"))
    for word, count in typed.items():
        assert int(next(said)) == count, word
        offered = [next(said) for _ in range(count)]
        # As the shell will read them: each is one word, that names the file.
        read = subprocess.run(["bash", "-c", f"printf '%s\\0' {' '.join(offered)}"], cwd=folder, capture_output=True, text=True)
        words = read.stdout.split("\0")[:count]
        key = "mask.file=./plain.json," if "," in word else "mask.file="
        assert all(w.startswith(key) and (folder / w.removeprefix(key)).exists() for w in words), (offered, words)
    assert not list(tmp_path.rglob("PWNED"))


TYPED = r"""
source "$COMPLETION"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMPREPLY=()
_lcbench_sweep "$1"
printf '%s\n' "${COMPREPLY[@]}"
"""


def offered(folder: Path, *words: str) -> list[str]:
    """What TAB offers behind these words, where ``lcbench`` is installed."""
    script = folder / "lcbench"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lcbench "$@"\n')
    script.chmod(0o755)
    done = subprocess.run(
        ["bash", "--norc", "-c", TYPED, "bash", *words], capture_output=True, text=True,
        env={**os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", "COMPLETION": str(COMPLETION)},
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("command", [["lcbench", "sweep"], ["python", "-m", "lcbench.sweep"]])
@pytest.mark.slow
def test_axes_are_completed_after_either_name_of_the_command(command: list[str], tmp_path: Path) -> None:
    assert offered(tmp_path, *command, "mask=causal_d") == ["mask=causal_document"]
    assert {"cp=ring", "cp=ring_flash_attn_zigzag"} <= set(offered(tmp_path, *command, "mask=full", "cp=r"))
    assert offered(tmp_path, *command, "mask=nothing_so") == []


def test_commands_are_completed_and_their_own_words_are_left_to_bash(tmp_path: Path) -> None:
    assert set(offered(tmp_path, "lcbench", "")) == set(commands())
    assert offered(tmp_path, str(tmp_path / "lcbench"), "sta") == ["status"]
    assert offered(tmp_path, "lcbench", "status", "mask=") == []
