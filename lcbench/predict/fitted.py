"""What a fit found: coefficients of kernels, links, factors of implementations, and how far predictions were off. One JSON file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from lcbench.masks.band import Ints
from lcbench.problem import Problem
from lcbench.schedule.machine import Floats, Tiles

SCHEMA = 1
FLOPS = {False: 4.0, True: 10.0}  # per pair and element of a head, forward and backward


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Coefficients(Frozen):
    """Seconds of a tile, a sum of terms that are all at least 0.

    Attributes:
        call_s: of a native call.
        flop_s: per FLOP of unmasked pairs.
        waste_s: per FLOP of pairs that are masked, in blocks that are computed all the same.
        row_s: per element of q; key_s: per element of k and v.
        piece_s: per piece of the mask and query head.
    """

    call_s: float = 0.0
    flop_s: float = 0.0
    waste_s: float = 0.0
    row_s: float = 0.0
    key_s: float = 0.0
    piece_s: float = 0.0


class KernelFit(Frozen):
    """A kernel on a device for a type of inputs; ``sources``: what it was fitted on, in words."""

    kernel: str
    dtype: str
    forward: Coefficients
    backward: Coefficients
    sources: tuple[str, ...] = ()

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """Seconds of each tile, (n,)."""
        c, dim = self.backward if backward else self.forward, problem.heads.dim
        per_pair = FLOPS[backward] * tiles.q_heads * dim
        found: Floats = (
            c.call_s * self.calls(tiles) + per_pair * (c.flop_s * tiles.pairs + c.waste_s * (tiles.covered - tiles.pairs))
            + c.row_s * tiles.rows * tiles.q_heads * dim + c.key_s * tiles.keys * tiles.kv_heads * dim
            + c.piece_s * tiles.pieces * tiles.q_heads
        )  # fmt: skip
        return found

    def calls(self, tiles: Tiles) -> Ints:
        return np.ones(len(tiles), dtype=np.int64)


class Fitted(Frozen):
    """A fit.

    Attributes:
        machine: name of the machine that it is for.
        kernels: by kernel and type of inputs.
        factors: by strategy and phase (``te_p2p/forward``): how much slower its implementation is than its schedule says.
        error: by phase, relative half-width of the 95 % interval of predictions, from cross-validation.
        sources: what it was fitted on, in words.
    """

    schema_: int = SCHEMA
    machine: str
    kernels: tuple[KernelFit, ...] = ()
    factors: dict[str, float] = {}
    error: dict[str, float] = {}
    sources: tuple[str, ...] = ()

    def kernel(self, name: str, dtype: str) -> KernelFit | None:
        return next((k for k in self.kernels if (k.kernel, k.dtype) == (name, dtype)), None)

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Fitted:
        """Raises:
        ValueError: it is no fit, or one of another version.
        OSError: it cannot be read.
        """
        return cls.model_validate_json(path.read_text())
