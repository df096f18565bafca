"""The viewer of masks, as a person calls it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np

from lcbench.masks.causal import causal
from lcbench.masks.picture import shades
from tests.commands import lcbench


def masks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return lcbench("masks", *arguments, env={**os.environ, "COLUMNS": "200"})


def test_a_mask_is_shown_with_its_area_bands_balance_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "mask.png"
    done = masks("mask=causal_document", "seqlen=64k", "lengths=fixed", "--out", str(picture))
    assert done.returncode == 0, done.stderr
    assert str(16 * 4096 * 4097 // 2) in done.stdout
    assert "16 bands" in done.stdout
    assert "4096 <= q < 8192,  4096 <= k < 8192,  k - q <= 0" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_has_a_row_for_each_mask_and_draw() -> None:
    done = masks("mask=causal,block_random,document", "mask.samples=1", "seqlen=4k", "--json", "--ranks", "4")
    assert done.returncode == 2  # causal draws nothing
    done = masks("mask=block_random,document", "mask.samples=2", "seqlen=4k", "--json", "--ranks", "4")
    rows = json.loads(done.stdout)
    assert [(r["mask"], r["draw"]) for r in rows] == [("block_random", 0), ("block_random", 1), ("document", 0), ("document", 1)]
    assert rows[2]["area"] != rows[3]["area"]
    assert set(rows[0]["imbalance"]) == {"contiguous", "zigzag", "striped"}


def test_bad_input_is_one_line_and_code_2() -> None:
    for arguments, words in ((["mask=cusal"], "did you mean causal"), (["mask=star_attention", "seqlen=64"], "longer than seqlen")):
        done = masks(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_pixels_hold_the_exact_share_of_pairs() -> None:
    image = shades(causal(10 << 20), pixels=4)
    assert image[0, 1] == 0
    assert image[1, 0] == 1
    assert abs(image[2, 2] - 0.5) < 1e-6
    assert np.isclose(image.mean(), causal(10 << 20).density)
