"""What a framework's file gives, and what it is told of a choice.

A framework is a module of this folder with ``CHECKED``, the release that its names were read in, and ``export``, which says a
choice in them. A framework that cannot do what was chosen says so (``Cannot``): something near it is another choice, whose
numbers nobody measured.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from omegaconf import OmegaConf

from lcbench.advice.patterns import Pattern, Shape, left_out, pattern_of, shape_of
from lcbench.cp.base import Scheduled, Strategy
from lcbench.grid.axes import AXES, CELL_AXES, value_of
from lcbench.grid.build import build_kernel, build_strategy, check_options, group_mask
from lcbench.grid.cell import Cell
from lcbench.grid.paths import CONF
from lcbench.grid.refusals import skip_reason
from lcbench.grid.values import axis_values
from lcbench.kernels.base import HALVES, Kernel
from lcbench.problem import Problem

T = TypeVar("T")


class Cannot(ValueError):
    """The framework has no such thing; the message is why."""


@dataclass(frozen=True)
class Choice:
    """What a framework is told of a cell.

    Attributes:
        cell: the cell.
        problem: what is computed.
        strategy: how ranks share it, with its options.
        pattern: the same in words that frameworks have.
        shape: the mask, likewise.
        kernel: what computes a tile; None: the strategy is a library's that brings its own.
    """

    cell: Cell
    problem: Problem
    strategy: Strategy
    pattern: Pattern
    shape: Shape
    kernel: Kernel | None

    @property
    def ranks(self) -> int:
        """P."""
        return self.problem.scale.world_size

    def word(self, axis: str) -> str:
        """The value of an axis as it is typed, ``cp=ring``."""
        return f"{axis}={value_of(self.cell.config, axis)}"

    def of_kernel(self, known: Mapping[type[Kernel], T], otherwise: T) -> T:
        """What a framework calls the kernel; ``otherwise`` where the strategy brings its own.

        Raises:
            Cannot: the framework has no such kernel.
        """
        if self.kernel is None:
            return otherwise
        if type(self.kernel) not in known:
            there = ", ".join(kind.__module__.rpartition(".")[2] for kind in known)
            raise Cannot(f"of these kernels it has {there} only")
        return known[type(self.kernel)]


@dataclass(frozen=True)
class Export:
    """A choice in a framework's words.

    Attributes:
        settings: names as the framework's own parser or configuration takes them, and their values.
        text: the same as it is typed there.
        environment: variables to set.
        left_out: what of the cell has no name there, and why.
        notes: what else to know.
    """

    settings: dict[str, Any]
    text: str
    environment: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Framework(Protocol):
    """A module of this folder."""

    CHECKED: str

    def export(self, choice: Choice) -> Export:
        """The choice in this framework's words.

        Raises:
            Cannot: it has no such thing.
        """
        ...


def names() -> list[str]:
    """The frameworks there are, by their files."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef export(" in path.read_text())


def framework(name: str) -> Framework:
    """Raises:
    ValueError: there is none of this name; names those there are.
    """
    if name not in names():
        raise ValueError(f"--for {name} is none of {', '.join(names())}")
    return cast(Framework, import_module(f"{__package__}.{name}"))


def exported(cell: Cell, name: str) -> Export:
    """A cell in a framework's words.

    Raises:
        Cannot: it has no such thing; one line with the framework, what it cannot run, and why.
        ValueError: there is no such framework, or the cell cannot run here either.
    """
    there = framework(name)
    if why := skip_reason(cell):
        raise ValueError(f"this cell cannot run: {why}")
    words = [f"{axis}={value_of(cell.config, axis)}" for axis in ("cp", "kernel", "mask", "scale", "heads")]
    try:
        choice = choice_of(cell)
        found = there.export(choice)
    except Cannot as error:
        others = ", ".join(_strategies(cell, there))
        hint = f"; with the rest as it is it can run cp={others}" if others else ""
        raise Cannot(f"{name} cannot run {' '.join(words)}: {error}{hint}") from None
    return Export(found.settings, found.text, found.environment, (*_left_out(choice), *found.left_out), found.notes)


def _strategies(cell: Cell, there: Framework) -> Iterator[str]:
    """Strategies of conf/ and ours with which the framework can run the rest of a cell."""
    for name in axis_values(CONF, "cp"):
        value = OmegaConf.to_container(OmegaConf.load(CONF / "cp" / f"{name}.yaml"))
        other = Cell.from_config({**cell.config, "cp": check_options("cp", cast(dict[str, Any], value))})
        if isinstance(build_strategy(other.config["cp"]), Scheduled) and not skip_reason(other):
            with suppress(Cannot):
                there.export(choice_of(other))
                yield name


def choice_of(cell: Cell) -> Choice:
    """A cell as frameworks are told of it.

    Raises:
        Cannot: its strategy, mask, batch, heads, softmax, workload or mesh is none that is exported.
    """
    config, problem = cell.config, cell.problem
    strategy = build_strategy(config["cp"])
    name = config["cp"]["name"]
    for axis, what in (("batch", "requests"), ("softmax", "more than a plain softmax")):
        if axis in config:
            raise Cannot(f"{axis}={config[axis]} is {what}, and what is exported is plain attention of whole sequences")
    if problem.heads.dim != problem.heads.v:
        raise Cannot(f"heads={cell.heads} has values of another dimension than its keys, which is not exported")
    if (pattern := pattern_of(strategy, problem)) is None:
        raise Cannot(f"cp={name} is no exchange of heads, no ring and no gather of keys and values, and it has no other strategy")
    if (shape := shape_of(group_mask(cell))) is None:
        raise Cannot(
            f"mask={config['mask']['name']} is neither full nor causal, whole or per document, nor a window; it has no other"
        )
    if "workload" in config:
        raise Cannot(f"workload={config['workload']['name']} is not attention alone, which is all that is exported")
    if "mesh" in config:
        raise Cannot(f"{cell.told('mesh')} is more than one context-parallel group, which is all that is exported")
    own = getattr(strategy, "libraries", ())  # those of a library that calls its kernel itself
    return Choice(cell, problem, strategy, pattern, shape, None if own else build_kernel(config["kernel"]))


def _left_out(choice: Choice) -> Iterable[str]:
    """What no framework has a name for."""
    yield from (f"{option}: there is no such option" for option in left_out(choice.strategy, choice.pattern))
    if choice.ranks > 1:
        yield f"{choice.word('reduce_dtype')}: sums between ranks have the type that the framework gives them"
    if choice.kernel is not None:
        given = {k: v for k, v in choice.cell.config["kernel"].items() if k not in ("name", "_target_") and v is not None}
        yield from (f"kernel.{option}={value}: there is no such option" for option, value in given.items())
    how = [name for name, axis in CELL_AXES.items() if axis.role == "how"]
    yield f"{', '.join(how)}, seed: how and on what it was measured"
    if choice.shape.documents:
        lengths = choice.cell.config["mask"].get("lengths", {}).get("name", "the mask's own")
        folded = next(axis.name for axis in AXES.values() if axis.folds_into == "mask")
        yield f"{folded}={lengths}: the lengths of documents are those of the data"


# -- what frameworks refuse alike ----------------------------------------------------------------------------------------


def check_halves(choice: Choice, who: str) -> None:
    """Raises:
    Cannot: the type of the inputs has not two bytes.
    """
    if choice.problem.dtype not in HALVES:
        raise Cannot(f"{who} takes {' and '.join(HALVES)}, not {choice.problem.dtype}")


def check_causal(choice: Choice, who: str) -> None:
    """Raises:
    Cannot: a query sees keys to its right.
    """
    if not choice.shape.causal:
        raise Cannot(f"{who} is causal, and no setting makes it anything else")


def check_heads(choice: Choice, *, replicated: bool) -> None:
    """Whether the ranks of an exchange of heads have whole heads each.

    Raises:
        Cannot: they have not; ``replicated``: key/value heads are repeated where there are fewer of them than ranks.
    """
    heads, degree = choice.problem.heads, choice.pattern.heads
    if heads.q % degree:
        raise Cannot(f"{degree} ranks cannot share {heads.q} query heads evenly")
    if heads.kv % degree and not (replicated and degree % heads.kv == 0):
        repeats = "nor repeat them evenly" if replicated else "and it repeats none"
        raise Cannot(f"{degree} ranks cannot share {heads.kv} key/value heads evenly, {repeats}")


def check_chunks(choice: Choice) -> None:
    """Raises:
    Cannot: the sequence cannot be cut into two chunks per rank.
    """
    chunks = 2 * choice.ranks
    if choice.ranks > 1 and choice.problem.seqlen % chunks:
        raise Cannot(f"it needs a length that 2 x {choice.ranks} chunks divide, not {choice.problem.seqlen}")


def check_layout(choice: Choice, *known: str) -> None:
    """Whether tokens are dealt out in an order that the framework has; in an exchange of heads alone, or where every token sees
    every other, the order means nothing.

    Raises:
        Cannot: they are not.
    """
    pattern, shape = choice.pattern, choice.shape
    matters = pattern.ring * pattern.gathered > 1 and (shape.causal or shape.windowed or shape.documents)
    if matters and pattern.layout not in ("auto", *known):
        raise Cannot(f"it deals tokens out in the order {' or '.join(known)}, not {pattern.layout}")


def ranks_note(choice: Choice) -> str:
    """Where these ranks are."""
    scale = choice.problem.scale
    measured = f"{choice.ranks} ranks, scale={scale}" if choice.ranks > 1 else "one GPU"
    return f"measured on {measured}; more GPUs than that are data parallel"


# -- how settings are typed ----------------------------------------------------------------------------------------------


def flags(settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> str:
    """Flags of a command line, one per line: True is a flag alone, a list several words, a tuple one with commas."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    lines += [" ".join([f"--{name}", *map(shlex.quote, _words(value))]) for name, value in settings.items()]
    return " \\\n".join(lines)


def argv(settings: Mapping[str, Any]) -> list[str]:
    """The same flags as words, for a parser."""
    return [word for name, value in settings.items() for word in (f"--{name}", *_words(value))]


def _words(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, list):
        return [str(item) for item in value]
    return [",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Overrides of Hydra."""
    return [f"{key}={'null' if value is None else _plain(value)}" for key, value in settings.items()]


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)
