"""Every axis of a grid, declared once: how a value is read, where it goes in a cell's config, and what it is in reports.

A new axis is one entry of ``AXES`` and one line of ``conf/config.yaml``, with a folder of files where its values have files. Its
``unsaid`` value is its default there: a cell's config says nothing of the axis at this value, so cells of before keep their ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lcbench.grid import values

# What a cell's value is in reports: with what it is computed, what is computed, or only how it is measured.
Role = Literal["choice", "problem", "how"]
# What of an axis value's file says what the value is; the rest are options.
RESERVED = ("name", "_target_")


@dataclass(frozen=True)
class Axis:
    """An axis: a folder of conf/ whose files are its values (``home``), or a plain key.

    Attributes:
        name: as it is typed, and in a cell's config.
        role: ``choice``, ``problem`` or ``how``.
        parse: from what was typed to what the config holds; raises ValueError. None: ``grid.build`` or ``grid.expand`` does it.
        home: where lcbench's own values live; what is outside is built only where a file of the user's names it.
        needs: methods of a class that is such a value; none: it is a function of ``seqlen``.
        given: arguments that a value gets besides its options.
        token_counts: whether whole numbers among its options are token counts, such as ``1k``.
        folds_into: the axis that takes this one in. A group: as an option, where the value has one of this name. A plain key: as
            another way to say it, or to say a group's option of this name; null is not said.
        of: the axis whose value has to take this one (``takes`` of its class names it); a cell whose does not says nothing of it.
        gives: the axis that a value of this one says itself, where a cell has it: of a group by its method of that name, as a
            model's heads; of a plain key ``grid.expand`` knows how, and it is another way to say that axis: a batch's length.
        has_options: whether a plain key has options of its own (``measure.warmup``).
        unsaid: the value at which a config says nothing of the axis; None: it always does.
        label: its place in a cell's label, where the config says something of it; 0: it is not there.
        paces: whether cells of one pace, in FLOP/s, are the same in it.
    """

    name: str
    role: Role
    parse: Callable[[Any], Any] | None = None
    home: str = ""
    needs: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    token_counts: bool = False
    folds_into: str = ""
    of: str = ""
    gives: str = ""
    has_options: bool = False
    unsaid: Any = None
    label: int = 0
    paces: bool = False

    def missing(self, found: Any) -> str | None:
        """What a class or function lacks to be a value of this group; None if it can be one."""
        if not self.needs:
            first = next(iter(inspect.signature(found).parameters), None) if inspect.isfunction(found) else None
            return None if first == "seqlen" else "is no function whose first argument is seqlen"
        if not inspect.isclass(found):
            return "is no class"
        lacks = [need for need in self.needs if not _has(found, need)]
        lacks = lacks or sorted(getattr(found, "__abstractmethods__", ()))
        return f"has no method {lacks[0]}" if lacks else None


def _has(found: type, method: str) -> bool:
    member = getattr(found, method, None)
    return callable(member) and not getattr(member, "__isabstractmethod__", False)


_DECLARED = (
    Axis("kernel", "choice", home="lcbench.kernels.", needs=("unavailable", "prepare"), label=2, paces=True),
    Axis("cp", "choice", home="lcbench.cp.", needs=("unsupported", "unavailable", "start"), label=1, paces=True),
    Axis("compressor", "choice", home="lcbench.cp.compressors.", needs=("start", "missing"), folds_into="cp"),
    Axis("mask", "problem", home="lcbench.masks.", given=("seqlen", "heads", "seed"), token_counts=True, label=3, paces=True),
    Axis("lengths", "problem", home="lcbench.masks.", needs=("sample",), token_counts=True, folds_into="mask"),
    Axis(
        "workload", "problem", home="lcbench.workloads.", needs=("unsupported", "start"), label=6, paces=True,
        unsaid={"name": "attention", "_target_": "lcbench.workloads.attention.Attention"},
    ),
    Axis(
        "model", "problem", home="lcbench.workloads.", needs=("heads", "layer_parameters", "head_parameters"),
        folds_into="workload", gives="heads",
    ),
    Axis("layers", "problem", partial(values.parse_all_or, name="layers"), folds_into="workload"),
    Axis(
        "recompute", "choice", home="lcbench.workloads.", needs=("forward",), of="workload", label=7, paces=True,
        unsaid={"name": "none", "_target_": "lcbench.workloads.recompute.none.NoRecompute"},
    ),
    Axis(
        "planner", "choice", home="lcbench.planners.", needs=("plan",), of="workload", label=11, paces=True,
        unsaid={"name": "none", "_target_": "lcbench.planners.none.NoPlanner"},
    ),
    Axis(
        "selector", "choice", home="lcbench.selectors.", needs=("keep",), of="workload", label=12, paces=True,
        unsaid={"name": "none", "_target_": "lcbench.selectors.none.NoSelector"},
    ),
    Axis(
        "inputs", "problem", home="lcbench.inputs.", needs=("draw",), label=13, paces=True,
        unsaid={"name": "gaussian", "_target_": "lcbench.inputs.gaussian.Gaussian"},
    ),
    Axis("seqlen", "problem", values.parse_tokens, label=4),
    Axis("seqlen_per_rank", "problem", folds_into="seqlen"),
    Axis(
        "batch", "problem", lambda value: str(values.parse_batch(value) or "null"), gives="seqlen", unsaid="null", label=9,
        paces=True,
    ),
    Axis("scale", "problem", lambda value: str(values.parse_scale(value)), label=5, paces=True),
    Axis("mesh", "problem", values.parse_mesh, has_options=True, unsaid=values.MESH, label=8, paces=True),
    Axis("heads", "problem", lambda value: str(values.parse_heads(value)), paces=True),
    Axis("softmax", "problem", lambda value: str(values.parse_softmax(value)), unsaid="plain", label=10, paces=True),
    Axis("dtype", "problem", values.parse_dtype, paces=True),
    Axis("direction", "problem", values.parse_direction, paces=True),
    Axis("reduce_dtype", "choice", values.parse_reduce_dtype),
    Axis("seed", "problem", partial(values.parse_int, name="seed")),
    Axis("measure", "how", values.parse_measure, has_options=True),
)  # fmt: skip

AXES: dict[str, Axis] = {axis.name: axis for axis in _DECLARED}
# Axes whose values have files, and those of which an override may set an option.
GROUPS = tuple(axis.name for axis in _DECLARED if axis.home)
WITH_OPTIONS = tuple(axis.name for axis in _DECLARED if axis.home or axis.has_options)
HOMES = tuple(dict.fromkeys(axis.home for axis in _DECLARED if axis.home))
# Plain keys that say another way what a plain key, or a group's option of their name, says.
OTHER_WAYS = {
    axis.name: f"{axis.folds_into}.{axis.name}" if axis.folds_into in GROUPS else axis.folds_into
    for axis in _DECLARED if axis.folds_into and not axis.home
}  # fmt: skip
# Keys that say one thing, of which a command line says one: by the first of them.
WAYS = {
    way: (way, *(a.name for a in _DECLARED if OTHER_WAYS.get(a.name) == way or (a.gives == way and not a.home)))
    for way in dict.fromkeys(OTHER_WAYS.values())
}  # fmt: skip
# Keys of a cell's config.
CELL_AXES = {axis.name: axis for axis in _DECLARED if not axis.folds_into}
CELL_GROUPS = tuple(axis.name for axis in CELL_AXES.values() if axis.home)
# A cell answers "with what?" ...
CHOICE = tuple(axis.name for axis in CELL_AXES.values() if axis.role == "choice")
# ... to a problem, which is the rest of its config but how long it was measured.
PROBLEM = tuple(axis.name for axis in CELL_AXES.values() if axis.role == "problem")
LABEL = tuple(axis.name for axis in sorted(_DECLARED, key=lambda axis: axis.label) if axis.label)
# Choices that only some workloads leave.
OF_WORKLOAD = tuple(name for name in CHOICE if AXES[name].of == "workload")
# Those that every label tells; of the others a label tells the name too.
ALWAYS_TOLD = tuple(name for name in LABEL if AXES[name].unsaid is None)
PACE = tuple(axis.name for axis in CELL_AXES.values() if axis.paces)


def value_of(config: dict[str, Any], axis: str) -> Any:
    """What a cell's config says of an axis, or would say of its default. Of a group the value's name; of options a text of those
    that are not at their default, or of all.
    """
    usual = AXES[axis].unsaid
    value = config.get(axis, usual)
    if axis in GROUPS:
        return value["name"]
    if not isinstance(value, dict):
        return value
    options = {option: value[option] for option in usual or value}
    differing = {option: one for option, one in options.items() if usual and one != usual[option]}
    return ", ".join(f"{option}={one}" for option, one in (differing or options).items())


def plain_axes() -> str:
    """The axes without files, for a help text."""
    return ", ".join(f"{axis.name}.*" if axis.has_options else axis.name for axis in _DECLARED if not axis.home)


# -- names that changed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed:
    """A name of before and its name now: an axis, or an option of an axis value (``cp.order``).

    Attributes:
        targets: only values whose ``_target_`` begins so have the name; another's option of the same name is its own.
    """

    old: str
    new: str
    targets: str = ""


RENAMED = (
    Renamed("transit", "reduce_dtype"),
    Renamed("cp.order", "cp.layout", targets="lcbench.cp."),
    Renamed("mask.draws", "mask.samples"),
    Renamed("cp.selector", "cp.compressor", targets="lcbench.cp."),
)
# Where classes of values lay before, and where they are.
RELOCATED = (("lcbench.cp.selectors.", "lcbench.cp.compressors."),)


def with_present_names(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's config, of this version or an earlier one, with the names of this version."""
    for name in RENAMED:
        config = _moved(config, name.old, name.new, name.targets)
    for old, new in RELOCATED:
        config = _relocated(config, old, new)
    return config


def with_first_names(config: dict[str, Any]) -> dict[str, Any]:
    """A cell's config with the first name that each thing ever had: ids are made of these, so no renaming changes an id."""
    for name in RENAMED:
        config = _moved(config, name.new, name.old, name.targets)
    for old, new in RELOCATED:
        config = _relocated(config, new, old)
    return config


def _relocated(value: Any, source: str, to: str) -> Any:
    """A config whose ``_target_`` of any depth that begins with one text begins with another."""
    if not isinstance(value, dict):
        return value
    found = {key: _relocated(one, source, to) for key, one in value.items()}
    target = found.get("_target_")
    return (
        {**found, "_target_": to + target.removeprefix(source)} if isinstance(target, str) and target.startswith(source) else found
    )


def _moved(config: dict[str, Any], source: str, to: str, targets: str) -> dict[str, Any]:
    group, _, option = source.rpartition(".")
    if not group:
        return {to if key == source else key: value for key, value in config.items()}
    value = config.get(group)
    if not isinstance(value, dict) or option not in value or not str(value.get("_target_", "")).startswith(targets):
        return config
    return {**config, group: _moved(value, option, to.rpartition(".")[2], "")}


def renamed(key: str) -> str | None:
    """One line on a key as it was typed before; None for any other."""
    new = next((name.new for name in RENAMED if name.old == key), None)
    return new and f"{key} is called {new} now; write {new}"
