"""Numbers for people: three significant digits, no exponent between 1e-3 and 1e15, a unit by size. Missing ones are empty text.

Stored values are in SI units and bytes; only what is shown passes through here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Number = float | int | None


@dataclass(frozen=True)
class Unit:
    """``size``: how much of the stored unit one of it is."""

    name: str
    size: float

    def of(self, value: Number, *, named: bool = True) -> str:
        """A stored value in this unit, with the unit's name behind it if ``named``; empty where there is none."""
        text = digits(None if value is None else value / self.size)
        return f"{text} {self.name}" if text and named else text


SECONDS = (Unit("ns", 1e-9), Unit("µs", 1e-6), Unit("ms", 1e-3), Unit("s", 1.0))
BYTES = (Unit("B", 1.0), Unit("KiB", 2.0**10), Unit("MiB", 2.0**20), Unit("GiB", 2.0**30), Unit("TiB", 2.0**40))
TFLOPS = (Unit("MFLOP/s", 1e-6), Unit("GFLOP/s", 1e-3), Unit("TFLOP/s", 1.0))
LARGE = (Unit("M", 1e6), Unit("G", 1e9), Unit("T", 1e12))  # of plain numbers


def digits(value: Number) -> str:
    """Of a number three significant digits: ``0.00123``, ``4.50``, ``989``, ``4540``, ``1.23M``; empty where there is none."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.2e}")
    if not 1e-3 <= abs(rounded) < 1e15:
        return f"{value:.2e}"
    if abs(rounded) >= 1e6:
        return unit_for(value, LARGE).of(value, named=True).replace(" ", "")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def unit_for(value: Number, ladder: tuple[Unit, ...]) -> Unit:
    """The largest unit of a ladder of which a value, rounded to three digits, is at least one; the smallest for less.

    For a column or an axis, ask with its largest value.
    """
    size = 0.0 if value is None or not math.isfinite(value) else abs(float(f"{value:.2e}"))
    # Rounded again: 1023.9 KiB are shown as 1020 KiB, but 0.9999 ms as 1.00 ms.
    return next((unit for unit in reversed(ladder) if float(f"{size / unit.size:.2e}") >= 1), ladder[0])


def duration(seconds: Number) -> str:
    """``1.23 ms``: ns, µs, ms or s."""
    return unit_for(seconds, SECONDS).of(seconds)


def size(count: Number) -> str:
    """``4.44 GiB``: of bytes, in powers of 1024."""
    return unit_for(count, BYTES).of(count)


def rate(tflops: Number) -> str:
    """``612 TFLOP/s``, and GFLOP/s below one: of TFLOP/s."""
    return unit_for(tflops, TFLOPS).of(tflops)


def times(ratio: Number) -> str:
    """``1.03x``: a ratio with two decimals up to ten, with three digits beyond."""
    if ratio is None or math.isnan(ratio):
        return ""
    return f"{ratio:.2f}x" if 0.005 <= ratio < 9.995 else f"{digits(ratio)}x"


def percent(share: Number, decimals: int = 1) -> str:
    """``62.5 %``: of a share, 0..1."""
    return "" if share is None or math.isnan(share) else f"{share * 100:.{decimals}f} %"


def more(ratio: Number) -> str:
    """``+2.4 %``: by how much a ratio is above one, ``-`` before what is below; as ``4.40x`` from twice on."""
    if ratio is None or math.isnan(ratio):
        return ""
    return times(ratio) if ratio >= 2 else f"{100 * (ratio - 1):+.1f} %"
