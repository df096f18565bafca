"""``python -m lcbench.sweep``: lcbench/commands/sweep.py."""

from lcbench.commands.sweep import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
