"""``python -m lcbench.plan``: lcbench/commands/plan.py."""

from lcbench.commands.plan import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
