"""A trace of a server as a few batches: what its lines say, and batches with weights whose totals are those of all lines.

A line is a pass of the server: so many equal requests that run together, each with new tokens behind a prefix that is in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcbench.grid.values import MOST_REQUESTS, MOST_TOKENS, parse_batch, parse_int, shown
from lcbench.problem import Batch, Requests

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# What a trace comes to. A pass is a line; pairs are those of causal attention.
TOTALS = ("passes", "requests", "new tokens", "prefix tokens", "pairs")
TOLERANCE = 0.01  # how far a total may be off, as a share of it
# How much more an error of a total counts than a weight that is not its cluster's number of lines, by relative size.
EXACT = 1e4
MOONCAKE = ("input_length", "hash_ids")
BLOCK = 512  # tokens of a block of Mooncake's traces


@dataclass(frozen=True)
class Trace:
    """A trace, and the batches that stand for it.

    Attributes:
        file: as it was named.
        content_sha256: of what is in it.
        totals: of its lines, each of ``TOTALS``.
        errors: how far those of the batches are off, as a share of each.
        weights: for how many lines each batch stands, by its text.
    """

    file: str
    content_sha256: str
    totals: dict[str, float]
    errors: dict[str, float]
    weights: dict[str, float]

    @classmethod
    def parse(cls, config: Any) -> Trace | None:
        """From the composed ``trace`` of a command; None: it names no file.

        Raises:
            ValueError: a file that is no trace, or more batches are needed than ``cells`` allows; one line.
        """
        if not isinstance(config, dict) or set(config) != {"file", "cells"}:
            raise ValueError(f"trace={shown(config)} means nothing; write trace=<file>, and trace.cells=<batches> beside it")
        most = parse_int(config["cells"], "trace.cells", least=1)
        if config["file"] is None:
            return None
        name = str(config["file"])
        if not name.strip():
            raise ValueError("trace= names no file; write trace=<file>")
        try:
            content = Path(name).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"trace={shown(name)} cannot be read: {error.strerror}") from error
        rows = read(content, f"trace={shown(name)}")
        try:
            cells = reduced(rows, most)
        except ValueError as error:
            raise ValueError(f"trace={shown(name)} trace.cells={most}: {error}") from error
        aim = added(rows).sum(axis=0)
        return cls(
            name, hashlib.sha256(content).hexdigest(), _by_total(aim), _by_total(errors(cells, aim)),
            {str(cell.batch): cell.weight for cell in cells},
        )  # fmt: skip

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Trace:
        """What ``note`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        numbers = {key: {str(name): float(value) for name, value in note[key].items()} for key in ("totals", "errors", "weights")}
        made = cls(str(note["file"]), str(note["content_sha256"]), **numbers)
        known = all(set(named) == set(TOTALS) for named in (made.totals, made.errors))
        weighted = made.weights and all(parse_batch(batch) and 0 < weight < math.inf for batch, weight in made.weights.items())
        if not (known and weighted and 0 < made.totals["new tokens"] < math.inf):
            raise ValueError(f"no trace: {dict(note)}")
        return made

    def note(self) -> dict[str, Any]:
        """As a sweep's manifest keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        """What it is and how well its batches stand for it, for people."""
        off = ", ".join(f"{name} {100 * error:.2f} %" for name, error in self.errors.items())
        stand = f"{self.totals['passes']:.0f} lines as {len(self.weights)} batches with weights"
        return f"trace {self.file}: {stand}; totals off by: {off}"

    @property
    def batches(self) -> str:
        """The batches with their weights, for people."""
        return ", ".join(f"{batch} x {weight:.4g}" for batch, weight in self.weights.items())


def _by_total(values: Floats) -> dict[str, float]:
    return dict(zip(TOTALS, values.tolist(), strict=True))


# -- reading -----------------------------------------------------------------------------------------------------------


def read(content: bytes, name: str) -> Ints:
    """The lines of a trace, (lines, 3): prefix tokens, new tokens and requests of each.

    A line is a JSON object with ``prefix``, ``new`` and ``concurrency``; what else it holds is not looked at. Or the first line has
    ``input_length`` and ``hash_ids``, and all are of a Mooncake trace (github.com/kvcache-ai/Mooncake, FAST25-release). Of it the
    prefill is taken: the prefix is what an unlimited cache has of a request, its leading blocks of 512 tokens that earlier lines
    had too, without the last token of the input, whose result is wanted. Each request is a pass of its own: the trace does not say
    which ran together.

    Args:
        name: what to call the file.

    Raises:
        ValueError: no line, or one that is none; names its number.
    """
    rows: list[tuple[int, int, int]] = []
    of_kind: Callable[[Mapping[str, Any]], tuple[int, int, int]] | None = None
    for number, text in enumerate(content.splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = _object(text)
            of_kind = of_kind or (_Mooncake() if all(key in line for key in MOONCAKE) else _plain)
            rows.append(_fitting(of_kind(line)))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
    if not rows:
        raise ValueError(f"{name} has no line; each is an object such as {_EXAMPLE}")
    return np.array(rows, dtype=np.int64)


_EXAMPLE = json.dumps({"prefix": 8192, "new": 1, "concurrency": 32})


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(text.decode(errors='replace'))} is no JSON; write an object such as {_EXAMPLE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)} is no object; write one such as {_EXAMPLE}")
    return found


def _count(line: Mapping[str, Any], key: str, least: int, most: int = MOST_TOKENS) -> int:
    if key not in line:
        raise ValueError(f"{key} is not there; write an object such as {_EXAMPLE}")
    value = line[key]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{key}={shown(value)} is no whole number from {least} to {most}")
    return value


def _plain(line: Mapping[str, Any]) -> tuple[int, int, int]:
    return _count(line, "prefix", 0), _count(line, "new", 1), _count(line, "concurrency", 1, MOST_REQUESTS)


class _Mooncake:
    """Lines of a Mooncake trace, in their order; it remembers the blocks of those before."""

    def __init__(self) -> None:
        self._cached = set[int]()

    def __call__(self, line: Mapping[str, Any]) -> tuple[int, int, int]:
        tokens, blocks = _count(line, "input_length", 1), line.get("hash_ids")
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise ValueError(f"hash_ids={shown(blocks)} is no list of whole numbers, as every line of a Mooncake trace has one")
        if len(blocks) != -(-tokens // BLOCK):
            raise ValueError(f"{len(blocks)} hash_ids of {BLOCK} tokens are not input_length={tokens}")
        known = next((place for place, block in enumerate(blocks) if block not in self._cached), len(blocks))
        self._cached.update(blocks)
        prefix = min(known * BLOCK, tokens - 1)
        return prefix, tokens - prefix, 1


def _fitting(row: tuple[int, int, int]) -> tuple[int, int, int]:
    """Raises:
    ValueError: more tokens than a batch may have.
    """
    prefix, new, requests = row
    if requests * (prefix + new) > MOST_TOKENS:
        raise ValueError(f"{requests} x {prefix + new} tokens are more than {MOST_TOKENS >> 20}m, the most that a batch may have")
    return row


# -- reducing ----------------------------------------------------------------------------------------------------------


def added(rows: Ints) -> Floats:
    """What each line adds to each of ``TOTALS``, (lines, 5). A new token sees the prefix and the new ones up to itself."""
    prefix, new, requests = rows.astype(np.float64).T
    pairs = new * (prefix + (new + 1) / 2)
    return np.stack([np.ones_like(new), requests, requests * new, requests * prefix, requests * pairs], axis=1)


@dataclass(frozen=True)
class Weighted:
    """A batch of equal requests that stands for ``weight`` lines of a trace; in tokens."""

    prefix: int
    new: int
    requests: int
    weight: float

    @property
    def batch(self) -> Batch:
        return Batch((Requests(self.requests, self.new, self.prefix + self.new),))


def reduced(lines: Ints, most: int) -> tuple[Weighted, ...]:
    """At most ``most`` batches with weights whose ``TOTALS`` are those of the lines within ``TOLERANCE``, as many as may be.

    Lines are parted into clusters, and a cluster becomes one batch of the mean requests, new tokens and prefix of its lines.
    Weights are the numbers of lines, moved as little as gives the totals.

    Args:
        lines: (lines, 3), as ``read`` gives them.

    Raises:
        ValueError: so few cannot have these totals; names the least number that can.
    """
    kinds, counts = np.unique(lines, axis=0, return_counts=True)
    sums = added(kinds) * counts[:, None]
    aim, best = sums.sum(axis=0), None
    for labels in _clusters(kinds, sums / np.where(aim > 0, aim, 1.0)):
        clusters = int(labels.max()) + 1
        clustered = np.stack([np.bincount(labels, column) for column in sums.T], axis=1)
        rows, place = np.unique([_mean(*cluster[:4]) for cluster in clustered], axis=0, return_inverse=True)
        found = _with_weights(rows, np.bincount(place.ravel(), clustered[:, 0]).astype(np.float64), aim)
        if clusters > most and best is not None:
            break
        if errors(found, aim).max() > TOLERANCE:
            continue
        best = found
        if clusters > most:
            raise ValueError(f"too few batches for the totals of all lines within {TOLERANCE:.0%}; the least is {clusters}")
    assert best is not None, "where each line has a batch, all totals are right"
    return best


def errors(cells: Sequence[Weighted], aim: Floats) -> Floats:
    """How far weighted totals are from ``aim``, each as a share of it, (5,)."""
    have = added(np.array([(cell.prefix, cell.new, cell.requests) for cell in cells]))
    return np.abs(np.array([cell.weight for cell in cells]) @ have - aim) / np.where(aim > 0, aim, 1.0)


def _clusters(kinds: Ints, shares: Floats) -> Iterator[NDArray[np.intp]]:
    """The cluster of every different line: first of few clusters, then of one more each time, until each line is its own.

    What attention runs in different ways stays apart from the beginning: lines without a prefix, and with one new token. Then the
    cluster with the greatest spread is cut in two where that takes most of it, in one of three logarithms: of keys, new tokens and
    requests. A line counts by its mean share of the totals (SciPy's k-means and linkage take no weights).

    Args:
        shares: what each line adds to each total, as a share of it.
    """
    prefix, new, requests = kinds.T
    points, weight = np.log2(np.stack([prefix + new, new, requests], axis=1)), shares.mean(axis=1)
    _, labels = np.unique(2 * (prefix > 0) + (new > 1), return_inverse=True)
    cuts = {label: _cut(points, weight, np.flatnonzero(labels == label)) for label in range(labels.max() + 1)}
    yield labels
    while any(len(right) for _, _, right in cuts.values()):
        label = max(cuts, key=lambda label: cuts[label][0])
        _, left, right = cuts[label]
        labels = labels.copy()
        labels[right] = len(cuts)
        cuts |= {label: _cut(points, weight, left), len(cuts): _cut(points, weight, right)}
        yield labels


def _cut(points: Floats, weight: Floats, members: NDArray[np.intp]) -> tuple[float, NDArray[np.intp], NDArray[np.intp]]:
    """The best cut of a cluster: the sum of squares that it takes away, and its two sides; of one point none, -1."""
    best = -1.0, members, members[:0]
    for column in points[members].T:
        order = np.argsort(column, kind="stable")
        x, w = column[order] - column.mean(), weight[members[order]]
        left, moment = np.cumsum(w)[:-1], np.cumsum(w * x)[:-1]
        right, rest = w[::-1].cumsum()[::-1][1:], (w * x)[::-1].cumsum()[::-1][1:]
        taken = np.where(np.diff(x) > 0, left * right * (moment / left - rest / right) ** 2 / (left + right), -1.0)
        place = int(taken.argmax()) if len(taken) else 0
        if len(taken) and taken[place] > best[0]:
            best = float(taken[place]), members[order[: place + 1]], members[order[place + 1 :]]
    return best


def _mean(passes: float, requests: float, new: float, prefix: float) -> tuple[int, int, int]:
    """Prefix, new tokens and requests of the mean line of a cluster, of the same kind as its lines are."""
    fresh, cached = round(new / requests), max(1, round(prefix / requests)) if prefix else 0
    return cached, fresh, min(round(requests / passes), MOST_TOKENS // (cached + fresh))


def _with_weights(rows: Ints, lines: Floats, aim: Floats) -> tuple[Weighted, ...]:
    """Batches with weights that give the totals and are as near to the lines of their clusters as that allows."""
    from scipy.optimize import nnls  # which plans without a trace do without

    scale = np.where(aim > 0, aim, 1.0)
    system = np.vstack([EXACT * (added(rows) * lines[:, None] / scale).T, np.eye(len(rows))])
    factors, _ = nnls(system, np.concatenate([EXACT * aim / scale, np.ones(len(rows))]))
    found = zip(rows.tolist(), (factors * lines).tolist(), strict=True)
    return tuple(Weighted(prefix, new, requests, weight) for (prefix, new, requests), weight in found if weight > 0)
