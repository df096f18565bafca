"""``python -m lcbench.lengths``: lcbench/commands/lengths.py."""

from lcbench.commands.lengths import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
