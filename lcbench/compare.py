"""``python -m lcbench.compare``: lcbench/commands/compare.py."""

from lcbench.commands.compare import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
