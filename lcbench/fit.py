"""``python -m lcbench.fit``: lcbench/commands/fit.py."""

from lcbench.commands.fit import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
