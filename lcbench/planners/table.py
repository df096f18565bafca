"""What documents take at the degrees that a planner looks at."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lcbench.planners.base import Cost, Documents, Fleet, Floats, Infeasible
from lcbench.planners.packing import Seconds

FEW = 8  # degrees, of which all are looked at


@dataclass(frozen=True, eq=False)
class Table:
    """What documents take at each degree that a planner looks at.

    Attributes:
        degrees: ascending.
        each_s: of each degree, (n,), by the method that is fastest for each document; infinite where so many ranks cannot share or
            hold it.
        overhead_s: of a group of each degree.
    """

    fleet: Fleet
    known: Seconds
    degrees: tuple[int, ...]
    each_s: dict[int, Floats] = field(repr=False)
    overhead_s: dict[int, float]

    @classmethod
    def of(cls, documents: Documents, fleet: Fleet, cost: Cost) -> Table:
        """With all degrees that the cost knows, or, where these are more than ``FEW``, with the powers of two and,
        where those do not hold a document, the fewest ranks that do.

        Raises:
            Infeasible: a document that no degree holds.
        """
        known = Seconds(documents, cost)
        possible = [degree for degree in cost.degrees if degree <= fleet.ranks]
        usual = possible if len(possible) <= FEW else [degree for degree in possible if not degree & (degree - 1)]
        table: dict[int, Floats] = {}
        homeless = np.ones(len(documents), dtype=np.bool_)
        for degree in [*usual, *(one for one in possible if one not in usual)]:
            if degree not in usual and not homeless.any():
                break
            held = documents.tokens <= degree * fleet.capacity
            seconds = np.where(held, known.by_method(degree).min(axis=0), np.inf)
            if np.isfinite(seconds[homeless] if degree not in usual else seconds).any():
                table[degree] = seconds
                homeless &= ~np.isfinite(seconds)
        if homeless.any():
            number = int(np.where(homeless, documents.tokens, -1).argmax())
            raise Infeasible(
                f"document {number} has {documents.tokens[number]} tokens: no method shares it among at most {fleet.ranks} ranks "
                f"that hold {fleet.capacity} each"
            )
        degrees = tuple(sorted(table))
        return cls(fleet, known, degrees, table, {degree: cost.overhead_s(degree) for degree in degrees})

    @property
    def documents(self) -> Documents:
        return self.known.documents
