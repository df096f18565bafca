"""``python -m lcbench.sync``: lcbench/commands/sync.py."""

from lcbench.commands.sync import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
