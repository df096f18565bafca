"""What a cell said: its own log with first causes and stacks, then what its ranks printed, or its job, if it never began."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator

from lcbench.commands.arguments import add_results_argument, chosen_cell, command_parser
from lcbench.grid.values import parse_scale
from lcbench.report.ending import bad_input, left_with
from lcbench.runs.attempt import Attempt, Running
from lcbench.runs.jobs import CellState, Watch
from lcbench.runs.logs import said_by_ranks
from lcbench.runs.settle import settled
from lcbench.runs.store import Sweep

INTERVAL_S = 1.0
EXAMPLES = """
python -m lcbench.logs 1a2b3c4d5e6f
python -m lcbench.logs first/1a2b3c4d5e6f --attempt 1
python -m lcbench.logs 1a2b3c4d5e6f --follow
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("logs", __doc__, EXAMPLES)
    parser.add_argument("cell", help="cell id, or its beginning; <sweep>/<cell id> where several sweeps hold it")
    parser.add_argument("--attempt", type=int, help="default: the newest")
    parser.add_argument("--follow", action="store_true", help="keep printing until the cell has ended")
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        sweep, cell_id = chosen_cell(options.results.absolute(), options.cell)
    again = f"the cell goes on; again: python -m lcbench.logs {shlex.join(arguments)}"
    with left_with(lambda: again):
        state = _show(sweep, cell_id, attempt=options.attempt, follow=options.follow)
    print(f"--- {state.state}{f', {state.failure}: {state.cause}' if state.failure else ''}")
    return 0


def _show(sweep: Sweep, cell_id: str, *, attempt: int | None, follow: bool) -> CellState:
    """Print what a cell has said, with ``follow`` until it has ended; where it stands then."""
    watch = Watch(sweep, patient=True)
    shown: dict[str, int] = {}
    while True:
        state = next(c for c in settled(watch).cells if c.id == cell_id)
        for source, text in sections(sweep, state, attempt or state.attempt):
            fresh = text[shown.get(source, 0) :]
            if fresh:
                print(f"--- {source}\n{fresh}", flush=True)
                shown[source] = len(text)
        if not follow or state.state not in ("running", "pending"):
            return state
        time.sleep(INTERVAL_S)


def sections(sweep: Sweep, state: CellState, attempt: int) -> Iterator[tuple[str, str]]:
    """(where it is from, text) of an attempt at a cell."""
    tries: tuple[Attempt | Running, ...] = (*sweep.attempts(state.id), *sweep.running(state.id))
    tried = next((a for a in tries if a.number == attempt), None)
    if tried is None:
        return
    own = sweep.attempt_path(state.id, attempt, "log")
    if own.exists():
        yield f"attempt {attempt}", own.read_text(errors="replace").strip("\n")
    pack = sweep.pack_file(tried.pack, "pack.json")
    if not pack:
        return
    spoke = False
    for rank, stream, text in said_by_ranks(
        sweep.pack_folder(tried.pack) / "logs", state.id, attempt, parse_scale(pack["scale"]).gpus_per_node
    ):
        spoke = True
        yield f"rank {rank}, {stream}", text
    if not spoke and not own.exists():  # it never began: its job may say why
        for path in sorted((sweep.folder / "jobs" / str(pack["job_name"])).glob(f"{state.job_id}_*_log.*")):
            yield f"job {path.name}", path.read_text(errors="replace").strip("\n")
