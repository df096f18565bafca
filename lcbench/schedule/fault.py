"""What is wrong with a schedule, as text."""

from __future__ import annotations

from lcbench.schedule.schedule import Schedule


class ScheduleError(ValueError):
    """A strategy's schedule is wrong.

    Attributes:
        fault: one line: step, rank, and what is wrong there.
        grid: the schedule with an arrow at that step; empty where it is too large to read, or too wrong to be drawn.
    """

    def __init__(self, fault: str, grid: str = "") -> None:
        super().__init__(fault)
        self.fault, self.grid = fault, grid
        if grid:
            self.add_note(grid)  # of a traceback


def fault_at(schedule: Schedule, step: int, message: str) -> ScheduleError:
    """The error of a fault in a step, with the grid where it is small enough to read."""
    if schedule.world_size > 16 or len(schedule.steps) > 64:
        return ScheduleError(f"step {step}: {message}")
    lines = str(schedule).splitlines()
    lines[step + 1] += f"   <-- {message}"
    return ScheduleError(f"step {step}: {message}", "\n".join(lines))
