"""``python -m lcbench.kernels``: lcbench/commands/kernels.py."""

from lcbench.commands.kernels import main
from lcbench.report.ending import run

if __name__ == "__main__":
    run(main)
