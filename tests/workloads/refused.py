"""What is asked of a check of training steps that is to refuse a fault."""

from __future__ import annotations

from lcbench.measure.measured import Measured


def assert_refused(found: Measured, part: str, where: str) -> None:
    """The check refuses what was measured, and this part of it is one that sees why."""
    assert found.check is not None, f"{where}: {found.unavailable}"
    assert found.check.failures, f"{where}: not refused; {found.check.ratios}"
    worst = {key: max(ratios.values()) for key, ratios in found.check.ratios.items()}
    assert worst[part] > 1, f"{where}: seen by others than {part}: {worst}"
