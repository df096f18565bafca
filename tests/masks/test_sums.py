"""Sums over what rows see, against the mask as a matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lcbench.masks.sums import Visible
from lcbench.problem import Heads
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import every_mask, small

HEADS = Heads(4, 2, 8)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", every_mask())
def test_sums_are_those_of_the_matrix(name: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    mask = small(name, 97, HEADS, tmp_path, seed=3)
    rows = random.permutation(97)[:60]
    values = torch.from_numpy(random.normal(size=(3, 97)))
    for head, matrix in enumerate(dense_heads(mask, HEADS.q)):
        number = head * getattr(mask, "maps", 0) // HEADS.q
        for side, dense in ((mask, matrix), (mask.transpose(), matrix.T)):
            visible, seen = Visible(side, rows, CPU, number), torch.from_numpy(dense[rows].astype(float))
            assert (visible.sums(values) - values @ seen.T).abs().max() < 1e-13
            whole = torch.round(8 * values)
            assert torch.equal(visible.sums(whole, whole=True), whole @ seen.T)


def test_a_short_sum_far_out_in_a_long_sequence_loses_nothing() -> None:
    from lcbench.masks.document import document
    from lcbench.masks.lengths import Fixed

    seqlen = 1 << 18
    mask = document(seqlen, seed=(0, 0), lengths=Fixed(3))
    values = torch.from_numpy(1 + np.random.default_rng(1).random((1, seqlen)))
    rows = np.arange(seqlen - 5, seqlen)
    first = rows // 3 * 3
    want = [float(values[0, b : min(b + 3, seqlen)].sum()) for b in first]
    assert Visible(mask, rows, CPU).sums(values)[0].tolist() == pytest.approx(want, abs=1e-14)
