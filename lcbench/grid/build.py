"""From a cell's config to its objects. The YAML of an axis value names its class or function in ``_target_``."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter

from lcbench.cp.base import Strategy
from lcbench.grid import own
from lcbench.grid.axes import AXES, GROUPS, HOMES, RESERVED, Axis, renamed
from lcbench.grid.cell import CONTENT, CONTENT_BEFORE, Cell
from lcbench.grid.paths import CONF
from lcbench.grid.values import check_finite, listed, parse_int, parse_option, parse_tokens
from lcbench.kernels.base import Kernel
from lcbench.masks.lengths import knows_draws
from lcbench.masks.mask import Mask
from lcbench.masks.requests import of_requests
from lcbench.problem import Heads
from lcbench.workloads.parts import Made, Share, attention_alone

if TYPE_CHECKING:
    from lcbench.inputs.base import Inputs
    from lcbench.planners.base import Planner
    from lcbench.selectors.base import Selector
    from lcbench.workloads.base import Workload

# Options that are the cell's and not its owner's: seeded draws of a mask to measure, and the digest of a file's content: as it is
# written now, and as cells of before have it.
SAMPLES, DIGESTS = "samples", (CONTENT, CONTENT_BEFORE)


WANTED = (
    "a value of an axis: a class with the methods of one of its kind (lcbench.kernels.base.Kernel), or a mask's function of seqlen"
)
NAMED = re.compile(r"^\s*_target_\s*:\s*[\"']?([\w.]+)", re.M)
_allowed: set[str] = set()


def allow(targets: Iterable[str]) -> None:
    """Let ``_target_`` name these from now on in this process: the user has named them, in an override, in a file of a folder of
    configuration, or when the sweep was begun.
    """
    _allowed.update(targets)


def targets_in(folder: Path) -> set[str]:
    """What YAML files below a configuration folder name as ``_target_``."""
    return {found for path in folder.rglob("*.yaml") for found in NAMED.findall(path.read_text(encoding="utf-8", errors="replace"))}


def check_targets(config: dict[str, Any]) -> set[str]:
    """What a cell's config names as ``_target_`` that is not lcbench's own.

    Raises:
        ValueError: something that is not allowed, not there (any more), or no such value.
    """
    named = {(group, target) for group in GROUPS for target in _targets(config.get(group))}
    for group, target in named:
        get_object(target, group if target == config[group].get("_target_") else None)
    return {target for _, target in named if not target.startswith(HOMES)}


def imports_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Modules that ranks of a cell would each import by themselves, by its workload; none of one that is not lcbench's own, whose
    module is not imported for it.

    Raises:
        ValueError: there is no such workload.
    """
    target = str(config.get("workload", {}).get("_target_", ""))
    return tuple(get_object(target, "workload").imports) if target.startswith(HOMES) else ()


def _targets(value: Any) -> Iterator[Any]:
    """Every ``_target_`` of an axis value, its own and those of values in its options."""
    if isinstance(value, dict):
        if "name" in value or "_target_" in value:
            yield _allowed_target(value.get("_target_"))
        for option in value.values():
            yield from _targets(option)


def get_object(target: str, group: str | None = None) -> Any:
    """The class or function that a ``_target_`` names. (Hydra's own does more, and costs every rank a fifth of its start.)

    A config may come from a results folder that others write to. So what is imported lies where values of axes live in lcbench, or
    a file of ``conf/`` or the user (``allow``) has named it; and it must be such a value itself: nothing else is ever called.

    Args:
        group: the axis that it is a value of; None: any.

    Raises:
        ValueError: it is not allowed, cannot be imported, or is something else.
    """
    module, _, name = _allowed_target(target).rpartition(".")
    try:
        members = vars(import_module(module))
    except (Exception, SystemExit) as error:  # the module is not there, or does not even load
        there = own.file_of(target)
        raise ValueError(
            f"_target_={target} cannot be imported: {f'{own.where(error, [target])}: ' if there else ''}{own.in_words(error)}"
        ) from error
    if name not in members:
        theirs = "" if target.startswith(HOMES) else f" ({own.file_of(target)})"
        raise ValueError(f"_target_={target} cannot be imported: {module} has no {name}{theirs}")
    found = members[name]
    named = inspect.isclass(found) or inspect.isfunction(found)
    could_be = _groups_of(found) if named else frozenset()
    if group is not None and group not in could_be:
        raise ValueError(f"_target_={target} {AXES[group].missing(found)}, and so no value of {group}")
    if not could_be or (target.startswith(HOMES) and found.__module__ != module):
        raise ValueError(f"_target_={target} is not {WANTED}")
    return found


@cache
def _groups_of(found: Any) -> frozenset[str]:
    """The axes that a class or function can be a value of."""
    return frozenset(name for name in GROUPS if AXES[name].missing(found) is None)


def _allowed_target(target: Any) -> str:
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise ValueError(f"_target_={target!r} is no name of a class or function, such as lcbench.kernels.mine.Mine")
    if not (target.startswith(HOMES) or target in _allowed or target in _conf_targets()):
        homes = ", ".join(home.rstrip(".") for home in HOMES)
        raise ValueError(
            f"_target_={target} is neither in {homes} nor named by a file of conf/, and nothing of it was run; if you know it, add"
            " --config-dir <folder>, with a file <axis>/<name>.yaml that names it"
        )
    return target


@cache
def _conf_targets() -> frozenset[str]:
    """What files of this checkout's conf/ name."""
    return frozenset(targets_in(CONF))


class Checked(dict[str, Any]):
    """The config of an axis value that ``check_options`` has passed: a grid checks each value once, not once per cell."""


def build(config: dict[str, Any], *given: Any, **more: Any) -> Any:
    """The value that a config names, with its options; an option that names a ``_target_`` itself is built first.

    Raises:
        ValueError: a file of which the config has a digest is not what it was when the cell was planned.
    """
    known = next((config[key] for key in DIGESTS if key in config), None)
    if known is not None and (not _is_file(Path(config["file"])) or _digest(config["file"]) != known):
        raise ValueError(f"file={config['file']} of {config['name']} has changed since this cell was planned; plan it anew")
    options = {key: build(value) if _is_nested(value) else value for key, value in _options(config).items()}
    return get_object(config["_target_"])(*given, **more, **options)


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def build_kernel(config: dict[str, Any]) -> Kernel:
    return cast(Kernel, build(config))


def build_strategy(config: dict[str, Any]) -> Strategy:
    return cast(Strategy, build(config))


def build_workload(config: dict[str, Any] | None) -> Workload:
    """What a cell runs; None: a cell that says nothing of it, which is the axis's default."""
    return cast("Workload", build(config or AXES["workload"].unsaid))


def build_recompute(config: dict[str, Any]) -> Any:
    """What backward computes again, by a whole cell's config; None where the workload does not take it."""
    return _build_taken("recompute", config)


def build_planner(config: dict[str, Any]) -> Planner | None:
    """Who shares out the documents of a batch, by a whole cell's config; None where the workload has no batch."""
    return cast("Planner | None", _build_taken("planner", config))


def build_selector(config: dict[str, Any]) -> Selector | None:
    """Who chooses the keys of sparse attention, by a whole cell's config; None where the workload chooses none."""
    return cast("Selector | None", _build_taken("selector", config))


def build_inputs(config: dict[str, Any]) -> Inputs:
    """What q, k and v are, by a whole cell's config."""
    return cast("Inputs", build(config.get("inputs", AXES["inputs"].unsaid)))


def _build_taken(name: str, config: dict[str, Any]) -> Any:
    """The value of an axis that only some values of another take; None where a cell's does not."""
    axis = AXES[name]
    return build(config.get(axis.name, axis.unsaid)) if takes_axis(config.get(axis.of, AXES[axis.of].unsaid), axis) else None


def made_of(config: dict[str, Any], share: Share) -> Made:
    """What a cell is made of on a rank with a share of it, by the whole cell's config; the default workload need not be loaded."""
    said = config.get("workload")
    if said is None:
        return attention_alone(share)
    return build_workload(said).made(replace(share, selector=build_selector(config)), build_recompute(config))


def input_bytes(cell: Cell) -> float:
    """Of what a rank of a cell with its even share of the tokens is given."""
    said = cell.config.get("workload")
    return cell.problem.input_bytes if said is None else build_workload(said).input_bytes(cell.problem)


def on_one_rank(config: dict[str, Any]) -> bool:
    """Whether a strategy, by its config, has no use for a second rank."""
    return bool(getattr(get_object(config["_target_"]), "one_rank", False))


def build_mask(config: dict[str, Any], seqlen: int, heads: Heads, seed: int, draw: int = 0, request: int | None = None) -> Mask:
    """The mask at a length; ``seed``, ``draw`` and ``request``, its number in a batch, reach the masks that draw something.

    Raises:
        DoesNotFit: the mask cannot exist at this length or with these heads.
        ValueError: options that are bad at any length, or a file that is not what it was when the cell was planned.
    """
    given = {"heads": heads, "seed": (seed, draw) if request is None else (seed, draw, request)}
    takes = _parameters(config["_target_"])
    options = {key: value for key, value in config.items() if key != SAMPLES}
    with own.blamed("mask", config):
        made = build(options, seqlen, **{key: value for key, value in given.items() if key in takes})
    return own.checked_mask(config, made, seqlen)


def cell_mask(cell: Cell, draw: int = 0) -> Mask:
    """The mask of a cell for the heads of all tensor-parallel ranks, (queries, keys). Raises as ``build_mask`` does."""
    config, batch = cell.config["mask"], cell.batch
    if batch is None:
        return build_mask(config, cell.config["seqlen"], cell.heads, cell.config["seed"], draw)
    return of_requests(
        batch,
        lambda total, request: build_mask(config, total, cell.heads, cell.config["seed"], draw, request),
        alike="seed" not in _parameters(config["_target_"]),
    )


def group_mask(cell: Cell, draw: int = 0) -> Mask:
    """The mask of a cell as its first context-parallel group sees it: for that one's share of the heads where tensor-parallel ranks
    have others. Raises as ``build_mask`` does.
    """
    whole = cell_mask(cell, draw)
    return whole if cell.mesh.tp == 1 else whole.of_heads(0, cell.problem.heads.q, cell.heads.q)


def fits_by_draw(config: dict[str, Any]) -> bool:
    """Whether one draw of a mask may fit where another does not: each batch of a file of document lengths has its own."""
    lengths = config.get("lengths")
    return lengths is not None and knows_draws(get_object(lengths["_target_"]))


def draws(config: dict[str, Any]) -> int:
    """How many seeded draws of a mask a cell measures."""
    return int(config.get(SAMPLES, 1))


def takes_axis(owner: dict[str, Any], axis: Axis) -> bool:
    """Whether a cell with this value of one axis has another, which folds into it as an option or is ``of`` it.

    The default of an axis that cells say nothing of takes none, and a plan need not load it.
    """
    group = axis.of or axis.folds_into
    if group not in GROUPS or owner == AXES[group].unsaid:
        return False
    target = owner["_target_"]
    return axis.name in (getattr(get_object(target), "takes", ()) if axis.of else _parameters(target))


def with_option(owner: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """An axis value's config with this value of an option, if it has one of this name (document lengths of a mask); the other
    owners are the same cell whatever the value.
    """
    parameter = _parameters(owner["_target_"]).get(name)
    if parameter is None:
        return owner
    rest = {option: said for option, said in owner.items() if option != name}
    return rest if parameter.left_out(value) else {**rest, name: value}


def said_by(group: str, config: dict[str, Any]) -> Any:
    """What a value of a group says itself of the axis that it ``gives``."""
    with own.blamed(group, config):
        return getattr(build(config), AXES[group].gives)()


def try_whole(group: str, config: dict[str, Any]) -> None:
    """Have a value that has taken values of other axes in check itself; ``check_options`` could not, without these.

    Raises:
        ValueError: refused by its owner.
    """
    if not AXES[group].given:
        _try(group, config)


def check_options(group: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of an axis value with its options checked against what ``_target_`` takes; token counts become integers.

    Args:
        group: the axis, or ``<axis>.<option>`` of a value that is an option.

    Raises:
        BadFile: the file of the value does not say what it is, or what it names is no such value.
        ValueError: an option that is missing, not set, not a token count where one is wanted, or refused by its owner.
    """
    # The default of an axis that cells say nothing of is lcbench's own, and a plan need not load what it names.
    if isinstance(config, Checked) or (group in AXES and config == AXES[group].unsaid):
        return dict(config)
    takes, given = _takes(group, config), _given(group)
    options = {option: parameter for option, parameter in takes.items() if not parameter.open and option not in given}
    _check_known(group, config, takes, [*options, *([SAMPLES] if "seed" in given else [])])
    checked = dict(config)
    for option, parameter in options.items():
        if _is_set(group, option, parameter, config):
            checked[option] = _parsed(group, option, parameter, config[option])
    check_finite(checked, group)
    if "seed" in given:
        _check_samples(checked, "seed" in takes)
    if "file" in takes and checked.get("file") is not None:
        _pin_file(group, checked)
    if not any(name in takes for name in given):
        _try(group, checked)
    return {option: value for option, value in checked.items() if option not in takes or not takes[option].left_out(value)}


class BadFile(ValueError):
    """The file of an axis value is wrong, whatever was typed."""


def _given(group: str) -> tuple[str, ...]:
    """What a value gets besides its options: arguments, and values of axes that fold into it."""
    folded = (axis.name for axis in AXES.values() if axis.folds_into == group and axis.home)
    return (*AXES[group].given, *folded) if group in AXES else ()


def _takes(group: str, config: dict[str, Any]) -> dict[str, Parameter]:
    """What the target of a config takes."""
    target = config.get("_target_")
    unset = [key for key in RESERVED if not isinstance(config.get(key), str)]
    if unset:
        raise BadFile(f"a value of {group} has a name and a _target_, each a text, and this one has no {unset[0]}")
    allow([str(target)])  # composed from the user's own files and words
    name = f"{group}={config['name']}"
    try:
        get_object(str(target), group if group in AXES else None)
        return _parameters(str(target))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise BadFile(f"{name}: {error}") from error


def _check_known(group: str, config: dict[str, Any], takes: dict[str, Parameter], known: list[str]) -> None:
    unknown = [option for option in config if option not in (*known, *RESERVED)]
    if not unknown or any(parameter.open for parameter in takes.values()):
        return
    if before := renamed(f"{group}.{unknown[0]}"):
        raise ValueError(before)
    options = [option for option in known if option in takes or "seed" in takes]
    raise ValueError(
        f"{group}={config['name']} has no option {unknown[0]!r} ({group}.{unknown[0]}={config[unknown[0]]}); "
        f"it has {listed(unknown[0], options) if options else 'none'}"
    )


def _is_set(group: str, option: str, parameter: Parameter, config: dict[str, Any]) -> bool:
    """Whether an option has a value; it must have one where its owner has no default."""
    value = config.get(option)
    if value is not None and value != "???":
        return True
    if parameter.required:
        number = "4k" if "int" in parameter.annotation or "NonNegative" in parameter.annotation else "a value"
        listed_too = f"[{number},{number}]" if parameter.annotation.startswith(("list", "tuple")) else number
        example = "path/to/file" if option == "file" else listed_too
        name = f"{group}.{option}"
        raise ValueError(f"{group}={config['name']} needs {name}, which is not set; for example {name}={example}")
    if value is None and option in config and not parameter.optional:
        raise ValueError(f"{group}.{option}=null is no value of it; leave it out, or set it")
    return False


def _check_samples(checked: dict[str, Any], draws_something: bool) -> None:
    if draws_something:
        checked[SAMPLES] = parse_int(checked.get(SAMPLES, 1), f"mask.{SAMPLES}", least=1)
    elif SAMPLES in checked:
        raise ValueError(f"mask={checked['name']} draws nothing, so mask.{SAMPLES}={checked[SAMPLES]} means nothing")


def _pin_file(group: str, checked: dict[str, Any]) -> None:
    """Make the path of an option ``file`` absolute, and put a digest of the content beside it."""
    path = Path(str(checked["file"])).expanduser().absolute()
    if not _is_file(path):
        raise ValueError(f"{group}.file={checked['file']} is no file")
    checked["file"], checked[CONTENT] = str(path), _digest(str(path))


def _try(group: str, checked: dict[str, Any]) -> None:
    """Have the owner of the options check them itself."""
    try:
        with own.blamed(group, checked):
            build(checked)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{group}={checked['name']}: {own.in_words(error)}") from error


def _parsed(group: str, option: str, parameter: Parameter, value: Any) -> Any:
    """An option's value. Where whole numbers are token counts, those of type ``NonNegative`` may be 0."""
    name, annotation = f"{group}.{option}", parameter.annotation
    if _is_nested(value):
        return check_options(name, value)
    if group in AXES and AXES[group].token_counts:
        if "list[int]" in annotation:
            return [parse_tokens(item, name) for item in (value if isinstance(value, list) else [value])]
        if "NonNegative" in annotation and str(value) == "0":
            return 0
        if "NonNegative" in annotation or ("int" in annotation and "float" not in annotation):
            return parse_tokens(value, name)
    return value if parameter.kind is None else parse_option(value, name, parameter.kind)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _digest(path: str) -> str:
    """Of a file's content, which is read once in a process as long as the file is the same by its size and times."""
    status = Path(path).stat()
    return _digest_of(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _digest_of(path: str, *same: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@dataclass(frozen=True)
class Parameter:
    """An option of a target."""

    annotation: str
    kind: Any  # the annotation itself; None where it says nothing, or cannot be resolved
    required: bool  # whether it has no default
    open: bool = False  # whether it stands for any others
    unsaid: Any = inspect.Parameter.empty  # a value that no cell names: cells of before there was a choice keep their ids

    @property
    def optional(self) -> bool:
        """Whether it may be null."""
        return self.kind is None or "None" in self.annotation

    def left_out(self, value: Any) -> bool:
        """Whether a cell says nothing of it at this value."""
        return self.unsaid is not inspect.Parameter.empty and value == self.unsaid


@cache
def _parameters(target: str) -> dict[str, Parameter]:
    """Options of a target."""
    owner = get_object(target)
    names = vars(sys.modules[owner.__module__]) if hasattr(owner, "__module__") else {}
    unsaid = {f.name for f in fields(owner) if f.metadata.get("left_out")} if is_dataclass(owner) else set()
    # A class that forgot its @dataclass may take anything by its place, which no file can give.
    taken = [p for p in inspect.signature(owner).parameters.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return {p.name: _parameter(p, names, p.name in unsaid) for p in taken}


def _parameter(parameter: inspect.Parameter, names: dict[str, Any], unsaid: bool) -> Parameter:
    annotation, kind = parameter.annotation, None
    if annotation is not inspect.Parameter.empty:
        with suppress(Exception):  # a name that only type checkers import
            kind = eval(annotation, dict(names)) if isinstance(annotation, str) else annotation
            TypeAdapter(kind)
    return Parameter(
        str(annotation),
        kind,
        parameter.default is inspect.Parameter.empty,
        parameter.kind is inspect.Parameter.VAR_KEYWORD,
        parameter.default if unsaid else inspect.Parameter.empty,
    )


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in (*RESERVED, *DIGESTS)}
