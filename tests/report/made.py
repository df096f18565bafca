"""Results that nobody measured, for tests of what is made of results: times from a rate per choice, with noise from a seed."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lcbench.grid.command_line import look
from lcbench.grid.expand import pairs
from lcbench.measure.flops import backward_flops, forward_flops
from lcbench.measure.stopping import Stopping, summary
from lcbench.runs.store import Attempt, Entry, Failure, Sweep

PROVENANCE: dict[str, Any] = {
    "git": {"commit": "0123456789abcdef", "dirty": False}, "versions": {"torch": "2.13.0", "nccl": "2.27"},
    "device": "NVIDIA H100 80GB HBM3", "cuda": {"capability": "9.0"}, "nodes": "n[01-12]",
    "check": {f"{link} GB/s": {"median": rate} for link, rate in (("within a node", 350), ("between nodes", 45))},
}  # fmt: skip


def made_sweep(
    root: Path,
    name: str,
    grid: list[str],
    *,
    seed: int = 0,
    noise: float = 0.01,
    run_to_run: float = 0.002,
    blocks: int = 3,
    slower: dict[str, float] | None = None,
    failed: dict[str, Failure] | None = None,
    provenance: dict[str, Any] | None = None,
    launch: dict[str, Any] | None = None,
) -> Sweep:
    """A sweep of ``grid`` with a good result per cell that can run.

    Args:
        noise: relative standard deviation of an iteration's time.
        run_to_run: the same of a block's, shared by its iterations and phases.
        blocks: of each cell; with one, results are as they were before there were blocks.
        slower: factor on the time of cells whose label holds a word.
        failed: how cells whose label holds a word failed.
    """
    sweep = Sweep(root, name)
    planned = look(grid).cells
    sweep.add([Entry(p.cell, p.skip) for p in planned], command=grid, launch=launch)
    for p in planned:
        if p.skip:
            continue
        cell, random = p.cell, np.random.default_rng([seed, int(p.cell.id, 16)])
        failure = next((f for word, f in (failed or {}).items() if word in cell.label), None)
        running = sweep.begin(cell.id, "p")
        config, problem = cell.config, cell.problem
        ranks, work = problem.scale.world_size, pairs(cell)
        flops = {"forward": forward_flops(work, problem.heads), "backward": backward_flops(work, problem.heads)}
        rate = 400 + zlib.crc32(f"{config['cp']['name']} {config['kernel']['name']}".encode()) % 200  # TFLOP/s per GPU
        factor = np.prod([f for word, f in (slower or {}).items() if word in cell.label])
        metrics: dict[str, float] = {}
        samples: dict[str, list[float]] = {}
        runs = random.lognormal(0, run_to_run, (blocks, 1))
        times = {p: factor * f / ranks / rate / 1e12 * runs * random.lognormal(0, noise, (blocks, 24)) for p, f in flops.items()}
        for phase in flops:
            samples[f"rank_{phase}_median_s"] = [0.97 * float(np.median(times[phase]))] * ranks
        times["total"] = times["forward"] + times["backward"]
        for phase, count in {**flops, "total": sum(flops.values())}.items():
            samples[f"{phase}_s"] = times[phase].ravel().tolist()
            if blocks > 1:
                samples[f"block_{phase}_s"] = np.median(times[phase], axis=1).tolist()
            metrics |= {f"time/{phase}/{k}_s": v for k, v in summary(samples[f"{phase}_s"]).items()}
            metrics[f"time/{phase}/median_s"] = float(np.median(times[phase], axis=1).mean())
            at = "compute" if phase == "total" else f"compute/{phase}"
            metrics[f"{at}/tflops_per_gpu"] = count / metrics[f"time/{phase}/median_s"] / ranks / 1e12
            metrics[f"{at}/mfu"] = metrics[f"{at}/tflops_per_gpu"] / 989
        metrics |= {
            "compute/peak_tflops": 989.0, "memory/peak_bytes": 1e9 + 1e3 * problem.seqlen,
            "time/noise": Stopping.noise(samples["total_s"]), **({"time/blocks": float(blocks)} if blocks > 1 else {}),
            "balance/area_max_over_mean": 1.1, "comm/bytes": 0.0 if ranks == 1 else 4e3 * problem.seqlen,
        }  # fmt: skip
        for phase in flops if ranks > 1 else ():
            metrics[f"overlap/{phase}/compute_s"] = 0.8 * metrics[f"time/{phase}/median_s"]
            metrics[f"overlap/{phase}/exposed_s"] = 0.2 * metrics[f"time/{phase}/median_s"]
        timeline = [[[m, m, m + 0.1, m + 0.7, m + 0.9] for m in range(ranks)] for _ in range(ranks)]
        sweep.finish(
            Attempt(
                cell.id, name, running.number, "failed" if failure else "ok", failure,
                {} if failure else metrics, {} if failure else samples,
                provenance=PROVENANCE | {"timeline": timeline} | (provenance or {}), config=config, pack="p",
                started_at=running.started_at, finished_at=running.started_at + 1,
            )
        )  # fmt: skip
    return sweep
