"""FlexAttention for block maps: all heads and their maps in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lcbench.kernels.base import Kernel, Platform, Prepared
from lcbench.kernels.block_maps import only_blocks
from lcbench.kernels.flex import PreparedFlex, flex_limits
from lcbench.masks.block import BlockMap
from lcbench.masks.mask import Mask
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FlexSparse(Kernel):
    """FlexAttention on block maps; types and softcaps as for ``flex``."""

    softcaps: ClassVar[bool] = True
    takes: ClassVar[str] = "blocks"

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return super().unsupported(problem, mask) or only_blocks(mask)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return flex_limits(problem, platform)

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        assert isinstance(mask, BlockMap)
        return PreparedFlex(mask, heads, device)
