"""Packs as Slurm jobs through submitit: one task per node, which becomes that node's agent."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra_plugins.lcbench._plan import NotSubmitted, PackLauncher

from lcbench.grid.expand import REPOSITORY
from lcbench.grid.values import parse_scale
from lcbench.runs.pack import Pack
from lcbench.runs.store import Sweep, write_json

POLL_S = 2.0


class SlurmLauncher(PackLauncher):
    name = "slurm"

    def run(self, sweep: Sweep, packs: list[Pack], *, wait: bool | None) -> bool:
        submitted: list[str] = []
        for pack in packs:
            try:
                job_id = submit(pack)
            except (RuntimeError, OSError) as error:
                already = f"; submitted before it: {', '.join(submitted)}" if submitted else "; nothing was submitted"
                raise NotSubmitted(f"Slurm refused pack {pack.id}: {_first_cause(error)}{already}") from error
            submitted.append(job_id)
            nodes = parse_scale(pack.scale).nodes
            print(f"job {job_id}: {len(pack.cells)} cells on {nodes} nodes, at most {pack.timeout_min} min (pack {pack.id})")
        if not wait:
            return not packs
        with site_environment(packs[0].site if packs else {}):
            _watch(sweep)
        return True


def submit(pack: Pack) -> str:
    """Hand a pack to sbatch; returns the job id. The job reads the pack file, so nothing of it is in the pickle."""
    import submitit

    from lcbench.runs.agent import run_under_slurm

    with submitit.helpers.clean_env(), site_environment(pack.site):
        executor = submitit.SlurmExecutor(folder=pack.folder / "submitit")
        executor.update_parameters(**parameters(pack))
        job = executor.submit(run_under_slurm, str(pack.path))
    write_json(
        pack.folder / "job.json",
        {"launcher": "slurm", "job_id": job.job_id, "started_at": time.time(), "timeout_min": pack.timeout_min},
    )
    return str(job.job_id)


def parameters(pack: Pack) -> dict[str, Any]:
    """The sbatch options of a pack, as submitit names them."""
    site, scale = pack.site, parse_scale(pack.scale)
    cpus = int(site.get("cpus_per_task") or 1)
    exports = [f"export {k}={shlex.quote(str(v))}" for k, v in (site.get("env") or {}).items()]
    options = {
        "job_name": f"lcbench-{pack.sweep}-{pack.id}",
        "comment": pack.id,  # an orphan is found again by it
        "nodes": scale.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "time": pack.timeout_min,
        "partition": site.get("partition"),
        "account": site.get("account"),
        "qos": site.get("qos"),
        "gres": (site.get("gpus") or "").format(gpus_per_node=scale.gpus_per_node) or None,
        "wckey": "",  # submitit's default is refused where wckeys are checked
        "setup": [*exports, f"cd {shlex.quote(str(REPOSITORY))}", *(site.get("setup") or [])],
        # A dead task would leave the others waiting for the time limit; older srun does not inherit cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", *(site.get("srun_args") or [])],
        "additional_parameters": {"open-mode": "append", **(site.get("sbatch") or {})},
    }
    return {k: v for k, v in options.items() if v is not None}


def sbatch_text(pack: Pack) -> str:
    """What submitit would give to sbatch, without needing Slurm on this machine."""
    import sys

    from submitit.slurm.slurm import _make_sbatch_string

    folder = pack.folder / "submitit"
    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)])
    text: str = _make_sbatch_string(command=command, folder=folder, **parameters(pack))
    return text


@contextmanager
def site_environment(site: dict[str, Any]) -> Iterator[None]:
    """The site's environment (where its Slurm is, for one) around a call of a Slurm command."""
    wanted = {k: str(v) for k, v in (site.get("env") or {}).items()}
    before = {k: os.environ.get(k) for k in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _watch(sweep: Sweep) -> None:
    """Show the sweep until all of its jobs have ended."""
    from rich.live import Live
    from rich.text import Text

    from lcbench.runs.jobs import pack_states

    with Live(Text("waiting for Slurm"), refresh_per_second=2) as live:
        while True:
            states = pack_states(sweep)
            live.update(Text("\n".join(f"job {s.job_id}: {s.state}, {s.done}/{s.cells} cells" for s in states)))
            if all(s.ended for s in states):
                return
            time.sleep(POLL_S)


def _first_cause(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else type(error).__name__)
