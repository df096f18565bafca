"""Fit a profile of document lengths to your own data: ``python -m lcbench.lengths lengths.txt --name mine``.

The file holds one length in tokens per line. What is written is a value of the lengths axis: ``mask=document lengths=mine``. The
documents of the file themselves, in its order, are ``lengths=file lengths.file=lengths.txt``.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from lcbench.commands.arguments import command_parser
from lcbench.grid.paths import CONF, REPOSITORY
from lcbench.grid.values import parse_tokens
from lcbench.masks.lengths import batches_of, fit
from lcbench.report.ending import bad_input

EXAMPLES = """
python -m lcbench.lengths lengths.txt --name mine
"""


def main(arguments: list[str]) -> int:
    parser = command_parser("lengths", __doc__, EXAMPLES)
    parser.add_argument("file", type=Path, help="one document length in tokens per line")
    parser.add_argument("--name", required=True, help="name of the new value of the lengths axis")
    parser.add_argument("--conf", type=Path, default=REPOSITORY / "conf", help="where to write <conf>/lengths/<name>.yaml")
    parser.add_argument("--force", action="store_true", help="write over a profile of that name")
    options = parser.parse_args(arguments)
    target = options.conf / "lengths" / f"{options.name}.yaml"
    with bad_input():
        if not re.fullmatch(r"[A-Za-z_][\w-]*", options.name) or not isinstance(
            OmegaConf.create(f"name: {options.name}").name, str
        ):
            raise ValueError(f"--name {options.name} is no name; use a letter and then letters, digits, - and _, such as my-texts")
        if target.exists() and not options.force:
            raise ValueError(f"{target} is there; take another --name, or --force")
        lengths = read(options.file)
    found = fit(lengths)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f"# Fitted to {len(lengths)} document lengths of {options.file.name}: {sum(lengths)} tokens.\n"
        f"_target_: lcbench.masks.lengths.Histogram\nname: {options.name}\nby: documents\n"
        f"edges: {found.edges}\nweights: {found.weights}\n"
    )
    print(f"{target}: {len(lengths)} documents, {min(lengths)} to {max(lengths)} tokens, in {len(found.weights)} buckets")
    where = "" if options.conf == CONF else f" --config-dir {options.conf}"
    print(f"use it:  python -m lcbench.sweep mask=causal_document lengths={options.name}{where}")
    return 0


def read(path: Path) -> list[int]:
    """Lengths of a file, one per line, of whichever batch, as token counts are written everywhere: ``512``, ``64k``.

    Raises:
        ValueError: no file, a line that is no token count, or no lines at all.
    """
    return [length for batch in batches_of(path, partial(parse_tokens, name="length")) for length in batch]
