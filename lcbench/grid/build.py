"""From a cell's config to its objects. The YAML of an axis value names its class or function in ``_target_``."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter

from lcbench.cp.base import Strategy
from lcbench.grid.cell import CONTENT, CONTENT_BEFORE
from lcbench.grid.paths import CONF
from lcbench.grid.values import check_finite, parse_int, parse_option, parse_tokens
from lcbench.kernels.base import Kernel
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    from lcbench.workloads.base import Workload

RESERVED = ("name", "_target_")
# What a mask gets besides its options: the length, the heads, a seed, document lengths.
GIVEN = ("seqlen", "heads", "seed", "lengths")
# Options that are the cell's and not its owner's: seeded draws of a mask to measure, and the digest of a file's content: as it is
# written now, and as cells of before have it.
DRAWS, DIGESTS = "draws", (CONTENT, CONTENT_BEFORE)


# Where values of axes live; everything else is built only where a file of conf/ or the user names it.
HOMES = ("lcbench.kernels.", "lcbench.cp.", "lcbench.masks.")
WANTED = "a kernel's class (lcbench.kernels.base.Kernel), a strategy's, one of document lengths, or a mask's function of seqlen"
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
    values = [config[group] for group in ("kernel", "cp", "mask")]
    values += [lengths for value in values if isinstance(lengths := value.get("lengths"), dict)]
    named = {_allowed_target(value.get("_target_")) for value in values}
    for target in named:
        get_object(target)
    return {target for target in named if not target.startswith(HOMES)}


def get_object(target: str) -> Any:
    """The class or function that a ``_target_`` names. (Hydra's own does more, and costs every rank a fifth of its start.)

    A config may come from a results folder that others write to. So what is imported lies where values of axes live in lcbench, or
    a file of ``conf/`` or the user (``allow``) has named it; and it must be such a value itself.

    Raises:
        ValueError: it is not allowed, cannot be imported, or is something else.
    """
    module, _, name = _allowed_target(target).rpartition(".")
    try:
        found = vars(import_module(module))[name]
    except Exception as error:  # the module is not there, has no such name, or does not even load
        raise ValueError(f"_target_={target} cannot be imported: {type(error).__name__}: {error}") from error
    if not _is_value(found) or (target.startswith(HOMES) and found.__module__ != module):
        raise ValueError(f"_target_={target} is not {WANTED}")
    return found


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


def _is_value(found: Any) -> bool:
    """Whether it is what an axis can take: nothing else is ever called."""
    if inspect.isfunction(found):
        return next(iter(inspect.signature(found).parameters), None) == "seqlen"
    members = ("prepare", "unsupported", "schedule", "start", "sample")  # a kernel's, a strategy's, and of lengths
    has = {name for name in members if callable(getattr(found, name, None))}
    return inspect.isclass(found) and ("prepare" in has or "sample" in has or {"unsupported"} < has)


@cache
def _conf_targets() -> frozenset[str]:
    """What files of this checkout's conf/ name."""
    return frozenset(targets_in(CONF))


class Checked(dict[str, Any]):
    """The config of an axis value that ``check_options`` has passed: a grid checks each value once, not once per cell."""


def build_kernel(config: dict[str, Any]) -> Kernel:
    return cast(Kernel, get_object(config["_target_"])(**_options(config)))


def build_strategy(config: dict[str, Any]) -> Strategy:
    return cast(Strategy, get_object(config["_target_"])(**_options(config)))


def on_one_rank(config: dict[str, Any]) -> bool:
    """Whether a strategy, by its config, has no use for a second rank."""
    return bool(getattr(get_object(config["_target_"]), "one_rank", False))


def build_mask(config: dict[str, Any], seqlen: int, heads: Heads, seed: int, draw: int = 0) -> Mask:
    """The mask at a length; ``seed`` and ``draw`` reach the masks that draw something.

    Raises:
        DoesNotFit: the mask cannot exist at this length or with these heads.
        ValueError: options that are bad at any length, or a file that is not what it was when the cell was planned.
    """
    target = config["_target_"]
    names = _parameters(target)
    given: dict[str, Any] = {"heads": heads, "seed": (seed, draw)}
    options = {k: v for k, v in _options(config).items() if k not in (DRAWS, "lengths")}
    if "lengths" in names:
        given["lengths"] = get_object(config["lengths"]["_target_"])(**_options(config["lengths"]))
    known = next((config[key] for key in DIGESTS if key in config), None)
    if known is not None and _digest(options["file"]) != known:
        raise ValueError(f"mask.file={options['file']} has changed since this cell was planned; plan it anew")
    return cast(Mask, get_object(target)(seqlen, **{k: v for k, v in given.items() if k in names}, **options))


def draws(config: dict[str, Any]) -> int:
    """How many seeded draws of a mask a cell measures."""
    return int(config.get(DRAWS, 1))


def with_lengths(mask: dict[str, Any], lengths: dict[str, Any]) -> dict[str, Any]:
    """A mask's config with the document lengths in it, if it has documents; the others are the same for every lengths value."""
    return {**mask, "lengths": lengths} if "lengths" in _parameters(mask["_target_"]) else mask


def check_options(group: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of an axis value with its options checked against what ``_target_`` takes; token counts become integers.

    Raises:
        ValueError: an option that is missing, not set, not a token count where one is wanted, or refused by its owner.
    """
    if isinstance(config, Checked):
        return dict(config)
    name = config.get("name", "?")
    if not isinstance(config.get("_target_"), str) or not isinstance(config.get("name"), str):
        raise ValueError(f"conf/{group}/{name}.yaml must set name and _target_, each a text")
    allow([config["_target_"]])  # composed from the user's own files and words
    try:
        takes = _parameters(config["_target_"])
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{group}={name}: _target_: {config['_target_']} is no class or function: {error}") from error
    known = [*(option for option in takes if group != "mask" or option not in GIVEN), *([DRAWS] if group == "mask" else [])]
    unknown = [option for option in config if option not in (*known, *RESERVED)]
    if unknown and not any(parameter.open for parameter in takes.values()):
        options = ", ".join(k for k in known if k in takes or "seed" in takes) or "none"
        raise ValueError(
            f"{group}={name} has no option {unknown[0]!r} ({group}.{unknown[0]}={config[unknown[0]]}); it has {options}"
        )
    checked = dict(config)
    for option, parameter in takes.items():
        if parameter.open or (group == "mask" and option in GIVEN):
            continue
        value = config.get(option)
        if value is None or value == "???":
            if parameter.required:
                example = "4k" if "int" in parameter.annotation or "NonNegative" in parameter.annotation else "a value"
                raise ValueError(f"{group}={name} needs {group}.{option}, which is not set; for example {group}.{option}={example}")
            if value is None and option in config and not parameter.optional:
                raise ValueError(f"{group}.{option}=null is no value of it; leave it out, or set it")
            continue
        checked[option] = _parsed(group, option, parameter, value)
    check_finite(checked, group)
    if group == "mask":
        if "seed" in takes:
            checked[DRAWS] = parse_int(config.get(DRAWS, 1), f"mask.{DRAWS}", least=1)
        elif DRAWS in checked:
            raise ValueError(f"mask={name} draws nothing, so mask.{DRAWS}={checked[DRAWS]} means nothing")
    if "file" in takes and checked.get("file") is not None:
        path = Path(str(checked["file"])).expanduser().absolute()
        if not _is_file(path):
            raise ValueError(f"{group}.file={checked['file']} is no file")
        checked["file"], checked[CONTENT] = str(path), _digest(str(path))
    if group != "mask":
        try:
            get_object(config["_target_"])(**_options(checked))  # its own checks
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{group}={name}: {error}") from error
    return {option: value for option, value in checked.items() if option not in takes or not takes[option].left_out(value)}


def _parsed(group: str, option: str, parameter: Parameter, value: Any) -> Any:
    """An option's value; every integer of a mask or of document lengths is a token count, ``NonNegative`` ones may be 0."""
    name, annotation = f"{group}.{option}", parameter.annotation
    if group in ("mask", "lengths"):
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
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


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
    return {p.name: _parameter(p, names, p.name in unsaid) for p in inspect.signature(owner).parameters.values()}


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


def build_workload(config: dict[str, Any] | None) -> Workload:
    """What a cell runs; None, of a cell that names no workload: attention."""
    from lcbench.workloads.attention import Attention  # with torch, which planning does without

    return Attention() if config is None else cast("Workload", get_object(config["_target_"])(**_options(config)))
