"""The cells of a sweep, and where they stand, as tables: read from the store, never from MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from lcbench.grid.cell import Cell, flat_config
from lcbench.report.inert import plain
from lcbench.runs.jobs import PackState, SweepStatus
from lcbench.runs.store import Look, Record, Sweep

WIDTH = 200  # of a table that goes to a file or a pipe
COLORS = {"ok": "green", "failed": "red", "lost": "red", "skipped": "yellow", "missing": "dim"}
CHECKED = ("out", "dq", "dk", "dv")
# Larger sweeps show what needs looking at.
MANY = 200


def to_rows(seen: Look, ids: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """One dictionary per cell, SI units. Metrics are those of the newest attempt."""
    wanted = seen.records.keys() if ids is None else set(ids)
    shown = {cell_id: record for cell_id, record in seen.records.items() if cell_id in wanted}
    named = labels(record.entry.cell for record in shown.values())
    return [_row(cell_id, record, named[cell_id]) for cell_id, record in shown.items()]


def labels(cells: Iterable[Cell]) -> dict[str, str]:
    """What to call cells among each other: those that share a label are told apart by what differs between them."""
    alike: dict[str, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(cell.label, []).append(cell)
    found = {}
    for label, members in alike.items():
        flat = [flat_config(cell) for cell in members] if len(members) > 1 else [{}]
        differing = [k for k in flat[0] if any(f.get(k) != flat[0][k] for f in flat)]
        # What heads consist of says nothing that they do not.
        differing = [k for k in differing if not (k.startswith(("num_heads", "head_dim")) and "heads" in differing)]
        for cell, values in zip(members, flat, strict=True):
            found[cell.id] = " ".join([label, *(f"{k}={values.get(k)}" for k in differing)])
    return found


def _row(cell_id: str, record: Record, label: str) -> dict[str, Any]:
    attempt, failure = record.last, record.failure
    metrics = attempt.metrics if attempt else {}
    errors = [metrics[f"check/{name}_error"] for name in CHECKED if f"check/{name}_error" in metrics]
    return {
        "cell": cell_id,
        "label": label,
        "status": record.status,
        "attempt": attempt.number if attempt else 0,
        "forward_s": metrics.get("time/forward/median_s"),
        "backward_s": metrics.get("time/backward/median_s"),
        "tflops_per_gpu": metrics.get("compute/tflops_per_gpu"),
        "mfu": metrics.get("compute/mfu"),
        "peak_bytes": metrics.get("memory/peak_bytes"),
        "noise": metrics.get("time/noise"),
        "error": max(errors) if errors else None,
        "no_speed": attempt.no_speed if attempt else "",
        "failure": failure.kind if failure else None,
        "cause": failure.cause if failure else None,
    }


def why_not(row: Mapping[str, Any]) -> str:
    """Why a cell has no result, or one that is checked and has no speed."""
    if row["failure"]:
        return f"{row['failure']}: {row['cause']}"
    return f"no speed: {row['no_speed']}" if row["no_speed"] else ""


def cells_table(seen: Look, name: str, ids: list[str] | None = None) -> Table:
    """For people: milliseconds, MiB, percent; a noisy cell's noise is said beside its time."""
    table = Table(title=plain(f"sweep {name}"), title_justify="left")
    for column in ("status", "cell", "what"):
        table.add_column(column, no_wrap=column != "what")
    for column in ("fwd ms", "bwd ms", "noise", "TFLOP/s\nper GPU", "MFU", "peak\nMiB", "max\nerror"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for row in to_rows(seen, ids):
        table.add_row(
            plain(row["status"], COLORS[row["status"]]),
            plain(row["cell"]),
            plain(row["label"]),
            _shown(row["forward_s"], 1e3, ".3g"),
            _shown(row["backward_s"], 1e3, ".3g"),
            _shown(row["noise"], 100, ".1f", "%"),
            _shown(row["tflops_per_gpu"], 1, ".3g"),
            _shown(row["mfu"], 100, ".1f", "%"),
            _shown(row["peak_bytes"], 1 / (1 << 20), ".1f"),
            _shown(row["error"], 1, ".1e"),
            plain(why_not(row)),
        )
    return table


def fastest_table(sweep: Sweep, seen: Look, ids: Iterable[str]) -> Table | None:
    """The fastest choice of every problem, where there was one; None if there was not, or too much to show."""
    from lcbench.report.frame import good_rows, reported
    from lcbench.report.winners import winners

    frame = good_rows(reported(sweep, seen))
    chosen = frame[frame["cell"].isin(set(ids))] if len(frame) else frame
    found = [w for w in winners(chosen) if w.margin is not None]
    if not found or len(found) > MANY:
        return None
    rows = [w.row() for w in found]
    table = Table(title="fastest, and how many times as long the next one takes (95 % interval)", title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(plain, row.values()))
    return table


def _shown(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"


def packs_table(packs: list[PackState], name: str) -> Table:
    """Jobs and how far they are."""
    table = Table(title=plain(f"packs of {name}"), title_justify="left")
    for column in ("pack", "launcher", "job", "state", "cells", "reason"):
        table.add_column(column)
    shown = packs if len(packs) <= MANY else [p for p in packs if not p.ended]
    for p in shown:
        table.add_row(*map(plain, (p.id, p.launcher, p.job_id, p.state, f"{p.done}/{len(p.cells)}", p.reason)))
    if len(shown) < len(packs):
        table.caption = f"and {len(packs) - len(shown)} that have ended"
    return table


def status_tables(standing: SweepStatus, name: str, *, everything: bool = False) -> Group:
    """Packs, cells, counts. Of a large sweep only the cells that are under way or not well, unless ``everything``."""
    table = Table(title="cells", title_justify="left")
    for column in ("state", "cell", "what", "attempt", "job", "job state", "class", "first cause"):
        table.add_column(column, no_wrap=column == "cell")
    cells = standing.cells
    shown = cells if everything or len(cells) <= MANY else [c for c in cells if c.state in ("running", "failed", "lost")]
    for c in shown if everything else shown[:MANY]:
        words = (c.id, c.label, c.attempt or "-", c.job_id, c.job_state, c.failure, c.cause)
        table.add_row(plain(c.state, COLORS.get(c.state, "cyan")), *map(plain, words))
    if table.row_count < len(cells):
        table.caption = f"and {len(cells) - table.row_count} more (--all)"
    return Group(packs_table(standing.packs, name), table, summary_line(standing))


def summary_line(standing: SweepStatus) -> str:
    """Cells by state, and how long it will take."""
    counts = ", ".join(f"{count} {state}" for state, count in standing.counts().most_common())
    left = str(standing.left())
    return f"{counts}; {left}" if left else counts
