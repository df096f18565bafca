"""Secrets - passwords, tokens, keys - and how they stay out of what is stored and shown.

A secret is known by where it stands (the user part of a URI), by its name (``HF_TOKEN=...``), or by its look (``ghp_...``). What is
left out reads ``***``. A job gets the real values from a file that only its owner may read; who goes on with a stored sweep gives
them again, by environment variables of the same names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# In a name: always a secret; one if what it holds is not plainly a switch or a number; and what makes it a place instead.
_STRONG = re.compile(r"(?:password|passwd|passphrase|passcode|secret|credentials?|apikey|connectionstring)s?$")
_WEAK = re.compile(r"(?:token|pwd|pass|dsn)$|^(?:keys?|jwt|pat|cookie|bearer|authorization)$")
_PLACE = ("file", "files", "path", "dir", "folder", "name", "url", "uri")
_AFTER = ("value", "id", "base64", "b64", "raw")
_JOINED = re.compile(r"(api|connection)_(key|string)", re.I)
# What the issuers of tokens begin them with.
_LOOK = re.compile(
    r"\b(?:gh[opusr]_\w{16,}|github_pat_\w{20,}|hf_\w{16,}|sk-[\w-]{16,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}"
    r"|nvapi-[\w-]{16,}|dapi[0-9a-f]{32}|pypi-[\w-]{32,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"
    r"|(?<=\b[Bb]earer )[\w.~+/=-]{8,}|(?<=\b[Bb]asic )[\w.~+/=-]{8,}"
)
# The user part of a URI. With a password in it, it ends at the word's last @, so that a / or an @ in the password is covered.
_USER = re.compile(r"\b([A-Za-z][\w+.-]*://)(?:[^\s/@:\"']*:(?!\d+(?:[/?#,\s\"'\])}]|$))\S*@|[^\s/?#@\"']*@)")
# The same without a scheme, as in http_proxy=user:password@host:3128; an image's name:tag@sha256:... is none.
_BARE_USER = re.compile(r"(^|[\s=,(\[\"'])[^\s:/@=,(\[\"'<>]+:(?!//)[^\s/@]+@(?=[\w\[])(?!sha\d+:)")
# The value is looked at and not taken, since it may hold an assignment itself.
_ASSIGNED = re.compile(
    r"(?:(?P<name>\b[A-Za-z_][\w.-]*)(?P<sign>[\"']?\s*[=:]\s*)|--(?P<flag>[a-z][\w-]*)\s+)"
    r"(?=\"(?P<double>[^\"]+)\"|'(?P<single>[^']+)'|(?P<bare>(?:(?:[Bb]earer|[Bb]asic|[Tt]oken)\s+)?[^\s,;&}\])\"'{\[(]+))"
)


def redacted(text: str, known: Iterable[str] = ()) -> str:
    """A text without the secrets in it: users and passwords of URIs, values behind telling names, what looks like a token.

    ``known``: secrets that are left out wherever they stand.
    """
    for secret in sorted((s for s in known if len(s) > 3), key=len, reverse=True):  # a shorter one is many a word
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    if HIDDEN not in text:
        text = _BARE_USER.sub(rf"\1{HIDDEN}@", _USER.sub(rf"\1{HIDDEN}@", text))
    spans = [span for found in _ASSIGNED.finditer(text) if (span := _secret_span(found))]
    for begin, end in reversed(spans):
        text = text[:begin] + HIDDEN + text[end:]
    return _LOOK.sub(HIDDEN, text)


def redacted_uri(uri: str) -> str:
    """A URI without user and password, and without secrets in its query: an address that still works where they come otherwise."""
    address, mark, query = _BARE_USER.sub(r"\1", _USER.sub(r"\1", uri)).partition("?")
    kept = [part for part in query.split("&") if part and not is_secret(*part.partition("=")[::2])]
    return address + (mark + "&".join(kept) if kept else "")


def redacted_values(data: Any) -> Any:
    """Nested lists and dicts without the secrets in their texts."""
    if isinstance(data, dict):
        return {key: HIDDEN if _holds_secret(key, value) else redacted_values(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [redacted_values(value) for value in data]
    return redacted(data) if isinstance(data, str) else data


def without(text: str, uri: str) -> str:
    """A text about a URI, without what the URI hides, wherever in the text it stands."""
    text = text.replace(uri, redacted_uri(uri))
    return redacted(text, _secrets_in(uri))


def _secrets_in(uri: str) -> Iterator[str]:
    found = re.match(r"[A-Za-z][\w+.-]*://([^/?#]*)@", uri)
    password = found[1].partition(":")[2] if found else ""
    queried = [part.partition("=")[2] for part in uri.partition("?")[2].split("&") if is_secret(*part.partition("=")[::2])]
    for secret in (password, *queried):
        yield from (secret, unquote(secret))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable or an option of this name, with this value, holds a secret."""
    value = value.strip("\"'")
    if not value or _is_file(value) or re.match(r"\$(?:[({]|[A-Za-z_]\w*$|$)", value):  # $NAME, $(command) say where to find it
        return False
    if redacted_uri(value) != value or _LOOK.search(value):
        return True
    words = _words(name)
    while len(words) > 1 and (words[-1] in _AFTER or words[-1].isdigit()):
        words.pop()
    if words[-1] in _PLACE:
        return False
    if any(map(_STRONG.search, words)):
        return True
    plain = re.fullmatch(r"[-+]?(?:0x[\da-f]+|[\d.]{1,4})|true|false|yes|no|on|off|none|null", value, re.I)
    return bool(_WEAK.search(words[-1]) and not plain)


def secrets_of(variables: Mapping[str, Any] | None) -> dict[str, str]:
    """Of environment variables that a site sets, those that hold a secret."""
    found = {str(key): str(value) for key, value in (variables or {}).items()}
    return {k: v for k, v in found.items() if is_secret(k, v) or redacted(v) != v or _is_random(v)}


def without_secret(value: str) -> str:
    """The value of a secret variable as it is stored: with stars for the secret, or nothing but stars."""
    shown = redacted(value)
    return shown if HIDDEN in shown else HIDDEN


def with_environment(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a stored sweep, their secrets filled in from this process's environment.

    Raises:
        ValueError: one is not there.
    """
    filled = dict(variables or {})
    for key in hidden(filled):
        if key not in os.environ:
            raise ValueError(f"site.env.{key} holds a secret, which is not stored with a sweep; export {key}=..., then try again")
        filled[key] = os.environ[key]
    return filled


def with_password(uri: str | None) -> str | None:
    """A stored address of a tracking server, with the user and password that ``MLFLOW_TRACKING_URI`` has for the same address."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if uri and redacted_uri(given) == uri else uri


def hidden(variables: Mapping[str, Any] | None) -> list[str]:
    """Names of stored variables whose value was left out."""
    return [str(key) for key, value in (variables or {}).items() if HIDDEN in str(value)]


def refuse_readable(site: Mapping[Any, Any]) -> None:
    """A site's lines that end in a job's script or on a command line, where others can read them, hold no secret.

    Raises:
        ValueError: one does; names the key.
    """
    for key in ("setup", "srun_args", "sbatch", "container", "collector"):
        for where, text in _texts(site.get(key), f"site.{key}"):
            if redacted(text) != text or is_secret(where.rpartition(".")[2], text):
                shown = redacted(text)
                cure = (
                    "enroot reads passwords of registries from its own file, ~/.config/enroot/.credentials"
                    if where == "site.container.image"
                    else "set it below site.env, such as HF_TOKEN: ${oc.env:HF_TOKEN}, which is kept from others"
                )
                shown = HIDDEN if shown == text else shown
                raise ValueError(f"{where} holds a secret ({shown}), and others may read it there; {cure}")


def _texts(data: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _texts(value, f"{where}.{key}")
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value, where)
    elif isinstance(data, str):
        yield where, data


def _holds_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and "://" not in value and is_secret(str(key), value)


def _secret_span(found: re.Match[str]) -> tuple[int, int] | None:
    """Where the value of an assignment stands, if it is a secret."""
    group = next(name for name in ("double", "single", "bare") if found[name])
    value, name = found[group], (found["flag"] or found["name"]).rpartition(".")[2]
    words, sign = _words(name), found["sign"] or "="
    # A colon in a sentence assigns nothing: "full_key: site.setup".
    telling = "=" in sign or not sign.endswith(" ") or name.isupper() or not re.match("keys?$", words[-1])
    address = "://" in value or "?" in value  # which is looked at by itself
    return found.span(group) if telling and HIDDEN not in value and not address and is_secret(name, value) else None


def _words(name: str) -> list[str]:
    """The words of a name, small: HF_TOKEN, hfToken and hf-token are the same two."""
    name = re.sub(r"(?<=[a-z\d])(?=[A-Z])", "_", name.rpartition(".")[2])
    return _JOINED.sub(r"\1\2", name).lower().replace("-", "_").strip("_").split("_")


def _is_file(value: str) -> bool:
    try:
        return value.startswith(("/", "~/", "./")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError):
        return False


def _is_random(value: str) -> bool:
    """A long word of capitals, small letters and digits, which nobody has thought of."""
    mixed = re.search(r"[a-z]", value) and re.search(r"[A-Z]", value) and re.search(r"\d", value)
    return bool(mixed and re.fullmatch(r"[\w+=-]{32,}", value))
