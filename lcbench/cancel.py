"""End a sweep, or one cell of it, and nothing else. What was measured is kept; the same sweep command goes on with the rest."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lcbench.arguments import add_results_argument, bad_input, chosen_cell, command_parser, find_sweep, run
from lcbench.runs.jobs import PackState, Watch
from lcbench.runs.pack import later_blocks
from lcbench.runs.queue import cancel_named, environment
from lcbench.runs.store import Sweep, sweeps, write_json

EXAMPLES = """
python -m lcbench.cancel last
python -m lcbench.cancel 1a2b3c4d5e6f
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("cancel", __doc__, EXAMPLES)
    parser.add_argument("what", help="name of a sweep, 'last', or a cell id (its beginning, or <sweep>/<cell id>)")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    root: Path = options.results.absolute()
    with bad_input():
        if options.what == "last" or options.what in sweeps(root):
            return cancel_sweep(find_sweep(root, options.what))
        return cancel_cell(*chosen_cell(root, options.what))


def cancel_sweep(sweep: Sweep) -> int:
    """End all of its jobs, the collector first, so that nothing is submitted again."""
    with sweep.lock():
        manifest = sweep.manifest()
        launch = manifest["launch"] or {}
        write_json(sweep.manifest_path, {**manifest, "launch": {**launch, "cancelled": True} if launch else None})
        packs = [p for p in Watch(sweep).look().packs if not p.ended]
        names = sorted(p.name for p in (sweep.folder / "jobs").glob("*"))
        said = cancel_named(names, environment(launch["settings"]["site"])) if names and launch else None
        said = said or end_local(packs)
    if said:
        print(f"error: {said}", file=sys.stderr)
        return 1
    print(f"{len(packs)} jobs of {sweep.name} are told to end: {sweep.command('status')}")
    return 0


def cancel_cell(sweep: Sweep, cell_id: str) -> int:
    """Tell its pack to leave the cell: in flight it is ended with its ranks, which start again for the rest of the pack. A cell
    that has its result keeps it, and loses the blocks of timings that were to come.
    """
    standing = Watch(sweep).look()
    state = next(c for c in standing.cells if c.id == cell_id)
    lives = any(p.id == state.pack and not p.ended for p in standing.packs)
    blocks = later_blocks(standing.seen.records[cell_id].attempts, state.pack) if lives else range(0)
    if state.state not in ("running", "pending") and not blocks:
        print(f"cell {cell_id} is not under way: it is {state.state}")
        return 0
    path = sweep.pack_folder(state.pack) / "cancel" / cell_id
    path.parent.mkdir(exist_ok=True)
    path.touch()
    kept = f"cell {cell_id} keeps its result; its blocks of timings from {blocks.start} on are cancelled"
    said = kept if blocks else f"cell {cell_id}, {state.state}, is told to end"
    print(f"{said}: {sweep.command('status')}")
    return 0


def end_local(packs: Sequence[PackState]) -> str | None:
    """End the agents of local packs on this machine, and with them their workers; a complaint about packs elsewhere."""
    for pack in packs:
        if pack.launcher == "local" and pack.host != socket.gethostname():
            return f"pack {pack.id} runs on {pack.host}; cancel it there"
        for pid in pack.pids if pack.launcher == "local" else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    return None


if __name__ == "__main__":
    run(main)
