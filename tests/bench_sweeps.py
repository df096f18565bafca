"""How long sweeps of thousands of cells take to plan, show and publish, and how many cells a minute get through: printed, never
asserted. ``make bench``; the part on the development cluster needs ``make cluster-up``.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lcbench.grid.command_line import look
from lcbench.runs.attempt import Attempt
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from tests.slurm.stage import ROOT, Server, lcbench

GRID = [
    "seed=range(70)",
    "seqlen=1k,2k,3k,4k,5k,6k,7k,8k,9k,10k,11k,12k",
    "cp=ring,ulysses,usp",
    "mask=full,causal",
    "scale=1x8,2x8",
]
# Of drawn masks on many GPUs: what a plan simulates, and what follows that.
DRAWN = [
    "seed=range(200)", "seqlen=64k,128k,256k,512k,1m", "cp=ring,ulysses,usp,groupcast,allgather", "mask=causal_document",
    "scale=4x8,12x8", "heads=96x8x128", "budget.gpu_hours=null",
]  # fmt: skip
TINY = [
    "dtype=float64", "heads=2x2x8", "seqlen=64", "scale=1x2", "measure.warmup=0", "measure.min_iterations=2",
    "measure.max_iterations=3", "measure.budget_s=0.2", "measure.precision=0.5",
]  # fmt: skip
THIRTY_SIX = ["cp=ring,ulysses", "mask=full,causal", "seed=range(9)"]


def say(what: str, seconds: float, more: str = "") -> None:
    print(f"{what:<64} {seconds:10.3f} s  {more}", flush=True)


def run(*command: str, environment: dict[str, str] | None = None) -> tuple[float, float, str]:
    """(seconds, MB at the peak, output) of a command."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        out.seek(0)
        text = out.read()
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise RuntimeError(text[-2000:])
    return seconds, usage.ru_maxrss / 1e3, text


def made_results(root: Path, name: str, grid: list[str]) -> Sweep:
    """A sweep with a good result for each cell, with as many samples as a measured one has."""
    sweep, draw = Sweep(root, name), random.Random(0)
    cells = [p.cell for p in look(grid).cells]
    sweep.add([Entry(c) for c in cells], command=grid)
    for cell in cells:
        begun = time.time()
        samples = {f"{phase}_s": [draw.random() for _ in range(40)] for phase in ("forward", "backward", "total")}
        metrics = {f"time/{p}/{q}_s": draw.random() for p in ("forward", "backward", "total") for q in ("median", "p20", "p80")}
        metrics |= {f"check/{x}_{y}": 1e-15 for x in ("out", "lse", "dq", "dk", "dv") for y in ("error", "bound")}
        provenance = {
            "git": {"commit": "0" * 40},
            "versions": {"torch": "2"},
            "device": "none",
            "host": "here",
            "nodes": "n[01-02]",
        }
        attempt = Attempt(
            cell.id, name, 1, "ok", None, metrics, samples, provenance=provenance, config=cell.config, pack="p",
            started_at=begun, finished_at=begun + 1,
        )  # fmt: skip
        (sweep.folder / cell.id).mkdir(parents=True)
        sweep.attempt_path(cell.id, 1).write_text(json.dumps(attempt.__dict__, indent=1))
    return sweep


def main() -> None:
    python = sys.executable
    seconds, memory, text = run(python, "-m", "lcbench.sweep", "-m", *GRID, "site=devcluster", "hydra/launcher=dry")
    say("plan of 10,080 cells, command line to printed plan", seconds, f"{memory:.0f} MB, {text.count('to run')} cells to run")
    seconds, memory, text = run(python, "-m", "lcbench.sweep", "-m", *DRAWN, "site=plain", "hydra/launcher=dry")
    say("the same of 10,000 of drawn masks on 32 and 96 GPUs", seconds, f"{memory:.0f} MB, {text.splitlines()[2]}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made_results(root, "large", GRID)
        seconds, memory, text = run(python, "-m", "lcbench.status", "large", "--results", folder)
        say("status of 10,080 cells", seconds, f"{memory:.0f} MB, {text.splitlines()[-1]}")
        seconds, memory, _ = run(python, "-m", "lcbench.results", "large", "--results", folder, "--out", f"{folder}/x.parquet")
        say("the same as parquet", seconds, f"{memory:.0f} MB")
    publishing()
    overhead()
    throughput()


def publishing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made_results(Path(folder), "many", ["seed=range(70)", *GRID[1:4], "scale=1x8"])
        server = Server(Path(folder) / "mlflow")
        server.start()
        try:
            command = [sys.executable, "-m", "lcbench.sync", "many", "--results", folder, "--tracking-uri", server.uri]
            seconds, memory, text = run(*command)
            say("publishing 5,040 results to an empty MLflow server", seconds, f"{memory:.0f} MB, {text.strip()}")
            seconds, memory, text = run(*command)
            say("the same again", seconds, f"{memory:.0f} MB, {text.strip()}")
        finally:
            server.kill()


def overhead() -> None:
    """What a cell of a pack takes besides its check and its timing, from its beginning to that of the next."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"results={folder}", f"tracking_uri=sqlite:///{folder}/mlflow.db", "sweep=gaps"]
        done = lcbench("sweep", *THIRTY_SIX, *TINY, *options, environment=dict(os.environ))
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        sweep = Sweep(Path(folder), "gaps")
        attempts = sorted((sweep.attempts(i)[-1] for i in sweep.entries()), key=lambda a: a.started_at)
        rest = [
            later.started_at - a.started_at - sum(a.metrics[f"time/{what}_s"] for what in ("first_pass", "check", "measure"))
            for a, later in itertools.pairwise(attempts)
        ]
        say("a cell of two CPU ranks besides check and timing, median of 35", float(np.median(rest)), f"worst {max(rest):.3f} s")


def throughput() -> None:
    """36 cells of two ranks on the development cluster: one job a cell by Hydra's own submitit launcher, and ours."""
    config = Path(os.environ.get("LCBENCH_DEVCLUSTER_DIR", ROOT / ".devcluster")) / "slurm.conf"
    if not config.exists():
        print("no development cluster: make cluster-up")
        return
    environment = {**os.environ, "SLURM_CONF": str(config)}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder) / "stock"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tools), "hydra-submitit-launcher==1.2.0"]
        subprocess.run(pip, check=True)
        stock = {**environment, "PYTHONPATH": f"{tools}:{ROOT}", "LCBENCH_STOCK_OUT": f"{folder}/stock-results"}
        command = [sys.executable, "-m", "tests.stock_app", "-m", *THIRTY_SIX, *TINY, f"hydra.sweep.dir={folder}/multirun"]
        seconds, _, _ = run(*command, environment=stock)
        done = len(list(Path(f"{folder}/stock-results").glob("*.json")))
        rates["stock"] = 60 * done / seconds
        say("36 cells through hydra-submitit-launcher 1.2.0", seconds, f"{done} results, {rates['stock']:.1f} cells a minute")
        options = ["site=devcluster", "wait=true", f"results={folder}", f"tracking_uri=sqlite:///{folder}/mlflow.db", "sweep=ours"]
        seconds, _, _ = run(sys.executable, "-m", "lcbench.sweep", *THIRTY_SIX, *TINY, *options, environment=environment)
        sweep = Sweep(Path(folder), "ours")
        done = sum(a.status == "ok" for i in sweep.entries() for a in sweep.attempts(i))
        rates["ours"] = 60 * done / seconds
        say("36 cells through ours", seconds, f"{done} results, {rates['ours']:.1f} cells a minute")
        print(f"ours does {rates['ours'] / rates['stock']:.1f} times as many cells a minute")


if __name__ == "__main__":
    main()
