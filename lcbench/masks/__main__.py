"""``python -m lcbench.masks``: lcbench/commands/masks.py."""

from lcbench.commands.masks import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
