"""The grammar of values, in one place: what a person may write, what it means, and what is wrong with the rest.

Every error is one line that names the offending value, the accepted form and an example.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lcbench.problem import DIRECTIONS, DTYPES, TRANSITS, Heads, Scale

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def axis_values(conf: Path, axis: str) -> list[str]:
    """The values of an axis by the files of conf/: without other names of the same, and what needs a file of the user's."""
    texts = {path.stem: path.read_text() for path in sorted((conf / axis).glob("*.yaml"))}
    return [name for name, text in texts.items() if "???" not in text and re.search(rf"^name: {name}\b", text, re.MULTILINE)]


def parse_tokens(value: object, name: str = "seqlen") -> int:
    """``64k -> 65536``, ``1m -> 1048576``, ``512 -> 512``: token counts of at least 1, binary suffixes.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, float) and value.is_integer():  # Hydra reads 1e6 as a float
        value = int(value)
    match = re.fullmatch(r"([1-9]\d*)([km]?)", str(value).strip().lower().replace("_", ""))
    if isinstance(value, bool) or not match:
        raise ValueError(f"{name}={_shown(value)} is no token count; write a number of at least 1 such as 512, 64k or 1m")
    return int(match[1]) * UNITS[match[2]]


def parse_scale(value: object) -> Scale:
    """``2x8`` -> 2 nodes with 8 GPUs each."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(value).strip().lower())
    if not match:
        raise ValueError(f"scale={_shown(value)} is not <nodes>x<GPUs per node>, each at least 1, such as 2x8")
    return Scale(int(match[1]), int(match[2]))


def parse_heads(value: object) -> Heads:
    """``32x8x128`` -> 32 query heads, 8 key/value heads, dimension 128."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", str(value).strip().lower())
    if not match:
        raise ValueError(f"heads={_shown(value)} is not <query>x<key/value>x<dim>, each at least 1, such as 32x8x128")
    heads = Heads(*map(int, match.groups()))
    if heads.q % heads.kv:
        raise ValueError(f"heads={value}: {heads.q} query heads are no multiple of {heads.kv} key/value heads, as in 32x8x128")
    return heads


def parse_dtype(value: object) -> str:
    name = DTYPE_ALIASES.get(str(value), str(value))
    if name not in DTYPES:
        raise ValueError(f"dtype={_shown(value)} is not one of {', '.join((*DTYPES, *DTYPE_ALIASES))}")
    return name


def parse_direction(value: object) -> str:
    if value not in DIRECTIONS:
        raise ValueError(f"direction={_shown(value)} is not one of {', '.join(DIRECTIONS)}")
    return str(value)


def parse_transit(value: object) -> str:
    if value not in TRANSITS:
        raise ValueError(f"transit={_shown(value)} is not one of {', '.join(TRANSITS)}")
    return str(value)


def parse_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={_shown(value)} is neither true nor false")
    return value


def parse_int(value: object, name: str, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={_shown(value)} is no whole number of at least {least}")
    return value


def parse_limit(value: object, name: str) -> int | None:
    """A number of at least 1, or none at all."""
    return None if value is None else parse_int(value, name, least=1)


def parse_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name}={_shown(value)} is no number above 0")
    return float(value)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
