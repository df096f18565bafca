"""``python -m lcbench.cp``: lcbench/commands/cp.py."""

from lcbench.commands.cp import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
