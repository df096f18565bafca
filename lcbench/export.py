"""``python -m lcbench.export``: lcbench/commands/export.py."""

from lcbench.commands.export import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
