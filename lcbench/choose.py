"""``python -m lcbench.choose``: lcbench/commands/choose.py."""

from lcbench.commands.choose import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
