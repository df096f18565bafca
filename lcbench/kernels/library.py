"""Whether an installed library is one that an adapter can call, decided by signatures and versions before anything is run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

from lcbench.kernels.base import importable


class LibraryCall(NamedTuple):
    """A function of a library, ``module`` and its name in there, and how an adapter calls it.

    Attributes:
        positional: how many arguments it gives by position, of a method with the object.
        keywords: the names of all others; None: the function is only to be there.
    """

    module: str
    function: str
    positional: int = 0
    keywords: tuple[str, ...] | None = None


def unfit(*calls: LibraryCall) -> str | None:
    """None if every module can be imported and every function takes the arguments of its call, else the first reason."""
    for call in calls:
        if reason := importable(call.module):
            return reason
        try:
            function = attrgetter(call.function)(import_module(call.module))
        except Exception as error:  # modules that import when they are asked raise as imports do
            return f"{call.module} has no {call.function}: {error}"
        signature = signature_of(function)
        if signature is None or call.keywords is None:
            continue
        try:
            signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
        except TypeError as error:
            return f"{call.module}.{call.function} of this version is another: {error}"
    return None


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function, also of one that torch made an operator of, which shows none; None where it cannot be known."""
    try:
        return inspect.signature(getattr(function, "_init_fn", function))
    except (TypeError, ValueError):
        return None


def release_of(module: str) -> tuple[int, ...]:
    """The numbers of a module's ``__version__``, empty where it has none: (0, 0, 35) of 0.0.35+cu130."""
    text = str(getattr(import_module(module), "__version__", ""))
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def flash_attention_2_is_here() -> bool:
    """Whether ``flash_attn`` is flash-attn 2's package, or shared with it: flash-attn-4 installs a part of that name too."""
    try:
        return find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None
    except Exception:
        return True  # only flash-attn 2's package runs code when it is looked into, and it is broken
