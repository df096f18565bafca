"""Bring a sweep to its end without the command that began it: close what its jobs left open, run again what its policy says,
publish. The last light job of a sweep on Slurm runs this; it may be run by hand at any time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from lcbench.arguments import add_as_mine_argument, add_sweep_arguments, agree_to_act, bad_input, chosen_sweep, command_parser, run
from lcbench.grid.paths import REPOSITORY
from lcbench.runs.ownership import others
from lcbench.runs.store import Sweep
from lcbench.runs.tracking import publish_or_say, tracked_at

EXAMPLES = """
python -m lcbench.collect last
python -m lcbench.collect last --wait
"""


class Collect:
    """The collector as a job of submitit's."""

    def __init__(self, root: str, name: str) -> None:
        self._root, self._name = root, name

    def __call__(self) -> None:
        os.chdir(REPOSITORY)
        sweep = Sweep(Path(self._root), self._name)
        collect(sweep, wait=False, on_a_node=True)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def collect(sweep: Sweep, *, wait: bool, on_a_node: bool = False, as_mine: bool = False) -> int:
    """Advance the sweep, with ``wait`` until all of its jobs have ended, and publish it; the number of cells
    without a good end and of jobs that are held.

    What runs again has a collector of its own behind it.
    """
    from hydra_plugins.lcbench._plan import Collector

    collector = Collector(sweep, as_mine=as_mine)
    while not (standing := collector.advance()).at_rest and wait:
        collector.pause()
    launch = standing.seen.launch if as_mine or not others(sweep) else None
    # A node may have no way to the tracking server; then whoever looks from a login node publishes.
    if launch and not (on_a_node and launch["settings"]["site"].get("publish", "nodes") != "nodes"):
        publish_or_say(sweep, tracked_at(launch))
    counts = standing.counts()
    print(", ".join(f"{count} {state}" for state, count in counts.most_common()))
    for line in standing.held_words():
        print(line, file=sys.stderr)
    return counts["failed"] + counts["lost"] + counts["missing"] + len(standing.held)


def main(arguments: list[str]) -> int:
    parser = command_parser("collect", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--wait", action="store_true", help="stay until every job has ended, or only held ones are left")
    add_as_mine_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
        as_mine = agree_to_act(sweep, "this submits jobs and publishes", as_mine=options.as_mine)
    return 1 if collect(sweep, wait=options.wait, as_mine=as_mine) else 0


if __name__ == "__main__":
    run(main)
