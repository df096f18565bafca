"""``python -m lcbench.status``: lcbench/commands/status.py."""

from lcbench.commands.status import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
