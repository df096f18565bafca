"""``python -m lcbench.logs``: lcbench/commands/logs.py."""

from lcbench.commands.logs import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
