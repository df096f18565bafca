"""A tracking server: alone with it, quietly, and within seconds whatever is wrong with it."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lcbench.redact import redacted_uri
from lcbench.runs.address import credentials, reason, sqlite_file
from lcbench.runs.store import Sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BATCH = 800  # MLflow takes 1000 metrics, params and tags a request, 100 params among them
PAGE_OF_RUNS = 1000
TAG_LENGTH = 4000
QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PGCONNECT_TIMEOUT": "5",
}
NOISY = ("alembic", "mlflow", "sqlalchemy", "urllib3")


class TrackingUnavailable(Exception):
    """The tracking server cannot be reached or refuses; nothing is lost, the store has it all."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{reason} ({redacted_uri(uri)})")


@contextmanager
def alone_with(sweep: Sweep, uri: str, *, wait: bool = True) -> Iterator[MlflowClient]:
    """Alone with a sweep and its server; whatever goes wrong with the server becomes ``TrackingUnavailable``.

    Raises:
        Timeout: without ``wait``, if somebody else is at it.
    """
    os.environ.update({k: os.environ.get(k, v) for k, v in QUICK.items()})
    try:
        with FileLock(sweep.folder / ".publish.lock", timeout=-1 if wait else 0), _quietly(), credentials(uri) as address:
            yield _client(address)
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
        if not file.exists():
            _make_database(file, address.partition(":")[0])
    return MlflowClient(tracking_uri=address)


def _make_database(file: Path, driver: str) -> None:
    """Make an SQLite file for MLflow whole, or not at all: MLflow makes its tables one by one, and where a process was killed
    meanwhile it never opens the file again.
    """
    from mlflow import MlflowClient

    folder = file.with_name(f".{file.name}.new")
    with FileLock(file.with_name(f".{file.name}.lock")):
        if file.exists():  # somebody else has made it meanwhile
            return
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        MlflowClient(tracking_uri=f"{driver}:///{folder / file.name}")
        (folder / file.name).rename(file)
        folder.rmdir()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what MLflow and its libraries log: what is wrong is said in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401  # which sets the levels of its loggers

        levels = {logging.getLogger(name): logging.getLogger(name).level for name in NOISY}
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def exists(client: MlflowClient, run_id: str) -> bool:
    """Whether a run is there and not deleted."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return False
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def runs_where(client: MlflowClient, experiment: str, where: str) -> Iterator[Run]:
    """All runs of an experiment that a filter of MLflow's finds."""
    token = None
    while True:
        page = client.search_runs([experiment], where, max_results=PAGE_OF_RUNS, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
