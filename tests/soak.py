"""Sweeps on the development cluster with random faults, from a seed, for as long as is asked; then the counts. ``make soak``."""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.slurm.stage import FAULTS, ROOT, Server, Stage, TooLate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = Path(os.environ.get("LCBENCH_DEVCLUSTER_DIR", ROOT / ".devcluster")) / "slurm.conf"
    environment = {**os.environ, "SLURM_CONF": str(config)}
    chance = random.Random(options.seed)
    faults: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "mlflow")
        server.start()
        while time.monotonic() < end:
            number = counts["sweeps"] = counts["sweeps"] + 1
            stage = Stage(Path(folder) / f"results-{number}", server, environment, chance.randrange(1 << 30), cells=40)
            chosen = chance.choices(sorted(FAULTS), k=chance.choice((1, 2, 3)))
            print(f"{time.strftime('%H:%M:%S')} sweep {number}: {', '.join(chosen)}", flush=True)
            before: dict[str, float] = {}
            try:
                stage.run()
                with suppress(TooLate):  # what was hit before may have ended the sweep
                    for fault in chosen:
                        stage.reach_a_random_moment(after=len(before))
                        before = stage.measured()  # nothing of this may change
                        getattr(stage, fault)()
                        faults[fault] += 1
                counts["commands to the end"] += stage.bring_to_its_end()
                allowed = set().union(*(FAULTS[fault] for fault in chosen))
                if "kill_slurmctld" in chosen:
                    # If it had not saved that a job died of another fault, it takes it for running until its time limit.
                    allowed.add("timeout")
                stage.check(before, allowed)
            except Exception:  # the next sweep may tell more
                counts["sweeps with a complaint"] += 1
                traceback.print_exc()
                server.kill()
                server.start()
                stage.restart_daemons()
            for cell_id in stage.sweep.entries():
                for attempt in stage.sweep.attempts(cell_id):
                    classes[attempt.failure.kind if attempt.failure else attempt.status] += 1
        server.kill()
    for name, counter in (("", counts), ("faults", faults), ("attempts", classes)):
        for key, count in sorted(counter.items()):
            print(f"{name:<9} {key:<34} {count:6}")
    return 1 if counts["sweeps with a complaint"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
