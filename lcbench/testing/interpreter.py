"""Importing this has Triton's interpreter leave out work that it repeats: three quarters of the time of a test's launch.

In every launch it puts its own functions in place of the language's, and does so again for each call of a device function; and it
computes sums, differences and products of 32-bit integers once more in 64 bits, to see overflows, which tensors of tests are too
small for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

_replace, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_replaced: set[int] = set()  # modules whose language is replaced, in the launch that runs, by the ids of their globals


def _replace_once(function: Callable[..., Any]) -> Any:
    module = id(function.__globals__)
    if module in _replaced:
        return interpreter._LangPatchScope()
    _replaced.add(module)
    return _replace(function)


def _launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
    _replaced.clear()  # the launch before has put the language back
    return _launch(self, *args, **kwargs)


interpreter._patch_lang = _replace_once
interpreter.GridExecutor.__call__ = _launch_anew
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
