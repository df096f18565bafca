"""From override lists to cells: each axis value is composed by Hydra once, and the grid is their product.

Hydra's own sweeper composes every cell, about 40 ms each. Here overrides are put together by the top-level key they touch
(``mask=sliding_window mask.left=1k,2k`` is one axis of two values), each combination of a key is composed once, and cells
are products of the resulting plain values. That is the same only as long as no axis looks at another, which is why axis
files hold no defaults list and no interpolation. Experiments reach across axes, so several of them are several plans, joined;
package overrides (``mask@other=...``) have nowhere to go in a cell and are refused.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcbench.grid import build, overrides, values
from lcbench.grid import site as sites
from lcbench.grid.axes import AXES, CELL_AXES, GROUPS, OTHER_WAYS, RESERVED, WAYS, WITH_OPTIONS, Axis, renamed
from lcbench.grid.cell import Cell
from lcbench.grid.compose import compose, compose_axis, one_line
from lcbench.grid.overrides import LAUNCHER, RUN_OPTIONS, lines_of, root_of, text_of
from lcbench.grid.paths import CONF
from lcbench.grid.refusals import skip_reason
from lcbench.grid.run_options import OPTION_GROUPS, check_run_options
from lcbench.grid.search import Bracket, Search, at
from lcbench.grid.trace import Trace
from lcbench.problem import Mesh, Scale
from lcbench.redact import refuse_readable

# Run options that are a file of conf/, if anything: what is composed of them is no run option of a plan as it is.
CHOSEN = ("site", "experiment", "machine", "search", "trace")
# Axes that say the length of one sequence.
LENGTHS = {"seqlen", *(name for name, way in OTHER_WAYS.items() if way == "seqlen")}


@dataclass(frozen=True)
class Planned:
    """A cell and, if it cannot run, why."""

    cell: Cell
    skip: str | None


@dataclass(frozen=True)
class Plan:
    """What a command asks for: its cells in order, each once, and everything that is not part of a cell."""

    cells: tuple[Planned, ...]
    options: dict[str, Any]  # sweep, wait, output, force, pack, hang, retry, results, tracking_uri, machine, fit
    site: dict[str, Any]
    overrides: tuple[str, ...]
    launcher: str  # its name in conf/hydra/launcher
    search: Search | None = None  # of lengths; then there is one cell of each choice, at the length to begin with
    trace: Trace | None = None  # of a server; then there is a cell of each choice for each of its batches

    def with_lengths(self) -> Plan:
        """The plan, for commands that do not look for lengths.

        Raises:
            ValueError: it is a search for them.
        """
        if self.search is not None:
            raise ValueError(f"search={self.search.name} is for python -m lcbench.sweep; write a length here, such as seqlen=64k")
        return self


_remembered: list[Plan] = []


def remember(plan: Plan) -> None:
    """Keep the plan that a command made before Hydra started, for Hydra's sweeper to run."""
    _remembered[:] = [plan]


def remembered() -> Plan | None:
    return _remembered[0] if _remembered else None


def expand(lines: Sequence[str], loader: ConfigLoaderImpl) -> Plan:
    """The plan of an override list.

    Raises:
        ValueError: bad input, in one line that names the value and the accepted ones.
    """
    parsed = overrides.read(lines, loader)
    swept = next((o for o in parsed if root_of(o) == "experiment" and o.is_sweep_override()), None)
    overrides.check(parsed, loader, launchers_of(loader))
    # An experiment may set anything, so each is a plan of its own.
    others = [text_of(o) for o in parsed if o is not swept]
    each = [parsed] if swept is None else [overrides.read([line, *others], loader) for line in lines_of(swept)]
    plans = [_plan(one, tuple(lines), loader) for one in each]
    joined = {p.cell.id: p for plan in plans for p in plan.cells}
    _refuse_unused(parsed, [p.cell.config for p in joined.values()])
    return replace(plans[0], cells=tuple(joined.values()))


def _plan(parsed: list[Override], lines: tuple[str, ...], loader: ConfigLoaderImpl) -> Plan:
    """The plan of overrides with one experiment at most."""
    chosen = [o for o in parsed if o.key_or_group == LAUNCHER]
    typed = [o for o in parsed if "/" not in o.key_or_group]
    fixed = [o for o in typed if _is_fixed(o)]
    _refuse_sweeps([*fixed, *chosen])
    base = _compose_base(fixed, loader)
    search, trace = _search(base, typed), _trace(base, typed)
    if trace is not None:
        typed = [*typed, *overrides.read([f"batch={','.join(trace.weights)}"], loader)]
    axes, swept = _axes(typed, base, loader)
    options = _run_options(base)
    if search is not None:  # lengths of an experiment give way
        axes, swept = [o for o in axes if root_of(o) not in LENGTHS], swept - LENGTHS
        base |= {"seqlen": search.shortest, "seqlen_per_rank": None}
    site = _site(base["site"], launchers_of(loader))
    by_site = "scale" not in swept and base["scale"] == site.get("scale")
    configs = _product(base, [text_of(o) for o in fixed if root_of(o) in ("site", "experiment")], axes, loader)
    made = (Cell.from_config(cell_config(config, said=swept, by_site=by_site)) for config in configs)
    cells = {cell.id: cell for cell in (made if search is None else map(partial(_first_of, search), made))}
    folder = Path(str(options["results"])).absolute() / str(options["sweep"] or "")
    launcher = str(chosen[-1].value()) if chosen else str(site.get("launcher"))
    if not sites.predicts(launcher):  # what is predicted is of another machine, and of any number of its GPUs
        _refuse_to_predict(options, launcher)
        sites.check_fit(site, (cell.scale for cell in cells.values()), options["pack"]["max_minutes"], folder)
    return Plan(
        cells=tuple(Planned(cell, skip_reason(cell)) for cell in cells.values()),
        options=options,
        site=site,
        overrides=lines,
        launcher=launcher,
        search=search,
        trace=trace,
    )


def _search(base: dict[str, Any], typed: list[Override]) -> Search | None:
    """Raises:
    ValueError: it is no search, or a length is typed beside it.
    """
    config = base.get("search")
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"search={values.shown(config)} means nothing; write search=max_seqlen")
    if length := next((o for o in typed if o.key_or_group in LENGTHS), None):
        found = f"search={config.get('name')} looks for one from search.from={config.get('from')} to search.to={config.get('to')}"
        raise ValueError(f"{text_of(length)} says a length, and {found}; leave it out")
    return Search.parse(config)


def _trace(base: dict[str, Any], typed: list[Override]) -> Trace | None:
    """Raises:
    ValueError: it is no trace, has no file, or a length is typed or looked for beside it.
    """
    trace = Trace.parse(base["trace"])
    said = {o.key_or_group: text_of(o) for o in typed}
    if trace is None:
        if cells := said.get("trace.cells"):
            raise ValueError(f"{cells} says nothing without a trace; write trace=<file>")
        return None
    if length := next((said[way] for way in (*WAYS["seqlen"], "search") if way in said), None):
        raise ValueError(f"{length} says a length, and the batches of trace={values.shown(trace.file)} have theirs; leave it out")
    return trace


def _first_of(search: Search, cell: Cell) -> Cell:
    """A cell of a choice at the length that a search for its longest begins with.

    Raises:
        ValueError: its lengths are those of a batch.
    """
    if cell.batch is not None:
        raise ValueError(f"search={search.name} looks for the longest sequence, and batch={cell.batch} has its own; leave one out")
    lengths = search.lengths(cell.problem.scale.world_size)
    return at(cell, Bracket.between(lengths, None, None).next())


def _refuse_to_predict(options: dict[str, Any], launcher: str) -> None:
    """Raises:
    ValueError: a machine or a fit is named, and the launcher predicts nothing.
    """
    for name in ("machine", "fit"):
        if options[name] is not None:
            said = f"{name}={options[name]} is for predictions, and hydra/launcher={launcher} makes none"
            raise ValueError(f"{said}: write hydra/launcher=simulate")


def _is_fixed(override: Override) -> bool:
    """Whether an override is of no axis, so that it has one value for the whole plan."""
    return root_of(override) in RUN_OPTIONS or root_of(override) == "hydra"


def _refuse_sweeps(fixed: list[Override]) -> None:
    for override in fixed:
        if override.is_sweep_override():
            raise ValueError(f"{override.get_key_element()} is not an axis and takes one value; axes: {', '.join(AXES)}")


def _axes(typed: list[Override], base: dict[str, Any], loader: ConfigLoaderImpl) -> tuple[list[Override], set[str]]:
    """Overrides of axes, those of an experiment's own sweep first, and their keys. What was typed of a key counts."""
    said = {overrides.key_of(text_of(o)): o for o in typed}
    params = {k: v for k, v in base["hydra"]["params"].items() if k not in said}
    _one_way(said, base, params)
    every = [*overrides.read([f"{k}={v}" for k, v in params.items()], loader), *typed]
    overrides.check(every, loader, launchers_of(loader))
    return [o for o in every if not _is_fixed(o)], {*said, *params}


def _run_options(base: dict[str, Any]) -> dict[str, Any]:
    """Everything but axes, site and experiment, checked."""
    options = {k: base[k] for k in RUN_OPTIONS if k not in CHOSEN}
    options["machine"] = base["hydra"]["choices"].get("machine")
    check_run_options(options)
    if unknown := [k for k in base if k not in (*AXES, *RUN_OPTIONS, "hydra")]:
        raise ValueError(overrides.unknown_key(unknown[0]))
    return options


def single_lines(lines: Sequence[str], loader: ConfigLoaderImpl) -> list[str]:
    """Overrides of one config, as Hydra has to be given them to mean what was typed.

    Raises:
        ValueError: one with several values, which stands for several configs.
    """
    parsed = overrides.read(lines, loader)
    for override in parsed:
        if override.is_sweep_override():
            raise ValueError(f"{text_of(override)}: this shows one config; write one value for {override.key_or_group}")
    return [text_of(o) for o in parsed]


def launchers_of(loader: ConfigLoaderImpl) -> list[str]:
    """Launchers that can run a plan: those with a file in conf/ or in the user's own folder, unlike Hydra's own."""
    files = [source for source in loader.get_sources() if source.scheme() == "file" and source.is_group(LAUNCHER)]
    return sorted({name for source in files for name in source.list(LAUNCHER, ObjectType.CONFIG)})


def _one_way(said: dict[str, Override], base: dict[str, Any], params: dict[str, Any]) -> None:
    """What is on the command line, in any way of saying it, takes the place of an experiment's in the others."""
    for ways in WAYS.values():
        if any(way in said and said[way].value() is not None for way in ways):
            for other in set(ways) - set(said):
                base.update({other: None} if other in base else {})
                params.pop(other, None)


def cell_config(config: dict[str, Any], *, said: Collection[str] = (), by_site: bool = False) -> dict[str, Any]:
    """The canonical config of a cell from a composed one: every value checked, every token count an integer.

    Args:
        said: keys that were asked for: what another one says differently beside one of them is a contradiction.
        by_site: nobody asked for the scale, which is the site's; what runs on one rank only then gets one.
    """
    found: dict[str, Any] = {group: build.check_options(group, config[group]) for group in GROUPS}
    scale = _scale(config["scale"], found["cp"], by_site)
    ranks = max(1, scale.world_size // Mesh(**values.parse_mesh(config["mesh"])).count)
    seqlen = _seqlen(config, ranks, said)
    found |= {"seqlen": seqlen, "scale": str(scale)}
    found |= {name: axis.parse(config[name]) for name, axis in CELL_AXES.items() if axis.parse is not None and name not in found}
    folded = set()
    for axis in AXES.values():
        if axis.of and not build.takes_axis(found[axis.of], axis):
            found[axis.name] = axis.unsaid
        elif axis.folds_into in GROUPS and build.takes_axis(found[axis.folds_into], axis):
            _fold(axis, found, config, said)
            folded.add(axis.folds_into)
    for group in folded:
        _check_whole(group, json.dumps(found[group]))
    return {name: found[name] for name, axis in CELL_AXES.items() if axis.unsaid is None or found[name] != axis.unsaid}


def _fold(axis: Axis, found: dict[str, Any], config: dict[str, Any], said: Collection[str]) -> None:
    """Put the value of an axis into that of the one that it folds into, and where it ``gives`` another axis its value, that too."""
    group = axis.folds_into
    if axis.home:
        found[group] = build.with_option(found[group], axis.name, found[axis.name])
    elif config[axis.name] is not None:
        if (way := OTHER_WAYS[axis.name]) in said:
            both = f"{axis.name}={values.shown(config[axis.name])} and {way}={values.shown(found[group][axis.name])}"
            raise ValueError(f"{both} are two ways to say one thing; write one of them")
        assert axis.parse is not None
        found[group] = build.with_option(found[group], axis.name, axis.parse(config[axis.name]))
    if axis.gives:
        own = _given_by(axis.name, json.dumps(found[axis.name]))
        if axis.gives in said and found[axis.gives] != own:
            raise ValueError(
                f"{axis.gives}={found[axis.gives]} contradicts {axis.name}={found[axis.name]['name']}, which has {own}; leave "
                f"{axis.gives} out, or write another {axis.name}"
            )
        found[axis.gives] = own


@cache
def _given_by(group: str, config: str) -> str:
    return str(build.said_by(group, json.loads(config)))


@cache
def _check_whole(group: str, config: str) -> None:
    build.try_whole(group, json.loads(config))


def _refuse_unused(parsed: list[Override], cells: list[dict[str, Any]]) -> None:
    """Raises:
    ValueError: a value of an axis that only some values of another axis take was typed, and no cell has one of these.
    """
    for override in parsed:
        axis = AXES.get(root_of(override))
        group = axis and (axis.of or axis.folds_into)
        if axis is None or group not in GROUPS:
            continue
        idle = axis.unsaid["name"] if axis.unsaid else "null"
        if override.key_or_group == axis.name and {line.partition("=")[2] for line in lines_of(override)} == {idle}:
            continue  # what every cell says
        owners = [config.get(group, AXES[group].unsaid) for config in cells]
        if not any(build.takes_axis(owner, axis) for owner in owners):
            names = ",".join(dict.fromkeys(owner["name"] for owner in owners))
            raise ValueError(f"{text_of(override)} means nothing here: {group}={names} has no {axis.name}")


def _scale(said: Any, strategy: dict[str, Any], by_site: bool) -> Scale:
    if said is None:
        raise ValueError("scale is not set, and the site gives none; write scale=<nodes>x<GPUs per node>, such as scale=2x8")
    return Scale(1, 1) if by_site and build.on_one_rank(strategy) else values.parse_scale(said)


def _seqlen(config: dict[str, Any], ranks: int, said: Collection[str]) -> int:
    """Total tokens, which are said in one way; ``ranks``: of a context-parallel group."""
    ways = [way for way in WAYS["seqlen"] if config[way] is not None and (way in said or way != "seqlen")]
    if len(ways) > 1:
        both = " and ".join(f"{way}={values.shown(config[way])}" for way in ways[:2])
        raise ValueError(f"{both} are two ways to say one length; write one of them")
    if all(config[way] is None for way in WAYS["seqlen"]):
        raise ValueError(f"no length is said: {', '.join(WAYS['seqlen'])} are null; write one of them, such as seqlen=64k")
    if (batch := values.parse_batch(config["batch"])) is not None:
        return batch.tokens
    if config["seqlen_per_rank"] is None:
        return values.parse_tokens(config["seqlen"])
    return values.parse_tokens(values.parse_tokens(config["seqlen_per_rank"], "seqlen_per_rank") * ranks)


# -- the product -----------------------------------------------------------------------------------------------------


def _product(
    base: dict[str, Any], base_lines: list[str], axes: list[Override], loader: ConfigLoaderImpl
) -> Iterable[dict[str, Any]]:
    by_root: dict[str, list[Override]] = {}
    for override in axes:
        by_root.setdefault(root_of(override), []).append(override)
    choices = [[(root, value) for value in _values(root, members, base_lines, loader)] for root, members in by_root.items()]
    if (count := math.prod(len(values) for values in choices)) > overrides.MOST_CELLS:
        raise ValueError(f"these are {count} cells, and a sweep has at most {overrides.MOST_CELLS}; make several of it")
    # The product combines the same few values again and again: each is checked once.
    chosen = base["hydra"]["choices"]
    rest = {group: _checked(group, base[group], chosen.get(group), loader) for group in GROUPS if group not in by_root}
    for combination in itertools.product(*choices):
        yield {**base, **rest, **dict(combination)}


def _values(root: str, members: list[Override], base_lines: list[str], loader: ConfigLoaderImpl) -> list[Any]:
    """What a top-level key takes under each combination of its overrides."""
    combinations = list(itertools.product(*map(lines_of, members)))
    last = [lines[-1] for lines in combinations]
    if root in WITH_OPTIONS or any("${" in line or not line.startswith(f"{root}=") for line in last):
        return [_compose_key(root, list(lines), base_lines, loader) for lines in combinations]
    # A plain key becomes what was written last.
    return [_plain(override) for override in overrides.read(last, loader)]


def _checked(group: str, value: Any, file: str | None, loader: ConfigLoaderImpl) -> build.Checked:
    """The value of a group, chosen from this file of it, checked; what is wrong with a file names it."""
    if not isinstance(value, dict):
        raise ValueError(f"{group}={values.shown(value)} is no value of this axis")
    try:
        return build.Checked(build.check_options(group, value))
    except ValueError as error:
        source = loader.repository.load_config(f"{group}/{file}")
        folder = Path(source.path.removeprefix("file://")) if source else CONF
        if source and (folder != CONF or isinstance(error, build.BadFile)):
            raise ValueError(f"{folder / group / str(file)}.yaml: {error}") from error
        raise


def _plain(override: Override) -> Any:
    value = override.value()
    return str(value) if isinstance(value, QuotedString) else value


def _compose_base(fixed: list[Override], loader: ConfigLoaderImpl) -> dict[str, Any]:
    """The config under the run options alone."""
    lines = [text_of(o) for o in fixed]
    try:
        return compose(lines, loader)
    except ValueError as error:
        for override in fixed:
            key = override.key_or_group.split(".")
            if key[0] == "site" and len(key) == 2 and not override.is_add() and key[1] not in sites.ClusterSite.model_fields:
                raise ValueError(sites.unknown_key(key[1])) from error
        for group in (*OPTION_GROUPS, "search", "trace"):
            own = [text_of(o) for o in fixed if root_of(o) == group]
            if own and (word := _option_error(group, own, [], loader)):
                raise ValueError(word) from error
        raise


def _compose_key(root: str, lines: list[str], base_lines: list[str], loader: ConfigLoaderImpl) -> Any:
    """The value of one top-level key under these overrides."""
    try:
        value, file = compose_axis(root, base_lines + lines, loader)
    except ValueError as error:
        raise ValueError(_option_error(root, lines, base_lines, loader) or str(error)) from error
    return _checked(root, value, file, loader) if root in GROUPS else value


# -- bad input -------------------------------------------------------------------------------------------------------


def _option_error(root: str, lines: list[str], base_lines: list[str], loader: ConfigLoaderImpl) -> str | None:
    """A clear word on an option that an axis value does not have."""
    if root not in (*WITH_OPTIONS, *OPTION_GROUPS, "search", "trace"):
        return None
    chosen = [line for line in lines if line.partition("=")[0] == root]
    config = compose(base_lines + chosen, loader).get(root)
    if config is None:
        return f"{lines[0]} says nothing without a search; write search=max_seqlen"
    if not isinstance(config, dict):
        return None
    options = [k for k in config if k not in RESERVED]
    for line in lines:
        key = line.partition("=")[0]
        option = key.partition(".")[2]
        if option and option.split(".")[0] not in options:
            if before := renamed(key.lstrip("+~")):
                return before
            owner = f"{root}={config['name']}" if "name" in config else root
            return f"{owner} has no option {option!r} ({line}); it has {values.listed(option, options) if options else 'none'}"
    return None


def _site(site: Any, launchers: list[str]) -> dict[str, Any]:
    try:
        resolved = OmegaConf.to_container(site, resolve=True, throw_on_missing=True) if OmegaConf.is_config(site) else site
    except OmegaConfBaseException as error:
        raise ValueError(f"site: {one_line(error)}") from error
    found = sites.checked({str(k): v for k, v in resolved.items()} if isinstance(resolved, dict) else resolved, launchers)
    refuse_readable(found)
    return found
