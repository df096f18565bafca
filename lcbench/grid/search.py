"""A search for the longest length that fits: what is asked for, which lengths are looked at, and which of them comes next."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lcbench.grid.cell import Cell
from lcbench.grid.values import parse_limit_number, parse_tokens, shown
from lcbench.problem import format_tokens

CELLS = 8  # of a choice, at most
# With so many lengths there are 2^CELLS outcomes: none fits, or the shortest, or the two shortest, and so on.
MOST_LENGTHS = 2**CELLS - 1
GIB = 1 << 30


@dataclass(frozen=True)
class Search:
    """What ``search=max_seqlen`` asks for.

    Attributes:
        name: of its file in conf/search.
        shortest, longest: tokens between which is looked, both included.
        cap_bytes: what a rank may need; None: what the device has.
    """

    name: str
    shortest: int
    longest: int
    cap_bytes: float | None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Search:
        """From the composed ``search`` of a command.

        Raises:
            ValueError: an option that there is not or that is not set, or a value that is none; one line.
        """
        options = {"from", "to", "gib"}
        if wrong := sorted({*config, "name"} ^ {*options, "name"}):
            said = "is not set" if wrong[0] in options else "is no option of it; it has from, to, gib"
            raise ValueError(f"search={shown(config.get('name'))}: search.{wrong[0]} {said}")
        shortest, longest = (parse_tokens(config[name], f"search.{name}") for name in ("from", "to"))
        if shortest > longest:
            raise ValueError(f"search.from={shown(config['from'])} is more than search.to={shown(config['to'])}")
        gib = parse_limit_number(config["gib"], "search.gib")
        return cls(str(config["name"]), shortest, longest, None if gib is None else gib * GIB)

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> Search:
        """What ``note`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        made = cls(str(note["name"]), int(note["shortest"]), int(note["longest"]), float(note["cap_bytes"]))
        if not 1 <= made.shortest <= made.longest or not made.cap_bytes or made.cap_bytes <= 0:
            raise ValueError(f"no search: {dict(note)}")
        return made

    def note(self) -> dict[str, Any]:
        """As a sweep's manifest keeps it."""
        return asdict(self)

    def lengths(self, ranks: int) -> tuple[int, ...]:
        """The lengths that are looked at for a context-parallel group of so many ranks, ascending: whole multiples of two tokens a
        rank, so that every layout gives every rank as many.

        Between a length and its double lie as many steps, all of the same size, as ``MOST_LENGTHS`` allow, a power of two.

        Raises:
            ValueError: there is none between the two ends.
        """
        unit, found = 2 * ranks, set[int]()
        steps = 1
        while (finer := self._lengths(unit, steps)) != found and len(finer) <= MOST_LENGTHS:
            found, steps = finer, 2 * steps
        if not found:
            raise ValueError(
                f"search.from={format_tokens(self.shortest)} search.to={format_tokens(self.longest)}: no multiple of {unit} tokens "
                f"lies between, which is two tokens for each of {ranks} ranks"
            )
        return tuple(sorted(found))

    def _lengths(self, unit: int, steps: int) -> set[int]:
        found, base = {self.longest // unit * unit}, self.shortest
        while base <= self.longest:
            found |= {base * (steps + i) // steps // unit * unit for i in range(steps)}
            base *= 2
        return {tokens for tokens in found if self.shortest <= tokens <= self.longest and tokens}


def at(cell: Cell, tokens: int) -> Cell:
    """The same cell at another length.

    Raises:
        ValueError: its lengths are those of a batch.
    """
    if cell.batch is not None:
        raise ValueError(f"batch={cell.batch} has its lengths: its cells have no other length")
    return Cell.from_config({**cell.config, "seqlen": tokens})


def resolution(lengths: Iterable[int]) -> float:
    """The largest step between neighbouring lengths, as a share of the shorter one; 0 of a single length."""
    return max((b / a - 1 for a, b in pairwise(lengths)), default=0.0)


@dataclass(frozen=True)
class Bracket:
    """What is known of which lengths fit. Outcome i says that the i shortest fit and no others.

    Attributes:
        lengths: ascending.
        low, high: the outcomes that may yet be so are those from ``low`` to ``high``.
    """

    lengths: tuple[int, ...]
    low: int
    high: int

    @classmethod
    def between(cls, lengths: tuple[int, ...], inside: int | None, beyond: int | None) -> Bracket:
        """Where one length fits and a longer one does not, neither of which need be of ``lengths``; None: none is known."""
        return cls(
            lengths, 0 if inside is None else bisect_right(lengths, inside),
            len(lengths) if beyond is None else bisect_left(lengths, beyond),
        )  # fmt: skip

    @property
    def closed(self) -> bool:
        return self.low == self.high

    def next(self, used: int = 0, expected: tuple[int, int] | None = None) -> int:
        """The length to look at next, where the bracket is not closed.

        After any answers to what this asks, the bracket is closed with the ``CELLS``-th at the latest, if there are no more than
        ``MOST_LENGTHS`` and ``used`` have been looked at so far. What is expected moves the question only as far as that allows.

        Args:
            expected: the first and last outcome of those that are likely.
        """
        asks = self._likely(expected) if expected is not None else self._middle(self.low, self.high)
        left = max(CELLS - used, (self.high - self.low).bit_length())
        half = 1 << (left - 1)
        return self.lengths[min(max(asks, self.high + 1 - half), self.low + half) - 1]

    def _likely(self, expected: tuple[int, int]) -> int:
        first, last = max(self.low, expected[0]), min(self.high, expected[1])
        if first > last:
            return self._middle(self.low, self.high)
        if first < last:
            return self._middle(first, last)
        # One outcome is left: its length is asked first, and then the next longer one.
        return first if first > self.low else first + 1

    @staticmethod
    def _middle(first: int, last: int) -> int:
        return (first + last + 1) // 2
