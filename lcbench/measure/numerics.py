"""The float64 reference, and how far a run is from it.

Exact for a set of query rows (out, LSE, dq) and of key columns (dk, dv): all of them when the problem is small, else a
seeded sample that always holds the mask's corners. A row needs only its partial over every rank's own keys and an
all-reduce, so a row costs O(S) however long the sequence is, and no rank ever holds more than its own tokens.

Imports no kernel and uses a mask only by rows and columns, on global indices: bands as intervals, block maps as a look-up; so
it shares neither the layout algebra nor the tiles with what it judges.

The bound on an error is what the same arithmetic in the run's own precision does: twice the error of the dense
computation in that type, on the same rows, and of the largest value one unit in the last place besides, since a result that is
merged from parts is rounded part by part, and what rounding an LSE to float32 does to every weight exp(score - LSE). For
float64, whose dense computation is the reference, it is 1e-12 of the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lcbench.masks.band import BandMask, Ints
from lcbench.masks.mask import Mask
from lcbench.problem import Problem

WHOLE_TOKENS = 2048  # up to this length every row and column is checked
SAMPLE = 64  # rows, and columns, beyond the corners
MAX_CORNERS = 64
CHUNK_ELEMENTS = 1 << 24  # scores at a time, over all heads
FLOAT64_BOUND = 1e-12


@dataclass(frozen=True)
class Check:
    """Largest absolute error per tensor and its bound; ``rows`` and ``columns`` say how many were looked at."""

    errors: dict[str, float]
    bounds: dict[str, float]
    rows: int
    columns: int
    whole: bool

    @property
    def failures(self) -> list[str]:
        """``dq: error 3.1e-02 above its bound 1.2e-02``, one per tensor that is out; NaN is out."""
        return [
            f"{name}: error {error:.3g} above its bound {self.bounds[name]:.3g}"
            for name, error in self.errors.items()
            if not error <= self.bounds[name]
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "errors": self.errors, "bounds": self.bounds, "rows": self.rows, "columns": self.columns,
            "reference": "whole" if self.whole else "sampled",
        }  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """What one rank owns: global token indices and the tensors of these tokens."""

    tokens: Ints
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What the run gave for the same tokens; gradients are None for a forward-only cell."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None


def check(mask: Mask, problem: Problem, shard: Shard, result: Result, *, seed: int) -> Check:
    """Compare a run with the reference. Collective over all ranks; every rank returns the same answer."""
    whole = problem.seqlen <= WHOLE_TOKENS
    rows = np.arange(mask.num_q) if whole else sample(mask, "q", seed)
    columns = np.arange(mask.num_k) if whole else sample(mask, "k", seed)
    run_dtype = getattr(torch, problem.dtype)
    exact = _rows(mask, problem, shard, rows, torch.float64)
    dense = exact if run_dtype == torch.float64 else _rows(mask, problem, shard, rows, run_dtype)
    wanted = {"out": (exact["out"], dense["out"]), "lse": (exact["lse"], dense["lse"])}
    if problem.backward:
        wanted["dq"] = (exact["dq"], dense["dq"])
        # Columns need LSE and delta of every row: the reference's own where it is whole, else the run's, whose error the
        # sampled rows have just bounded.
        own = torch.from_numpy(shard.tokens)
        lse, out = (exact["lse"][own], exact["out"][own]) if whole else (result.lse.double(), result.out.double())
        exact_columns = _columns(mask, problem, shard, columns, lse, out, torch.float64)
        dense_columns = (
            exact_columns if run_dtype == torch.float64 else _columns(mask, problem, shard, columns, lse, out, run_dtype)
        )
        wanted |= {name: (exact_columns[name], dense_columns[name]) for name in ("dk", "dv")}

    lse = exact["lse"][torch.isfinite(exact["lse"])]
    largest_lse = float(lse.abs().max()) if lse.numel() else 0.0
    errors, bounds = {}, {}
    for name, (reference, same_precision) in wanted.items():
        got = getattr(result, name)
        mine, positions = _owned(shard.tokens, columns if name in ("dk", "dv") else rows)
        errors[name] = _max_error(got[mine].double(), reference[positions])
        bounds[name] = _bound(reference, same_precision, run_dtype, largest_lse)
    return Check(errors, bounds, len(rows), len(columns), whole)


def sample(mask: Mask, side: str, seed: int) -> Ints:
    """Rows (``side="q"``) or columns to check: the first and last of bands (the corners of the mask), and a seeded draw."""
    number = mask.num_q if side == "q" else mask.num_k
    corners = np.unique(np.concatenate([[0, number - 1], mask.corners(side)]))
    random = np.random.default_rng([seed, number, side == "k"])
    if len(corners) > MAX_CORNERS:
        corners = np.concatenate([corners[[0, -1]], random.choice(corners, MAX_CORNERS, replace=False)])
    return np.unique(np.concatenate([corners, random.integers(0, number, SAMPLE)])).astype(np.int64)


def _rows(mask: Mask, problem: Problem, shard: Shard, rows: Ints, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """out, lse and dq of global ``rows``, with the arithmetic of ``dtype``; the same on every rank."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = _collect(shard.q, shard.tokens, rows).to(dtype)
    dout = _collect(shard.dout, shard.tokens, rows).to(dtype) if shard.dout is not None else None
    keys, values = (_per_query_head(x, problem).to(dtype) for x in (shard.k, shard.v))
    parts: dict[str, list[torch.Tensor]] = {"out": [], "lse": [], "dq": []}
    for chunk in _chunks(len(rows), problem.heads.q * len(shard.tokens)):
        allowed = _allowed(mask, rows[chunk], shard.tokens, problem).to(q.device)
        scores = (torch.einsum("qhd,khd->hqk", q[chunk], keys) * problem.softmax_scale).to(wide)
        scores = scores.masked_fill(~allowed, -torch.inf)
        top = _reduce(scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:2], -torch.inf), "max")
        shift = torch.where(top == -torch.inf, 0.0, top)
        weights = torch.exp(scores - shift[..., None])
        total = _reduce(weights.sum(-1), "sum")
        lse = torch.log(total) + shift
        probabilities = weights / torch.where(total == 0, 1.0, total)[..., None]
        out = _reduce(torch.einsum("hqk,khd->qhd", probabilities.to(dtype), values).to(wide), "sum").to(dtype)
        parts["out"].append(out)
        parts["lse"].append(lse.T)
        if dout is not None:
            delta = (dout[chunk].to(wide) * out.to(wide)).sum(-1).T
            dweights = torch.einsum("qhd,khd->hqk", dout[chunk], values).to(wide)
            dscores = probabilities * (dweights - delta[..., None])
            dq = torch.einsum("hqk,khd->qhd", dscores.to(dtype), keys).to(wide) * problem.softmax_scale
            parts["dq"].append(_reduce(dq, "sum").to(dtype))
    return {name: torch.cat(found).double() for name, found in parts.items() if found}


def _columns(
    mask: Mask,
    problem: Problem,
    shard: Shard,
    columns: Ints,
    lse: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """dk and dv of global ``columns``, from LSE and out of this rank's rows; the same on every rank."""
    assert shard.dout is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = (_per_query_head(_collect(x, shard.tokens, columns), problem).to(dtype) for x in (shard.k, shard.v))
    q, dout = shard.q.to(dtype), shard.dout.to(dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(-1).T[..., None]
    finite = torch.where(lse == -torch.inf, 0.0, lse).to(wide).T[..., None]
    parts: dict[str, list[torch.Tensor]] = {"dk": [], "dv": []}
    for chunk in _chunks(len(columns), problem.heads.q * len(shard.tokens)):
        allowed = _allowed(mask.transpose(), columns[chunk], shard.tokens, problem).transpose(-1, -2).to(q.device)
        scores = (torch.einsum("qhd,khd->hqk", q, keys[chunk]) * problem.softmax_scale).to(wide)
        weights = torch.exp(scores - finite).masked_fill(~allowed, 0.0)
        dweights = torch.einsum("qhd,khd->hqk", dout, values[chunk]).to(wide)
        dscores = weights * (dweights - delta)
        parts["dv"].append(_per_kv_head(torch.einsum("hqk,qhd->khd", weights.to(dtype), dout).to(wide), problem))
        dk = torch.einsum("hqk,qhd->khd", dscores.to(dtype), q).to(wide) * problem.softmax_scale
        parts["dk"].append(_per_kv_head(dk, problem))
    return {name: _reduce(torch.cat(found), "sum").to(dtype).double() for name, found in parts.items()}


def _allowed(mask: Mask, rows: Ints, keys: Ints, problem: Problem) -> torch.Tensor:
    """bool (rows, keys), or (Hq, rows, keys) where heads differ."""
    if isinstance(mask, BandMask):
        return _allowed_by_bands(mask, rows, keys)
    row, column = (np.searchsorted(edges, at, side="right") - 1 for edges, at in ((mask.q_edges, rows), (mask.k_edges, keys)))
    kept = np.stack([mask.keep(i)[row[:, None], column] for i in range(mask.maps)])
    return torch.from_numpy(kept).repeat_interleave(problem.heads.q // mask.maps, 0)


def _allowed_by_bands(mask: BandMask, rows: Ints, keys: Ints) -> torch.Tensor:
    """Each band gives each of its rows one interval of keys."""
    allowed = np.zeros((len(rows), len(keys)), dtype=bool)
    for q0, q1, k0, k1, lo, hi in mask.bands[_touching(mask, rows)]:
        inside = np.nonzero((q0 <= rows) & (rows < q1))[0]
        begin = np.maximum(k0, rows[inside] + lo)[:, None]
        end = np.minimum(k1, rows[inside] + hi + 1)[:, None]
        allowed[inside] |= (begin <= keys) & (keys < end)
    return torch.from_numpy(allowed)


def _touching(mask: BandMask, rows: Ints) -> Ints:
    """Indices of the bands that hold one of ``rows`` (sorted)."""
    first = np.searchsorted(rows, mask.bands[:, 0])
    return np.nonzero((first < len(rows)) & (rows[np.minimum(first, len(rows) - 1)] < mask.bands[:, 1]))[0]


def _collect(x: torch.Tensor, tokens: Ints, wanted: Ints) -> torch.Tensor:
    """Global rows ``wanted`` of a tensor of which every rank owns some, in float64, on every rank."""
    mine, positions = _owned(tokens, wanted)
    rows = torch.zeros((len(wanted), *x.shape[1:]), dtype=torch.float64, device=x.device)
    rows[positions] = x[mine].double()
    return _reduce(rows, "sum")


def _owned(tokens: Ints, wanted: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """(local positions, positions in ``wanted``) of the wanted tokens that this rank owns; ``wanted`` is sorted."""
    at = np.searchsorted(wanted, tokens).clip(0, len(wanted) - 1)
    hit = np.nonzero(wanted[at] == tokens)[0]
    return torch.from_numpy(hit), torch.from_numpy(at[hit])


def _per_query_head(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    return x.repeat_interleave(problem.heads.q // problem.heads.kv, 1)


def _per_kv_head(x: torch.Tensor, problem: Problem) -> torch.Tensor:
    return x.unflatten(1, (problem.heads.kv, -1)).sum(2)


def _chunks(count: int, elements_each: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    # Ranks own different numbers of tokens but must reduce equally often.
    agreed = torch.tensor([size])
    if dist.is_initialized():
        agreed = _reduce(-agreed.to(_comm_device()), "max").cpu().neg()
    return [slice(begin, begin + int(agreed)) for begin in range(0, count, int(agreed))]


def _comm_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _reduce(x: torch.Tensor, operation: str) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        x = x.contiguous()
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
    return x


def _max_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got - want| over all ranks; equal infinities (LSE of an empty row) agree, anything else non-finite is NaN."""
    difference = torch.where(got == want, 0.0, (got - want).abs())
    bad = ~torch.isfinite(difference)
    worst = torch.stack([difference.masked_fill(bad, 0.0).max() if len(got) else difference.new_zeros(()), bad.any()])
    error, broken = _reduce(worst, "max").tolist()
    return float("nan") if broken else error


def _bound(reference: torch.Tensor, same_precision: torch.Tensor, dtype: torch.dtype, largest_lse: float) -> float:
    finite = torch.isfinite(reference)
    if not finite.any():
        return 0.0
    largest = float(reference[finite].abs().max())
    if dtype == torch.float64:
        return FLOAT64_BOUND * max(1.0, largest)
    dense_error = float((same_precision - reference)[finite].abs().max())
    return 2 * dense_error + (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * largest_lse) * max(1.0, largest)
