"""``python -m lcbench.report``: lcbench/commands/report.py."""

from lcbench.commands.report import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
