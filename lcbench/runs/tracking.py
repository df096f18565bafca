"""MLflow, published from the store: one parent run per sweep, one child per cell, showing the cell's latest attempt.

Publishing is idempotent by (sweep, cell id): what the server has is remembered beside the results and found again by tag,
so it can be repeated, interrupted, or done over for a new server. It never runs in a measuring process.

Metrics carry ``step = attempt``, so the newest attempt is shown and the history is kept; times of iterations are the metrics
``samples/...``, whose step is ``SAMPLE_STRIDE * (attempt - 1) + iteration``. ``runs/shown.py`` has their names and units.

What a sweep comes to (what to use, why cells failed, colours of choices) is known to ``report/`` only. ``report/publishing.py``
publishes the cells (``publish``) and then tells that (``tell``); a pack that publishes at its end leaves it to whoever comes later.

An attempt that was published and then got another block of timings is published again: its metrics with a later timestamp, of
which MLflow shows the last, and of its samples what is new.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from lcbench.grid.cell import Cell
from lcbench.grid.site import runs_here
from lcbench.redact import redacted, redacted_uri, with_password
from lcbench.runs import shown
from lcbench.runs.address import EXPERIMENT, credentials, reason, server_command, sqlite_file
from lcbench.runs.attempt import FORETOLD, Attempt
from lcbench.runs.dashboard import (
    PLACE,
    VIEW,
    View,
    cell_views,
    failures_view,
    note,
    place_tag,
    predictions_view,
    run_path,
    sweeps_view,
)
from lcbench.runs.files import write_json
from lcbench.runs.manifest import Entry, entries_of
from lcbench.runs.store import MEMORY, Sweep
from lcbench.runs.users import user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

LOCAL = "http://127.0.0.1:5000"  # where make mlflow serves by default
BATCH = 800  # MLflow takes 1000 metrics, params and tags a request, 100 params among them
TAG_LENGTH = 4000
NOTE_LENGTH, LINKS_LENGTH = 5000, 2500  # of a sweep's description, and of the links to its views in it
ARTIFACTS = "mlartifacts"  # beside an SQLite file, where files of its runs lie
REPORT = "report"
# What is published of a cell. One that was published otherwise is published again.
FORM = 2
SAVE_EVERY_S = 15.0
QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PGCONNECT_TIMEOUT": "5",
}
FILES = "lcbench.files"
NOISY = ("alembic", "mlflow", "sqlalchemy", "urllib3")


class TrackingUnavailable(Exception):
    """The tracking server cannot be reached or refuses; nothing is lost, the store has it all."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{reason} ({redacted_uri(uri)})")


class Known(NamedTuple):
    """What a server has of a cell: its run, the newest attempt there, how many blocks of timings that had then and had lost,
    when its file was written (0: not known), whether it has the files of the attempts too, and in which form it was published.
    """

    run_id: str
    attempt: int = 0
    status: str | None = None
    blocks: int = 0
    lost: int = 0
    written_ns: int = 0
    files: bool = True
    form: int = 0

    def has(self, attempt: Attempt) -> bool:
        """Whether it has an attempt as it is now, and as it is published now."""
        return self.form == FORM and self[1:5] == (attempt.number, attempt.status, attempt.blocks, len(attempt.lost_blocks))


@dataclass(frozen=True)
class Counts:
    """What came of publishing.

    Attributes:
        published: cells that were published.
        unchanged: cells that were there already.
        complete: whether there was time for all.
        files: why the files of attempts could not be put beside their runs, if so.
        told: whether the sweep's run says what its cells come to as they are now.
        ended: whether every cell that can run has a result.
    """

    published: int
    unchanged: int
    complete: bool = True
    files: str = ""
    told: bool = True
    ended: bool = False


@dataclass(frozen=True)
class Summary:
    """What a sweep comes to, for its own run.

    Attributes:
        verdict: what to use, Markdown; empty where there is nothing to say.
        body: the rest of the description, Markdown: each line of it may be left out where there is no room.
        metrics: of the sweep as a whole.
        tags: of the sweep's run.
        colors: of each cell's run, as #rrggbb, by cell id.
        at: when the last of its results was measured, in seconds since the epoch.
    """

    verdict: str = ""
    body: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    colors: Mapping[str, str] = field(default_factory=dict)
    at: float = 0.0


def publish(
    sweep: Sweep, uri: str, experiment: str | None = None, *, budget_s: float | None = None, thorough: bool = False
) -> Counts:
    """Bring a tracking server up to date with a sweep's store.

    Args:
        experiment: the name of MLflow's; by default the sweep's own choice.
        budget_s: stop after this long, and do nothing if somebody else is at it; what is left is published another time.
        thorough: ask the server what it has instead of trusting what is remembered; runs that were deleted there are made again.

    Raises:
        TrackingUnavailable: within seconds, whatever is wrong with the server.
    """
    end = None if budget_s is None else time.monotonic() + budget_s
    try:
        with _publisher(sweep, uri, experiment, wait=budget_s is None, thorough=thorough) as publisher:
            return publisher.run(end)
    except Timeout:
        return Counts(0, 0, complete=False)


def tell(sweep: Sweep, uri: str, experiment: str | None, summary: Summary, page: Path | None = None) -> str:
    """Have the sweep's own run say what its cells come to, and give their runs the colours of their choices.

    Args:
        page: the report's page, to be put beside it.

    Returns: why files could not be put beside it, if so.

    Raises:
        TrackingUnavailable: as for ``publish``.
    """
    with _publisher(sweep, uri, experiment) as publisher:
        return publisher.tell(summary, page)


def attach(sweep: Sweep, uri: str, folder: Path) -> None:
    """Put a folder's files beside the sweep's own run, as artifacts below the folder's name.

    Raises:
        TrackingUnavailable: as for ``publish``.
    """
    with _publisher(sweep, uri) as publisher:
        publisher.attach(folder)


@contextmanager
def _publisher(
    sweep: Sweep, uri: str, experiment: str | None = None, *, wait: bool = True, thorough: bool = False
) -> Iterator[_Publisher]:
    """Alone with a sweep and its server; whatever goes wrong with the server becomes ``TrackingUnavailable``.

    Raises:
        Timeout: without ``wait``, if somebody else is at it.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in QUICK.items()})
    try:
        with FileLock(sweep.folder / ".publish.lock", timeout=-1 if wait else 0), _quietly(), credentials(uri) as address:
            yield _Publisher(sweep, uri, _client(address), experiment, thorough=thorough)
    except (Timeout, TrackingUnavailable):
        raise
    except Exception as error:  # drivers of databases, stores of artifacts and plugins have exceptions of their own
        raise TrackingUnavailable(uri, reason(error, uri)) from error


def _client(address: str) -> MlflowClient:
    from mlflow import MlflowClient

    if not address.startswith(("http://", "https://")):
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # MLflow tries for 100 s to open a database, with a page of warnings
    if file := sqlite_file(address):
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=address)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what MLflow and its libraries log: what is wrong is said in one line."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in NOISY}
    for name in loggers:
        name.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def publish_or_say(
    sweep: Sweep, uri: str | None, how: Callable[[Sweep, str], Counts] | None = None, *, budget_s: float | None = None
) -> None:
    """Publish where there is a tracking server; one that is away costs a line.

    Args:
        how: by default cells only (``publish``).
        budget_s: of ``publish``.
    """
    if not uri:
        return
    try:
        counts = how(sweep, uri) if how else publish(sweep, uri, budget_s=budget_s)
    except TrackingUnavailable as error:
        print(f"not published: {error}; later: {sweep.command('sync')}", file=sys.stderr)
    else:
        if counts.files:
            print(counts.files, file=sys.stderr)


def attach_or_say(sweep: Sweep, uri: str | None, folder: Path) -> None:
    """Attach where there is a tracking server; one that is away costs a line."""
    if not uri:
        return
    try:
        attach(sweep, uri, folder)
    except TrackingUnavailable as error:
        print(f"not attached to the sweep's run: {error}", file=sys.stderr)


def view_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server shows this sweep's charts, of a large sweep those of its first part; a database's at ``LOCAL``; None
    where it has nothing of the sweep.
    """
    return _url(sweep, uri, lambda mine: _cell_views(sweep.name, sweep.manifest())[0].path(mine["experiment"]))


def failures_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server shows this sweep's failed cells; None where it knows of none."""
    failed = sum(Known(*known).status == "failed" for known in _mine(sweep, uri).get("cells", {}).values())
    manifest = sweep.manifest()
    return _url(
        sweep, uri,
        lambda mine: failures_view(sweep.name, manifest["id"], manifest["created_at"], failed).path(mine["experiment"]),
    ) if failed else None  # fmt: skip


def sweep_url(sweep: Sweep, uri: str | None) -> str | None:
    """Where a tracking server says what this sweep comes to, with links to all else; None where it has nothing of the sweep."""
    return _url(sweep, uri, lambda mine: run_path(mine["experiment"], mine["parent"]))


def _url(sweep: Sweep, uri: str | None, path: Callable[[dict[str, Any]], str]) -> str | None:
    mine = _mine(sweep, uri)
    if not uri or "experiment" not in mine:
        return None
    server = redacted_uri(uri).rstrip("/") if uri.startswith("http") else LOCAL
    return f"{server}/#{path(mine)}"


def _mine(sweep: Sweep, uri: str | None) -> dict[str, Any]:
    """What a server has of a sweep."""
    found: dict[str, Any] = _memory(sweep).get(redacted_uri(uri), {}) if uri else {}
    return found


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


def _memory(sweep: Sweep) -> dict[str, Any]:
    """What servers have of a sweep, by their addresses without user and password."""
    return {redacted_uri(uri): known for uri, known in sweep.remembered().items()}


class _Publisher:
    """What the server has of this sweep is remembered in ``mlflow.json``: cell -> ``Known``. The file says ``open``
    while somebody publishes; who finds it so asks the server, by tag, what became of that.
    """

    def __init__(self, sweep: Sweep, uri: str, client: MlflowClient, experiment: str | None, *, thorough: bool) -> None:
        self._sweep, self._uri, self._client = sweep, redacted_uri(uri), client
        self._manifest = sweep.manifest()
        self._launch: dict[str, Any] = self._manifest["launch"] or {}
        self._name = experiment or self._launch.get("settings", {}).get("experiment") or EXPERIMENT
        self._no_files = ""
        self._location = ""
        self._experiment = self._find_experiment()
        self._known = _memory(sweep)
        mine: dict[str, Any] = self._known.get(self._uri, {})
        same = mine.get("experiment") == self._experiment
        fresh = not thorough and not mine.get("open") and same and self._exists(mine.get("parent", ""))
        self._mine = mine if fresh else self._recall(mine.get("cells", {}) if same else {})

    def run(self, end: float | None) -> Counts:
        published = unchanged = 0
        entries = entries_of(self._manifest)
        cells: dict[str, Any] = self._mine["cells"]
        saved = 0.0
        complete, looked = True, False
        for place, (cell_id, entry) in enumerate(entries.items()):
            newest = self._sweep.newest(cell_id)
            written_ns = self._sweep.written_ns(cell_id, newest) if newest else 0
            known = Known(*cells.get(cell_id, ("",)))
            same = (newest, written_ns) == (known.attempt, known.written_ns) and known.form == (FORM if newest else 0)
            if same and (known.files or self._no_files):
                unchanged += newest > 0
                continue
            if end is not None and time.monotonic() > end:
                complete = False
                break
            attempts = self._sweep.attempts(cell_id)
            if not attempts:
                continue
            if known.has(attempts[-1]):
                more = not known.files and self._put_files(entry, attempts, known.run_id)
                if more:
                    self._client.delete_tag(known.run_id, FILES)
                cells[cell_id], looked = known._replace(written_ns=written_ns, files=known.files or more), True
                published, unchanged = published + more, unchanged + (not more)
                continue
            if time.monotonic() - saved > SAVE_EVERY_S:
                self._save(open_=True)
                saved = time.monotonic()
            if not known.run_id:
                known = Known(self._create_child(entry.cell, attempts[0]))
            known, files = self._fill(place, entry, attempts, known)
            cells[cell_id] = _known(known.run_id, attempts[-1], written_ns, files)
            published += 1
        foretold, all_told = self._publish_predictions(entries, end if complete else 0.0)
        published, complete = published + foretold, complete and all_told
        if published or not unchanged or self._mine["open"]:
            self._finish_parent(entries, complete)
        if published or looked or self._known.get(self._uri) != self._mine:
            self._save(open_=False)
        told = self._mine.get("told") == self._digest()
        return Counts(published, unchanged, complete, self._about_files(), told, self._statuses(entries)["missing"] == 0)

    def _publish_predictions(self, entries: dict[str, Entry], end: float | None) -> tuple[int, bool]:
        """Give every prediction that is new a run of its own; how many, and whether there was time for all."""
        there, published = self._predictions, 0
        for place, (cell_id, entry) in enumerate(entries.items()):
            written_ns = self._sweep.written_ns(cell_id, FORETOLD)
            run_id, known_ns = there.get(cell_id, ("", 0))
            if written_ns == known_ns:
                continue
            if end is not None and time.monotonic() > end:
                return published, False
            prediction = self._sweep.prediction(cell_id)
            made = prediction is not None and prediction.status == "predicted"
            if not (made or run_id):
                continue
            if not published:
                self._save(open_=True)
            if prediction is not None and made:
                there[cell_id] = [self._fill_prediction(place, entry, prediction, run_id), written_ns]
            else:  # with this machine and fit there can be none any more
                self._client.delete_run(run_id)
                del there[cell_id]
            published += 1
        return published, True

    def _fill_prediction(self, place: int, entry: Entry, prediction: Attempt, run_id: str) -> str:
        """Bring the run of a prediction up to date, which is made if it is not there; its id."""
        from mlflow.entities import Metric, Param, RunTag

        mine = {**self._tags_of_all(), shown.PREDICTIONS_OF: self._manifest["id"]}
        del mine["lcbench.sweep_id"]  # by which measured cells are found
        at = shown.written_ms(prediction)
        if not self._exists(run_id):
            tags = {**mine, "mlflow.parentRunId": self._mine["parent"], "lcbench.cell_id": entry.cell.id, shown.PREDICTED: "true"}
            name = f"{entry.cell.label} (predicted)"
            run_id = str(self._client.create_run(self._experiment, start_time=at, run_name=name, tags=tags).info.run_id)
        self._client.log_batch(
            run_id, params=[Param(key, value) for key, value in shown.params(entry.cell).items()],
            metrics=[Metric(key, value, at, 0) for key, value in shown.prediction_values(prediction)],
        )  # fmt: skip
        self._client.set_terminated(run_id, "FINISHED", end_time=at)
        tags = {**mine, **shown.prediction_tags(prediction), PLACE: place_tag(place)}
        self._client.log_batch(run_id, tags=[RunTag(k, redacted(v)[:TAG_LENGTH]) for k, v in tags.items()])
        return run_id

    @property
    def _predictions(self) -> dict[str, Any]:
        """What the server has of predictions: by cell their run, and when the file that is there was written."""
        found: dict[str, Any] = self._mine.setdefault("predictions", {})
        return found

    def _about_files(self) -> str:
        if not self._no_files:
            return ""
        if self._strange:
            return f"files not published: {self._no_files}; metrics, parameters and tags are"
        proxied = self._location.startswith(("mlflow-artifacts:", "http"))
        cure = "look at the server's --artifacts-destination" if proxied else (
            "start the server with --serve-artifacts, and take another experiment, since one keeps its root: "
            "mlflow_experiment=NAME, or lcbench.sync --experiment NAME"
        )  # fmt: skip
        return (
            f"files not published: {self._no_files}; metrics, parameters and tags are. The server's artifact root "
            f"{redacted_uri(self._location)} cannot be written: {cure}"
        )

    def _save(self, *, open_: bool) -> None:
        self._mine["open"] = open_
        write_json(self._sweep.folder / MEMORY, {**self._known, self._uri: self._mine})

    def _digest(self) -> str:
        """What is there of the cells, as one word."""
        there = {cell_id: Known(*known)[1:5] for cell_id, known in self._mine["cells"].items()}
        more = [self._predictions] if self._predictions else []
        return hashlib.sha256(json.dumps([len(self._manifest["cells"]), there, *more], sort_keys=True).encode()).hexdigest()

    def attach(self, folder: Path) -> None:
        if self._no_files:
            raise TrackingUnavailable(self._uri, self._no_files)
        self._client.log_artifacts(self._mine["parent"], str(folder), folder.name)

    def tell(self, summary: Summary, page: Path | None) -> str:
        from mlflow.entities import Metric, RunTag

        parent, cells = self._mine["parent"], self._mine["cells"]
        colors: dict[str, str] = self._mine.setdefault("colors", {})
        for cell_id, color in summary.colors.items():
            run_id = Known(*cells.get(cell_id, ("",))).run_id
            if run_id and colors.get(run_id) != color:
                self._client.set_tag(run_id, "mlflow.runColor", color)
                colors[run_id] = color
        if page is not None:
            self._try_files(lambda: self._client.log_artifact(parent, str(page), REPORT))
        tags = {**summary.tags, "mlflow.note.content": self._note(summary)}
        at = int(summary.at * 1000)
        self._client.log_batch(
            parent, metrics=[Metric(key, value, at, 0) for key, value in summary.metrics.items()],
            tags=[RunTag(key, redacted(value)[:NOTE_LENGTH]) for key, value in tags.items()],
        )  # fmt: skip
        self._mine["told"] = self._digest()
        self._save(open_=False)
        return self._about_files()

    def _note(self, summary: Summary) -> str:
        """The description of the sweep's run, Markdown. The page folds it after a few lines, so what matters most comes first."""
        entries, experiment, parent = entries_of(self._manifest), self._experiment, self._mine["parent"]
        page = f"{REPORT}/report.html"
        there: list[str] = []
        self._try_files(lambda: there.extend(file.path for file in self._client.list_artifacts(parent, REPORT)))
        links = []
        if page in there:
            links.append(f"[Report](#{run_path(experiment, parent, page)})")
        views = self._views(self._statuses(entries))
        links += [f"[{view.short}](#{view.path(experiment)})" for view in views if not view.key.endswith(".failed")]
        failed = [f"[**{view.short}**](#{view.path(experiment)})" for view in views if view.key.endswith(".failed")]
        links = failed + links
        while sum(map(len, links)) > LINKS_LENGTH:
            links.pop()
        more = len(views) + 1 - len(links)
        said = [summary.verdict, " · ".join(links) + (f" and {more} more among the page's views" if more > 1 else "")]
        end = self._about_results()
        body = summary.body.split("\n")
        while body and len("\n\n".join([*said, "\n".join(body), end])) > NOTE_LENGTH:
            body.pop()
        return "\n\n".join(filter(None, [*said, "\n".join(body), end]))[:NOTE_LENGTH]

    def _about_results(self) -> str:
        """Where a sweep's results lie and which commands made them, Markdown."""
        # Not as blocks of code: MLflow's page gets as wide as their longest line.
        commands = [f"`{redacted(self._command(words))}`" for words in self._manifest["commands"]]
        return "\n\n".join([f"Results in `{self._sweep.folder}`.", *commands])

    def _find_experiment(self) -> str:
        """The experiment, with a description and with views of all sweeps and of this one."""
        found = self._client.get_experiment_by_name(self._name)
        if found is None:
            # Else artifacts land in the working directory.
            location = self._beside()
            made, tags = str(self._client.create_experiment(self._name, artifact_location=location)), {}
            self._location = str(self._client.get_experiment(made).artifact_location)
        else:
            made, tags, self._location = str(found.experiment_id), found.tags, str(found.artifact_location)
            if found.lifecycle_stage != "active":
                raise TrackingUnavailable(
                    self._uri,
                    f"its experiment {self._name!r} is deleted: restore it by "
                    f"MLFLOW_TRACKING_URI={shlex.quote(self._uri)} mlflow experiments restore --experiment-id {made}, "
                    "or take another: mlflow_experiment=NAME, or lcbench.sync --experiment NAME",
                )
        self._tags_there = dict(tags)
        sweeps = sweeps_view()
        self._set_experiment_tags(made, {"mlflow.note.content": note(made), VIEW + sweeps.key: sweeps.value})
        self._keep_out_of_another_checkout()
        return made

    def _beside(self) -> str | None:
        """Where files of runs lie that an SQLite file of ours holds; None of a server."""
        file = sqlite_file(self._uri)
        return (file.absolute().parent / ARTIFACTS).as_uri() if file else None

    def _keep_out_of_another_checkout(self) -> None:
        """An experiment keeps the absolute path of its files, which in a copied or moved checkout is that of before."""
        ours = self._beside()
        self._strange = ours is not None and self._location != ours and self._location.rstrip("/").endswith(f"/{ARTIFACTS}")
        if self._strange:
            self._no_files = (
                f"the experiment {self._name!r} keeps them in {self._location}, which is not beside its database, as after a copy"
                " or a move; take another experiment: mlflow_experiment=NAME, or lcbench.sync --experiment NAME"
            )

    def _set_experiment_tags(self, experiment: str, wanted: Mapping[str, str]) -> None:
        for key, value in wanted.items():
            if self._tags_there.get(key) != value:
                self._client.set_experiment_tag(experiment, key, value)
                self._tags_there[key] = value

    def _views(self, statuses: Mapping[str, int]) -> list[View]:
        """The sweep's views, that of its failures first."""
        manifest = self._manifest
        failed = statuses["failed"]
        failures = [failures_view(self._sweep.name, manifest["id"], manifest["created_at"], failed)] if failed else []
        count = len(self._predictions)
        foretold = [predictions_view(self._sweep.name, manifest["id"], manifest["created_at"], count)] if count else []
        return [*failures, *_cell_views(self._sweep.name, manifest), *foretold]

    def _set_views(self, statuses: Mapping[str, int]) -> None:
        """Bring the sweep's views up to date; those that hold no more, such as one of all cells of a sweep that grew, go."""
        wanted = {VIEW + view.key: view.value for view in self._views(statuses)}
        self._set_experiment_tags(self._experiment, wanted)
        mine = VIEW + self._manifest["id"]
        for key in [k for k in self._tags_there if k == mine or k.startswith(f"{mine}.")]:
            if key not in wanted:
                self._client.delete_experiment_tag(self._experiment, key)
                del self._tags_there[key]

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        if not run_id:
            return False
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _recall(self, before: dict[str, Any]) -> dict[str, Any]:
        """What the server has of this sweep, found by tag; the parent is made if it is not there.

        ``before``: what is remembered of its cells; of runs that are still so, it knows which file they are made of.
        """
        where = f"tags.`lcbench.sweep_id` = '{self._manifest['id']}'"
        cells: dict[str, Known] = {}
        parents: dict[str, str] = {}
        parent, token = None, None
        while True:
            page = self._client.search_runs([self._experiment], where, max_results=1000, page_token=token)
            for run in page:
                tags = run.data.tags
                if "lcbench.cell_id" in tags:
                    known = Known(
                        run.info.run_id, int(tags.get("lcbench.attempt", 0)), tags.get("lcbench.status"),
                        int(tags.get("lcbench.blocks") or 0), len(json.loads(tags.get("lcbench.lost_blocks") or "[]")),
                        files=not tags.get(FILES), form=int(tags.get("lcbench.form") or 0),
                    )  # fmt: skip
                    # A restored experiment has runs again that were deleted one by one: the newest attempt counts.
                    if known.attempt < cells.get(tags["lcbench.cell_id"], Known("")).attempt:
                        continue
                    was = Known(*before.get(tags["lcbench.cell_id"], ("",)))
                    cells[tags["lcbench.cell_id"]] = was if was == known._replace(written_ns=was.written_ns) else known
                    parents[known.run_id] = tags.get("mlflow.parentRunId", "")
                else:
                    parent = run.info.run_id
            token = page.token
            if not token:
                break
        parent = parent or self._create_parent()
        for run_id in (r for r, its in parents.items() if its != parent):  # its parent was deleted
            self._client.set_tag(run_id, "mlflow.parentRunId", parent)
        return {
            "sweep_id": self._manifest["id"], "experiment": self._experiment, "parent": parent, "cells": cells, "open": True,
            "predictions": self._recall_predictions(parent),
        }  # fmt: skip

    def _recall_predictions(self, parent: str) -> dict[str, Any]:
        """The runs of predictions, found by tag; what is in them is not known."""
        where, found, token = f"tags.`{shown.PREDICTIONS_OF}` = '{self._manifest['id']}'", dict[str, Any](), None
        while True:
            page = self._client.search_runs([self._experiment], where, max_results=1000, page_token=token)
            for run in page:
                found[run.data.tags["lcbench.cell_id"]] = [run.info.run_id, 0]
                if run.data.tags.get("mlflow.parentRunId") != parent:
                    self._client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
            token = page.token
            if not token:
                return found

    def _tags_of_all(self) -> dict[str, str]:
        # Its id, since two people may both have a sweep called "first".
        return {
            "lcbench.sweep": self._sweep.name, "lcbench.sweep_id": self._manifest["id"], "mlflow.user": self._user(),
            "mlflow.source.name": redacted(self._command((self._manifest["commands"] or [[]])[-1]))[:TAG_LENGTH],
            "mlflow.source.type": "LOCAL" if runs_here(str(self._launch.get("launcher"))) else "JOB",
        }  # fmt: skip

    @staticmethod
    def _command(words: list[str]) -> str:
        return shlex.join(["python", "-m", "lcbench.sweep", *words])

    def _user(self) -> str:
        """Who started the sweep, or the number of whoever owns it."""
        return str(self._launch.get("by") or user_name(self._sweep.folder.stat().st_uid))

    def _create_parent(self) -> str:
        tags = {**self._tags_of_all(), "mlflow.note.content": self._about_results()[:NOTE_LENGTH]}
        begun = int(self._manifest["created_at"] * 1000)
        run = self._client.create_run(self._experiment, start_time=begun, run_name=self._sweep.name, tags=tags)
        return str(run.info.run_id)

    def _create_child(self, cell: Cell, first: Attempt) -> str:
        tags = {**self._tags_of_all(), "mlflow.parentRunId": self._mine["parent"], "lcbench.cell_id": cell.id}
        run = self._client.create_run(self._experiment, start_time=int(first.started_at * 1000), run_name=cell.label, tags=tags)
        return str(run.info.run_id)

    def _fill(self, place: int, entry: Entry, attempts: list[Attempt], known: Known) -> tuple[Known, bool]:
        """Bring a cell's run up to date, in a new one if it was deleted; the run, and whether it has the files too."""
        try:
            return known, self._fill_run(place, entry, attempts, known)
        except Exception:
            if self._exists(known.run_id):
                raise
            known = Known(self._create_child(entry.cell, attempts[0]))
            return known, self._fill_run(place, entry, attempts, known)

    def _fill_run(self, place: int, entry: Entry, attempts: list[Attempt], known: Known) -> bool:
        from mlflow.entities import Param

        newest, run_id = attempts[-1], known.run_id
        changed = [a for a in attempts if a.number > known.attempt or (a.number == known.attempt and not known.has(a))]
        metrics = [metric for attempt in changed for metric in self._metrics(attempt, known)]
        params = [Param(key, value) for key, value in shown.params(entry.cell).items()]
        # Only an attempt that is complete there is marked as there: its number is among the tags, which come last.
        self._client.log_batch(run_id, params=params, metrics=metrics[:BATCH])
        for first in range(BATCH, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + BATCH])
        files = self._put_files(entry, changed if known.files else attempts, run_id)
        status = {"ok": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}[newest.status]
        self._client.set_terminated(run_id, status, end_time=shown.written_ms(newest))
        more = {FILES: "" if files else "missing", PLACE: place_tag(place), "lcbench.form": str(FORM)}
        self._set_tags(run_id, {**shown.tags(attempts), **self._tags_of_all(), **more}, again=known.attempt > 0)
        return files

    def _set_tags(self, run_id: str, tags: Mapping[str, str], *, again: bool) -> None:
        """Set a run's tags; those that say nothing are not there. ``again``: whether some may be there from before."""
        from mlflow.entities import RunTag

        there = self._client.get_run(run_id).data.tags if again else {}
        for key in [key for key, value in tags.items() if not value and key in there]:
            self._client.delete_tag(run_id, key)
        self._client.log_batch(run_id, tags=[RunTag(k, redacted(v)[:TAG_LENGTH]) for k, v in tags.items() if v])

    def _put_files(self, entry: Entry, attempts: list[Attempt], run_id: str) -> bool:
        """Put the files of attempts beside a cell's run; whether they are there. Where that fails once, it is not tried again."""

        def put() -> None:
            self._client.log_text(run_id, json.dumps(entry.cell.config, indent=1), "config.json")
            self._client.log_text(run_id, json.dumps(attempts[-1].provenance, indent=1), "environment.json")
            for attempt in attempts:
                for suffix in ("json", "log"):
                    path = self._sweep.attempt_path(attempt.cell_id, attempt.number, suffix)
                    if path.exists():
                        self._client.log_artifact(run_id, str(path), "attempts")

        return self._try_files(put)

    def _try_files(self, put: Callable[[], object]) -> bool:
        if self._no_files:
            return False
        try:
            put()
        except Exception as error:  # every store of artifacts has exceptions of its own
            self._no_files = reason(error, self._uri)
        return not self._no_files

    def _metrics(self, attempt: Attempt, known: Known) -> list[Metric]:
        """An attempt's metrics, without what is there of it; what is there and does not hold any more becomes NaN."""
        from mlflow.entities import Metric

        there = known if attempt.number == known.attempt else Known(known.run_id)
        values: list[tuple[str, float]] = []
        if (there.status, there.blocks, there.form) != (attempt.status, attempt.blocks, FORM):
            values = shown.values(attempt)
        if there.status == "ok" and attempt.status == "failed":
            logged = self._client.get_run(known.run_id).data.metrics
            values += [(key, math.nan) for key in sorted(logged.keys() - dict(values)) if not key.startswith("samples/")]
        found = [Metric(key, value, shown.written_ms(attempt), attempt.number) for key, value in values]
        # A sample never changes, so that logged twice, by a publisher that died in between, it is the same one.
        at = int(attempt.finished_at * 1000)
        return found + [Metric(key, value, at, step) for key, value, step in shown.samples(attempt, there.blocks)]

    def _statuses(self, entries: dict[str, Entry]) -> Counter[str]:
        """How many cells are ok, failed, skipped, predicted only or missing, as far as they are published."""
        cells, otherwise = self._mine["cells"], dict.fromkeys(self._predictions, "predicted")
        return Counter(
            "skipped" if e.skip else cells[i][2] if i in cells else otherwise.get(i, "missing") for i, e in entries.items()
        )

    def _finish_parent(self, entries: dict[str, Entry], complete: bool) -> None:
        """Views, counts by status, and cells that cannot run, which have no run of their own."""
        from mlflow.entities import Metric, RunTag

        cells, parent, statuses = self._mine["cells"], self._mine["parent"], self._statuses(entries)
        self._set_views(statuses)
        said = ("ok", "failed", "skipped", "missing", *(["predicted"] if statuses["predicted"] else []))
        counts = {f"cells/{status}": statuses[status] for status in said}
        tags = {**self._tags_of_all(), "lcbench.cells": str(len(entries)), "lcbench.published": "all" if complete else "in part"}
        tags |= {f"lcbench.{key.replace('/', '.')}": str(count) for key, count in counts.items()}
        now = int(time.time() * 1000)
        self._client.log_batch(
            parent, metrics=[Metric(key, float(count), now, 0) for key, count in counts.items()],
            tags=[RunTag(k, v) for k, v in tags.items()],
        )  # fmt: skip
        skipped = {i: {"what": e.cell.label, "why": e.skip} for i, e in entries.items() if e.skip}
        if skipped:
            self._try_files(lambda: self._client.log_text(parent, json.dumps(skipped, indent=1), "skipped.json"))
        if complete and not statuses["missing"]:
            written = [*(Known(*known).written_ns for known in cells.values()), *(at for _, at in self._predictions.values())]
            fine = statuses["ok"] or statuses["predicted"]
            self._client.set_terminated(parent, "FINISHED" if fine else "FAILED", end_time=max(written, default=0) // 10**6 or now)
        else:
            self._client.update_run(parent, "RUNNING")


def _cell_views(name: str, manifest: dict[str, Any]) -> list[View]:
    return cell_views(name, manifest["id"], manifest["created_at"], entries_of(manifest))


def _known(run_id: str, attempt: Attempt, written_ns: int, files: bool) -> Known:
    return Known(run_id, attempt.number, attempt.status, attempt.blocks, len(attempt.lost_blocks), written_ns, files, FORM)
