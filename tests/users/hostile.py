"""A results folder that somebody else made to run something: whatever of it is believed leaves a file behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look

NAME = "evil"


def targets(marker: Path) -> dict[str, dict[str, Any]]:
    """What a config may name instead of a class, and what it would be called with."""
    touch = f"touch {marker}"
    return {
        "subprocess.check_output": {"args": ["touch", str(marker)]},
        "os.system": {"command": touch},
        "builtins.exec": {"source": f"open({str(marker)!r}, 'w')"},
        "builtins.open": {"file": str(marker), "mode": "w"},
        "importlib.import_module": {"name": "evil_module"},
        "evil_module.Kernel": {},
        "pathlib.Path.touch": {"self": str(marker)},
        "lcbench.runs.squeue.subprocess.run": {"args": ["touch", str(marker)]},
        "lcbench.masks.mask.np.load": {"file": str(marker)},
        "lcbench.masks.lengths.np.random.default_rng": {},
        "lcbench.masks.picture.save": {"path": str(marker)},
        "lcbench.kernels.base.dataclass": {},
        "lcbench.testing.faulty.Faulty": {"what": "kill"},
        "lcbench.masks..os.system": {"command": touch},
        "evil_module": {},
        "": {},
    }


def make(root: Path, marker: Path, groups: tuple[str, ...] = ("kernel", "cp", "mask", "lengths")) -> list[str]:
    """The sweep ``evil`` below ``root``, a cell for every target in every group; ids of its cells."""
    (root / NAME).mkdir(parents=True)
    (planned,) = look(["kernel=naive", "cp=none", "mask=causal_document", "seqlen=256", "heads=2x2x8", "dtype=float32"]).cells
    good, cells = planned.cell.config, {}
    for group in groups:
        for target, options in targets(marker).items():
            bad = {"name": "bad", "_target_": target, **options}
            config = {**good, group: {**bad, "lengths": good["mask"]["lengths"]}} if group != "lengths" else {
                **good, "mask": {**good["mask"], "lengths": bad}}  # fmt: skip
            cells[Cell.from_config(config).id] = config
    site = {"name": "local", "launcher": "local", "env": {"PATH": str(root / "bin")}, "setup": [f"touch {marker}"]}
    # Slurm's commands by the PATH of the pack, as programs of whoever made the folder.
    for command in ("squeue", "sacct", "scancel", "sbatch", "scontrol", "sinfo", "srun", "python", "git", "nvidia-smi"):
        program = root / "bin" / command
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {marker}\n")
        program.chmod(0o755)
    settings = {
        "site": site, "devices": [], "tracking_uri": None, "pack": {"max_cells": None, "max_minutes": 1, "max_jobs": None},
        "hang": {"factor": 1.0, "min_s": 1.0, "max_s": 1.0}, "retry": {},
    }  # fmt: skip
    launch = {"launcher": "local", "settings": settings, "by": "evil"}
    manifest = {
        "schema": 1, "sweep": NAME, "id": "0" * 16, "created_at": 1.0, "commands": [["a=b"]], "launch": launch,
        "cells": {cell_id: {"config": config, "skip": None} for cell_id, config in cells.items()},
    }  # fmt: skip
    write(root / NAME / "manifest.json", manifest)
    tried = list(cells)[: len(cells) // 2]
    for number, cell_id in enumerate(tried):
        metrics = {f"time/{p}/median_s": 1.0 for p in ("forward", "backward", "total")} | {"compute/tflops_per_gpu": 1.0}
        failure = {"kind": "crash", "cause": f"[/red] [bold]$(touch {marker})[/bold] \x1b]0;x\x07", "rank": None}
        bad = number % 2
        write(root / NAME / cell_id / "attempt-1.json", {
            "cell_id": cell_id, "sweep": NAME, "number": 1, "status": "failed" if bad else "ok",
            "failure": failure if bad else None, "metrics": {} if bad else metrics, "samples": {}, "config": cells[cell_id],
            "pack": "p",
        })  # fmt: skip
    pack = {
        "id": "p", "sweep": NAME, "root": str(root), "launcher": "local", "scale": "1x1", "cells": tried,
        "configs": {c: cells[c] for c in tried}, "seconds": dict.fromkeys(tried, 1.0), "timeout_min": 1, "settings": settings,
        "job_name": "", "index": 0,
    }  # fmt: skip
    write(root / NAME / "packs" / "p" / "pack.json", pack)
    write(root / NAME / "packs" / "p" / "job.json", {"launcher": "local", "pid": 1, "pids": [], "host": "h", "started_at": 1.0})
    # One that Slurm is said to have: whether it lives is asked of Slurm.
    rest = list(cells)[len(cells) // 2 :][:2]
    queued = {
        **pack, "id": "q", "launcher": "slurm", "job_name": f"x$(touch {marker})", "cells": rest,
        "configs": {c: cells[c] for c in rest}, "seconds": dict.fromkeys(rest, 1.0),
        "settings": {**settings, "site": {**site, "launcher": "slurm", "partition": f"$(touch {marker})"}},
    }  # fmt: skip
    write(root / NAME / "packs" / "q" / "pack.json", queued)
    write(root / NAME / "packs" / "q" / "job.json", {"launcher": "slurm", "job_id": f"7;touch {marker}", "started_at": 1.0})
    return list(cells)


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
