"""What the ranks of a pack printed: torch elastic keeps a file per rank and gang, a mark in it says where a cell begins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lcbench.runs.failure import error_in

MARK = re.compile(r"^==== cell (\w+) attempt (\d+)$", re.M)


def cell_mark(cell_id: str, attempt: int) -> str:
    """The line at which a cell's part of a rank's output begins."""
    return f"==== cell {cell_id} attempt {attempt}"


def last_words(node_folder: Path, local_rank: int) -> str:
    """What a rank of a node complained of on stderr in the cell that it was at; empty if it did not."""
    newest = max(node_folder.glob(f"*/attempt_*/{local_rank}/stderr.log"), key=lambda p: p.stat().st_mtime, default=None)
    text = newest.read_text(errors="replace") if newest else ""
    begun = [found.end() for found in MARK.finditer(text)]
    return error_in(text[begun[-1] if begun else 0 :])


def said_by_ranks(folder: Path, cell_id: str, attempt: int, gpus_per_node: int) -> Iterator[tuple[int, str, str]]:
    """(rank, stdout or stderr, text) of a cell, all its blocks of timings, by rank, from the log folder of its pack; ranks that
    said nothing are left out.
    """
    files = []
    for path in folder.glob("node-*/*/attempt_*/*/std*.log"):
        node, local = int(path.relative_to(folder).parts[0].removeprefix("node-")), int(path.parent.name)
        gang = int(path.parent.parent.name.removeprefix("attempt_"))
        files.append((node * gpus_per_node + local, path.stem, gang, path))
    said: dict[tuple[int, str], list[str]] = {}
    for rank, stream, _, path in sorted(files):
        text = path.read_text(errors="replace")
        for found in MARK.finditer(text):
            if (found[1], int(found[2])) == (cell_id, attempt):
                following = MARK.search(text, found.end())
                said.setdefault((rank, stream), []).append(text[found.end() : following.start() if following else None].strip("\n"))
    for (rank, stream), parts in said.items():
        if any(parts):
            yield rank, stream, "\n".join(filter(None, parts))
