"""The grammar of values, in one place: what a person may write, what it means, and what is wrong with the rest.

Every error is one line that names the offending value, the accepted form and an example.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import permutations
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from lcbench.problem import ALONE, DIRECTIONS, DTYPES, PLAIN, REDUCE_DTYPES, Batch, Heads, Mesh, Requests, Scale, Softmax

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
# Far beyond what anybody runs, and small enough that a slip of the finger is no plan that never ends.
MOST_TOKENS = 1 << 30
MOST_RANKS = 1 << 16
MOST_HEADS = 1 << 16
MOST_REQUESTS = 1 << 16
MOST_INT = (1 << 63) - 1
MOST_NUMBER = 1e15
LONG = 200  # characters of a value that a message shows
# Types of options, as a person calls their values.
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true, false", str: "text", NoneType: "null"}
LISTS: dict[Any, str] = {int: "a list of whole numbers", float: "a list of numbers", str: "a list of names, such as [a,b]"}
_TRUTH: dict[str, object] = {"true": True, "false": False}
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def axis_values(conf: Path, axis: str) -> list[str]:
    """The values of an axis by the files of conf/: without other names of the same, and what needs a file of the user's."""
    texts = {path.stem: path.read_text() for path in sorted((conf / axis).glob("*.yaml"))}
    return [name for name, text in texts.items() if "???" not in text and re.search(rf"^name: {name}\b", text, re.MULTILINE)]


def listed(value: str, options: Sequence[str], near: Sequence[str] | None = None) -> str:
    """Options, with the one that was meant if that can be guessed."""
    close = difflib.get_close_matches(value, near or options, n=1)
    return ", ".join(options) + (f" (did you mean {close[0]}?)" if close else "")


def parse_tokens(value: object, name: str = "seqlen") -> int:
    """``64k -> 65536``, ``1m -> 1048576``, ``512 -> 512``, ``1e6 -> 1000000``: token counts of at least 1, binary suffixes.

    Raises:
        ValueError: anything else, and more than ``MOST_TOKENS``.
    """
    text = str(value).strip().lower().replace("_", "")
    match = re.fullmatch(r"([1-9][0-9]*)([km]?)", text)
    if match and not isinstance(value, bool):
        tokens: Any = _read(match[1]) * UNITS[match[2]]
    else:
        tokens = _whole(_read(value)) if isinstance(value, float) or re.fullmatch(r"[0-9.]+e[+]?[0-9]+", text) else None
        if not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"{name}={shown(value)} is no token count; write a number of at least 1 such as 512, 64k or 1m")
    if tokens > MOST_TOKENS:
        raise ValueError(f"{name}={shown(value)} is more than {MOST_TOKENS >> 20}m tokens, the most that a token count may be")
    return int(tokens)


def parse_scale(value: object) -> Scale:
    """``2x8`` -> 2 nodes with 8 GPUs each."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", str(value).strip().lower())
    if not match:
        raise ValueError(f"scale={shown(value)} is not <nodes>x<GPUs per node>, each at least 1, such as 2x8")
    nodes, gpus = map(_read, match.groups())
    if nodes * gpus > MOST_RANKS:
        raise ValueError(f"scale={shown(value)} is more than {MOST_RANKS} GPUs")
    return Scale(nodes, gpus)


def parse_heads(value: object) -> Heads:
    """``32x8x128`` -> 32 query heads, 8 key/value heads, dimension 128; ``16x16x192:128``: keys have 192, values 128 numbers.

    One key/value head with values narrower than its keys is latent: ``128x1x576:512``.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)x([1-9][0-9]*)(?::([1-9][0-9]*))?", str(value).strip().lower())
    if not match:
        raise ValueError(
            f"heads={shown(value)} is not <query>x<key/value>x<dim> or <query>x<key/value>x<key dim>:<value dim>, each at least 1, "
            "such as 32x8x128, 128x128x192:128 or, latent, 128x1x576:512"
        )
    numbers = [_read(number) for number in match.groups() if number is not None]
    if max(numbers) > MOST_HEADS:
        raise ValueError(f"heads={shown(value)}: heads and their dimensions are at most {MOST_HEADS} each")
    q, kv, dim, *of_values = numbers
    if q % kv:
        raise ValueError(f"heads={value}: {q} query heads are no multiple of {kv} key/value heads, as in 32x8x128")
    dim_v = of_values[0] if of_values else dim
    return Heads(q, kv, dim, dim_v, latent=kv == 1 and dim_v < dim)


def parse_batch(value: object) -> Batch | None:
    """``2q2k_32q1s8k`` -> two requests of 2048 new tokens, and 32 with one new token of 8192; null -> no batch, one sequence.

    Raises:
        ValueError: anything else, a request that cannot be, more than ``MOST_REQUESTS`` requests or ``MOST_TOKENS`` tokens.
    """
    if value is None or value == "null":
        return None
    wanted = "write [count]q<new>[s<total>], several joined by _, such as 32q1s128k or 2q2k_32q1s8k"
    groups = []
    for part in str(value).strip().lower().split("_"):
        match = re.fullmatch(r"([0-9]{0,9})q([0-9]{1,10})([km]?)(?:s([0-9]{1,10})([km]?))?", part)
        if not match or isinstance(value, bool):
            raise ValueError(f"batch={shown(value)} is no batch of requests; {wanted}")
        count, new = int(match[1] or 1), int(match[2]) * UNITS[match[3]]
        total = new if match[4] is None else int(match[4]) * UNITS[match[5]]
        try:
            groups.append(Requests(count, new, total))
        except ValueError as error:
            raise ValueError(f"batch={shown(value)}: {error}; {wanted}, with counts of at least 1 and total >= new") from error
    batch = Batch(tuple(groups))
    if len(batch) > MOST_REQUESTS:
        raise ValueError(f"batch={shown(value)} has {len(batch)} requests, and a batch has at most {MOST_REQUESTS}")
    if batch.tokens > MOST_TOKENS:
        raise ValueError(f"batch={shown(value)} has {batch.tokens} tokens, and a batch has at most {MOST_TOKENS >> 20}m")
    return batch


def parse_softmax(value: object) -> Softmax:
    """``sink_softcap30`` -> a sink, and scores capped at 30; ``scale0.1``: products are multiplied with 0.1; ``plain``: none of it.

    Raises:
        ValueError: anything else.
    """
    text = str(value).strip().lower()
    if text == str(PLAIN):
        return PLAIN
    found: dict[str, Any] = {}
    for part in text.split("_"):
        match = re.fullmatch(r"(sink)|(softcap|scale)([0-9].*)", part)
        number = _read(match[3]) if match and match[3] else None
        if not match or (match[3] and not (isinstance(number, int | float) and 0 < number <= MOST_NUMBER)):
            raise ValueError(
                f"softmax={shown(value)} is neither plain nor some of sink, softcap<number> and scale<number> joined by _, such as "
                f"sink_scale0.1; numbers are above 0 and up to {MOST_NUMBER:g}"
            )
        if (name := match[1] or match[2]) in found:
            raise ValueError(f"softmax={shown(value)} says {name} twice; write it once, as in sink_scale0.1")
        found[name] = True if number is None else float(number)
    return Softmax(**found)


def parse_dtype(value: object) -> str:
    name = DTYPE_ALIASES.get(str(value), str(value))
    if name not in DTYPES:
        raise ValueError(f"dtype={shown(value)} is not one of {', '.join((*DTYPES, *DTYPE_ALIASES))}")
    return name


def parse_direction(value: object) -> str:
    if value not in DIRECTIONS:
        raise ValueError(f"direction={shown(value)} is not one of {', '.join(DIRECTIONS)}")
    return str(value)


def parse_reduce_dtype(value: object) -> str:
    if value not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype={shown(value)} is not one of {', '.join(REDUCE_DTYPES)}")
    return str(value)


def parse_bool(value: object, name: str) -> bool:
    """``true`` or ``false``, also as text."""
    found = _TRUTH.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"{name}={shown(value)} is neither true nor false")
    return found


def parse_int(value: object, name: str, *, least: int = 0) -> int:
    """A whole number, also as text and as ``1e3``; at most what 64 bits hold."""
    number = _whole(_read(value))
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"{name}={shown(value)} is no whole number of at least {least}")
    if number > MOST_INT:
        raise ValueError(f"{name}={shown(value)} is more than {MOST_INT}, the most that it may be")
    return number


def parse_limit(value: object, name: str) -> int | None:
    """A number of at least 1, or none at all."""
    return None if value is None else parse_int(value, name, least=1)


def parse_all_or(value: object, name: str) -> int | None:
    """A number of at least 1; or ``all``, which is None."""
    if value == "all":
        return None
    try:
        return parse_int(value, name, least=1)
    except ValueError as error:
        raise ValueError(f"{error}, or all") from error


def parse_number(value: object, name: str) -> float:
    """A finite number above 0, also as text."""
    number = _read(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= MOST_NUMBER:
        raise ValueError(f"{name}={shown(value)} is no number above 0 and up to {MOST_NUMBER:g}")
    return float(number)


def parse_limit_number(value: object, name: str) -> float | None:
    """A number above 0, or none at all."""
    return None if value is None else parse_number(value, name)


def parse_measure(value: object) -> dict[str, Any]:
    """How a cell is timed, as its config holds it: every option of ``measure`` checked."""
    if not isinstance(value, dict):
        raise ValueError(f"measure={shown(value)} means nothing; it has options, and each is set by itself: measure.<option>=...")
    if unknown := sorted(set(value) - set(MEASURE)):
        raise ValueError(f"measure has no option {unknown[0]!r}; it has {', '.join(MEASURE)}")
    missing = [option for option in MEASURE if option not in value and option != "blocks"]
    if missing:
        raise ValueError(f"measure.{missing[0]} is not set")
    found = {option: parse(value[option], f"measure.{option}") for option, parse in MEASURE.items() if option in value}
    return {option: one for option, one in found.items() if option != "blocks" or one != BLOCKS}


def parse_mesh(value: object) -> dict[str, Any]:
    """Groups of context-parallel ranks, as a cell's config holds them: how many by ``tp`` and ``dp``, and the order of ranks.

    What has one rank has no place in the order: it stands where it stands by default, so that the same groups are the same cell.

    Raises:
        ValueError: no whole numbers of at least 1, or no order of the three.
    """
    if not isinstance(value, dict):
        raise ValueError(f"mesh={shown(value)} means nothing; it has options, and each is set by itself: mesh.tp=2 mesh.dp=2")
    if unknown := sorted(set(value) - set(MESH)):
        raise ValueError(f"mesh has no option {unknown[0]!r}; it has {', '.join(MESH)}")
    sizes = {name: parse_int(value.get(name), f"mesh.{name}", least=1) for name in ("tp", "dp")}
    said = Mesh(**sizes, order=shown(value.get("order"))).order.split("-")
    moving = [name for name in said if sizes.get(name) != 1]
    order = next(order for order in permutations(Mesh.DIMENSIONS) if [name for name in order if name in moving] == moving)
    return {**sizes, "order": "-".join(order)}


def parse_option(value: object, name: str, kind: Any) -> Any:
    """An option of an axis value as its annotation ``kind`` wants it: numbers that came as text, and token counts, become numbers.

    Raises:
        ValueError: of another type, or not finite.
    """
    adapter = TypeAdapter(kind)
    for candidate in (value, _whole(_read(value)), _read(value), _TRUTH.get(str(value).lower(), value), _tokens(value)):
        with suppress(ValidationError):
            found = adapter.validate_python(candidate, strict=True)
            check_finite(found, name)
            return found
    raise ValueError(f"{name}={shown(value)} is not one of {', '.join(_accepted(kind))}")


def _tokens(value: object) -> object:
    """A count of tokens as a number, and anything else as it is."""
    with suppress(ValueError):
        return parse_tokens(value)
    return value


def check_finite(value: Any, name: str) -> None:
    """Raises:
    ValueError: a number that JSON cannot hold, at any depth.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_finite(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} is no finite number")
    elif isinstance(value, int) and abs(value) > MOST_INT:
        raise ValueError(f"{name}={shown(value)} is more than {MOST_INT}, the most that it may be")


def _accepted(kind: Any) -> list[str]:
    """What a type takes, in words."""
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    words: list[str] = []
    for one in alternatives:
        if get_origin(one) is Literal:
            words += sorted(map(str, get_args(one)))
        elif get_origin(one) in (list, tuple):
            words.append(LISTS.get(get_args(one)[0], "a list"))
        else:
            words.append(WORDS.get(get_origin(one) or one, str(one)))
    return list(dict.fromkeys(words))


def _read(value: object) -> Any:
    """A number that quotes or the environment gave as text."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value.strip().replace("_", ""))
        except ValueError:
            continue
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(value: Any) -> str:
    """A value as it would be typed, at most a line of it."""
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) > MOST_INT:
        return f"{float(value):g}" if abs(value) < MOST_NUMBER else "a huge number"
    text = str(value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


# Options of mesh, at their defaults: nothing but the context-parallel group.
MESH: dict[str, Any] = asdict(ALONE)
# measure.blocks at its default is no part of a cell: cells of before there were blocks keep their ids.
BLOCKS = 3
# Options of measure, and how each is read.
MEASURE: dict[str, Callable[[Any, str], Any]] = {
    "warmup": parse_int, "min_iterations": partial(parse_int, least=1), "max_iterations": partial(parse_int, least=1),
    "budget_s": parse_number, "precision": parse_number, "timeline": parse_bool, "blocks": partial(parse_int, least=1),
}  # fmt: skip
