"""What the values of a cell say of it before it runs: why it cannot, whether it approximates, its mask. Each is made once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lcbench.cp.base import Scheduled, Strategy
from lcbench.grid import build, own
from lcbench.grid.axes import AXES
from lcbench.grid.cell import Cell
from lcbench.grid.paths import CONF
from lcbench.kernels.base import Kernel
from lcbench.masks.band import BandMask, DoesNotFit
from lcbench.masks.block import MAX_BLOCKS, BlockMap, chosen
from lcbench.masks.mask import Mask
from lcbench.planners.base import Documents, Fleet
from lcbench.problem import Batch, Heads, Problem
from lcbench.schedule.layout import documents
from lcbench.selectors.base import Selector, block_edges, blocks_of
from lcbench.workloads.base import Workload


def skip_reason(cell: Cell) -> str | None:
    """Why no run of this cell can give a result, from its kernel, its strategy and its mask; None if one can.

    Raises:
        ValueError: code of the user's is wrong: a mask, a schedule. Ours is proven by tests.
    """
    config, problem = cell.config, cell.problem
    try:
        mask = mask_of(cell)
    except DoesNotFit as error:
        return f"mask {config['mask']['name']}: {error}"
    said, made, blocks = config.get("workload"), {}, _widest(cell, mask)
    workload = None if said is None else _object("workload", json.dumps(said), build.build_workload)
    for group, builder in (("kernel", build.build_kernel), ("cp", build.build_strategy)):
        made[group] = _object(group, json.dumps(config[group]), builder)
        if reason := _other_operator(group, made[group], workload):
            return f"{group} {config[group]['name']}: {reason}"
        if group == "cp" and workload is not None and workload.in_groups:
            continue
        if reason := own.reason_not(group, config[group], made[group], problem, blocks if group == "kernel" else mask):
            return f"{group} {config[group]['name']}: {reason}"
    if reason := _refused_by_workload(cell, mask, blocks, made["kernel"], made["cp"]) or _refused_by_inputs(cell, workload):
        return reason
    if own.named_in(config["cp"]):
        _prove(cell)
    return None


def _other_operator(group: str, value: Kernel | Strategy, workload: Workload | None) -> str | None:
    """Why a kernel or a strategy is for another kind of attention than the workload, and what is for the same; None: it is not."""
    own = value.operators if isinstance(value, Strategy) else (value.operator,)
    wanted = "softmax" if workload is None else workload.operator
    if wanted in own:
        return None
    # Of softmax attention there is nearly everything, so what is named is the workload that this one would be for.
    groups = ("kernel", "cp") if wanted != "softmax" else ("workload",)
    of = own[0] if wanted == "softmax" else wanted
    named = " and ".join(f"{other}={'|'.join(_of_operator(other, of))}" for other in groups)
    return f"is for {' and '.join(own)} attention, and the workload's is {wanted}; for {of} attention there are {named}"


@cache
def _of_operator(group: str, operator: str) -> tuple[str, ...]:
    """The files of an axis in conf whose values are for a kind of attention; without the axis's default, which is for softmax and
    need not be loaded."""
    paths = (path for path in sorted((CONF / group).glob("*.yaml")) if path.stem != (AXES[group].unsaid or {}).get("name"))
    every = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in paths}
    kinds = {name: build.get_object(config["_target_"]) for name, config in every.items()}  # type: ignore[call-overload, index]
    return tuple(name for name, kind in kinds.items() if operator in getattr(kind, "operators", (getattr(kind, "operator", ""),)))


def approximates(cell: Cell) -> bool:
    """Whether the results of a cell that can run are not those of its mask: its strategy computes another, or its selector may
    leave out keys.

    Raises: as ``mask_of`` does.
    """
    selector = _selector(cell)
    if selector is not None and not selector.dense:
        return True
    strategy = _object("cp", json.dumps(cell.config["cp"]), build.build_strategy)
    return bool(strategy.approximates(cell.problem, mask_of(cell)))


def _refused_by_workload(cell: Cell, mask: Mask, blocks: Mask, kernel: Kernel, strategy: Strategy) -> str | None:
    """What the workload says to a cell; the axis's default takes what kernel and strategy take, and a plan need not load it."""
    config = cell.config
    said = config.get("workload")
    if said is None:
        reason = strategy.only_in_a_step()
        return reason and f"cp {config['cp']['name']}: {reason}"
    workload = _object("workload", json.dumps(said), build.build_workload)
    taken = {name: config[name] for name in ("workload", "recompute") if name in config}
    recompute = _object("recompute", json.dumps(taken), build.build_recompute)
    given = cell.problem, mask, kernel, strategy, recompute
    if reason := workload.misfit(cell.mesh) or own.reason_not("workload", said, workload, *given):
        return f"workload {said['name']}: {reason}"
    return _refused_by_planner(cell, mask, workload) or _refused_by_selector(cell, mask, blocks, strategy)


def _refused_by_inputs(cell: Cell, workload: Workload | None) -> str | None:
    """What inputs say to a cell; the axis's default can make all."""
    said = cell.config.get("inputs")
    if said is None:
        return None
    inputs = _object("inputs", json.dumps({"inputs": said}), build.build_inputs)
    if workload is not None and not workload.any_inputs:
        reason: str | None = f"workload={cell.config['workload']['name']} makes its queries, keys and values itself"
    else:
        reason = inputs.misfit(cell.mesh) or own.reason_not("inputs", said, inputs, cell.problem)
    if reason is None:
        layers = getattr(workload, "layers", 1)
        has = inputs.layers(cell.problem) if layers > 1 else None  # a file is read for it
        if has is not None and layers > has:
            reason = f"it has inputs of {has} such layers, and workload.layers={layers}"
    return reason and f"inputs {said['name']}: {reason}"


def _refused_by_planner(cell: Cell, mask: Mask, workload: Workload) -> str | None:
    """What a planner says to the documents of a batch on its ranks before it knows what they cost."""
    config = cell.config
    taken = {name: config[name] for name in ("workload", "planner") if name in config}
    planner = _object("planner", json.dumps(taken), build.build_planner)
    capacity = getattr(workload, "capacity", None)
    if planner is None or capacity is None:
        return None
    scale, (bounds, pairs_of) = cell.problem.scale, documents(mask)
    said = config.get("planner", AXES["planner"].unsaid)
    waits = "recompute" in workload.takes and "recompute" not in config  # as it is not where it is none
    fleet = Fleet(scale.world_size, scale.gpus_per_node, capacity, waits)
    reason = own.reason_not("planner", said, planner, Documents(np.diff(bounds), pairs_of), fleet)
    return reason and f"planner {said['name']}: {reason}"


def _refused_by_selector(cell: Cell, mask: Mask, blocks: Mask, strategy: Strategy) -> str | None:
    """What a selector says to a problem, and the strategy to the blocks that it may choose."""
    selector, problem = _selector(cell), cell.problem
    if selector is None or selector.dense:
        return None
    said = cell.config.get("selector", AXES["selector"].unsaid)
    if reason := own.reason_not("selector", said, selector, problem):
        return f"selector {said['name']}: {reason}"
    if (count := math.prod(blocks_of(selector, problem))) > MAX_BLOCKS:
        return f"selector {said['name']}: {count} blocks are more than {MAX_BLOCKS}; take larger blocks"
    reason = own.reason_not("cp", cell.config["cp"], strategy.settled(problem, mask), problem, blocks)
    return reason and f"cp {cell.config['cp']['name']}: {reason}"


def _widest(cell: Cell, mask: Mask) -> Mask:
    """What a kernel may be given of a cell: its mask, or all blocks of it that a selector may choose."""
    selector, problem = _selector(cell), cell.problem
    if selector is None or selector.dense or not isinstance(mask, BandMask):
        return mask
    edges = (block_edges(mask.num_q, selector.q_block), block_edges(mask.num_k, selector.k_block))
    return chosen(np.broadcast_to(True, (selector.maps(problem.heads), *blocks_of(selector, problem))), *edges, mask)


def _selector(cell: Cell) -> Selector | None:
    taken = {name: cell.config[name] for name in ("workload", "selector") if name in cell.config}
    found: Selector | None = _object("selector", json.dumps(taken), build.build_selector)
    return found


def pairs(cell: Cell) -> float:
    """Unmasked pairs over all query heads: exact for bands; of a block map, which is not drawn for this, what was asked for."""
    mask, problem = mask_of(cell), cell.problem
    if isinstance(mask, BandMask):
        return float(mask.pairs(problem.heads.q))
    return float(cell.config["mask"].get("density", 1.0)) * problem.plane * problem.heads.q


# -- objects, each made once -----------------------------------------------------------------------------------------

_masks: dict[tuple[str, int, Batch | None, Heads, int, int], Mask | DoesNotFit] = {}
_objects: dict[tuple[str, str], Any] = {}
_proven: set[tuple[str, str, Heads, Problem, int]] = set()


def mask_of(cell: Cell) -> Mask:
    """The first draw of a cell's mask, of one context-parallel group, made once.

    Raises:
        DoesNotFit: the mask cannot exist at this length or with these heads.
        ValueError: a file that is not what it was when the cell was planned, or code that is not known here.
    """
    config = cell.config["mask"]
    key = (json.dumps(config), cell.config["seqlen"], cell.batch, cell.heads, cell.mesh.tp, cell.config["seed"])
    if key not in _masks:
        try:
            made = build.group_mask(cell)
            for draw in range(1, build.draws(config) if build.fits_by_draw(config) else 1):
                build.group_mask(cell, draw)
            if isinstance(made, BlockMap) and own.named_in(config):
                made.draw(0)  # code of the user's, which is to fail here and not in a job
            _masks[key] = made
        except DoesNotFit as error:
            _masks[key] = error
    mask = _masks[key]
    if isinstance(mask, DoesNotFit):
        raise mask
    return mask


def _object(group: str, config: str, builder: Any) -> Any:
    if (group, config) not in _objects:
        _objects[group, config] = builder(json.loads(config))
    return _objects[group, config]


def _prove(cell: Cell) -> None:
    """Prove the schedule of a strategy of the user's, once for all types that are computed in: milliseconds up to 64 ranks, some
    ten seconds of 512.
    """
    problem, said, seed = cell.problem, cell.config["cp"], cell.config["seed"]
    config, mask = json.dumps(said), json.dumps(cell.config["mask"])
    key = (config, mask, cell.heads, replace(problem, dtype="float32", reduce_dtype="float32"), seed)
    strategy = _object("cp", config, build.build_strategy)
    if key not in _proven and isinstance(strategy, Scheduled):
        drawn = mask_of(cell)
        own.proven(said, strategy, own.scheduled(said, strategy, problem, drawn), problem, drawn)
    _proven.add(key)
