"""``python -m lcbench.rerun``: lcbench/commands/rerun.py."""

from lcbench.commands.rerun import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
