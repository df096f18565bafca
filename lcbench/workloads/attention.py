"""Stands in for the workload of the same name until it is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """One attention call, forward and, where it is asked for, backward."""

    def start(self) -> None: ...
