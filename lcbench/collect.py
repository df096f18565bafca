"""``python -m lcbench.collect``: lcbench/commands/collect.py."""

from lcbench.commands.collect import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
