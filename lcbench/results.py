"""``lcbench.results.load`` and ``python -m lcbench.results``: lcbench/commands/results.py."""

from lcbench.commands.results import load, main
from lcbench.report.ending import run

__all__ = ["load", "main"]

if __name__ == "__main__":
    run(main)
