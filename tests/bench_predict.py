"""How well this machine's CPU ranks are predicted: fitted on 12 measured cells, held against 60 others. ``make bench``.

    python -m tests.bench_predict                    # measures both sweeps in a folder of its own, in some ten minutes
    python -m tests.bench_predict --results FOLDER   # in this folder; what has been measured there stays
    python -m tests.bench_predict --results FOLDER --again   # measures once more; the fastest blocks of all count
    python -m tests.bench_predict --cpu-seconds      # where others use the machine: what ranks with one thread compute for

The exit code is 1 if predictions are worse than they must be (``tests/predict/held_out.py``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from lcbench.predict.fit import fit
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.runs.store import Sweep
from tests.predict import cpu_seconds, held_out

ROOT = Path(__file__).parents[1]
ITERATIONS = 5


def measure(root: Path, *, again: bool) -> None:
    """Measure the cells of both sweeps below ``root``.

    Raises:
        subprocess.CalledProcessError: a cell has no good result.
    """
    for name, grids in (("fit", [held_out.FIT]), ("others", held_out.OTHERS)):
        for grid in grids:
            more = [
                f"sweep={name}",
                f"results={root}",
                f"tracking_uri=sqlite:///{root}/mlflow.db",
                f"force={again}",
                "output=quiet",
            ]
            subprocess.run([sys.executable, "-m", "lcbench.sweep", "-m", *grid, *more], cwd=ROOT, check=True)


def of_sweeps(root: Path) -> tuple[list[CellTime], list[CellTime]]:
    """(to fit on, others)."""
    seen, others = (held_out.of_sweep(Sweep(root, name)) for name in ("fit", "others"))
    return seen, others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder of results; by default one that is gone afterwards")
    parser.add_argument("--again", action="store_true", help="measure all cells once more")
    parser.add_argument("--cpu-seconds", action="store_true", help="of ranks with one thread each, instead of sweeps")
    parser.add_argument("--write", type=Path, help="keep the times in this file")
    options = parser.parse_args()
    if options.cpu_seconds:
        wanted = held_out.cells(held_out.FIT)
        times = cpu_seconds.measured([*wanted, *held_out.cells(*held_out.OTHERS)], ITERATIONS)
        seen, others = times[: len(wanted)], times[len(wanted) :]
    else:
        with tempfile.TemporaryDirectory() as folder:
            root = (options.results or Path(folder)).absolute()
            measure(root, again=options.again)
            seen, others = of_sweeps(root)
    if options.write:
        clock = "CPU seconds of ranks with one thread" if options.cpu_seconds else "sweeps"
        held_out.write(options.write, {"fit": seen, "others": others}, held_out.provenance(clock=clock))
    rows = held_out.judged(fit(seen, machine_of("this"), folds=1), others, one_thread=options.cpu_seconds)
    print(held_out.table(rows))
    return 0 if held_out.holds(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
