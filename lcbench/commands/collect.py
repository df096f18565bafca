"""Bring a sweep to its end without the command that began it: close what its jobs left open, run again what its policy says,
publish. The last light job of a sweep on Slurm runs this; it may be run by hand at any time.
"""

from __future__ import annotations

from functools import partial

from lcbench.commands.arguments import add_launch_arguments, add_sweep_arguments, agree_to_act, chosen_sweep, command_parser
from lcbench.commands.launchers import launcher_named
from lcbench.report.ending import bad_input, left_with
from lcbench.report.publishing import publish_sweep
from lcbench.runs.collector import collect

EXAMPLES = """
python -m lcbench.collect last
python -m lcbench.collect last --wait
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("collect", __doc__, EXAMPLES)
    add_sweep_arguments(parser)
    parser.add_argument("--wait", action="store_true", help="stay until every job has ended, or only held ones are left")
    add_launch_arguments(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        sweep = chosen_sweep(options)
        as_mine = agree_to_act(sweep, "this submits jobs and publishes", as_mine=options.as_mine)
    with left_with(lambda: f"the sweep goes on; again: {sweep.command('collect', '--wait')}"):
        launchers = partial(launcher_named, folders=options.config_dir)
        return 1 if collect(sweep, launchers, publish_sweep, wait=options.wait, as_mine=as_mine) else 0
