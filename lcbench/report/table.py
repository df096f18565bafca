"""The cells of a sweep as a table: read from the store, never from MLflow."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from lcbench.runs.store import Attempt, Entry, Sweep

WIDTH = 200  # of a table that goes to a file or a pipe
COLORS = {"ok": "green", "failed": "red", "skipped": "yellow", "missing": "dim"}
CHECKED = ("out", "dq", "dk", "dv")


def to_rows(sweep: Sweep, ids: list[str] | None = None) -> list[dict[str, Any]]:
    """One dictionary per cell, SI units: what ``--json`` prints. Metrics are those of the newest attempt."""
    rows = []
    for cell_id, entry in sweep.entries().items():
        if ids is None or cell_id in ids:
            attempts = sweep.attempts(cell_id)
            rows.append(_row(entry, attempts[-1] if attempts else None))
    return rows


def _row(entry: Entry, attempt: Attempt | None) -> dict[str, Any]:
    metrics = attempt.metrics if attempt else {}
    errors = [metrics[f"check/{name}_error"] for name in CHECKED if f"check/{name}_error" in metrics]
    return {
        "cell": entry.cell.id,
        "label": entry.cell.label,
        "status": attempt.status if attempt else "missing",
        "attempt": attempt.number if attempt else 0,
        "forward_s": metrics.get("time/forward/median_s"),
        "backward_s": metrics.get("time/backward/median_s"),
        "tflops_per_gpu": metrics.get("compute/tflops_per_gpu"),
        "mfu": metrics.get("compute/mfu"),
        "peak_bytes": metrics.get("memory/peak_bytes"),
        "noise": metrics.get("time/noise"),
        "error": max(errors) if errors else None,
        "failure": attempt.failure.kind if attempt and attempt.failure else None,
        "cause": attempt.failure.cause if attempt and attempt.failure else None,
    }


def cells_table(sweep: Sweep, ids: list[str] | None = None) -> Table:
    """For people: milliseconds, MiB, percent; a noisy cell's noise is said beside its time."""
    table = Table(title=f"sweep {sweep.name}", title_justify="left")
    for column in ("status", "cell", "what"):
        table.add_column(column, no_wrap=column != "what")
    for column in ("fwd ms", "bwd ms", "noise", "TFLOP/s\nper GPU", "MFU", "peak\nMiB", "max\nerror"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("why not", overflow="fold")
    for row in to_rows(sweep, ids):
        color = COLORS[row["status"]]
        table.add_row(
            f"[{color}]{row['status']}[/]",
            row["cell"],
            row["label"],
            _shown(row["forward_s"], 1e3, ".3g"),
            _shown(row["backward_s"], 1e3, ".3g"),
            _shown(row["noise"], 100, ".1f", "%"),
            _shown(row["tflops_per_gpu"], 1, ".3g"),
            _shown(row["mfu"], 100, ".1f", "%"),
            _shown(row["peak_bytes"], 1 / (1 << 20), ".1f"),
            _shown(row["error"], 1, ".1e"),
            f"{row['failure']}: {row['cause']}" if row["failure"] else "",
        )
    return table


def _shown(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"
