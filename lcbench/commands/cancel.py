"""End a sweep, or one cell of it, and nothing else. What was measured is kept; the same sweep command goes on with the rest."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lcbench.commands.arguments import add_as_mine_argument, add_results_argument, agree_to_act, chosen_either, command_parser
from lcbench.report.ending import bad_input
from lcbench.runs import notes
from lcbench.runs.attempt import Failure
from lcbench.runs.files import write_json
from lcbench.runs.jobs import PackState, Watch
from lcbench.runs.ownership import others, trusted_site
from lcbench.runs.pack import later_blocks
from lcbench.runs.queues import SLURM, Queue
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep

OURS = "lcbench-"  # what the names of our jobs begin with
UNKNOWN_TO_SLURM = "Invalid job id"
EXAMPLES = """
python -m lcbench.cancel last
python -m lcbench.cancel 1a2b3c4d5e6f
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("cancel", __doc__, EXAMPLES)
    parser.add_argument("what", help="name of a sweep, 'last', or a cell id (its beginning, or <sweep>/<cell id>)")
    add_as_mine_argument(parser)
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    root: Path = options.results.absolute()
    with bad_input():
        sweep, cell_id = chosen_either(root, options.what)
        agree_to_act(sweep, "this cancels its jobs", as_mine=options.as_mine)
        return cancel_cell(sweep, cell_id) if cell_id else cancel_sweep(sweep)


def cancel_sweep(sweep: Sweep) -> int:
    """End all of its jobs, the collector too, so that nothing is submitted again."""
    with sweep.lock():
        manifest = sweep.manifest()
        launch = manifest["launch"] or {}
        write_json(sweep.manifest_path, {**manifest, "launch": {**launch, "cancelled": True} if launch else None})
        watch = Watch(sweep)
        packs = [p for p in settled(watch, as_mine=True).packs if not p.ended]
        told, refused, complaints = cancel_jobs(watch, launch["settings"]["site"] if launch else {}, packs)
        for pack in packs:
            if UNKNOWN_TO_SLURM in refused.get(pack.job_id, ""):  # accounting may call it running for good
                why = Failure("cancelled", "python -m lcbench.cancel, and the controller does not know its job")
                notes.write_ending(sweep.pack_folder(pack.id), notes.END, notes.Ending(why))
        if said := end_local(sweep, packs):
            complaints.append(said)
    count = sum(p.job_id in told or not p.queued for p in packs)
    if complaints:
        print(f"error: {'; '.join(complaints)}" + (f" ({count} other jobs are told to end)" if count else ""), file=sys.stderr)
        return 1
    print(f"{count} jobs of {sweep.name} are told to end: {sweep.command('status')}")
    return 0


def cancel_jobs(
    watch: Watch, site: dict[str, Any], packs: Sequence[PackState]
) -> tuple[set[str], dict[str, str], list[str]]:  # fmt: skip
    """Cancel what schedulers have of a sweep: what their queues list by the names of its jobs.

    The ids that are told to end; by id, why a job was not; and what to tell of it.
    """
    told: set[str] = set()
    refused: dict[str, str] = {}
    complaints: list[str] = []
    site = trusted_site(site, not others(watch.sweep))
    folders = [p for p in (watch.sweep.folder / "jobs").glob("*") if p.name.startswith(OURS)]  # of Slurm's, the collector's too
    for target in sorted({p.queue for p in packs if p.queued} | ({SLURM} if folders else set())):
        waiting, there = [p for p in packs if p.queue == target], folders if target == SLURM else []
        try:
            ended, why, said = _cancel_in(watch.queue(target), site, waiting, there)
        except ValueError as error:
            ended, why, said = set(), {}, [str(error)]
        told, refused, complaints = told | ended, refused | why, [*complaints, *said]
    return told, refused, complaints


def _cancel_in(
    queue: Queue, site: dict[str, Any], packs: Sequence[PackState], folders: Sequence[Path]
) -> tuple[set[str], dict[str, str], list[str]]:  # fmt: skip
    """Cancel what one queue has, by the names of packs and of the folders of jobs."""
    names = sorted({p.name for p in folders} | {p.job_name for p in packs if p.queue != SLURM or p.job_name.startswith(OURS)})
    begun = min((folder.stat().st_mtime for folder in folders), default=0.0)
    # Earlier versions named jobs after their sweep; where that cannot be asked for, the scripts' names hold the ids.
    odd = [p for p in folders if "," in p.name]
    ids = sorted({found.name.partition("_")[0] for folder in odd for found in folder.glob("[0-9]*_submission.sh")})
    answer = queue.ask(names, begun, site, ids)
    if not answer.controller:
        return set(), {}, [f"{queue.name} does not answer"]
    ours = {job.id: job for (name, _), job in answer.jobs.items() if name in names}
    alive = {job_id for job_id, job in ours.items() if not job.ended}
    refused = queue.cancel(sorted(alive), site)
    lost = [f"pack {p.id} with job {p.job_id or '?'}: {p.reason or p.state}" for p in packs if p.job_id not in ours]
    return alive - set(refused), refused, [*(f"job {job_id}: {why}" for job_id, why in refused.items()), *lost]


def cancel_cell(sweep: Sweep, cell_id: str) -> int:
    """Tell its pack to leave the cell: in flight it is ended with its ranks, which start again for the rest of the pack. A cell
    that has its result keeps it, and loses the blocks of timings that were to come.
    """
    standing = settled(Watch(sweep))
    state = next(c for c in standing.cells if c.id == cell_id)
    lives = any(p.id == state.pack and not p.ended for p in standing.packs)
    blocks = later_blocks(standing.seen.records[cell_id].attempts, state.pack) if lives else range(0)
    if state.state not in ("running", "pending") and not blocks:
        print(f"cell {cell_id} is not under way: it is {state.state}")
        return 0
    notes.cancel_cell(sweep.pack_folder(state.pack), cell_id)
    kept = f"cell {cell_id} keeps its result; its blocks of timings from {blocks.start} on are cancelled"
    said = kept if blocks else f"cell {cell_id}, {state.state}, is told to end"
    print(f"{said}: {sweep.command('status')}")
    return 0


def end_local(sweep: Sweep, packs: Sequence[PackState]) -> str | None:
    """End the agents of local packs on this machine, and with them their workers; a complaint about packs elsewhere."""
    for pack in packs:
        if pack.queued:
            continue
        if pack.host != socket.gethostname():
            return f"pack {pack.id} runs on {pack.host}; cancel it there"
        for pid in pack.pids:
            if _is_agent(pid, sweep.pack_folder(pack.id)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
    return None


def _is_agent(pid: int, folder: Path) -> bool:
    """Whether a process is an agent of a pack, whatever number its file names."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return pid > 0 and b"lcbench.runs.agent" in words and os.fsencode(folder / "pack.json") in words
