"""Where sweeps stand, for people: counts and time left, then what runs, what failed by cause and node, and what to type next."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from lcbench.grid.devices import known_devices
from lcbench.measure.peak import entry_of
from lcbench.report.causes import Unwell, again, by_node, grouped
from lcbench.report.fitted import LEAST, Column, Fitted
from lcbench.report.inert import plain, printable
from lcbench.report.table import COLORS, Names
from lcbench.runs.files import Unreadable
from lcbench.runs.jobs import CellState, PackState, SweepStatus, Watch
from lcbench.runs.squeue import word_of
from lcbench.runs.store import Sweep, sweeps

BAR, LEAST_BAR = 24, 8
DONE = ("ok", "failed", "skipped")
UNWELL = ("failed", "lost", "skipped")
FEW_IDS = 3  # of the cells that share a cause
INDENT = len("running  ")  # where what follows the word of a line begins


def summary_line(standing: SweepStatus) -> str:
    """Cells by state, and how long it will take."""
    left = time_left(standing)
    return f"{_counts(standing)}; {left}" if left else _counts(standing)


def _counts(standing: SweepStatus) -> str:
    return ", ".join(f"{count} {state}" for state, count in standing.counts().most_common())


def time_left(standing: SweepStatus, *, now: float | None = None) -> str:
    """How long it will take, when that is, and at which pace: ``about 59 min left, until 14:05, 7.1 cells/min (8x8: 22/112)``."""
    left = standing.left()
    said = [str(left)] if str(left) else []
    if left.running_s and not left.waiting:
        said.append(f"until {time.strftime('%H:%M', time.localtime((now or time.time()) + left.running_s))}")
    if said and (pace := _pace(standing, now or time.time())):
        said.append(f"{pace:.2g} cells/min")
    scales: dict[str, Counter[bool]] = {}
    for cell in standing.cells:
        scale = standing.seen.records[cell.id].entry.cell.config["scale"]
        scales.setdefault(scale, Counter())[cell.state in DONE] += 1
    open_ = [f"{scale}: {done[True]}/{done.total()}" for scale, done in scales.items() if done[False]]
    return ", ".join(said) + (f" ({', '.join(open_)})" if said and len(scales) > 1 else "")


def _pace(standing: SweepStatus, now: float) -> float:
    """Cells that ended per minute in the jobs that run, since the first of these cells began; 0 where fewer than two have."""
    live = {p.id for p in standing.packs if p.state == "RUNNING"}
    tries = [a for record in standing.seen.records.values() for a in record.attempts if a.pack in live]
    since = now - min((a.started_at for a in tries), default=now)
    return 60 * len(tries) / since if len(tries) > 1 and since > 0 else 0.0


@dataclass
class Standing:
    """The view of a sweep. ``everything``: every job and every cell has a row. ``height``: lines that there is room for, what to
    type next (``advice``) among them; rows of what runs and causes are left out for it. None: no limit, and advice is not among
    them, since what is to be copied is printed without being folded.
    """

    standing: SweepStatus
    sweep: Sweep
    everything: bool = False
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(height=None)

        def lines_of(shown: RenderableType) -> list[list[Segment]]:
            return console.render_lines(shown, options, pad=False, new_lines=True)

        head, foot = list(self._head(options)), [*self._jobs(), *(plain(line) for line in self.advice() if self.height is not None)]
        running, failed = self._running(), self._failed()
        room = None if self.height is None else max(0, self.height - sum(len(lines_of(part)) for part in (*head, *foot)))
        # What failed needs a person, so it has most of the room; what is left of it goes to what runs.
        shown_failed, used = _fitting(failed, None if room is None else room - min(len(running), room // 3), lines_of)
        shown_running, _ = _fitting(running, None if room is None else room - used, lines_of)
        parts: list[RenderableType] = [*head, *shown_running, *shown_failed, *foot]
        if self.everything:
            parts += [packs_table(self.standing.packs, self.sweep.name), states_table(self.standing, self.sweep.name)]
        lines = [line for part in parts for line in lines_of(part)]
        for line in lines[: self.height]:
            yield from line

    def _head(self, options: ConsoleOptions) -> Iterator[Text]:
        """Two lines, at any width and however long the name is: a bar with the counts, and the time that is left."""
        counts = self.standing.counts()
        done, total = sum(counts[state] for state in DONE), len(self.standing.cells)
        states = [(f"  {n} {state}", COLORS.get(state, "cyan")) for state, n in counts.most_common()]
        said = [(f"  {done}/{total} ", "bold"), *states]
        name = Text(printable(self.sweep.name), "bold")
        spare = options.max_width - sum(cell_len(text) for text, _ in said)
        bar = max(LEAST_BAR, min(BAR, spare - min(LEAST, cell_len(name.plain)) - 2))
        name.truncate(max(1, spare - bar - 2), overflow="ellipsis")
        full, empty = ("#", "-") if options.ascii_only else ("█", "░")
        filled = bar * done // total if total else bar
        line = Text.assemble(name, "  ", (full * filled, "green"), (empty * (bar - filled), "dim"), *said)
        line.truncate(options.max_width)
        yield line
        if left := time_left(self.standing):
            more = Text(left)
            more.truncate(options.max_width, overflow="ellipsis")
            yield more

    def _running(self) -> list[RenderableType]:
        """A row for each cell in flight."""
        names = Names.of(record.entry.cell for record in self.standing.seen.records.values())
        cells = [c for c in self.standing.cells if c.state == "running"]
        rows = []
        for cell in cells:
            job = f"job {cell.job_id}" if cell.job_id else ""
            rows.append([cell.id, names.what[cell.id], job, clock(cell.elapsed_s)])
        columns = [Column("cell"), Column("what", folds=True), Column("job"), Column("time", right=True)]
        return _rows_of("running", "cyan", rows, columns)

    def _failed(self) -> list[RenderableType]:
        """A row for each cause, with the cells that share it."""
        causes = grouped(unwell_of(self.standing.cells), self.sweep)
        columns = [Column("cells", right=True), Column("class"), Column("cause", folds=True, cut=self.height is not None)]
        shown: list[RenderableType] = []
        for status in UNWELL:
            alike = [cause for cause in causes if cause.status == status]
            rows = [[str(len(c.cells)), c.kind or c.status, c.cause or "its job is gone"] for c in alike]
            shown += _rows_of(status, COLORS[status], rows, columns, [_ids(c.cells) for c in alike])
        return shown

    def advice(self) -> Iterator[str]:
        """Nodes that several failures name, and what to type about cells that failed; none of it while there are none."""
        failed = [c for c in unwell_of(self.standing.cells) if c.status != "skipped"]
        if not failed:
            return
        suspects = by_node(failed, self.sweep)
        for suspect in suspects:
            yield f"{'node':<{INDENT}}{suspect.says}"
        yield f"{'next':<{INDENT}}{again(self.sweep, [s.node for s in suspects])}"

    def _jobs(self) -> Iterator[Text]:
        """Jobs in one line, by their state; what waits with why."""
        states: Counter[str] = Counter()
        for pack in self.standing.packs:
            word = word_of(pack.state).lower() or "unknown"
            states["ended" if pack.ended else f"{word}, {pack.reason}" if pack.reason and word != "running" else word] += 1
        if states:
            yield plain(f"{'jobs':<{INDENT}}" + "; ".join(f"{count} {state}" for state, count in states.most_common()), "dim")


def unwell_of(cells: Iterable[CellState]) -> list[Unwell]:
    """The cells that have failed, are lost or cannot run."""
    return [Unwell(c.id, c.state, c.failure, c.cause) for c in cells if c.state in UNWELL]


def _ids(cells: Sequence[str]) -> str:
    """The first of these cells, and how many more there are."""
    return " ".join(cells[:FEW_IDS]) + (f" and {len(cells) - FEW_IDS} more" if len(cells) > FEW_IDS else "")


def clock(seconds: float) -> str:
    """``2:10``, ``1:02:10``."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _rows_of(
    word: str, style: str, rows: Sequence[Sequence[str]], columns: Sequence[Column], below: Sequence[str] = ()
) -> list[RenderableType]:
    """Rows with a word before the first, each by itself, so that those there is no room for can be left out; all equally wide."""
    if not rows:
        return []
    table = Fitted("", [Column("", wanted=0), *columns], headed=False)
    for number, row in enumerate(rows):
        first = plain(f"{word if not number else '':<{INDENT - 2}}", style)
        table.add(first, *row, below=Text(f"{'':<{INDENT - 2}}{below[number]}", "dim") if below else "")
    return table.each()


def _fitting(
    rows: Sequence[RenderableType], room: int | None, lines_of: Callable[[RenderableType], list[Any]]
) -> tuple[list[RenderableType], int]:
    """Of rows those that there is room for, and a line about the rest; and how many lines these are."""
    shown: list[RenderableType] = []
    used = 0
    for number, row in enumerate(rows):
        lines = len(lines_of(row))
        last = number == len(rows) - 1
        if room is not None and used + lines + (not last) > room:
            if used < room:
                shown.append(plain(f"{'':<{INDENT}}and {len(rows) - number} more", "dim"))
                used += 1
            break
        shown.append(row)
        used += lines
    return shown, used


# -- tables --------------------------------------------------------------------------------------------------------------


def packs_table(packs: Iterable[PackState], name: str) -> Fitted:
    """Every job and how far it is."""
    table = Fitted(f"jobs of {name}", [
        Column("job"), Column("state"), Column("cells", right=True), Column("pack", 1), Column("launcher", 2),
        Column("reason", folds=True),
    ])  # fmt: skip
    for p in packs:
        table.add(p.job_id or "-", p.state, f"{p.done}/{len(p.cells)}", p.id, p.launcher, p.reason)
    return table


def states_table(standing: SweepStatus, name: str) -> Fitted:
    """Every cell and where it stands."""
    names = Names.of(record.entry.cell for record in standing.seen.records.values())
    table = Fitted(names.title(f"cells of {name}"), [
        Column("state"), Column("cell"), Column("what", folds=True, wanted=2 * LEAST), Column("attempt", 2, right=True),
        Column("job", 1), Column("job state", 3), Column("time", 1, right=True),
    ])  # fmt: skip
    for c in standing.cells:
        took = clock(c.elapsed_s) if c.elapsed_s else "-"
        table.add(
            plain(c.state, COLORS.get(c.state, "cyan")), c.id, names.what[c.id], str(c.attempt or "-"), c.job_id or "-",
            c.job_state or "-", took, below=_why(c),
        )  # fmt: skip
    return table


def _why(cell: CellState) -> str:
    return f"{cell.failure}: {cell.cause}" if cell.failure else cell.cause


def sweeps_table(root: Any, watch: Callable[[Sweep], Watch] = Watch) -> Fitted:
    """Every sweep below a folder, the newest first: when it began, how many cells it has and where they are, and the device.

    Slurm is asked only about sweeps that have cells without a result.
    """
    table = Fitted(f"sweeps below {root}", [
        Column("sweep"), Column("begun", 1), Column("cells", right=True), Column("ok", right=True), Column("failed", right=True),
        Column("running", right=True), Column("other", 2, right=True), Column("device", 3, folds=True), Column("", wanted=0),
    ])  # fmt: skip
    found = sweeps(root)
    for name in reversed(found):
        last = "last" if name == found[-1] else ""
        try:
            table.add(name, *_told(Sweep(root, name), watch), last)
        except Unreadable as error:
            table.add(name, *["-"] * 7, last, below=str(error))
    return table


def _told(sweep: Sweep, watch: Callable[[Sweep], Watch]) -> list[str]:
    seen = sweep.look()
    counts = Counter(record.status for record in seen.records.values())
    if counts["missing"] or any(record.running for record in seen.records.values()):
        counts = watch(sweep).look().counts()
    failed, running = counts["failed"] + counts["lost"], counts["running"]
    other = counts.total() - counts["ok"] - failed - running
    devices = dict.fromkeys(
        str(attempt.provenance["device"])
        for record in seen.records.values() for attempt in record.attempts if attempt.provenance.get("device")
    )  # fmt: skip
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.manifest()["created_at"]))
    short = ", ".join(dict.fromkeys(map(_short, devices))) or "-"
    return [begun, *map(str, (counts.total(), counts["ok"], failed, running, other)), short]


def _short(device: str) -> str:
    """The name of conf/device for a device, where it has one."""
    entry = entry_of(known_devices(), device)
    return str(entry["name"]) if entry else device
