"""Packs as Slurm jobs through submitit: an array per scale, one task per node, which becomes that node's agent."""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra_plugins.lcbench.base import PackLauncher

from lcbench.grid.paths import REPOSITORY
from lcbench.grid.site import check_path, lost_without_requeue, sbatch_flags
from lcbench.grid.values import parse_scale
from lcbench.redact import secrets_of
from lcbench.runs.agent import RunPack, warned_s
from lcbench.runs.collector import Collect, Collector
from lcbench.runs.launch import Launches, NotSubmitted, write_down
from lcbench.runs.notes import END, job_here, read_ending, read_job, write_job
from lcbench.runs.pack import Pack
from lcbench.runs.queues import Queue, Slurm
from lcbench.runs.squeue import KEPT, cancel_named, cluster_of, environment, reason_in, site_variables, where
from lcbench.runs.store import Sweep

MAX_ARRAY = 1000  # Slurm's own default allows 1001
COLLECTOR_MIN = 60
# What sbatch says when there is no room now, and when it could not even ask.
NO_ROOM = ("SubmitJob", "submit limit", "job array specification", "MaxJobCount", "AssocGrp", "QOSGrp")
AWAY = ("Unable to contact", "timed out", "Connection refused", "Zero Bytes", "Communication connection failure")
AWAY_TRIES, AWAY_PAUSE_S = 2, 10.0  # sbatch itself tries for a minute or two


class SlurmLauncher(PackLauncher):
    name = "slurm"
    queue: Queue | None = Slurm()

    def submit(self, sweep: Sweep, packs: list[Pack]) -> None:
        try:
            check_path(sweep.folder)
        except ValueError as error:
            raise NotSubmitted(str(error), packs) from error
        if lost := lost_without_requeue(packs[0].site):
            self.say(lost)
        queue = list(arrays(packs))
        submitted: list[str] = []
        refused: list[Pack] = []
        words: list[str] = []
        while queue:
            array = queue.pop(0)
            try:
                # With a limit on jobs in flight, one array after the other: each knows its own limit only.
                after = submitted[-1:] if array[0].settings.pack["max_jobs"] else []
                job_id = submit_array(array, after)
            except (RuntimeError, OSError) as error:
                said = reason_in(str(error)) or type(error).__name__
                away, full = (any(word in str(error) for word in kind) for kind in (AWAY, NO_ROOM))
                if full and len(array) > 1:
                    queue[:0] = [array[: len(array) // 2], array[len(array) // 2 :]]
                    continue
                words.append(said)
                if away or full:  # the rest would hear the same
                    queue.insert(0, array)
                    break
                refused += array
                continue
            submitted.append(job_id)
            cells, nodes = sum(len(p.cells) for p in array), parse_scale(array[0].scale).nodes
            jobs = f"array {job_id}: {len(array)} jobs, " if len(array) > 1 else f"job {job_id}: "
            self.say(f"{jobs}{cells} cells on {nodes} nodes each, at most {max(p.timeout_min for p in array)} min")
        if submitted and packs[0].site.get("collector", True):
            submit_collector(self, sweep, packs[0], submitted)
        if words:
            already = f"submitted: {', '.join(submitted)}" if submitted else "nothing was submitted"
            raise NotSubmitted(f"Slurm refused: {words[0]} ({already})", refused, [p for array in queue for p in array])

    def follow(self, sweep: Sweep, packs: list[Pack]) -> None:
        """Show the sweep until all of its jobs have ended, and do what a collector does."""
        from rich.live import Live

        from lcbench.report.fitted import room_in
        from lcbench.report.standing import Standing

        collector, terminal = Collector(sweep, lambda _: self), self.console
        with Live(console=terminal, refresh_per_second=1) as live:
            while True:
                standing = collector.advance()
                live.update(Standing(standing, sweep, height=room_in(terminal)))
                if standing.at_rest:
                    break
                collector.pause()


def arrays(packs: Sequence[Pack]) -> Iterator[list[Pack]]:
    """Packs of one scale together, as many as an array may have elements."""
    most = int(packs[0].site.get("max_array") or MAX_ARRAY)
    for scale in dict.fromkeys(p.scale for p in packs):
        alike = [p for p in packs if p.scale == scale]
        for first in range(0, len(alike), most):
            yield alike[first : first + most]


def submit_array(packs: Sequence[Pack], after: Sequence[str] = ()) -> str:
    """Hand packs of one shape to sbatch as one array; returns the job's id. A job reads its pack file, so that nothing of it is in
    submitit's pickle.

    Raises:
        RuntimeError: Slurm refused, or did not answer for a while.
    """
    for tries_left in reversed(range(AWAY_TRIES)):
        # A name of its own, and in the packs before Slurm hears of it: so the job is found whoever dies when.
        name = job_name(Sweep(Path(packs[0].root), packs[0].sweep))
        named = [replace(pack, job_name=name, index=index) for index, pack in enumerate(packs)]
        for pack in named:
            write_down(pack)
        try:
            with called_for(packs[0].site):
                executor = _executor(packs[0], name, max_num_timeout=2 * max(len(p.cells) for p in packs))
                executor.update_parameters(**parameters(named, after))
                jobs = executor.submit_array([RunPack(str(pack.path)) for pack in named])
            break
        except RuntimeError as error:
            if not any(word in str(error) for word in AWAY):
                raise
            print(f"Slurm does not answer: {reason_in(str(error))}", file=sys.stderr)
            time.sleep(AWAY_PAUSE_S)
            cancel_named([name], environment(packs[0].site))  # it may have been taken all the same
            if not tries_left:
                raise
    cluster = cluster_of(where(environment(packs[0].site)))
    for pack, job in zip(named, jobs, strict=True):
        told = read_job(pack.folder) or job_here(pack.launcher)
        write_job(pack.folder, replace(told, job_id=str(job.job_id), timeout_min=pack.timeout_min, cluster=cluster))
    return str(jobs[0].job_id).partition("_")[0]


def job_name(sweep: Sweep) -> str:
    """A new name for a job of a sweep: nothing of it is what a person typed, since commas, bars and percent signs mean something to
    Slurm's commands, and two results folders may have a sweep of the same name.
    """
    return f"lcbench-{sweep_key(sweep)}-{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def sweep_key(sweep: Sweep) -> str:
    """What the names of a sweep's jobs have in common: a hash of its folder."""
    return hashlib.sha256(os.fsencode(sweep.folder)).hexdigest()[:8]


def submit_collector(launcher: Launches, sweep: Sweep, like: Pack, after: Sequence[str]) -> None:
    """A light job behind the others, which brings the sweep to its end: retries, results that nobody closed, publishing."""
    import submitit

    from lcbench.report.publishing import publish_sweep

    site = like.site
    name = f"{job_name(sweep)}-collect"
    own = sbatch_flags(site["collector"] if isinstance(site.get("collector"), dict) else {})
    options = {
        **_common(site, name, sweep.name),
        "nodes": 1,
        "cpus_per_task": 1,
        "time": min(COLLECTOR_MIN, site.get("max_minutes") or COLLECTOR_MIN),
        "dependency": f"afterany:{':'.join(after)}",
        "srun_args": _srun_args({**site, "container": None}, 1),  # it needs Slurm's commands, which an image has not
    }
    options["additional_parameters"] = _flags({**options["additional_parameters"], **own})
    try:
        with called_for(site):
            executor = submitit.SlurmExecutor(folder=sweep.folder / "jobs" / name, max_num_timeout=10)
            executor.update_parameters(**{k: v for k, v in options.items() if v is not None and k.replace("_", "-") not in own})
            executor.submit(Collect(str(sweep.root), sweep.name, launcher, publish_sweep))
    except RuntimeError as error:
        print(f"no collector: {reason_in(str(error))}; {sweep.command('collect')} does its work", file=sys.stderr)


def parameters(packs: Sequence[Pack], after: Sequence[str] = ()) -> dict[str, Any]:
    """The sbatch options of an array, as submitit names them."""
    first = packs[0]
    site, scale = first.site, parse_scale(first.scale)
    cpus = int(site.get("cpus_per_task") or 1)
    common = _common(site, first.job_name, first.sweep)
    fallen = fallen_nodes(Sweep(Path(first.root), first.sweep))
    if fallen:
        said = common["additional_parameters"].pop("exclude", None)
        common["exclude"] = ",".join([*([str(said)] if said else []), *fallen])
    options = {
        **common,
        "nodes": scale.nodes,
        "cpus_per_task": cpus,
        "time": max(p.timeout_min for p in packs),
        "gres": (site.get("gpus") or "").format(gpus_per_node=scale.gpus_per_node) or None,
        "array_parallelism": first.settings.pack["max_jobs"] or len(packs),
        "dependency": f"afterany:{':'.join(after)}" if after else None,
        "signal_delay_s": warned_s(max(p.timeout_min for p in packs)),
        "srun_args": _srun_args(site, cpus),
    }
    return {k: v for k, v in options.items() if v is not None}


def fallen_nodes(sweep: Sweep) -> dict[str, str]:
    """Nodes that a check of this sweep found unwell, and why: later jobs keep away from them."""
    fallen: dict[str, str] = {}
    for pack in sweep.packs():
        if (end := read_ending(sweep.pack_folder(pack), END)) is not None:
            fallen |= end.fallen
    return fallen


def _common(site: dict[str, Any], name: str, sweep: str) -> dict[str, Any]:
    # Secrets come with the job's environment (sbatch passes it on) and the pack's private file; others may read the script.
    secret = secrets_of(site.get("env"))
    exports = [f"export {k}={shlex.quote(v)}" for k, v in site_variables(site).items() if k not in secret]
    setup = [str(line) for line in site.get("setup") or []]
    # A line that fails ends the job there and says which it was, instead of an attempt in half an environment.
    guarded = ["set -eE", "trap 'echo \"error: site.setup failed: $BASH_COMMAND\" >&2' ERR", *setup, "trap - ERR; set +eE"]
    return {
        "job_name": name,
        "ntasks_per_node": 1,
        "partition": site.get("partition"),
        "account": site.get("account"),
        "qos": site.get("qos"),
        "wckey": "",  # submitit's default is refused where wckeys are checked
        "comment": f"lcbench sweep {re.sub(r'[^A-Za-z0-9._-]', '_', sweep)}",  # for people who look at the queue
        "setup": [*exports, f"cd {shlex.quote(str(REPOSITORY))}", *(guarded if setup else [])],
        "additional_parameters": _flags({"open-mode": "append", "requeue": True, **sbatch_flags(site.get("sbatch") or {})}),
    }


def _flags(options: dict[str, Any]) -> dict[str, Any]:
    """sbatch's options without the flag that another one of them takes back."""
    return {k: v for k, v in options.items() if k != "requeue" or "no-requeue" not in options}


def _srun_args(site: dict[str, Any], cpus: int) -> list[str]:
    # A dead task would leave the others waiting for the time limit; older srun does not inherit cpus-per-task.
    return [
        "--kill-on-bad-exit=1",
        f"--cpus-per-task={cpus}",
        *container_args(site.get("container")),
        *(site.get("srun_args") or []),
    ]


def container_args(container: dict[str, Any] | None) -> list[str]:
    """Pyxis' flags of srun."""
    if not container:
        return []
    mounts = [f"{REPOSITORY}:{REPOSITORY}", *(container.get("mounts") or [])]
    flags = [
        f"--container-image={container['image']}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={REPOSITORY}",
    ]
    return [*flags, *(["--no-container-mount-home"] if container.get("mount_home") is False else [])]


def _executor(pack: Pack, name: str, *, max_num_timeout: int) -> Any:
    import submitit

    folder = Sweep(Path(pack.root), pack.sweep).folder / "jobs" / name
    folder.mkdir(parents=True)
    for made in (folder, folder.parent):
        with suppress(OSError):  # jobs load what lies there, so nobody else is to write into it, whatever the umask
            made.chmod(made.stat().st_mode & ~0o022)
    python = (pack.site.get("container") or {}).get("python")
    return submitit.SlurmExecutor(folder=folder, max_num_timeout=max_num_timeout, python=python)


def sbatch_text(packs: Sequence[Pack]) -> str:
    """What submitit would give to sbatch, without needing Slurm on this machine."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = Sweep(Path(packs[0].root), packs[0].sweep).folder / "jobs" / "<name>"
    python = (packs[0].site.get("container") or {}).get("python") or sys.executable
    command = shlex.join([python, "-u", "-m", "submitit.core._submit", str(folder)])
    named = [replace(p, job_name=f"lcbench-{sweep_key(Sweep(Path(p.root), p.sweep))}") for p in packs]
    count = len(packs) if len(packs) > 1 else None
    text: str = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters(named))
    return text


@contextmanager
def called_for(site: dict[str, Any]) -> Iterator[None]:
    """Around a call of sbatch: the environment of Slurm's commands on a site, for the job too, which inherits it, and with it the
    site's secrets. What sbatch says is in submitit's exception; its copy on stderr is kept back.
    """
    import submitit

    env, secret = environment(site), secrets_of(site.get("env"))
    given = {**{k: env[k] for k in KEPT if k in env}, **secret}
    with submitit.helpers.clean_env([k for k in os.environ if k not in env or k in secret]), redirect_stderr(io.StringIO()):
        os.environ.update(given)
        try:
            yield
        finally:
            for key in given:  # clean_env brings back what was there
                os.environ.pop(key, None)
