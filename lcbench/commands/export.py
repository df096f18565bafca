"""A choice in another framework's words: ``python -m lcbench.export <cell> --for megatron``.

A cell is the id of one that is stored, or the overrides of a sweep of one cell. What the framework cannot do is one line and exit
code 2. Comments say what has no name there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lcbench.advice.frameworks.base import Export, exported, framework, names
from lcbench.commands.arguments import add_results_argument, chosen_cell, command_parser
from lcbench.grid import build
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.report.ending import bad_input
from lcbench.report.inert import printable

EXAMPLES = """
python -m lcbench.export cp=ulysses scale=1x8 heads=32x8x128 seqlen=256k kernel=flash_attn3 --for megatron
python -m lcbench.export cp=allgather kernel=flex scale=2x8 seqlen=128k --for torchtitan
python -m lcbench.export <cell id> --for te --json
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("export", __doc__, EXAMPLES)
    parser.add_argument("cell", nargs="+", help="a cell id, <sweep>/<cell id>, or overrides: cp=... kernel=... mask=... scale=...")
    parser.add_argument("--for", dest="framework", required=True, metavar="FRAMEWORK", help=f"one of {', '.join(names())}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], metavar="FOLDER", help="files of your own, as for a sweep"
    )
    add_results_argument(parser)
    options = parser.parse_args(arguments)
    with bad_input():
        checked = framework(options.framework).CHECKED
        cell = _cell(options)
        found = exported(cell, options.framework)
    print(_json(cell, options.framework, checked, found) if options.json else _text(cell, options.framework, checked, found))
    return 0


def _cell(options: argparse.Namespace) -> Cell:
    """Raises:
    ValueError: there is none, or more than one.
    """
    if any("=" in word for word in options.cell):
        planned = look([*options.cell, *(f"--config-dir={folder}" for folder in options.config_dir)]).cells
        if len(planned) != 1:
            raise ValueError(f"these overrides make {len(planned)} cells, and one is exported; write one value for each axis")
        return planned[0].cell
    if len(options.cell) > 1:
        raise ValueError(f"one cell is exported, not {len(options.cell)}: {' '.join(options.cell)}")
    sweep, cell_id = chosen_cell(options.results.absolute(), options.cell[0])
    build.allow(sweep.allowed().union(*map(build.targets_in, options.config_dir)))
    cell = sweep.entries()[cell_id].cell
    build.check_targets(cell.config)
    return cell


def _text(cell: Cell, name: str, checked: str, found: Export) -> str:
    head = [f"{name}, by the names of {checked}", f"cell {cell.id}: {cell.label} heads={cell.heads} dtype={cell.problem.dtype}"]
    tail = [*(f"left out: {word}" for word in found.left_out), *(f"note: {word}" for word in found.notes)]
    lines = [*(f"# {line}" for line in head), *found.text.splitlines(), *(f"# {line}" for line in tail)]
    return "\n".join(printable(line) for line in lines)


def _json(cell: Cell, name: str, checked: str, found: Export) -> str:
    return json.dumps(
        {
            "framework": name, "checked": checked, "cell": cell.id, "config": cell.config, "settings": found.settings,
            "environment": found.environment, "text": found.text, "left_out": found.left_out, "notes": found.notes,
        },
        indent=1,
    )  # fmt: skip
