"""Code of a user's own behind an axis value: what is wrong with it is one line that names its file, as with any bad input.

Faults of lcbench's own code stay exceptions with a traceback.
"""

from __future__ import annotations

import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lcbench.cp.base import Scheduled
from lcbench.grid.axes import HOMES
from lcbench.grid.paths import PACKAGE
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.block import BlockMap, Keep
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.fault import ScheduleError
from lcbench.schedule.schedule import Schedule
from lcbench.schedule.verify import ScheduleCost, verify

# Where nothing is a user's: this package, and Python with what is installed beside it.
NOT_THEIRS = (PACKAGE, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")))
INSTALLED = ("site-packages", "dist-packages")


def named_in(value: Any) -> set[str]:
    """Every ``_target_`` of an axis value, its own and those of values in its options, that is not lcbench's."""
    if not isinstance(value, dict):
        return set()
    target = value.get("_target_")
    mine = {target} if isinstance(target, str) and not target.startswith(HOMES) else set()
    return mine.union(*map(named_in, value.values()))


@contextmanager
def blamed(group: str, config: dict[str, Any]) -> Iterator[None]:
    """An exception in here is the user's, where the value of an axis runs code of theirs. ``DoesNotFit`` is none: it is an answer.

    Args:
        group: the axis.
        config: the value.

    Raises:
        ValueError: one line with the value, file and line of the code, and what it says.
    """
    try:
        yield
    except (DoesNotFit, ScheduleError):
        raise
    except Exception as error:
        targets = named_in(config)
        if not targets:
            raise
        raise ValueError(f"{group}={config['name']} ({where(error, targets)}): {in_words(error)}") from error


def in_words(error: BaseException) -> str:
    """An exception in one line: of a ValueError, which is written for people, what it says; of others the type too."""
    said = str(error) if type(error) is ValueError and str(error) else traceback.format_exception_only(error)[-1]
    return " ".join(said.split())


def where(error: BaseException, targets: Collection[str]) -> str:
    """File and line of the user's code in which an exception arose; the file alone where no line of it was running."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{error.filename}:{error.lineno}"
    return _line(error, targets) or ", ".join(sorted(_files(targets) or targets))


def line_in(error: BaseException, config: dict[str, Any]) -> str | None:
    """File and line of the user's code that was running when an exception arose in a cell; None where none was.

    Args:
        config: the whole cell's.
    """
    targets = named_in(config)
    return _line(error, targets) if targets else None


def _line(error: BaseException, targets: Collection[str]) -> str | None:
    folders = {Path(file).parent for file in _files(targets)}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(frame.filename, folders)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _files(targets: Collection[str]) -> set[str]:
    return {file for target in targets if (file := file_of(target))}


def file_of(target: str) -> str | None:
    """The file of a ``_target_``, whether or not it could be imported; None where there is none."""
    module = target.rpartition(".")[0]
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    with suppress(Exception):  # a package that it is in may fail, too
        return getattr(find_spec(module), "origin", None)
    return None


def _is_theirs(filename: str, folders: Collection[Path]) -> bool:
    path = Path(filename)
    if filename.startswith("<") or path.is_relative_to(PACKAGE):
        return False
    return path.parent in folders or not (set(path.parts) & set(INSTALLED) or any(map(path.is_relative_to, NOT_THEIRS)))


# -- masks ---------------------------------------------------------------------------------------------------------------


def checked_mask(config: dict[str, Any], mask: Any, seqlen: int) -> Mask:
    """What a mask's function of the user's gave, if it is a mask of this length.

    Raises:
        ValueError: it is none: no mask, one of another length, or bands that share a pair.
    """
    if not (targets := named_in(config)):
        found: Mask = mask
        return found
    who = f"mask={config['name']} ({', '.join(sorted(filter(None, map(file_of, targets))))})"
    if not isinstance(mask, BandMask | BlockMap):
        raise ValueError(f"{who} gives {_kind(mask)}, and a mask's function gives a BandMask or a BlockMap")
    if (mask.num_q, mask.num_k) != (seqlen, seqlen):
        raise ValueError(f"{who} gives a mask of {mask.num_q} x {mask.num_k} tokens at seqlen={seqlen}")
    if isinstance(mask, BlockMap):
        return replace(mask, draw=_Drawn(config, mask))
    if mask.bands.shape[1:] != (6,) or mask.bands.dtype != np.int64:
        raise ValueError(f"{who} gives bands of shape {mask.bands.shape} and type {mask.bands.dtype}, not (n, 6) of int64")
    if shared := mask.overlap():
        one, two = map(list, shared)
        raise ValueError(f"{who}: bands must be disjoint, but {one} and {two} share pairs")
    return mask


class _Drawn:
    """What a user's block map draws, when it is asked for."""

    def __init__(self, config: dict[str, Any], mask: BlockMap) -> None:
        self._config, self._mask = config, mask

    def __call__(self, number: int) -> Keep:
        wanted = (len(self._mask.q_edges) - 1, len(self._mask.k_edges) - 1)
        with blamed("mask", self._config):
            kept = self._mask.draw(number)
            if not isinstance(kept, np.ndarray) or kept.dtype != np.bool_ or kept.shape != wanted:
                shape = f" of shape {kept.shape} and type {kept.dtype}" if isinstance(kept, np.ndarray) else ""
                raise ValueError(f"draw({number}) gives {_kind(kept)}{shape}, not a bool array of {wanted[0]} x {wanted[1]} blocks")
            return kept


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# -- kernels and strategies ----------------------------------------------------------------------------------------------


def reason_not(group: str, config: dict[str, Any], value: Any, *given: Any) -> str | None:
    """What a kernel, a strategy or a workload says to a problem, or a planner to documents: None if it takes it, else why not.

    Raises: as ``answer`` does.
    """
    return answer(group, config, value.unsupported, *given)


def answer(group: str, config: dict[str, Any], asked: Callable[..., str | None], *given: Any) -> str | None:
    """Why a value of an axis does not run something, by a method of it; None: it does.

    Args:
        asked: the method: ``unsupported``, ``unavailable`` or ``missing``.
        given: what it is asked with.

    Raises:
        ValueError: code of the user's fails, or says something else.
    """
    with blamed(group, config):
        reason: Any = asked(*given)
        if named_in(config) and not isinstance(reason, str | None):
            raise ValueError(f"{asked.__name__}() gives {reason!r}; it gives None, or the reason as a text")
    found: str | None = reason
    return found


def scheduled(config: dict[str, Any], strategy: Scheduled, problem: Problem, mask: Mask) -> Schedule:
    """The schedule of a strategy, not looked at yet.

    Raises:
        ValueError: code of the user's fails, or gives no schedule.
    """
    with blamed("cp", config):
        schedule: Any = strategy.schedule(problem, mask)
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"cp={config['name']} ({inspect.getfile(type(strategy))}): schedule() gives {_kind(schedule)}, not a Schedule"
        )
    return schedule


def proven(config: dict[str, Any], strategy: Scheduled, schedule: Schedule, problem: Problem, mask: Mask) -> ScheduleCost:
    """What a strategy's schedule costs, once it is proven.

    Raises:
        ScheduleError: it is wrong; the fault names the strategy and its file.
    """
    try:
        with blamed("cp", config):
            return verify(schedule, mask, problem)
    except ScheduleError as error:
        raise ScheduleError(f"cp={config['name']} ({inspect.getfile(type(strategy))}): {error.fault}", error.grid) from error
