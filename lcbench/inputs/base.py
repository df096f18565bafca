"""What inputs are: every rank and every layout sees rows of the same global tensors, and no rank ever holds these whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcbench.masks.band import Ints
from lcbench.problem import Mesh, Problem

if TYPE_CHECKING:
    import torch

MOST_CRITICAL = 0.6  # share of keys that hold 90 % of a row's weight where there is no structure, about


@dataclass(frozen=True)
class Wanted:
    """Rows of one global tensor that a rank wants.

    Attributes:
        name: ``q``, ``k``, ``v`` or ``dout``.
        tokens: global indices, any order: of queries for q and dout, of keys for k and v.
        problem: of the context-parallel group.
        seed: of the cell.
        device: where they are to be.
        group: (dp, tp) index of the context-parallel group: others have other data, or other heads of the same.
        heads: those of the tensor that are wanted, adjacent; None: all.
        layer: others have other data.
        step: of a series of passes whose inputs change a little from one to the next, as those of a diffusion model's steps do.
    """

    name: str
    tokens: Ints
    problem: Problem
    seed: int
    device: torch.device
    group: tuple[int, int] = (0, 0)
    heads: range | None = None
    layer: int = 0
    step: int = 0


@dataclass(frozen=True)
class Inputs(ABC):
    """A way to make q, k, v and dout, and its options."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot make the inputs of a problem, stored word for word in the skipped result; None: it can."""
        return None

    def misfit(self, mesh: Mesh) -> str | None:
        """Why it has no inputs for such groups of ranks; None: it has."""
        return None

    def layers(self, problem: Problem) -> int | None:
        """How many layers it has inputs of, for a problem that it takes; None: any number."""
        return None

    def missing(self) -> str | None:
        """Why it does not run in this process: which library is not installed."""
        return None

    def states(self, problem: Problem, seed: int, group: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """What it makes of a problem, for the provenance of results; empty: its name and options say it."""
        return {}

    @abstractmethod
    def draw(self, wanted: Wanted) -> torch.Tensor:
        """q (T, Hq, D), dout (T, Hq, Dv), k (T, Hk, D) or v (T, Hk, Dv) in the problem's type: rows of the one global tensor of
        that name, whichever rank asks. Of latent heads v is a view of k's numbers.
        """
