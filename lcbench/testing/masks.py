"""Every mask that conf/ names at the size of a test: a new mask is tested as soon as its YAML is there."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lcbench.cp.base import Scheduled
from lcbench.grid.build import build_kernel, build_mask, build_strategy, check_options, with_option
from lcbench.grid.paths import CONF
from lcbench.masks.band import OPEN, BandMask
from lcbench.masks.block import BlockMap, chosen
from lcbench.masks.causal import causal
from lcbench.masks.mask import Mask
from lcbench.problem import Batch, Heads, Problem, Scale
from lcbench.selectors.base import block_edges
from lcbench.testing.shrink import shrunk, tokens_of

# Block maps as selectors choose them, within masks of conf/: name -> mask. Those of ``chosen_causal`` differ by query head.
WITHIN = {"chosen_causal": "causal", "chosen_document": "causal_document", "chosen_prefix": "prefix_lm_document"}


def load(group: str, name: str) -> dict[str, Any]:
    """The YAML of an axis value as plain values."""
    return deepcopy(_read(CONF / group / f"{name}.yaml"))


@cache  # tests ask for the same few again and again
def _read(path: Path) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    return {str(k): v for k, v in config.items()}


def names(group: str = "mask") -> list[str]:
    """Every value of an axis, aliases left out."""
    return [path.stem for path in sorted((CONF / group).glob("*.yaml")) if load(group, path.stem)["name"] == path.stem]


def every_mask() -> list[str]:
    """Names that ``small`` knows: every mask of conf/, and maps within masks."""
    return [*names(), *WITHIN]


def aliases(group: str = "mask") -> dict[str, str]:
    """Other names of axis values: alias -> name."""
    stems = [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
    return {stem: load(group, stem)["name"] for stem in stems if load(group, stem)["name"] != stem}


def softmax_kernels() -> list[str]:
    """Every kernel of conf/kernel that computes attention over a mask; those of linear attention have tests of their own."""
    return [name for name in names("kernel") if build_kernel(load("kernel", name)).operator == "softmax"]


def trained_by() -> dict[str, Scheduled]:
    """Every strategy of conf/cp that is a schedule and computes gradients."""
    of = Problem(64, Heads(4, 4, 8), Scale(1, 1), "float64", "forward_backward")
    built = {name: build_strategy(load("cp", name)) for name in names("cp")}
    return {name: s for name, s in built.items() if isinstance(s, Scheduled) and not s.unsupported(of, causal(64))}


def small_config(name: str, seqlen: int, heads: Heads, folder: Path, **options: Any) -> dict[str, Any]:
    """The checked config of a mask with its token counts shrunk to ``seqlen``; files that it needs go to ``folder``."""
    config = load("mask", name)
    for option, value in config.items():
        tokens = tokens_of(value)
        if tokens is not None and option != "samples" and seqlen >= 8:
            config[option] = shrunk(tokens, seqlen)
    if config.get("file") == "???":
        config["file"] = str(_file(name, seqlen, heads, folder))
    lengths = {"_target_": "lcbench.masks.lengths.Uniform", "name": "uniform", "low": 1, "high": max(1, seqlen // 3)}
    return with_option(check_options("mask", {**config, **options}), "lengths", lengths)


def small(name: str, seqlen: int, heads: Heads, folder: Path, *, seed: int = 0, **options: Any) -> Mask:
    """A mask of ``names()`` or of ``WITHIN`` at a small length."""
    if name in WITHIN:
        return _chosen(name, seqlen, heads, folder, seed)
    return build_mask(small_config(name, seqlen, heads, folder, **options), seqlen, heads, seed)


def _chosen(name: str, seqlen: int, heads: Heads, folder: Path, seed: int) -> BlockMap:
    """Blocks as a selector may choose them: at random, those of the diagonal among them."""
    within = small(WITHIN[name], seqlen, heads, folder, seed=seed)
    assert isinstance(within, BandMask)
    edges = block_edges(seqlen, max(2, seqlen // 6))
    random, blocks = np.random.default_rng([seed, seqlen]), len(edges) - 1
    keep = random.random((heads.q if name == "chosen_causal" else heads.kv, blocks, blocks)) < 0.4
    return chosen(keep | np.eye(blocks, dtype=bool), edges, edges, within)


def _file(name: str, seqlen: int, heads: Heads, folder: Path) -> Path:
    half, third = seqlen // 2 + 1, seqlen // 3 + 1
    path = folder / f"{name}-{seqlen}-{heads}"
    if name == "band_file":
        # Causal above, a stretch of few keys below, and rows without any.
        bands = [[0, half, 0, seqlen, None, 0]]
        if half < seqlen - 1:
            bands += [[half, seqlen - 1, 0, third, None, None]]
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"seqlen": seqlen, "bands": bands}))
        return path
    random = np.random.default_rng(0)
    edges = [np.unique([0, *random.integers(0, seqlen, 5), seqlen]) for _ in range(2)]
    keep = random.random((heads.kv, len(edges[0]) - 1, len(edges[1]) - 1)) < 0.5
    path = path.with_suffix(".npz")
    np.savez(path, q_edges=edges[0], k_edges=edges[1], keep=keep)
    return path


def causal_batch(batch: Batch) -> BandMask:
    """Each new token sees its request up to itself: by hand, for what is held against ``masks.requests``."""
    q, k = batch.q_bounds, batch.k_bounds
    ends = np.full(len(batch), -OPEN), k[1:] - q[1:]  # a request's last new token sees its last key
    return BandMask.of(batch.queries, batch.tokens, np.stack([q[:-1], q[1:], k[:-1], k[1:], *ends], 1))
