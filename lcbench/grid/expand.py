"""From override lists to cells: each axis value is composed by Hydra once, and the grid is their product.

Hydra's own sweeper composes every cell, about 40 ms each. Here overrides are put together by the top-level key they touch
(``mask=sliding_window mask.left=1k,2k`` is one axis of two values), each combination of a key is composed once, and cells
are products of the resulting plain values. That is the same only as long as no axis looks at another, which is why axis
files hold no defaults list and no interpolation. Experiments reach across axes, so several of them are several plans, joined;
package overrides (``mask@other=...``) have nowhere to go in a cell and are refused.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcbench.grid import build, values
from lcbench.grid.cell import Cell
from lcbench.grid.devices import known_devices
from lcbench.grid.paths import REPOSITORY
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem
from lcbench.redact import refuse_readable

GROUPS = ("kernel", "cp", "mask", "lengths")
AXES = (*GROUPS, "seqlen", "seqlen_per_rank", "scale", "heads", "dtype", "direction", "transit", "seed", "measure")
RUN_OPTIONS = (
    "sweep", "site", "wait", "output", "force", "pack", "hang", "retry", "results", "tracking_uri", "mlflow_experiment",
    "experiment",
)  # fmt: skip
CONFIG = "config"
OUTPUTS = ("table", "quiet", "json")
# measure.blocks at its default is no part of a cell: cells of before there were blocks keep their ids.
BLOCKS = 3
# Run options with options of their own, and how each of these is read.
OPTION_GROUPS: dict[str, Callable[[Any, str], Any]] = {
    "pack": values.parse_limit, "hang": values.parse_number, "retry": values.parse_int,
}  # fmt: skip

# For site files: paths that do not depend on where the command was typed.
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


@dataclass(frozen=True)
class Planned:
    """A cell and, if it cannot run, why."""

    cell: Cell
    skip: str | None


@dataclass(frozen=True)
class Plan:
    """What a command asks for: its cells in order, each once, and everything that is not part of a cell."""

    cells: tuple[Planned, ...]
    options: dict[str, Any]  # sweep, wait, output, force, pack, hang, retry, results, tracking_uri
    site: dict[str, Any]
    overrides: tuple[str, ...]


_remembered: list[Plan] = []


def remember(plan: Plan) -> None:
    """Keep the plan that a command made before Hydra started, for Hydra's sweeper to run."""
    _remembered[:] = [plan]


def remembered() -> Plan | None:
    return _remembered[0] if _remembered else None


def expand(overrides: list[str], loader: ConfigLoaderImpl) -> Plan:
    """The plan of an override list.

    Raises:
        ValueError: bad input, in one line that names the value and the accepted ones.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = _parse(parser, overrides)
    swept = next((o for o in parsed if _root(o) == "experiment" and o.is_sweep_override()), None)
    if swept is not None:  # an experiment may set anything, so each is a plan of its own
        others = [o for o in overrides if o != swept.input_line]
        plans = [expand([line, *others], loader) for line in _lines(swept)]
        joined = {p.cell.id: p for plan in plans for p in plan.cells}
        return replace(plans[0], cells=tuple(joined.values()), overrides=tuple(overrides))
    fixed = [o for o in parsed if _root(o) in RUN_OPTIONS or _root(o) == "hydra"]
    for override in fixed:
        if override.is_sweep_override():
            raise ValueError(f"{override.get_key_element()} is not an axis and takes one value; axes: {', '.join(AXES)}")
    _check_choices(parsed, loader)
    base_lines = [_line(o) for o in fixed]
    base = _compose_base(fixed, loader)
    # An experiment's own sweep, below what the command line says of the same key.
    said = {o.get_key_element().lstrip("+~") for o in parsed}
    params = {k: v for k, v in base["hydra"]["params"].items() if k not in said}
    parsed = [*_parse(parser, [f"{k}={v}" for k, v in params.items()]), *parsed]
    _check_choices(parsed, loader)
    axes = [o for o in parsed if not (_root(o) in RUN_OPTIONS or _root(o) == "hydra")]

    configs = _product(base, base_lines, axes, loader)
    cells = {(cell := Cell.from_config(config)).id: cell for config in configs}
    options = {k: base[k] for k in RUN_OPTIONS if k not in ("site", "experiment")}
    _check_run_options(options)
    unknown = [k for k in base if k not in (*AXES, *RUN_OPTIONS, "hydra")]
    if unknown:
        raise ValueError(_unknown_key(unknown[0]))
    return Plan(
        cells=tuple(Planned(cell, skip_reason(cell)) for cell in cells.values()),
        options=options,
        site=_site(base["site"]),
        overrides=tuple(overrides),
    )


def compose(overrides: list[str], loader: ConfigLoaderImpl) -> dict[str, Any]:
    """One whole config as Hydra composes it, as plain values; ``hydra`` holds the sweeper's parameters only."""
    try:
        config = loader.load_configuration(CONFIG, overrides, run_mode=RunMode.RUN)
        params = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
        site = config.get("site")
        OmegaConf.set_readonly(config, False)
        OmegaConf.set_struct(config, False)
        plain: dict[str, Any] = {
            str(k): OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v := config._get_node(k)) else config[k]
            for k in config
            if k not in ("hydra", "site")
        }
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error
    plain["site"], plain["hydra"] = site, {"params": params}
    return plain


def cell_config(config: dict[str, Any]) -> dict[str, Any]:
    """The canonical config of a cell from a composed one: every value checked, every token count an integer."""
    scale = values.parse_scale(config["scale"])
    seqlen = config["seqlen"]
    if config["seqlen_per_rank"] is not None:
        seqlen = values.parse_tokens(config["seqlen_per_rank"], "seqlen_per_rank") * scale.world_size
    measure = dict(config["measure"])
    blocks = values.parse_int(measure.pop("blocks", BLOCKS), "measure.blocks", least=1)
    groups = {group: build.check_options(group, _named(group, config[group])) for group in GROUPS}
    groups["mask"] = build.with_lengths(groups["mask"], groups.pop("lengths"))
    return {
        **groups,
        "seqlen": values.parse_tokens(seqlen),
        "scale": str(scale),
        "heads": str(values.parse_heads(config["heads"])),
        "dtype": values.parse_dtype(config["dtype"]),
        "direction": values.parse_direction(config["direction"]),
        "transit": values.parse_transit(config["transit"]),
        "seed": values.parse_int(config["seed"], "seed"),
        "measure": {
            **{k: values.parse_int(measure.pop(k), f"measure.{k}", least=least) for k, least in
               (("warmup", 0), ("min_iterations", 1), ("max_iterations", 1))},
            **{k: values.parse_number(measure.pop(k), f"measure.{k}") for k in ("budget_s", "precision")},
            "timeline": values.parse_bool(measure.pop("timeline"), "measure.timeline"),
            **({"blocks": blocks} if blocks != BLOCKS else {}),
            **_nothing_left("measure", measure),
        },
    }  # fmt: skip


def skip_reason(cell: Cell) -> str | None:
    """Why no run of this cell can give a result, from its kernel, its strategy and its mask; None if one can."""
    config, problem = cell.config, cell.problem
    try:
        mask = _mask(json.dumps(config["mask"]), problem, config["seed"])
    except DoesNotFit as error:
        return f"mask {config['mask']['name']}: {error}"
    for group, builder in (("kernel", build.build_kernel), ("cp", build.build_strategy)):
        reason = _object(group, json.dumps(config[group]), builder).unsupported(problem, mask)
        if reason:
            return f"{group} {config[group]['name']}: {reason}"
    return None


def pairs(cell: Cell) -> float:
    """Unmasked pairs over all query heads: exact for bands; of a block map, which is not drawn for this, what was asked for."""
    config, problem = cell.config, cell.problem
    mask = _mask(json.dumps(config["mask"]), problem, config["seed"])
    if isinstance(mask, BandMask):
        return float(mask.pairs(problem.heads.q))
    return float(config["mask"].get("density", 1.0)) * problem.seqlen**2 * problem.heads.q


# -- the product -----------------------------------------------------------------------------------------------------


def _product(
    base: dict[str, Any], base_lines: list[str], axes: list[Override], loader: ConfigLoaderImpl
) -> Iterable[dict[str, Any]]:
    by_root: dict[str, list[Override]] = {}
    for override in axes:
        by_root.setdefault(_root(override), []).append(override)
    choices = [[(root, value) for value in _values(root, members, base_lines, loader)] for root, members in by_root.items()]
    checked: dict[tuple[str, int], dict[str, Any]] = {}
    for combination in itertools.product(*choices):
        config = {**base, **dict(combination)}
        for group in GROUPS:
            # The product combines the same few objects again and again: check each once.
            key = group, id(config[group])
            if key not in checked:
                checked[key] = build.check_options(group, _named(group, config[group]))
            config[group] = build.Checked(checked[key])
        yield cell_config(config)


def _values(root: str, members: list[Override], base_lines: list[str], loader: ConfigLoaderImpl) -> list[Any]:
    """What a top-level key takes under each combination of its overrides."""
    combinations = list(itertools.product(*map(_lines, members)))
    if root in (*GROUPS, "measure") or len(members) > 1:
        return [_compose_key(root, list(lines), base_lines, loader) for lines in combinations]
    # A plain key becomes what was written: composing one of its values shows that the override is a good one.
    first = _compose_key(root, list(combinations[0]), base_lines, loader)
    rest = _parse(OverridesParser.create(config_loader=loader), [line for (line,) in combinations[1:]])
    return [first, *(_plain(override) for override in rest)]


def _plain(override: Override) -> Any:
    value = override.value()
    return str(value) if isinstance(value, QuotedString) else value


def _compose_base(fixed: list[Override], loader: ConfigLoaderImpl) -> dict[str, Any]:
    """The config under the run options alone."""
    lines = [_line(o) for o in fixed]
    try:
        return compose(lines, loader)
    except ValueError as error:
        for group in OPTION_GROUPS:
            own = [_line(o) for o in fixed if _root(o) == group]
            if own and (word := _option_error(group, own, [], loader)):
                raise ValueError(word) from error
        raise


def _compose_key(root: str, lines: list[str], base_lines: list[str], loader: ConfigLoaderImpl) -> Any:
    """The value of one top-level key under these overrides."""
    try:
        composed = compose(base_lines + lines, loader)
    except ValueError as error:
        raise ValueError(_option_error(root, lines, base_lines, loader) or str(error)) from error
    if root not in composed:
        raise ValueError(f"~{root} takes an axis away that every cell needs")
    return composed[root]


def _lines(override: Override) -> list[str]:
    """The single-valued overrides that a swept one stands for."""
    if not override.is_sweep_override():
        return [_line(override)]
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line}: an interval has no values to run; list them, or use range()")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _root(override: Override) -> str:
    return override.key_or_group.split(".")[0].split("/")[0]


# -- bad input -------------------------------------------------------------------------------------------------------


def _parse(parser: OverridesParser, lines: list[str]) -> list[Override]:
    try:
        return list(parser.parse_overrides(lines))
    except HydraException as error:
        raise ValueError(_one_line(error)) from error


def _check_choices(overrides: list[Override], loader: ConfigLoaderImpl) -> None:
    """Unknown keys and unknown members of a group, before anything is composed."""
    groups = (*GROUPS, "site", "experiment", "hydra/launcher", "hydra/sweeper")
    for override in overrides:
        root = _root(override)
        if root not in (*AXES, *RUN_OPTIONS, "hydra"):
            raise ValueError(_unknown_key(root))
        if override.package is not None and root != "hydra":
            raise ValueError(f"{override.input_line}: an axis has one place in a cell; write {root}=... without @")
        if override.key_or_group not in groups or override.is_delete():
            continue
        options = sorted(loader.get_group_options(override.key_or_group))
        for line in _lines(override):
            value = line.partition("=")[2].strip("'\"")
            if value not in options:
                raise ValueError(f"{override.key_or_group}={value} is not one of {_listed(value, options)}")


def _unknown_key(key: str) -> str:
    known = (*AXES, *RUN_OPTIONS)
    return f"unknown axis {key!r}; axes: {', '.join(AXES)}; run options: {_listed(key, RUN_OPTIONS, known)}"


def _listed(value: str, options: Sequence[str], near: Sequence[str] | None = None) -> str:
    close = difflib.get_close_matches(value, near or options, n=1)
    return ", ".join(options) + (f" (did you mean {close[0]}?)" if close else "")


def _option_error(root: str, lines: list[str], base_lines: list[str], loader: ConfigLoaderImpl) -> str | None:
    """A clear word on an option that an axis value does not have."""
    if root not in (*GROUPS, "measure", *OPTION_GROUPS):
        return None
    chosen = [line for line in lines if line.partition("=")[0] == root]
    config = compose(base_lines + chosen, loader)[root]
    options = [k for k in config if k not in build.RESERVED]
    for line in lines:
        key = line.partition("=")[0]
        option = key.partition(".")[2]
        if option and option.split(".")[0] not in options:
            owner = f"{root}={config['name']}" if "name" in config else root
            return f"{owner} has no option {option!r} ({line}); it has {_listed(option, options) if options else 'none'}"
    return None


def _named(group: str, config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"{group}={config} is no value of this axis")
    return config


def _nothing_left(owner: str, rest: dict[str, Any]) -> dict[str, Any]:
    if rest:
        raise ValueError(f"{owner} has no option {sorted(rest)[0]!r}")
    return {}


def _check_run_options(options: dict[str, Any]) -> None:
    values.parse_bool(options["force"], "force")
    if options["wait"] is not None:
        values.parse_bool(options["wait"], "wait")
    if options["output"] not in OUTPUTS:
        raise ValueError(f"output={options['output']} is not one of {', '.join(OUTPUTS)}")
    for group, parse in OPTION_GROUPS.items():
        if not isinstance(options[group], dict):
            raise ValueError(f"{group}={options[group]} means nothing; {group} has options, such as pack.max_cells=1")
        options[group] = {key: parse(value, f"{group}.{key}") for key, value in options[group].items()}
    if options["hang"]["min_s"] > options["hang"]["max_s"]:
        raise ValueError(f"hang.min_s={options['hang']['min_s']} is more than hang.max_s={options['hang']['max_s']}")
    name = options["sweep"]
    if name is not None and (not str(name).strip() or set(str(name)) & set("/\\ ") or str(name).startswith(".")):
        raise ValueError(f"sweep={name!r} is no folder name; use letters, digits, - and _, such as sweep=first-try")


def _site(site: Any) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(site, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"site: {_one_line(error)}") from error
    assert isinstance(resolved, dict)
    known: dict[str, list[str | None]] = {
        "device": [None, "cpu", *(entry["name"] for entry in known_devices())],
        "check": ["stop", "warn"],
        "publish": ["nodes", "login"],
    }
    for key, accepted in known.items():
        value = resolved.get(key, accepted[0])
        if value not in accepted:
            raise ValueError(f"site.{key}={value} is not one of {', '.join('null' if a is None else a for a in accepted)}")
    refuse_readable(resolved)
    return {str(k): v for k, v in resolved.items()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# -- objects, each made once -----------------------------------------------------------------------------------------

_masks: dict[tuple[str, int, Heads, int], Mask | DoesNotFit] = {}
_objects: dict[tuple[str, str], Any] = {}


def _mask(config: str, problem: Problem, seed: int) -> Mask:
    key = (config, problem.seqlen, problem.heads, seed)
    if key not in _masks:
        try:
            _masks[key] = build.build_mask(json.loads(config), problem.seqlen, problem.heads, seed)
        except DoesNotFit as error:
            _masks[key] = error
    mask = _masks[key]
    if isinstance(mask, DoesNotFit):
        raise mask
    return mask


def _object(group: str, config: str, builder: Any) -> Kernel:
    if (group, config) not in _objects:
        _objects[group, config] = builder(json.loads(config))
    made: Kernel = _objects[group, config]
    return made
