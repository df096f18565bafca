"""Addresses of tracking servers: what is one, and the innermost cause where one takes nothing."""

from __future__ import annotations

import http.server
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lcbench.runs.address import checked_address, planned_address, planned_experiment, server_command
from lcbench.runs.manifest import Entry
from lcbench.runs.store import Sweep
from lcbench.runs.tracking.links import dashboard_hint
from lcbench.runs.tracking.publish import publish
from lcbench.runs.tracking.server import TrackingUnavailable
from tests.runs.test_store import made_cell
from tests.runs.test_tracking import attempt


def test_which_address_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    default = "sqlite:////home/me/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert planned_address(None, None, default) == default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///from/env.db")
    assert planned_address(None, None, default) == f"sqlite:///{tmp_path}/from/env.db"  # whatever folder a job is in
    assert planned_address(None, "http://site:1", default) == "http://site:1"
    assert planned_address("HTTP://option:1/x", "http://site:1", default) == "http://option:1/x"
    assert planned_address("none", "http://site:1", default) is None
    assert planned_address(None, "none", default) is None
    assert planned_address("http://option:1", "none", default) == "http://option:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert planned_address(None, None, default) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlflow:5000")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI=mlflow:5000 names no scheme; write http://mlflow:5000"):
        planned_address(None, None, default)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert planned_experiment(None) == "lcbench"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "team")
    assert (planned_experiment(None), planned_experiment("mine")) == ("team", "mine")
    with pytest.raises(ValueError, match="quotes"):
        planned_experiment(1.1)


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("127.0.0.1:5000", "write http://127.0.0.1:5000"), ("localhost:5000", "write http://localhost:5000"),
        ("mlflow.example.org", "write http://mlflow.example.org"), ("u:secret@h:5000", "write http://h:5000"),
        ("http:/h:5000", "write http://h:5000"), ("https//h", "write https://h"), ("sqlite:x.db", "write sqlite:///x.db"),
        ("./mlruns", "write sqlite:////"), ("file:///data/mlruns", "write sqlite:////data/mlflow.db"),
        ("uc:http://h", "databricks"),
        ("htp://h", "did you mean http"), ("postgres://u:secret@h/d", "did you mean postgresql"), 
        ("http://h:abc", "a port is a number"),
        ("http://u:se/secret@h", "%2F"), ("http://h:5000?token=secret", "MLFLOW_TRACKING_TOKEN"), ("http://", "names no host"),
        ("http://h 5000", "blanks"), ("sqlite://", "slashes"), ("sqlite:///:memory:", "gone"), (5000, "no address"),
        (["http://u:secret@h"], "no address"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_one_line(uri: object, word: str) -> None:
    with pytest.raises(ValueError) as said:  # noqa: PT011
        checked_address(uri, "tracking_uri")
    assert word in str(said.value)
    assert "secret" not in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "postgresql+psycopg2://u:p@h/d", "http://[::1]:5000/x"])
def test_what_mlflow_knows_stays_as_it_is(uri: str) -> None:
    assert checked_address(uri, "tracking_uri") == uri


def test_who_serves_what(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "s")
    assert "lcbench.sync s" in dashboard_hint(sweep, "http://127.0.0.1:9", ours=False)
    said = server_command(f"sqlite:///{tmp_path}/my own.db")
    assert (
        said == f"mlflow server --backend-store-uri 'sqlite:///{tmp_path}/my own.db' --artifacts-destination {tmp_path}/mlartifacts"
    )
    assert server_command("postgresql://u:secret@h/d") == "mlflow server --backend-store-uri postgresql://h/d"


class Coded(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path begins with."""

    def do_GET(self) -> None:
        body = b"<html><style>x</style><h1>a proxy says so</h1></html>"
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Says nothing of clients that went away before their answer came, as they do on a busy machine."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture(scope="module")
def coded() -> Iterator[int]:
    server = Server(("127.0.0.1", 0), Coded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.mark.slow
def test_the_innermost_cause_comes_first(
    coded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    sweep, cell = Sweep(tmp_path / "results", "s"), made_cell()
    sweep.add([Entry(cell)], command=[])
    attempt(sweep, cell.id, "ok", 1.0)
    (tmp_path / "text.db").write_text("this is no database " * 100)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "file").touch()
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.executescript("create table alembic_version(version_num); insert into alembic_version values('feed')")
    newer.close()
    silent = socket.create_server(("127.0.0.1", 0))
    base = f"http://me:hunter2@127.0.0.1:{coded}"
    causes = {
        f"sqlite:///{tmp_path}/text.db": "file is not a database",
        f"sqlite:///{tmp_path}/folder.db": "unable to open database file",
        f"sqlite:///{tmp_path}/file/x.db": "File exists",
        "sqlite:////proc/nowhere/x.db": "No such file or directory: /proc/nowhere",
        f"sqlite:///{tmp_path}/newer.db": "Can't locate revision",
        "postgresql+nodriver://me:hunter2@127.0.0.1:9/x": "Can't load plugin",
        "mssql+pymssql://me:hunter2@127.0.0.1:9/x": "pymssql cannot be imported: pip install",
        "http://me:hunter2@127.0.0.1:9": "Connection refused",
        f"https://me:hunter2@127.0.0.1:{coded}": "[SSL: WRONG_VERSION_NUMBER]",
        "http://me:hunter2@no.such.host.invalid": ("Name or service not known", "Temporary failure in name resolution"),
        f"http://me:hunter2@127.0.0.1:{silent.getsockname()[1]}": "no answer within 1 s",
        f"{base}/200": "what answers there is no MLflow server", f"{base}/401": "401 Unauthorized; the server does not know",
        f"http://127.0.0.1:{coded}/401": "401 Unauthorized; set MLFLOW_TRACKING_USERNAME", f"{base}/403": "403 Forbidden; ",
        f"{base}/404": "404 Not Found; no MLflow server answers there", f"{base}/500": "500 Internal Server Error",
        f"{base}/503": "503 Service Unavailable", "databricks://nobody": "",
    }  # fmt: skip
    for uri, cause in causes.items():
        with pytest.raises(TrackingUnavailable) as said:
            publish(sweep, uri)
        assert str(said.value).startswith(cause), uri
        assert "hunter2" not in str(said.value)
        assert "\n" not in str(said.value)
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(TrackingUnavailable, match=r"^the proxy of http_proxy or https_proxy: Connection refused") as said:
        publish(sweep, "http://mlflow.example.org:5000")
    assert "hunter2" not in str(said.value)
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""  # no library's warnings either
