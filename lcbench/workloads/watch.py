"""When parts of a pass begin and end, without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Watch:
    """Begin and end of spans, by what they are of."""

    cuda: bool
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        """The host's time, or an event in the device's stream, for which nothing waits."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds of all spans of a name; on CUDA after the device has done all."""
        found: dict[str, float] = {}
        for name, begun, ended in self.spans:
            found[name] = found.get(name, 0.0) + self.between(begun, ended)
        return found

    def between(self, begun: Any, ended: Any) -> float:
        """Seconds from one moment to another; on CUDA it waits for the device."""
        if not self.cuda:
            return float(ended - begun)
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3
