"""A mask of the user's own: bands from a file."""

from __future__ import annotations

import json
from pathlib import Path

from lcbench.masks.band import OPEN, BandMask, DoesNotFit
from lcbench.masks.text import read_text


def band_file(seqlen: int, *, file: str) -> BandMask:
    """``file``: JSON ``{"seqlen": 4096, "bands": [[q0, q1, k0, k1, lo, hi], ...]}``, null for an open diagonal bound.

    Raises:
        ValueError: a file that holds no such thing, or bands that share a pair or leave the plane.
        DoesNotFit: a mask of another length.
    """
    text = read_text(Path(file))
    try:
        content = json.loads(text)
        length, bands = int(content["seqlen"]), content["bands"]
        rows = [[*band[:4], -OPEN if band[4] is None else band[4], OPEN if band[5] is None else band[5]] for band in bands]
        if any(len(band) != 6 for band in bands) or not all(type(x) is int for row in rows for x in row):
            raise TypeError("a band is six whole numbers [q0, q1, k0, k1, lo, hi]; lo and hi may be null")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        wanted = '{"seqlen": n, "bands": [[q0, q1, k0, k1, lo, hi], ...]}'
        raise ValueError(f"mask.file={file} does not hold {wanted}: {type(error).__name__}: {error}") from error
    for row in rows:
        if not (0 <= row[0] < row[1] <= length and 0 <= row[2] < row[3] <= length):
            raise ValueError(f"mask.file={file}: band {row[:4]} is empty or leaves the plane of {length} tokens")
    mask = BandMask.of(length, length, rows)
    if shared := mask.overlap():
        one, two = map(list, shared)
        raise ValueError(f"mask.file={file}: bands must be disjoint, but {one} and {two} (cut tight) share pairs")
    if length != seqlen:
        raise DoesNotFit(f"{Path(file).name} holds a mask of {length} tokens, seqlen is {seqlen}")
    return mask
