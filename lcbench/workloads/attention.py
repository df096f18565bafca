"""Stands in for the workload of the same name until it is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """One attention call, forward and, where it is asked for, backward."""

    def unsupported(self) -> str | None:
        return None

    def work(self) -> None: ...

    def start(self) -> None: ...
