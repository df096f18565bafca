"""Seeded inputs: every P, layout and rank sees the same global tensors, and no rank ever holds them whole."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from lcbench.masks.band import Ints
from lcbench.problem import Problem

BLOCK = 256  # tokens drawn together; part of what the numbers are, so it never changes


def draw(name: str, tokens: Ints, problem: Problem, seed: int, device: torch.device) -> torch.Tensor:
    """Rows ``tokens`` (global indices, any order) of the global tensor ``name``: q and dout (T, Hq, D), k and v (T, Hk, D).

    Standard normal, drawn per block of tokens from a seed that depends on (seed, name, block) only. The values are those of
    the device's own generator: they agree between ranks of one kind of device, not between CPU and CUDA.
    """
    heads = problem.heads.q if name in ("q", "dout") else problem.heads.kv
    dtype = getattr(torch, problem.dtype)
    drawn_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    result = torch.empty((len(tokens), heads, problem.heads.dim), dtype=dtype, device=device)
    generator = torch.Generator(device)
    blocks = tokens // BLOCK
    for block in np.unique(blocks).tolist():
        text = f"{seed}/{name}/{block}".encode()
        generator.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1)
        values = torch.randn((BLOCK, heads, problem.heads.dim), generator=generator, dtype=drawn_dtype, device=device)
        rows = np.nonzero(blocks == block)[0]
        result[torch.from_numpy(rows).to(device)] = values[torch.from_numpy(tokens[rows] % BLOCK).to(device)].to(dtype)
    return result
