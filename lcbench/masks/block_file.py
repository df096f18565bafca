"""A block map of the user's own, from a file."""

from __future__ import annotations

import zipfile

import numpy as np

from lcbench.masks.band import DoesNotFit
from lcbench.masks.block import BlockMap
from lcbench.problem import Heads


def block_file(seqlen: int, *, heads: Heads, file: str) -> BlockMap:
    """``file``: a NumPy .npz with ``q_edges`` (nr + 1), ``k_edges`` (nc + 1) and ``keep``, bool (maps, nr, nc).

    Raises:
        ValueError: a file that holds no such thing.
        DoesNotFit: a map of another length, or of a number of heads that these heads are no multiple of.
    """
    wanted = "q_edges, k_edges (rising from 0) and keep, bool (maps, rows of blocks, columns of blocks)"
    try:
        with np.load(file) as arrays:
            q_edges, k_edges, keep = (arrays[name] for name in ("q_edges", "k_edges", "keep"))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"mask.file={file} does not hold {wanted}: {error}") from error
    edges = [np.asarray(e, dtype=np.int64) for e in (q_edges, k_edges)]
    shaped = keep.ndim == 3 and keep.dtype == bool and len(keep) and keep.shape[1:] == tuple(len(e) - 1 for e in edges)
    if not shaped or any(e[0] != 0 or (np.diff(e) <= 0).any() for e in edges):
        raise ValueError(f"mask.file={file} does not hold {wanted}, but keep {keep.dtype} {keep.shape}")
    if edges[0][-1] != seqlen or edges[1][-1] != seqlen:
        raise DoesNotFit(f"{file} holds a map of {edges[0][-1]} x {edges[1][-1]} tokens, seqlen is {seqlen}")
    if heads.q % len(keep):
        raise DoesNotFit(f"{heads.q} query heads are no multiple of the {len(keep)} maps in {file}")
    return BlockMap(edges[0], edges[1], len(keep), lambda i: keep[i])
