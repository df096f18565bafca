"""APB's own: an MLP per layer, trained with the model, scores a token for each key/value head from its q, k and v.

Retaining heads (Locret, arXiv 2410.01805; APB, arXiv 2502.12085; ``cis`` in thunlp/APB ``apb/models/modeling_llama.py``) are
``fc2(silu(fc1(q, k, v)))`` without biases, then a max-pool over 5 neighbouring tokens. There q and k are those before rotary
embeddings. Nothing here is trained: without weights there is no such compressor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lcbench.cp.compressors.base import Block, Compressor, Scores
from lcbench.kernels.base import Unsupported, importable
from lcbench.problem import Problem, check_whole

if TYPE_CHECKING:
    import torch

    from lcbench.cp.exchange import Exchange

POOL = 5  # tokens


@dataclass(frozen=True)
class RetainingHeads(Compressor):
    """``file``: safetensors with fc1.weight and fc2.weight, alone or of ``layers.<layer>.self_attn``; ``layer``: which one's."""

    odd: ClassVar[bool] = False

    file: str
    layer: int = 0

    def __post_init__(self) -> None:
        check_whole("compressor.layer", self.layer, 0)

    def missing(self) -> str | None:
        return importable("safetensors")

    def start(self, problem: Problem, device: torch.device, exchange: Exchange) -> Scores:
        import torch

        heads, dtype = problem.heads, getattr(torch, problem.dtype)
        first, second = (self._weight(name).to(device, dtype) for name in ("fc1.weight", "fc2.weight"))
        width = heads.q * heads.dim + heads.kv * (heads.dim + heads.v)
        if first.ndim != 2 or first.shape[1] != width:
            raise Unsupported(f"fc1.weight of compressor.file is {_shape(first)}; heads={heads} have {width} numbers in q, k and v")
        if second.ndim != 2 or second.shape[1] != first.shape[0] or heads.kv % second.shape[0]:
            raise Unsupported(f"fc2.weight of compressor.file is {_shape(second)}, and not {heads.kv}x{first.shape[0]}")
        return Retaining(first, second)

    def _weight(self, name: str) -> torch.Tensor:
        """A weight of this layer.

        Raises:
            Unsupported: the file is none of safetensors, or has no such weight.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as file:
                opened: Any = file
                ends = name, f"layers.{self.layer}.self_attn.{name}"
                found = [key for key in opened.keys() if key == ends[0] or key == ends[1] or key.endswith(f".{ends[1]}")]  # noqa: SIM118
                if len(found) == 1:
                    weight: torch.Tensor = opened.get_tensor(found[0])
                    return weight
        except (OSError, SafetensorError) as error:
            raise Unsupported(f"compressor.file={self.file} is no file of safetensors: {error}") from error
        raise Unsupported(f"compressor.file={self.file} has {len(found)} weights {ends[1]} or {name}, and not one")


@dataclass(frozen=True)
class Retaining:
    """The heads of one layer. ``first``: (hidden, numbers of q, k and v); ``second``: (Hk, hidden), or a divisor of Hk."""

    first: torch.Tensor
    second: torch.Tensor

    def __call__(self, blocks: Sequence[Block]) -> list[torch.Tensor]:
        return [self._of(block) for block in blocks]

    def _of(self, block: Block) -> torch.Tensor:
        import torch
        from torch.nn.functional import linear, max_pool1d, silu

        inputs = torch.cat([x.flatten(1) for x in (block.q, block.k, block.v)], 1)
        scores = linear(silu(linear(inputs, self.first)), self.second)
        pooled = max_pool1d(scores.T, POOL, stride=1, padding=POOL // 2).T
        return pooled.repeat_interleave(block.k.shape[1] // pooled.shape[1], 1)


def _shape(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape))
