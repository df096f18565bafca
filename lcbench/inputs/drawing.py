"""Seeded inputs: every P, layout and rank sees the same global tensors, and no rank ever holds them whole."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from lcbench.masks.band import Ints
from lcbench.problem import Problem

BLOCK = 256  # tokens drawn together; part of what the numbers are, so it never changes
ELEMENTS = 1 << 22  # of blocks that are drawn before they are put in place


def draw(
    name: str,
    tokens: Ints,
    problem: Problem,
    seed: int,
    device: torch.device,
    group: tuple[int, int] = (0, 0),
    heads: range | None = None,
    layer: int = 0,
) -> torch.Tensor:
    """Rows ``tokens`` (global indices, any order) of the global tensor ``name``: q (T, Hq, D) and dout (T, Hq, Dv) by the indices
    of queries, k (T, Hk, D) and v (T, Hk, Dv) by those of keys. Of latent heads v is a view of k's numbers.

    Standard normal, drawn per block of tokens from a seed that depends on (seed, name, block, group) only. The values are those of
    the device's own generator: they agree between ranks of one kind of device, not between CPU and CUDA.

    Args:
        group: (dp, tp) index of the context-parallel group: others have other data, or other heads of the same.
        heads: those of the tensor that are wanted, adjacent; None: all.
        layer: others have other data.
    """
    own = problem.heads
    if name == "v" and own.latent:
        return draw("k", tokens, problem, seed, device, group, heads, layer)[..., : own.v]
    shape = own.q if name in ("q", "dout") else own.kv, own.v if name in ("v", "dout") else own.dim
    text = f"{name}/{layer}" if layer else name
    return draw_rows(text, tokens, shape, getattr(torch, problem.dtype), seed, device, group, heads)


def draw_sink(problem: Problem, keys: float, seed: int, device: torch.device, group: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The sinks of all query heads, (Hq,), in the type of sums: normal around the logarithm of ``keys``, the keys that a row sees
    in the mean, so that a sink has a share of the weights that results show."""
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    return draw_rows("sink", np.arange(problem.heads.q), (), dtype, seed, device, group) + math.log(max(1.0, keys))


def seed_of(text: str) -> int:
    """A generator's seed for what has this name, 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_rows(
    name: str,
    tokens: Ints,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    group: tuple[int, int] = (0, 0),
    wanted: range | None = None,
) -> torch.Tensor:
    """The same of any global tensor: (T, ...), of rows of a shape; ``wanted``: those along its first dimension; None: all."""
    drawn_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.empty((len(tokens), *(shape if wanted is None else (len(wanted), *shape[1:]))), dtype=dtype, device=device)
    generator = torch.Generator(device)
    blocks, inverse = np.unique(tokens // BLOCK, return_inverse=True)
    rows, ends = np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse, minlength=len(blocks)))
    together = max(1, ELEMENTS // (BLOCK * math.prod(shape)))
    for first in range(0, len(blocks), together):
        some = blocks[first : first + together].tolist()
        values = torch.empty((len(some), BLOCK, *shape), dtype=drawn_dtype, device=device)
        for block, into in zip(some, values, strict=True):
            text = f"{seed}/{name}/{block}" + ("/{}/{}".format(*group) if any(group) else "")  # the first is as where there is one
            generator.manual_seed(seed_of(text))
            into.normal_(generator=generator)
        mine = rows[ends[first - 1] if first else 0 : ends[first + len(some) - 1]]
        places = (inverse[mine] - first) * BLOCK + tokens[mine] % BLOCK
        drawn = values.flatten(0, 1)
        if wanted is not None:
            drawn = drawn[:, wanted.start : wanted.stop]
        result[torch.from_numpy(mine).to(device)] = drawn[torch.from_numpy(places).to(device)].to(dtype)
    return result
