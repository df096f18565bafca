"""Where a tracking server shows a sweep: addresses of its pages, and how to get there."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from lcbench.redact import redacted_uri, with_password
from lcbench.runs.address import server_command
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.dashboard import failures_view, run_path, views_of
from lcbench.runs.tracking.memory import Known, remembered

LOCAL = "http://127.0.0.1:5000"  # where make mlflow serves by default


def view_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server shows this sweep's charts, of a large sweep those of its first part; a database's at ``LOCAL``; None
    where it has nothing of the sweep.
    """
    return _url(sweep, uri, lambda mine: views_of(sweep.name, sweep.manifest())[0].path(mine["experiment"]))


def failures_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server shows this sweep's failed cells; None where it knows of none."""
    failed = sum(Known(*known).status == "failed" for known in remembered(sweep, uri).get("cells", {}).values())
    manifest = sweep.manifest()
    return _url(
        sweep, uri,
        lambda mine: failures_view(sweep.name, manifest["id"], manifest["created_at"], failed).path(mine["experiment"]),
    ) if failed else None  # fmt: skip


def sweep_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server says what this sweep comes to, with links to all else; None where it has nothing of the sweep."""
    return _url(sweep, uri, lambda mine: run_path(mine["experiment"], mine["parent"]))


def _url(sweep: Sweep, uri: str | None, path: Callable[[dict[str, Any]], str]) -> str | None:
    mine = remembered(sweep, uri)
    if not uri or "experiment" not in mine:
        return None
    server = redacted_uri(uri).rstrip("/") if uri.startswith("http") else LOCAL
    return f"{server}/#{path(mine)}"


def dashboard_hint(sweep: Sweep, uri: str | None, *, ours: bool) -> str:
    """How to look at what a sweep comes to. ``ours``: whether ``make mlflow`` serves this address."""
    url = sweep_url(sweep, uri)
    if not uri or url is None:
        return f"nothing is published yet: python -m lcbench.sync {shlex.quote(sweep.name)}"
    if uri.startswith("http"):
        return url
    if uri.startswith("databricks"):
        return f"the experiment in {redacted_uri(uri)}"
    return f"{'make mlflow' if ours else server_command(uri)}, then {url}"


def tracked_at(launch: dict[str, Any] | None) -> str | None:
    """The tracking server of a sweep that was launched so, with the password that ``MLFLOW_TRACKING_URI`` has for it."""
    return with_password(launch["settings"]["tracking_uri"]) if launch else None
