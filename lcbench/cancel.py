"""``python -m lcbench.cancel``: lcbench/commands/cancel.py."""

from lcbench.commands.cancel import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
