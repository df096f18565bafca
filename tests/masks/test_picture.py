"""A mask drawn with characters: blank exactly where no pair counts, at any length and in any encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lcbench.commands.masks import main
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.picture import ASCII, BLOCKS, LETTERS, drawn, shades
from lcbench.masks.sliding_window import sliding_window
from lcbench.problem import Heads
from lcbench.testing.masks import every_mask, small

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", every_mask())
@pytest.mark.parametrize("seqlen", [13, 1000])
def test_a_character_is_blank_only_where_no_pair_counts(name: str, seqlen: int, tmp_path: Path) -> None:
    mask = small(name, seqlen, Heads(2, 2, 8), tmp_path)
    pixels = shades(mask, LETTERS)
    for ascii_only, (ramp, (upper, lower)) in ((False, BLOCKS), (True, ASCII)):
        lines = drawn(mask, ascii_only=ascii_only)
        assert len(lines) == -(-len(pixels) // 2)
        assert {len(line) for line in lines} == {pixels.shape[1]}
        assert set("".join(lines)) <= {" ", *ramp, upper, lower}
        for number, line in enumerate(lines):
            pair = pixels[2 * number : 2 * number + 2]
            assert [letter != " " for letter in line] == (pair.sum(0) > 0).tolist()
            for letter, column in zip(line, pair.T, strict=True):
                if letter == upper:
                    assert column[0] > 0
                    assert not column[1:].any()
                if letter == lower:
                    assert column[0] == 0
                    assert column[1] > 0


def test_shapes_are_seen() -> None:
    assert drawn(full(64 << 10)) == ["█" * 24] * 12
    lines = drawn(causal(1 << 20))
    assert [line.count("█") for line in lines] == [2 * n + 1 for n in range(12)]
    assert all(line.rstrip().endswith("▄") for line in lines)
    filled = [sum(letter != " " for letter in line) for line in drawn(sliding_window(1 << 20, left=1 << 16, right=0))]
    assert max(filled) <= 5
    assert np.isclose(shades(causal(1 << 20), 24).mean(), causal(1 << 20).density)


def test_one_mask_is_drawn_and_several_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mask=causal", "seqlen=64k"]) == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("│") for line in out.splitlines()) == 12
    assert "64k x 64k tokens" in out
    assert main(["mask=causal,full", "seqlen=64k"]) == 0
    assert "│" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_terminal_without_unicode_gets_a_picture_too() -> None:
    command = [sys.executable, "-m", "lcbench.masks", "mask=causal", "seqlen=64k"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert done.returncode == 0, done.stderr
    assert b"|#_" in done.stdout
