"""What a fit found: kernels, links, what implementations take besides, and how far predictions were off. One JSON file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lcbench.masks.band import Ints
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.problem import Heads, Problem
from lcbench.schedule.machine import Collective, Floats, Link, Machine, Tiles
from lcbench.schedule.states import products

SCHEMA = 2
BLOCK = 128  # rows that one block of a kernel computes
FLOPS = {False: forward_flops, True: backward_flops}


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Coefficients(Frozen):
    """Seconds of a tile, a sum of terms that are all at least 0.

    Attributes:
        call_s: of a native call.
        flop_s: per FLOP of unmasked pairs.
        pair_s: per unmasked pair of a query head, whatever the head dim: exponentials.
        waste_s: per FLOP of pairs that are masked, in blocks that are computed all the same.
        tail_s: per FLOP of one block of rows of one head on the keys that a row sees on average: what the last blocks of a call
            take while most of the device has nothing left to do.
        row_s: per element of q and of out, two of which count as one; key_s: the same of k and v, of keys that some row sees.
        piece_s: per piece of the mask and query head.
        gather_s: as ``row_s`` and ``key_s``, of what is copied for a call and merged or added up after it.
    """

    call_s: float = 0.0
    flop_s: float = 0.0
    pair_s: float = 0.0
    waste_s: float = 0.0
    tail_s: float = 0.0
    row_s: float = 0.0
    key_s: float = 0.0
    piece_s: float = 0.0
    gather_s: float = 0.0


class Factor(Frozen):
    """What an implementation of a strategy takes, against its schedule with the kernel alone.

    Attributes:
        compute: its kernels' seconds per those of the kernel.
        operand_s: seconds besides, per byte of the operands of a tile (q, out, k and v): gathering, padding, scattering.
        sources: what it was fitted on, in words.
    """

    compute: float = 1.0
    operand_s: float = 0.0
    sources: tuple[str, ...] = ()


class Workspace(Frozen):
    """Bytes that a call holds beside its operands and results, a sum of terms that are all at least 0.

    Attributes:
        call: whatever it computes.
        row: per element of q; key: per element of k and v.
        spread: per element of k and v, had they as many heads as q: what kernels hold that add up each query head by itself.
        gathered: per element of q, k and v that is held as a copy for the largest native call.
        score: per pair of a row and a key, masked or not, and query head: of kernels that hold all scores.
    """

    call: float = 0.0
    row: float = 0.0
    key: float = 0.0
    spread: float = 0.0
    gathered: float = 0.0
    score: float = 0.0

    def bytes(self, tiles: Tiles, heads: Heads) -> Floats:
        """Of each tile, (n,); ``heads``: whose dimensions they have."""
        found: Floats = (
            self.call + self.row * heads.dim * tiles.rows * tiles.q_heads
            + heads.kv_width * (self.key * tiles.keys * tiles.kv_heads + self.spread * tiles.keys * tiles.q_heads)
            + self.gathered * (heads.dim * tiles.most_rows * tiles.q_heads + heads.kv_width * tiles.most_keys * tiles.kv_heads)
            + self.score * tiles.rows.astype(np.float64) * tiles.keys * tiles.q_heads
        )  # fmt: skip
        return found


class MemoryFit(Frozen):
    """What the passes of a kernel need inside, for a type of inputs.

    Attributes:
        backward: whether it is of iterations with backward, which mostly need more, or of forward alone.
        error: relative half-width of the 95 % interval of a rank's peak, by leaving groups of cells out.
        cells: that it was fitted on; sources: where they are from, in words.
    """

    kernel: str
    dtype: str
    backward: bool
    workspace: Workspace
    error: float
    cells: int
    sources: tuple[str, ...] = ()


def regime(problem: Problem) -> str:
    """What decides how a kernel spends its time: ``whole``: every token has a query; ``decode``: each request has one new token, so
    that its keys and values are read for a row; ``cache``: anything else with keys that have no query."""
    if not problem.rectangular:
        return "whole"
    return "decode" if problem.batch is not None and problem.batch.decodes else "cache"


class KernelFit(Frozen):
    """A kernel on a device for a type of inputs; ``sources``: what it was fitted on, in words.

    ``factors``: of the implementation that calls it, forward and backward. ``workspace``: of its memory. ``cores``: of the node
    that it was fitted on, which CPU ranks share; 0: every rank has a device. ``rank_cores``: of a rank, where that is known; 0: the
    ranks of its group have the node for themselves. ``regimes``: of what it was fitted on, see ``regime``.

    ``key_bytes``: of a number of keys and values, where a cache stores them otherwise than inputs; 0: as these. ``packed``: whether
    query heads that share a key/value head are rows of one block. ``read_bytes_per_s``: see ``Machine``.
    """

    kernel: str
    dtype: str
    forward: Coefficients
    backward: Coefficients
    sources: tuple[str, ...] = ()
    factors: tuple[Factor, Factor] = (Factor(), Factor())
    workspace: Workspace = Workspace()
    cores: int = 0
    rank_cores: float = 0.0
    regimes: tuple[str, ...] = ("whole",)
    key_bytes: float = 0.0
    packed: bool = False
    read_bytes_per_s: float = 0.0

    def seconds(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """Seconds of each tile, (n,)."""
        if problem.rule is not None:
            return self._linear(tiles, problem, backward=backward)
        c, heads, factor = self.backward if backward else self.forward, problem.heads, self.factors[backward]
        of_row, of_key, flops = (heads.dim + heads.v) / 2, heads.kv_width / 2, FLOPS[backward](1.0, heads)
        queries, keys = of_row * tiles.rows * tiles.q_heads, of_key * tiles.keys * tiles.kv_heads
        key_bytes = self.key_bytes or problem.itemsize
        read = key_bytes * of_key * tiles.read * tiles.kv_heads
        pairs = flops * (c.flop_s * tiles.pairs + c.waste_s * (self._covered(tiles) - tiles.pairs))
        gathered = of_row * tiles.gathered_rows * tiles.q_heads + 2 * of_key * tiles.gathered_keys * tiles.kv_heads
        tail = c.tail_s * flops * np.minimum(tiles.rows, BLOCK) * tiles.pairs / np.maximum(tiles.rows, 1)
        found: Floats = (
            factor.compute * (c.call_s * self.calls(tiles) + (
                tiles.q_heads * (pairs + c.pair_s * tiles.pairs) + tail + c.row_s * queries + c.key_s * read / problem.itemsize
                + c.piece_s * tiles.pieces * tiles.q_heads + c.gather_s * gathered) / self.cores_of(problem))
            + factor.operand_s * 2 * problem.itemsize * (queries + keys)
        )  # fmt: skip
        return np.maximum(found, 2 * read / self.read_bytes_per_s) if self.read_bytes_per_s else found

    def _linear(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """Of linear attention: the products of its recurrence, and a pass over the operands."""
        c, heads, twice = self.backward if backward else self.forward, problem.heads, 2 if backward else 1
        flops = 2.0 * heads.dim * heads.v * tiles.rows * products(tiles.q_heads, tiles.kv_heads, problem.rule)
        queries, keys = tiles.rows * tiles.q_heads * (heads.dim + heads.v), tiles.keys * tiles.kv_heads * heads.kv_width
        passed = (c.flop_s * flops + c.row_s * queries / 2 + c.key_s * keys / 2) * twice
        found: Floats = c.call_s * self.calls(tiles) + passed / self.cores_of(problem)
        return found

    def _covered(self, tiles: Tiles) -> Floats:
        """Pairs of the blocks that are computed, of each tile and query head, (n,)."""
        if not self.packed:
            return tiles.covered
        found: Floats = np.maximum(tiles.covered * tiles.kv_heads / tiles.q_heads, tiles.pairs)
        return found

    def calls(self, tiles: Tiles) -> Ints:
        return tiles.calls

    def workspace_bytes(self, tiles: Tiles, problem: Problem, *, backward: bool) -> Floats:
        """What a call holds inside, of each tile, (n,): in the last phase of an iteration, the one that it was fitted on."""
        return self.workspace.bytes(tiles, problem.heads) if backward == problem.backward else np.zeros(len(tiles))

    def cores_of(self, problem: Problem) -> float:
        """Cores that a rank has: whole ones, one thread each, unless there are more ranks than cores."""
        if self.rank_cores:
            return self.rank_cores
        ranks = problem.scale.gpus_per_node
        return float(self.cores // ranks or self.cores / ranks) if self.cores else 1.0


class DenseFit(Frozen):
    """What treats every token alone: products with weights, and all that goes element by element. Of a rank's device or core.

    Attributes:
        flop_s: seconds per FLOP of products; byte_s: per byte that is read or written by all else.
        sources: what it was fitted on, in words.
    """

    dtype: str
    flop_s: float
    byte_s: float
    sources: tuple[str, ...] = ()


class MachineFit(Frozen):
    """Numbers of conf/machine in whose place fitted ones are; None: those of conf/machine stay."""

    inside: Link | None = None
    across: Link | None = None
    memory_bytes_per_s: float | None = None
    launch_s: float | None = None
    message_s: float | None = None
    collectives: dict[str, Collective] = {}

    def of(self, machine: Machine) -> Machine:
        """The machine with what was fitted."""
        said: dict[str, Any] = {name: value for name, value in self if name != "collectives" and value is not None}
        return replace(machine, **said, collectives=machine.collectives | self.collectives)


class Residual(Frozen):
    """How far the fit is from what it was fitted on, of a group of observations.

    Attributes:
        count: observed times.
        median, p90: of the absolute relative errors.
        left_out: the median when the group was left out of the fit; None: it never was.
    """

    group: str
    count: int
    median: float
    p90: float
    left_out: float | None = None


class Fit(Frozen):
    """What one run of ``lcbench.fit`` found.

    Attributes:
        machine: name of the machine that it is for.
        kernels: by kernel and type of inputs.
        dense: what treats every token alone, by type of inputs.
        factors: by strategy and phase (``ring/forward``): what its implementation takes besides.
        links: what the machine's links and host were found to do.
        memory: what kernels allocate inside.
        error: by phase, relative half-width of the 95 % interval of predictions, from cross-validation; of workloads but the
            default under ``<workload>/<phase>``.
        residuals: by group of observations.
        cells: ids of the cells that it was fitted on.
        sources: what it was fitted on, in words.
    """

    schema_: int = SCHEMA
    machine: str
    kernels: tuple[KernelFit, ...] = ()
    dense: tuple[DenseFit, ...] = ()
    factors: dict[str, Factor] = {}
    links: MachineFit = MachineFit()
    memory: tuple[MemoryFit, ...] = ()
    error: dict[str, float] = {}
    residuals: tuple[Residual, ...] = ()
    cells: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def kernel(self, name: str, dtype: str) -> KernelFit | None:
        """What was fitted for it; None: nothing was."""
        return next((k for k in self.kernels if (k.kernel, k.dtype) == (name, dtype)), None)

    def dense_of(self, dtype: str) -> DenseFit | None:
        """What was fitted for it; None: nothing was."""
        return next((d for d in self.dense if d.dtype == dtype), None)

    def neighbour(self, dtype: str) -> KernelFit | None:
        """The kernel that stands in for one that was not fitted: of the same inputs, fitted on most kinds of observations."""
        return max((k for k in self.kernels if k.dtype == dtype), key=lambda k: len(k.sources), default=None)

    def memory_of(self, kernel: str, problem: Problem) -> MemoryFit | None:
        """What was fitted for it; None: nothing was."""
        wanted = (kernel, problem.dtype, problem.backward)
        return next((m for m in self.memory if (m.kernel, m.dtype, m.backward) == wanted), None)

    def factor(self, strategy: str, phase: str) -> Factor:
        return self.factors.get(f"{strategy}/{phase}", Factor())

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Fit:
        """Raises:
        ValueError: it cannot be read, is no fit, or one of another version; one line.
        """
        try:
            found = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(f"fit {path} cannot be read: {error.strerror}; python -m lcbench.fit writes one") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"{path} is no fit of lcbench.fit: {where}: {first['msg']}") from error
        if found.schema_ != SCHEMA:
            raise ValueError(f"{path} is a fit of version {found.schema_}, this lcbench reads {SCHEMA}; fit again")
        return found
