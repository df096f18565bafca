"""Run options, which are of no cell: what a command does with its cells, and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lcbench.grid import values

OUTPUTS = ("table", "quiet", "json")
# Run options with options of their own, and how each of these is read.
OPTION_GROUPS: dict[str, Callable[[Any, str], Any]] = {
    "pack": values.parse_limit, "hang": values.parse_number, "retry": values.parse_int, "budget": values.parse_limit_number,
}  # fmt: skip
# Run options that are texts, and of what.
TEXTS = {"results": "folder", "tracking_uri": "address", "fit": "file"}
FILE_BYTES = 255  # of a file's name, as every file system of Linux has it
NAME_BYTES = 200  # of a sweep's name: a file's name holds 255, and some are made of it and a cell's
NOT_IN_NAMES = "/\\%|,"
WORDS_OF_COMMANDS = ("last", "all")


def check_run_options(options: dict[str, Any]) -> None:
    """Check the run options, and put values of the right type in their places."""
    options["force"] = values.parse_bool(options["force"], "force")
    if options["wait"] is not None:
        options["wait"] = values.parse_bool(options["wait"], "wait")
    if options["output"] not in OUTPUTS:
        raise ValueError(f"output={values.shown(options['output'])} is not one of {', '.join(OUTPUTS)}")
    for group, parse in OPTION_GROUPS.items():
        if not isinstance(options[group], dict):
            raise ValueError(f"{group}={values.shown(options[group])} means nothing; {group} has options, such as pack.max_cells=1")
        options[group] = {key: parse(value, f"{group}.{key}") for key, value in options[group].items()}
    if options["hang"]["min_s"] > options["hang"]["max_s"]:
        raise ValueError(f"hang.min_s={options['hang']['min_s']} is more than hang.max_s={options['hang']['max_s']}")
    for name, kind in TEXTS.items():
        value = options[name]
        if isinstance(value, dict | list) or (value is None and name == "results") or not str(value).strip():
            raise ValueError(f"{name}={values.shown(value)} is no {kind}; write a text")
        if value is not None and not str(value).isprintable():
            raise ValueError(f"{name}={str(value)!r} holds characters that cannot be shown")
        options[name] = None if value is None else str(value)
        parts = [] if name == "tracking_uri" else str(value).split("/")  # an address may be as long as its server likes
        if long := next((one for one in parts if len(one.encode()) > FILE_BYTES), None):
            raise ValueError(f"{name}={values.shown(long)} is {len(long.encode())} bytes long, and a name has at most {FILE_BYTES}")
    options["results"] = os.path.expanduser(options["results"])
    options["fit"] = options["fit"] and os.path.expanduser(options["fit"])
    options["sweep"] = check_name(options["sweep"])


def check_name(name: Any) -> str | None:
    """A sweep's name, which is a folder's and goes into files' names; null is none.

    Raises:
        ValueError: one that cannot be a folder's everywhere, or is a word of the commands.
    """
    if name is None:
        return None
    text = str(name)
    shown = values.shown(repr(text))
    advice = "use letters, digits, - and _, such as sweep=first-try"
    if isinstance(name, dict | list) or not text.strip():
        raise ValueError(f"sweep={shown} is no folder name; {advice}")
    wrong = next((c for c in text if c in NOT_IN_NAMES or c.isspace() or not c.isprintable()), None)
    if wrong is not None:
        raise ValueError(f"sweep={shown} is no folder name, because of {wrong!r}; {advice}")
    if text[0] in "-.":
        raise ValueError(f"sweep={shown} begins with {text[0]!r}, as options and hidden folders do; {advice}")
    if text.lower() in WORDS_OF_COMMANDS:
        raise ValueError(f"sweep={shown} is a word of the commands (status last, results all); take another name")
    if len(text.encode()) > NAME_BYTES:
        raise ValueError(f"sweep={shown} is {len(text.encode())} bytes long, and a name has at most {NAME_BYTES}")
    return text
