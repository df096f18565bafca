"""The unknowns of a fit: positive numbers by their paths, each with what is believed of it before anything was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lcbench.predict.fitted import Coefficients, DenseFit, Factor, KernelFit, MachineFit
from lcbench.schedule.machine import Collective, Machine

Key = tuple[str, ...]
GUESSED = 2.0  # how far from a guess, in logarithms, an unknown may well be of which nobody has measured anything
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Unknown:
    """A number above 0.

    Attributes:
        value: where the search begins; what it stays at where nothing that was measured depends on it.
        width: how far from it, in natural logarithms, it may well be.
    """

    value: float
    width: float


@dataclass(frozen=True)
class Unknowns:
    """All unknowns of a fit on a machine.

    Attributes:
        of: by path: ``kernel <name> <dtype> <phase> <coefficient>``, ``link <inside|across> <number>``,
            ``collective <operation> <number>``, ``machine <number>``,
            ``dense <dtype> <number>``, ``factor <strategy> <phase> <number>``.
    """

    machine: Machine
    of: dict[Key, Unknown]

    def with_values(self, values: dict[Key, float], width: float | None = None) -> Unknowns:
        """The same, at other values; ``width``: how sure these are, None: as it was."""
        changed = {p: replace(self.of[p], value=v, width=self.of[p].width if width is None else width) for p, v in values.items()}
        return replace(self, of=self.of | changed)

    def below(self, *path: str) -> dict[str, float]:
        """Values of the paths that begin so, by what follows."""
        return {p[len(path)]: u.value for p, u in self.of.items() if p[: len(path)] == path and len(p) == len(path) + 1}

    def kernel(self, name: str, dtype: str, strategy: str = "", sources: Iterable[str] = ()) -> KernelFit:
        """A kernel as an implementation of a strategy calls it."""
        said = name, dtype, strategy, tuple(sources)
        if said not in self._kernels:
            self._kernels[said] = self._kernel(*said)
        return self._kernels[said]

    @cached_property
    def _kernels(self) -> dict[tuple[str, str, str, tuple[str, ...]], KernelFit]:
        """Those that were asked for: every cell of a fit asks, at values that few cells have for themselves."""
        return {}

    def _kernel(self, name: str, dtype: str, strategy: str, sources: tuple[str, ...]) -> KernelFit:
        forward, backward = (Coefficients(**self.below("kernel", name, dtype, phase)) for phase in PHASES)
        factors = (self.factor(strategy, "forward"), self.factor(strategy, "backward"))
        return KernelFit(
            kernel=name, dtype=dtype, forward=forward, backward=backward, factors=factors, sources=sources,
            cores=self.machine.cores,
        )  # fmt: skip

    def dense(self, dtype: str, sources: Iterable[str] = ()) -> DenseFit:
        """What treats every token alone; of a type that no cell has: nothing takes any time."""
        return DenseFit(dtype=dtype, **({"flop_s": 0.0, "byte_s": 0.0} | self.below("dense", dtype)), sources=tuple(sources))

    def factor(self, strategy: str, phase: str) -> Factor:
        return Factor.model_validate(self.below("factor", strategy, phase))

    def links(self) -> MachineFit:
        """What stands in the place of the machine's own numbers."""
        said: dict[str, Any] = dict(self.below("machine"))
        for name in ("inside", "across"):
            if found := self.below("link", name):
                said[name] = replace(getattr(self.machine, name), **found)
        operations = {p[1] for p in self.of if p[0] == "collective"}
        said["collectives"] = {
            name: replace(self.machine.collectives.get(name, Collective()), **self.below("collective", name))
            for name in sorted(operations)
        }
        return MachineFit(**said)

    def fitted(self) -> Machine:
        """The machine at these values."""
        return self._fitted

    @cached_property
    def _fitted(self) -> Machine:
        return self.links().of(self.machine)


def kernel_unknowns(
    name: str, dtype: str, guess: dict[str, Coefficients], width: float, widths: dict[str, float]
) -> dict[Key, Unknown]:
    """The unknowns of a kernel; ``guess``: by phase; ``widths``: of coefficients that are known better than ``width``."""
    return {
        ("kernel", name, dtype, phase, coefficient): Unknown(value, widths.get(coefficient, width))
        for phase, coefficients in guess.items() for coefficient, value in coefficients
    }  # fmt: skip
