"""Addresses of tracking servers: which one a sweep publishes to, how to look at it, and why it takes nothing."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lcbench.redact import redacted, redacted_uri, without

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
EXPERIMENT = "lcbench"
NOWHERE = "none"  # an address at which nothing is published
EXAMPLES = f"http://mlflow.example.org:5000 for a server, sqlite:////home/me/mlflow.db for a file, {NOWHERE} to publish nothing"


def given_address(option: Any, site: Any) -> tuple[str, Any]:
    """What names where a sweep publishes to, and what it says: the option ``tracking_uri``, else the site's, else
    ``MLFLOW_TRACKING_URI``; None where nothing does."""
    given = (("tracking_uri", option), ("site.tracking_uri", site), ("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI")))
    return next(((name, value) for name, value in given if value is not None and value != ""), ("", None))


def planned_address(option: Any, site: Any, default: str | None) -> str | None:
    """Where a sweep publishes to: what ``given_address`` finds, else the default; None: nowhere.

    Raises:
        ValueError: it is no address that MLflow can publish to.
    """
    name, uri = given_address(option, site)
    uri = default if uri is None else uri
    return None if uri in (None, NOWHERE) else checked_address(uri, name)


def planned_experiment(option: Any) -> str:
    """The experiment's name: the option, else ``MLFLOW_EXPERIMENT_NAME``, else ``lcbench``.

    Raises:
        ValueError: it is no text.
    """
    name = option if option is not None else os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"mlflow_experiment={name} is no name; write a number in quotes: 'mlflow_experiment=\"{name}\"'")
    return name


def checked_address(uri: Any, name: str) -> str:
    """An address as it is used from any folder: paths of SQLite files are absolute. ``name``: what gave it.

    Raises:
        ValueError: it is no address that MLflow can publish to; one line, without secrets.
    """
    if not isinstance(uri, str):
        raise ValueError(f"{name}={redacted(str(uri))} is no address; write {EXAMPLES}")
    shown = f"{name}={redacted(uri)}"
    uri = uri.strip()
    if re.search(r"\s", uri.partition("://")[0]) or (not uri.startswith("sqlite") and re.search(r"\s", uri)):
        raise ValueError(f"{shown} has blanks in it; in an address they are written %20")
    scheme, sign, rest = uri.partition("://")
    if uri == "databricks" or scheme == "databricks":
        return uri
    scheme = scheme.lower()
    uri = f"{scheme}{sign}{rest}"
    if uri.partition(":")[0] in {entry.name for entry in entry_points(group="mlflow.tracking_store")}:
        return uri  # a plugin of MLflow's knows it
    if not sign or scheme == "file" or uri.startswith("uc:"):
        raise ValueError(f"{shown} {_no_scheme(uri)}")
    engine = scheme.partition("+")[0]
    if scheme not in ("http", "https") and engine not in DATABASES:
        known = ("http", "https", *DATABASES, "databricks")
        close = difflib.get_close_matches(engine, known, n=1)
        raise ValueError(
            f"{shown}: {scheme}:// is none of {', '.join(known)}, which MLflow knows"
            + (f" (did you mean {close[0]}?)" if close else "")
        )
    if engine == "sqlite":
        return _absolute(uri, shown)
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(
            f"{shown}: host and port cannot be read; a port is a number, and in a password / is written %2F, @ %40, : %3A"
        ) from error
    if not host and not (engine in DATABASES and parts.query):
        raise ValueError(f"{shown} names no host; write {EXAMPLES}")
    if scheme in ("http", "https") and (parts.query or parts.fragment):
        raise ValueError(
            f"{shown}: a server's address ends before ? and #; its token goes into MLFLOW_TRACKING_TOKEN, "
            "user and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    return uri


def _no_scheme(uri: str) -> str:
    if found := re.match(rf"(https?|{'|'.join(DATABASES)})(?::/?|/+)(?!/)", uri):
        slashes = "://" if found[1].startswith("http") else ":///"
        return f"is no address; write {found[1]}{slashes}{redacted(uri[found.end() :])}"
    if uri.startswith(("uc:", "databricks-uc")):
        return "is a store of models, not of runs; write databricks"
    path = re.sub(r"^file:/*", "/" if uri.startswith("file:/") else "", uri)
    if uri.startswith(("file:", "/", "./", "../", "~")) or uri == "mlruns" or Path(path).is_dir():
        database = (Path(path).expanduser().absolute().parent / "mlflow.db").as_posix()
        return f"is a folder, and MLflow 3 publishes into none; write sqlite:///{database}"
    return f"names no scheme; write http://{redacted_uri('http://' + uri).removeprefix('http://')}"


def _absolute(uri: str, shown: str) -> str:
    head, mark, query = uri.partition("?")
    scheme, _, path = head.partition("://")
    if not path.startswith("/"):
        raise ValueError(
            f"{shown} has too few slashes; write sqlite:///{path or 'mlflow.db'}, or sqlite:////... for an absolute path"
        )
    path = path[1:]
    if path in ("", ":memory:"):
        raise ValueError(f"{shown} is gone with the process that writes it; write sqlite:////home/me/mlflow.db")
    return f"{scheme}:///{Path(path).expanduser().absolute()}{mark}{query}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address."""
    head = uri.partition("?")[0]
    return Path(head.partition(":///")[2]) if head.partition(":")[0].partition("+")[0] == "sqlite" else None


def server_command(uri: str) -> str:
    """How to serve a database, so that a browser can look at it."""
    file = sqlite_file(uri)
    artifacts = f" --artifacts-destination {shlex.quote(str(file.parent / 'mlartifacts'))}" if file else ""
    return f"mlflow server --backend-store-uri {shlex.quote(redacted_uri(uri))}{artifacts}"


@contextmanager
def credentials(uri: str) -> Iterator[str]:
    """The address for MLflow's client. User and password are taken out of it and given to MLflow in its own variables."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        yield uri
        return
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    # A user alone is a token, as GitHub and others have it.
    wanted = {"MLFLOW_TRACKING_USERNAME": unquote(user), "MLFLOW_TRACKING_PASSWORD": unquote(password)} if password else {
        "MLFLOW_TRACKING_TOKEN": unquote(user)}  # fmt: skip
    with variables(wanted):
        yield redacted_uri(uri)


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process in here; afterwards they are as before."""
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


# -- why it takes nothing --------------------------------------------------------------------------------------------

_CURES = {
    401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (a sweep does not store them)",
    403: "the account may not do that, or the server does not know this name of its: mlflow server --allowed-hosts",
    404: "no MLflow server answers there; look at the path and the port",
    405: "no MLflow server answers there; look at the path and the port",
    407: "the proxy of http_proxy or https_proxy wants a user and a password",
}  # fmt: skip
_NOT_TAKEN = "the server does not know the user, password or token that it was given"
_TLS = {
    "WRONG_VERSION_NUMBER": "no TLS is spoken there; write http://",
    "RECORD_LAYER_FAILURE": "no TLS is spoken there; write http://",
    "CERTIFICATE_VERIFY_FAILED": "name its authority's file in MLFLOW_TRACKING_SERVER_CERT_PATH",
}
_STATUS = re.compile(r"failed with error code (\d{3})\b|too many (\d{3}) error responses|^(\d{3}) (?:Client|Server) Error")
_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient", "pymysql": "pymysql"}


def reason(error: BaseException, uri: str) -> str:
    """Why a server or a database takes nothing, in one line: the innermost cause, and what to do where that is known."""
    said = _cause(error, uri)
    return without(" ".join(said.split()), uri)


def _cause(error: BaseException, uri: str) -> str:
    chain = list(_chain(error))
    names = {type(e).__name__ for e in chain}
    if missing := next((e for e in chain if isinstance(e, ImportError)), None):
        name = missing.name or str(missing)
        return f"{name} cannot be imported: pip install {_DRIVERS.get(name, name)}" if missing.name else name
    if code := _status(chain):
        phrase = HTTPStatus(code).phrase if code in list(HTTPStatus) else ""
        cure = _NOT_TAKEN if code == 401 and _has_credentials(uri) else _CURES.get(code)
        return "; ".join(filter(None, (f"{code} {phrase}".strip(), cure, _body(chain))))
    database = next(filter(None, (getattr(e, "orig", None) for e in chain)), None)  # SQLAlchemy's
    if database is not None:
        return str(database)
    system = next((e for e in reversed(chain) if isinstance(e, OSError) and not _wraps(e)), None)
    where = "the proxy of http_proxy or https_proxy: " if "ProxyError" in names else ""
    if system is not None:
        tls = next((f"; {cure}" for word, cure in _TLS.items() if word in str(system)), "")
        named = f": {system.filename}" if system.filename else ""
        said = system.strerror if system.strerror and not tls else str(system)
        if isinstance(system, TimeoutError) and not system.strerror:
            said = f"no answer within {os.environ.get('MLFLOW_HTTP_REQUEST_TIMEOUT', '5')} s"
        return f"{where}{said or type(system).__name__}{named}{tls}"
    if "ConnectTimeoutError" in names or "ReadTimeoutError" in names:
        return f"{where}no answer within {os.environ.get('MLFLOW_HTTP_REQUEST_TIMEOUT', '5')} s"
    if "not in a valid JSON format" in str(error):
        return "what answers there is no MLflow server"
    return where + (str(chain[-1]) or type(chain[-1]).__name__ if _wraps(error) else str(error) or type(error).__name__)


def _has_credentials(uri: str) -> bool:
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN")
    return redacted_uri(uri) != uri or any(os.environ.get(name) for name in names)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it came from, outermost first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while isinstance(found, BaseException) and id(found) not in seen:
        seen.add(id(found))
        yield found
        within = getattr(found, "reason", None)  # urllib3's
        nested = within if isinstance(within, BaseException) else found.__cause__ or found.__context__
        found = nested or next((a for a in found.args if isinstance(a, BaseException)), None)


def _wraps(error: BaseException) -> bool:
    """Whether an exception of requests or urllib3 only wraps the cause."""
    return type(error).__module__.split(".")[0] in ("requests", "urllib3")


def _status(chain: list[BaseException]) -> int | None:
    for error in chain:
        if type(error).__name__ == "RestException":
            code = error.get_http_status_code()  # type: ignore[attr-defined]
            return int(code) if code in (401, 403) else None  # of the others the server's own words say more
        found = _STATUS.search(str(error))
        if found:
            return int(next(filter(None, found.groups())))
        if "Tunnel connection failed: 407" in str(error):
            return 407
    return None


def _body(chain: list[BaseException]) -> str:
    """What a server that is not MLflow, such as a proxy in front of it, says beside its status."""
    found = re.search(r"Response body: '(.*)'", str(chain[0]), re.S)
    text = found[1] if found else str(getattr(chain[0], "message", ""))
    text = re.sub(r"<style.*?</style>|<script.*?</script>|<[^>]*>", " ", text, flags=re.S)
    words = " ".join(text.split())
    return f"it says: {words[:200]}" if words and not words.startswith("API request") else ""
