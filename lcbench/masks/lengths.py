"""Document lengths: distributions that fill a sequence with documents, packed back to back, always to exactly its length."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lcbench.masks.band import DoesNotFit, Ints
from lcbench.masks.text import read_text

Weighing = Literal["documents", "tokens"]
DIGITS = 12  # of a length in a file


class Lengths(Protocol):
    """A distribution of document lengths."""

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        """Lengths in tokens, each at least 1, that add up to ``seqlen`` or more. An argument ``draw``, where there is one, is the
        number of the draw, from 0 on (``mask.samples``).

        Raises:
            DoesNotFit: lengths that cannot make up this ``seqlen``.
        """
        ...


def knows_draws(lengths: Lengths | type[Lengths]) -> bool:
    """Whether lengths are told the number of a draw, so that one draw may fit where another does not."""
    return "draw" in inspect.signature(lengths.sample).parameters


def document_bounds(seqlen: int, lengths: Lengths, seed: Sequence[int]) -> Ints:
    """Offsets 0 = b0 < b1 < ... = seqlen of documents in tokens; the last one drawn is cut where the sequence ends.

    Args:
        seed: the cell's, and the number of the draw.

    Raises:
        DoesNotFit: lengths that cannot make up this ``seqlen``.
        ValueError: a document without a token.
    """
    more: dict[str, Any] = {"draw": seed[1]} if knows_draws(lengths) else {}
    sizes = np.asarray(lengths.sample(seqlen, np.random.default_rng(seed), **more))
    if len(sizes) and sizes.min() < 1:
        raise ValueError(f"a document of {sizes.min()} tokens; each has at least 1")
    ends = np.cumsum(sizes)
    return np.concatenate([[0], ends[ends < seqlen], [seqlen]]).astype(np.int64)


@dataclass(frozen=True)
class Fixed:
    """Every document ``length`` tokens."""

    length: int

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        return np.full(-(-seqlen // self.length), self.length, dtype=np.int64)


@dataclass(frozen=True)
class Uniform:
    """Every length from ``low`` to ``high``, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"lengths.low={self.low} is above lengths.high={self.high}")

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        return _until(seqlen, (self.low + self.high) / 2, lambda n: random.integers(self.low, self.high + 1, n))


@dataclass(frozen=True)
class LogNormal:
    """``median`` tokens, ``sigma`` of the logarithm, none longer than ``high``."""

    median: int
    sigma: float
    high: int

    def __post_init__(self) -> None:
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float) or not 0 < self.sigma <= 10:
            raise ValueError(f"lengths.sigma={self.sigma} is no number above 0 and up to 10, such as 1.1")

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        mean = min(self.high, self.median * math.exp(self.sigma**2 / 2))

        def some(count: int) -> Ints:
            lengths = np.exp(random.normal(math.log(self.median), self.sigma, count)).clip(1, self.high)
            return np.rint(lengths).astype(np.int64)

        return _until(seqlen, mean, some)


@dataclass(frozen=True)
class Histogram:
    """Buckets ``[edges[i], edges[i+1])`` of tokens with ``weights``; inside a bucket every length is equally likely.

    ``by``: whether a weight is a share of the ``documents`` or of the ``tokens``.
    """

    edges: list[int]
    weights: list[float]
    by: Weighing = "documents"

    def __post_init__(self) -> None:
        if self.by not in ("documents", "tokens"):
            raise ValueError(f"lengths.by={self.by} is neither documents nor tokens")
        if len(self.edges) != len(self.weights) + 1 or len(self.weights) < 1:
            raise ValueError(f"lengths.edges must be one more than the {len(self.weights)} lengths.weights, not {len(self.edges)}")
        if min(self.edges) < 1 or any(a >= b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"lengths.edges={self.edges} must rise from 1 or more")
        if min(self.weights) < 0 or not sum(self.weights) > 0:
            raise ValueError(f"lengths.weights={self.weights} must not be negative and not all 0")

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        low, high = np.array(self.edges[:-1]), np.array(self.edges[1:])
        middle = (low + high - 1) / 2
        weights: NDArray[np.float64] = np.array(self.weights, dtype=float)
        if self.by == "tokens":
            weights = weights / middle
        weights /= weights.sum()

        def some(count: int) -> Ints:
            bucket = random.choice(len(weights), count, p=weights)
            return random.integers(low[bucket], high[bucket])

        return _until(seqlen, float(weights @ middle), some)


@dataclass(frozen=True)
class Packed:
    """A stream of documents cut into packs, as a data loader lays them: ``seqlen`` tokens from anywhere in it.

    Documents are of ``lengths``, each as often as its weight among ``documents``. One longer than a pack's ``parts``-th part is cut
    into such parts and a rest, all are shuffled, and a pack begins where the one before it ended, maybe inside of a document.
    """

    lengths: list[int]
    documents: list[float]
    parts: int = 4

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.documents) or not self.lengths:
            raise ValueError(
                f"lengths.documents must be as many as the {len(self.lengths)} lengths.lengths, not {len(self.documents)}"
            )
        if min(self.lengths) < 1:
            raise ValueError(f"lengths.lengths={self.lengths} must be at least 1")
        if min(self.documents) < 0 or not sum(self.documents) > 0:
            raise ValueError(f"lengths.documents={self.documents} must not be negative and not all 0")

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        longest = seqlen // self.parts
        if not longest:
            raise DoesNotFit(f"seqlen={seqlen} has no {self.parts} parts (lengths.parts)")
        lengths = np.array(self.lengths, dtype=np.int64)
        weights: NDArray[np.float64] = np.array(self.documents, dtype=float)
        weights /= weights.sum()

        def some(count: int) -> Ints:
            drawn = lengths[random.choice(len(lengths), count, p=weights)]
            parts = np.concatenate([np.full(int((drawn // longest).sum()), longest), drawn[drawn % longest > 0] % longest])
            random.shuffle(parts)
            return parts

        pieces = _until(seqlen + longest, float(weights @ lengths), some)
        ends = np.cumsum(pieces)
        begin = int(random.integers(0, longest))
        return np.diff(np.concatenate([[begin], ends[ends > begin]]))


@dataclass(frozen=True)
class Explicit:
    """The lengths themselves, in this order; they must add up to the sequence."""

    values: list[int]

    def sample(self, seqlen: int, random: np.random.Generator) -> Ints:
        if sum(self.values) != seqlen:
            raise DoesNotFit(f"lengths.values add up to {sum(self.values)} tokens, seqlen is {seqlen}")
        return np.array(self.values, dtype=np.int64)


@dataclass(frozen=True)
class FromFile:
    """The lengths of a file, in its order, as a data loader gave them out; nothing of it is drawn twice.

    Blank lines separate batches: draw i has batch i, of which what is beyond ``seqlen`` is cut off. Without any the documents are a
    stream: draw i begins where draw i - 1 ended, maybe inside of a document.

    Attributes:
        file: one length in tokens per line; what follows a ``#`` is a comment (``batches_of``).

    Raises:
        ValueError: there is no such file, or a line of it is no length.
    """

    file: str

    def __post_init__(self) -> None:
        _ = self._batches  # read now, so that a bad line is found before any job

    @cached_property
    def _batches(self) -> tuple[Ints, ...]:
        return tuple(np.array(batch, dtype=np.int64) for batch in batches_of(Path(self.file), _whole))

    def sample(self, seqlen: int, random: np.random.Generator, *, draw: int) -> Ints:
        if len(self._batches) == 1:
            return self._of_stream(seqlen, draw)
        if draw >= len(self._batches):
            raise DoesNotFit(f"lengths.file has {len(self._batches)} batches, and mask.samples wants a batch {draw + 1}")
        batch = self._batches[draw]
        if batch.sum() < seqlen:
            raise DoesNotFit(f"batch {draw + 1} of lengths.file has {batch.sum()} tokens, fewer than seqlen={seqlen}")
        return batch

    def _of_stream(self, seqlen: int, draw: int) -> Ints:
        ends = np.cumsum(self._batches[0])
        begin = draw * seqlen
        if begin + seqlen > ends[-1]:
            wanted = f"draw {draw + 1} of seqlen={seqlen} ends at token {begin + seqlen}"
            raise DoesNotFit(
                f"lengths.file has {ends[-1]} tokens, and {wanted}; python -m lcbench.lengths fits a profile to a file"
            )
        return np.diff(np.concatenate([[begin], ends[ends > begin]]))


def batches_of(path: Path, read: Callable[[str], int]) -> list[list[int]]:
    """Batches of document lengths of a text file, one length per line. Blank lines separate batches, and ``#`` begins a comment,
    which a line may consist of.

    Args:
        read: a line's length in tokens; raises ValueError.

    Raises:
        ValueError: no file, a line that is no length, which it names, or no lengths at all.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; write one length per line into it")
    batches: list[list[int]] = [[]]
    for number, line in enumerate(read_text(path).splitlines(), 1):
        said, comment, _ = line.partition("#")
        if said.strip():
            try:
                batches[-1].append(read(said.strip()))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        elif batches[-1] and not comment:
            batches.append([])
    if not batches[0]:
        raise ValueError(f"{path} holds no lengths; write one per line")
    return [batch for batch in batches if batch]


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= DIGITS and int(text)):
        raise ValueError(f"length={text} is no whole number of tokens of at least 1, such as 4096")
    return int(text)


def fit(lengths: Sequence[int]) -> Histogram:
    """The histogram of a list of document lengths, in tokens: two buckets per doubling, weights in documents.

    Raises:
        ValueError: no lengths, or one below 1.
    """
    values = np.array(lengths, dtype=np.int64)
    if not len(values) or values.min() < 1:
        raise ValueError("document lengths must be whole numbers of at least 1, and there must be one")
    steps = np.arange(math.floor(2 * math.log2(values.min())), math.ceil(2 * math.log2(values.max() + 1)) + 1)
    edges = np.unique(np.rint(2.0 ** (steps / 2)).astype(np.int64))
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max() + 1)
    counts, _ = np.histogram(values, bins=np.append(edges[:-1], edges[-1] - 0.5))
    kept = np.nonzero(counts)[0]
    first, last = kept[0], kept[-1]
    # What is seen bounds what is drawn.
    edges = edges[first : last + 2]
    edges[0], edges[-1] = max(edges[0], values.min()), min(edges[-1], values.max() + 1)
    return Histogram(edges.tolist(), [float(c) for c in counts[first : last + 1]])


def _until(seqlen: int, mean: float, some: Callable[[int], Ints]) -> Ints:
    """Lengths from ``some(count)`` until they fill ``seqlen``; mostly one call is enough."""
    lengths = np.empty(0, dtype=np.int64)
    while (missing := seqlen - int(lengths.sum())) > 0:
        lengths = np.concatenate([lengths, some(16 + int(1.1 * missing / mean))])
    return lengths
