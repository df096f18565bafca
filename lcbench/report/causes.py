"""Cells without a good result, by the cause that they share and by the node that causes name, with what helps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    import pandas as pd

# What differs between two cells that failed of one cause: ports, processes, addresses in memory, ranks, sizes that did not fit.
ACCIDENTAL = re.compile(
    r"(?<=<)\d+(?=>)|(?<=:)\d{4,5}\b|\bpid \d+|\b0x[0-9a-fA-F]+\b|\brank \d+|\b\d+(\.\d+)? [KMGT]i?B\b|\b\d+ bytes\b"
)
# Places at which a cause names a node: NCCL's sockets, the check of the nodes, Slurm's and the kernel's words. Where other words
# may stand too, only what has a digit is a node.
HOST = r"[A-Za-z][\w.-]*"
NUMBERED = rf"(?=[\w.-]*\d){HOST}"
NAMED = [
    re.compile(pattern)
    for pattern in (
        rf"(?<![\w.-])({HOST})<\d+>", rf"the check of its nodes: ({HOST}): ", rf"(?:^|; |error: )({NUMBERED}): ",
        rf"\b(?:[Nn]ode|[Hh]ost|on) ({NUMBERED})(?![\w.-])",
    )
]  # fmt: skip
# Statuses of cells that were tried, or whose job is gone.
FAILED = ("failed", "lost")
# As many cells as it takes for a node to be a suspect.
FEWEST_CELLS = 2
# Words that look like a node's name where one may stand.
NO_NODES = re.compile(r"(?i)localhost|(rank|gpu|cuda|attempt|block|mlx|eth|ib|line|port)[-_:]?\d+(_\d+)?")
# Failures that are no node's.
BLAMELESS = ("oom", "numerics", "implausible", "unsupported", "cancelled")
# What to do about a class of failure (docs/clusters.md says what each is), and whether running it again may help by itself.
HELP = {
    "oom": ("Fewer tokens (seqlen) or more GPUs (scale): it needs as much memory again.", False),
    "timeout": ("Run it again; raise pack.max_minutes if it ends so twice.", True),
    "hang": ("The stacks of its ranks are in its log.", True),
    "nccl": ("Run it again, without the node that failed if causes name one.", True),
    "numerics": ("The result is wrong; its log says where. Running it again gives the same.", False),
    "implausible": ("A number of it cannot be true; its log says which.", False),
    "node-fail": ("Run it again without that node.", True),
    "preempted": ("Run it again.", True),
    "crash": ("Its log has the first error.", True),
    "cancelled": ("Run it again.", True),
    "no-start": ("Mend what the cause names (site, setup, Slurm), then run it again.", True),
    "unsupported": ("", False),
}
IN_LOGS = ("hang", "numerics", "implausible", "crash")


@dataclass(frozen=True)
class Unwell:
    """A cell without a good result, as a frame, a store or a watch over a sweep knows it."""

    cell: str
    status: str
    kind: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Cause:
    """Cells that have no good result for one reason.

    Attributes:
        status: failed, skipped, lost or missing.
        kind: the failure's class; empty where there is none.
        cause: in the words of the first of the cells.
        cells: their ids, in the order of the plan.
        nodes: that their causes name.
        help: what to do, in words; empty where nothing helps.
        command: the shell command that helps; empty where there is none.
    """

    status: str
    kind: str
    cause: str
    cells: tuple[str, ...]
    nodes: tuple[str, ...]
    help: str
    command: str


@dataclass(frozen=True)
class Suspect:
    """A node that the causes of at least two failed cells name.

    Attributes:
        node: its name.
        cells: ids of the cells.
        kinds: classes of their failures.
        failed: how many cells failed in all.
        command: runs what failed again without it.
    """

    node: str
    cells: tuple[str, ...]
    kinds: tuple[str, ...]
    failed: int
    command: str

    @property
    def says(self) -> str:
        """In a sentence."""
        return f"{len(self.cells)} of {self.failed} failures name {self.node}."


def causes(frame: pd.DataFrame, sweep: Sweep | None = None) -> list[Cause]:
    """Cells of a frame (``frame.reported`` or ``lcbench.results.load``) without a good result, by cause, the most frequent first.

    Args:
        sweep: whose cells these are, for commands; None: the one that the frame names, in results/.
    """
    return grouped(unwell(frame), sweep or _sweep_of(frame))


def suspects(frame: pd.DataFrame, sweep: Sweep | None = None) -> list[Suspect]:
    """Nodes that the causes of several failed cells of a frame name, the most frequent first; ``sweep`` as for ``causes``."""
    return by_node(unwell(frame), sweep or _sweep_of(frame))


def unwell(frame: pd.DataFrame) -> list[Unwell]:
    """The cells of a frame without a good result, and without a prediction."""
    if frame.empty:
        return []
    bad = frame[~frame["status"].isin(["ok", "predicted"])]
    return [Unwell(*row) for row in bad[["cell", "status", "failure", "cause"]].itertuples(index=False)]


def _sweep_of(frame: pd.DataFrame) -> Sweep:
    return Sweep(Path("results").absolute(), str(frame["sweep"].iloc[0]) if len(frame) else "last")


def grouped(cells: Iterable[Unwell], sweep: Sweep) -> list[Cause]:
    """These cells of a sweep by cause, the most frequent first. Ranks, ports, processes and sizes in a cause do not tell causes of
    failures apart.
    """
    groups: dict[tuple[str, str, str], list[Unwell]] = {}
    for cell in cells:
        gist = ACCIDENTAL.sub("#", cell.cause) if cell.status in FAILED else cell.cause
        groups.setdefault((cell.status, cell.kind, gist), []).append(cell)
    found = []
    for (status, kind, _), members in groups.items():
        nodes = tuple(dict.fromkeys(node for cell in members for node in nodes_of(cell)))
        ids = tuple(cell.cell for cell in members)
        words, command = _help(status, kind, ids, nodes, sweep)
        found.append(Cause(status, kind, members[0].cause, ids, nodes, words, command))
    return sorted(found, key=lambda c: (c.status not in FAILED, -len(c.cells)))


def by_node(cells: Iterable[Unwell], sweep: Sweep) -> list[Suspect]:
    """Nodes that the causes of at least two of these cells of a sweep name, the most frequent first."""
    failed = [cell for cell in cells if cell.status in FAILED]
    groups: dict[str, list[Unwell]] = {}
    for cell in failed:
        for node in nodes_of(cell):
            groups.setdefault(node, []).append(cell)
    named = sorted(((n, m) for n, m in groups.items() if len(m) >= FEWEST_CELLS), key=lambda group: -len(group[1]))
    return [
        Suspect(
            node, tuple(c.cell for c in members), tuple(dict.fromkeys(c.kind for c in members)), len(failed), again(sweep, [node])
        )
        for node, members in named
    ]


def nodes_of(cell: Unwell) -> tuple[str, ...]:
    """Names of the nodes that a failed cell's cause names, found by where they stand in it; none where no node is to blame."""
    if cell.status not in FAILED or cell.kind in BLAMELESS:
        return ()
    found = (match for pattern in NAMED for match in pattern.findall(cell.cause))
    return tuple(dict.fromkeys(node for node in found if not NO_NODES.fullmatch(node)))


def again(sweep: Sweep, without: Sequence[str] = ()) -> str:
    """The command that runs a sweep's failed cells again, ``without`` these nodes."""
    failed = [f"--failed={sweep.name}"] if sweep.name.startswith("-") else ["--failed", sweep.name]
    exclude = ["--exclude", ",".join(without)] if without else []
    return shlex.join(["python", "-m", "lcbench.rerun", *failed, *exclude, *sweep.where])


def _help(status: str, kind: str, cells: Sequence[str], nodes: Sequence[str], sweep: Sweep) -> tuple[str, str]:
    """(words, command) on what to do about cells that share a cause."""
    if status not in FAILED:
        return ("It was not tried. Run it.", again(sweep)) if status == "missing" else ("", "")
    words, may_help = HELP.get(kind, ("", True))
    if kind in IN_LOGS:
        return words, f"python -m lcbench.logs {shlex.quote(f'{sweep.name}/{cells[0]}')}"
    named = nodes if kind == "node-fail" or len(cells) >= FEWEST_CELLS else ()
    return words, again(sweep, named) if may_help else ""
