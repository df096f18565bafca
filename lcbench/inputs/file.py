"""q, k and v as they were captured from a model: tensors of a file of safetensors, of one layer or several.

The names are ``layers.<n>.q``, ``layers.<n>.k`` and ``layers.<n>.v``; each is (tokens, heads, dim), as attention gets them: rotary
embeddings are in q and k, and the scale of scores is not. A cell takes the first tokens, as many as its length.
docs/inputs.md has a recipe that captures them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcbench.inputs.base import Inputs, Wanted
from lcbench.problem import Mesh, Problem, check_whole

if TYPE_CHECKING:
    import torch

NAMES = ("q", "k", "v")
TYPES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of a number, by the types that are taken
LARGEST_HEADER = 100_000_000  # bytes, as safetensors has it
TOGETHER = 4096  # tokens that are read at once, of which a rank may want some
# The largest number of each type of cells.
MOST = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": 2.0**128 - 2.0**104, "float64": float(np.finfo("f8").max)}


@dataclass(frozen=True)
class Captured:
    """A tensor as a file's header has it, and the byte of the file that it begins at."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class File(Inputs):
    """Tensors of a file; dout is standard normal. Every step has the same.

    Attributes:
        file: of safetensors; its content is part of the cell.
        layer: of which layer; where a workload has several, the first of them.

    Raises:
        ValueError: no file of safetensors, one that is cut short, or one without q, k and v of the layer as (tokens, heads, dim) of
            floating-point numbers.
    """

    file: str
    layer: int = 0

    def __post_init__(self) -> None:
        check_whole("inputs.layer", self.layer, 0)
        self._tensors(self.layer)

    def _tensors(self, layer: int) -> dict[str, Captured]:
        """q, k and v of a layer, as the header has them."""
        header = _header(self.file)
        found = {name: header.get(f"layers.{layer}.{name}") for name in NAMES}
        if any(tensor is None for tensor in found.values()):
            lacks = next(name for name, tensor in found.items() if tensor is None)
            has = _layers(header)
            shown = f"layers {', '.join(map(str, has[:8]))}{', ...' if len(has) > 8 else ''}" if has else "no layer"
            raise ValueError(f"inputs.file={self.file} has no tensor layers.{layer}.{lacks}; it has q, k and v of {shown}")
        tensors = {name: tensor for name, tensor in found.items() if tensor is not None}
        for name, tensor in tensors.items():
            told = f"inputs.file={self.file}: layers.{layer}.{name} is {'x'.join(map(str, tensor.shape))} {tensor.dtype}"
            if len(tensor.shape) != 3 or 0 in tensor.shape:
                raise ValueError(f"{told}, and not tokens x heads x dim")
            if tensor.dtype not in TYPES:
                raise ValueError(f"{told}, and not of a type among {', '.join(TYPES)}")
        q, k, v = (tensors[name].shape for name in NAMES)
        told = ", ".join(f"{name} {'x'.join(map(str, tensors[name].shape))}" for name in NAMES)
        if k[:2] != v[:2] or q[0] != k[0] or q[2] != k[2] or q[1] % k[1]:
            raise ValueError(f"inputs.file={self.file}: layers.{layer} has {told} (tokens x heads x dim), which do not go together")
        return tensors

    def layers(self, problem: Problem) -> int:
        has = _layers(_header(self.file))
        fit = (n for n in range(1, len(has) + 1) if self.layer + n not in has or self._other(self.layer + n, problem))
        return next(fit)

    def misfit(self, mesh: Mesh) -> str | None:
        if mesh.count == 1:
            return None
        return f"a file has one sequence with all its heads, and {mesh} has {mesh.count} groups of ranks"

    def unsupported(self, problem: Problem) -> str | None:
        heads = problem.heads
        if problem.batch is not None:
            return f"a file has one sequence, and no batch={problem.batch}"
        if heads.latent:
            return f"heads={heads}: a file has keys and values, and no latent keys"
        return self._other(self.layer, problem)

    def _other(self, layer: int, problem: Problem) -> str | None:
        """Why a layer is none of such a problem, or None."""
        q, k, v = (self._tensors(layer)[name].shape for name in NAMES)
        own = f"{q[1]}x{k[1]}x{q[2]}" + (f":{v[2]}" if v[2] != q[2] else "")
        if own != str(problem.heads):
            return f"layer {layer} of the file has heads={own}, and the cell heads={problem.heads}"
        if q[0] < problem.seqlen:
            return f"layer {layer} of the file has {q[0]} tokens, and the cell {problem.seqlen}"
        changed = Path(self.file).stat().st_mtime_ns
        for name in NAMES:
            tensor = self._tensors(layer)[name]
            if found := _first_without(self.file, changed, tensor, problem.seqlen, MOST[problem.dtype]):
                token, head, number = found
                return (
                    f"layers.{layer}.{name} of the file has {number:g} at token {token} of head {head}, which is no number of "
                    f"dtype={problem.dtype}"
                )
        return None

    def missing(self) -> str | None:
        return None if find_spec("safetensors") else "safetensors is not installed: pip install lcbench[file]"

    def states(self, problem: Problem, seed: int, group: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        tensors = self._tensors(self.layer)
        return {"layer": self.layer, "tokens": tensors["q"].shape[0], "dtype": {n: tensors[n].dtype for n in NAMES}}

    def draw(self, wanted: Wanted) -> torch.Tensor:
        import torch  # which planning does without
        from safetensors import safe_open

        from lcbench.inputs.drawing import draw

        w = wanted
        if w.name not in NAMES:
            return draw(w.name, w.tokens, w.problem, w.seed, w.device, w.group, w.heads, w.layer)
        name = f"layers.{self.layer + w.layer}.{w.name}"
        _, count, dim = self._tensors(self.layer + w.layer)[w.name].shape
        heads = w.heads or range(count)
        found = torch.empty((len(w.tokens), len(heads), dim), dtype=getattr(torch, w.problem.dtype), device=w.device)
        order = np.argsort(w.tokens, kind="stable")
        stretches = np.split(order, np.flatnonzero(np.diff(w.tokens[order] // TOGETHER)) + 1) if len(order) else []
        with safe_open(self.file, framework="pt") as file:
            rows: Any = file.get_slice(name)
            for stretch in stretches:
                tokens = w.tokens[stretch]
                first, last = int(tokens[0]), int(tokens[-1])
                read = rows[first : last + 1, heads.start : heads.stop]
                found[torch.from_numpy(stretch).to(w.device)] = read[torch.from_numpy(tokens - first)].to(w.device, found.dtype)
        return found


def _header(file: str) -> dict[str, Captured]:
    """What a file's tensors are, without reading them; read anew where the file has changed.

    Raises:
        ValueError: it is no file of safetensors, or ends before its tensors do.
    """
    try:
        status = Path(file).stat()
        return _read(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ValueError(f"inputs.file={file} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=16)
def _read(file: str, size: int, changed: int) -> dict[str, Captured]:
    no_file = f"inputs.file={file} is no file of safetensors"
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{no_file}: its first 8 bytes are no length of a header")
        text = opened.read(length)
    try:
        header = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        places = {name: tuple(map(int, value["data_offsets"])) for name, value in header.items()}
        found = {
            name: Captured(str(value["dtype"]), tuple(map(int, value["shape"])), 8 + length + places[name][0])
            for name, value in header.items()
        }
        ends = {name: last for name, (_, last) in places.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{no_file}: its header is none") from error
    if (end := max(ends.values(), default=0)) > size - 8 - length:
        raise ValueError(f"inputs.file={file} is cut short: its tensors end at byte {8 + length + end}, and it at {size}")
    for name, tensor in found.items():
        first, last = places[name]
        if tensor.dtype in TYPES and last - first != math.prod(tensor.shape) * TYPES[tensor.dtype]:
            raise ValueError(f"{no_file}: {name} has {last - first} bytes, which its shape and type do not have")
    return found


@lru_cache(maxsize=64)
def _first_without(file: str, changed: int, tensor: Captured, tokens: int, most: float) -> tuple[int, int, float] | None:
    """(token, head, number) of the first of so many tokens with NaN, an infinity or a number beyond ``most``; None: none has."""
    kinds = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
    every = np.memmap(file, kinds[tensor.dtype], "r", tensor.begin, tensor.shape)
    for begin in range(0, tokens, TOGETHER):
        rows = np.asarray(every[begin : min(tokens, begin + TOGETHER)])
        numbers = (rows.astype("<u4") << 16).view("<f4") if tensor.dtype == "BF16" else rows
        bad = ~np.isfinite(numbers) | (np.abs(numbers) > most)
        if bad.any():
            token, head, place = (int(at) for at in np.argwhere(bad)[0])
            return begin + token, head, float(numbers[token, head, place])
    return None


def _layers(header: dict[str, Captured]) -> list[int]:
    """Layers of which a header has q, k and v, ascending."""
    parts = [name.split(".") for name in header]
    numbers = {int(part[1]) for part in parts if len(part) == 3 and part[0] == "layers" and part[1].isdigit()}
    return sorted(n for n in numbers if all(f"layers.{n}.{name}" in header for name in NAMES))
