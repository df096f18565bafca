"""A cell: one point of the grid, frozen, named by a hash of its canonical resolved config and of nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lcbench.grid.axes import ALWAYS_TOLD, AXES, GROUPS, LABEL, RESERVED, value_of, with_first_names, with_present_names
from lcbench.grid.values import parse_batch, parse_heads, parse_scale, parse_softmax
from lcbench.problem import PLAIN, Batch, Heads, Mesh, Problem, Scale, Softmax, format_tokens

ID_LENGTH = 12
# Digest of the content of an option ``file``. Beside it the path is no part of the cell: the same file elsewhere is the same cell.
# (Cells of before have it under another name, and their path is a part of them.)
CONTENT, CONTENT_BEFORE = "content_sha256", "file_sha256"


@dataclass(frozen=True)
class Cell:
    """One value for every axis.

    ``config`` is the canonical resolved config, plain JSON types only; it alone, without the paths of files whose content it
    names by a digest, decides equality and ``id``::

        {"kernel": {"name": "sdpa_flash", "_target_": "lcbench.kernels.sdpa_flash.SDPAFlash", ...options},
         "cp":     {"name": "ring", "_target_": "lcbench.cp.ring.Ring", ...options},
         "mask":   {"name": "document", "_target_": "lcbench.masks.document.document", ...options, "samples": 1,
                    "lengths": {"name": "web_text", ...}},  # lengths, samples: where the mask has documents, draws something
         "seqlen": 65536, "scale": "2x8", "heads": "32x8x128", "dtype": "bfloat16",
         "direction": "forward_backward", "reduce_dtype": "float32", "seed": 0,
         # An axis with an ``unsaid`` value (``grid/axes.py``) is left out at it:
         "workload": {"name": "block", ...options, "layers": 2, "model": {"name": "llama3_8b", ...}},  # model's heads are heads
         "recompute": {"name": "full", ...}, "mesh": {"tp": 2, "dp": 2, "order": "tp-cp-dp"},
         "batch": "2q2k_32q1s8k", "softmax": "sink_scale0.1",  # seqlen is then the tokens of the batch
         "measure": {"warmup": 3, "min_iterations": 5, "max_iterations": 100, "budget_s": 20.0, "precision": 0.02,
                     "timeline": false}}

    Token counts are plain integers there; where the cell ran, and when, is not part of it.
    """

    canonical: str  # the JSON text of what decides, by the first names of things, sorted keys, no white space
    whole: str = field(compare=False)  # the config by the names of now, with the paths of files, which whoever measures needs

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Cell:
        """Raises:
        ValueError: a number that JSON does not know: infinity, or none at all.
        """
        config = with_present_names(config)
        return cls(_canonical(with_first_names(_without_paths(config))), _canonical(config))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config as plain values; shared, so not to be changed."""
        config: dict[str, Any] = json.loads(self.whole)
        return config

    @cached_property
    def id(self) -> str:
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:ID_LENGTH]

    @cached_property
    def problem(self) -> Problem:
        """That of one context-parallel group.

        Raises:
            ValueError: the mesh does not fit the heads or the scale.
        """
        config = self.config
        heads, scale = self.mesh.heads(self.heads), self.mesh.group_scale(self.scale)
        return Problem(
            config["seqlen"], heads, scale, config["dtype"], config["direction"], config["reduce_dtype"], self.batch, self.softmax,
            config.get("workload", {}).get("rule"),
        )  # fmt: skip

    @cached_property
    def mesh(self) -> Mesh:
        """The context-parallel groups that are at work at once."""
        return Mesh(**self.config.get("mesh", {}))

    @cached_property
    def scale(self) -> Scale:
        return parse_scale(self.config["scale"])

    @cached_property
    def heads(self) -> Heads:
        return parse_heads(self.config["heads"])

    @cached_property
    def batch(self) -> Batch | None:
        """Requests of each replica; None: one sequence."""
        return parse_batch(self.config.get("batch"))

    @cached_property
    def softmax(self) -> Softmax:
        return parse_softmax(self.config["softmax"]) if "softmax" in self.config else PLAIN

    @cached_property
    def label(self) -> str:
        """For people: ``ring sdpa_flash causal_document(web_text) 64k 2x8``, and ``workload=block(llama3_8b, layers=2)
        recompute=full mesh(tp=2)`` behind it where that is so; not unique.
        """
        return " ".join(map(self.told, self.words))

    @cached_property
    def words(self) -> dict[str, str]:
        """The words of the label by axis."""
        return {axis: self.word(axis) for axis in LABEL if axis in self.config}

    @cached_property
    def flat(self) -> dict[str, Any]:
        """Every axis as one value: a group's value under the group's name, its options below it. Shared, so not to be changed.

        Beside them numbers: of all ranks, of the heads that a rank's context-parallel group has, and of what its batch is made of,
        a sequence being one request.
        """
        scale, problem = self.scale, self.problem
        heads = problem.heads
        unsaid = {name: axis.unsaid for name, axis in AXES.items() if axis.unsaid is not None and name not in self.config}
        return _flat("", {**self.config, **unsaid}) | {
            "nodes": scale.nodes, "gpus_per_node": scale.gpus_per_node, "world_size": scale.world_size,
            "num_heads_q": heads.q, "num_heads_kv": heads.kv, "head_dim": heads.dim, "head_dim_v": heads.v,
            "requests": 1 if problem.batch is None else len(problem.batch), "queries": problem.queries,
        }  # fmt: skip

    def told(self, axis: str) -> str:
        """The word of an axis as a label tells it: with the axis's name where labels do not always tell it."""
        word = self.word(axis)
        return word if axis in ALWAYS_TOLD else f"{axis}({word})" if AXES[axis].has_options else f"{axis}={word}"

    def word(self, axis: str) -> str:
        """The value of an axis, with the values of axes that are folded into it in brackets; its default where nothing is said."""
        value = value_of(self.config, axis)
        if isinstance(value, int):
            return format_tokens(value)
        options = self.config.get(axis, {}) if axis in GROUPS else {}
        folded = {other.name: options[other.name] for other in AXES.values() if other.folds_into == axis and other.name in options}
        shown = [one["name"] if isinstance(one, dict) else f"{name}={one}" for name, one in folded.items() if one is not None]
        return f"{value}({', '.join(shown)})" if shown else str(value)


def _canonical(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config without every ``file`` that has the digest of its content beside it, at any depth."""
    kept = {k: v for k, v in config.items() if not (k == "file" and CONTENT in config)}
    return {k: _without_paths(v) if isinstance(v, dict) else v for k, v in kept.items()}


def flat_options(cell: Cell, axis: str) -> dict[str, Any]:
    """The options of a cell's value of an axis, those of what is folded into it below its name: of none, or without any, empty."""
    value = cell.config.get(axis, AXES[axis].unsaid)
    return _flat("", {k: v for k, v in value.items() if k not in RESERVED}) if isinstance(value, dict) else {}


def _flat(prefix: str, config: dict[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{CONTENT if key == CONTENT_BEFORE else key}"
        if isinstance(value, dict):
            if "name" in value:
                params[name] = value["name"]
            params |= _flat(f"{name}.", {k: v for k, v in value.items() if k not in ("name", "_target_")})
        else:
            params[name] = value
    return params
