"""Which masks kernels of block maps do not run, and why."""

from __future__ import annotations

from lcbench.masks.block import BlockMap, uniform_blocks
from lcbench.masks.mask import Mask


def only_blocks(mask: Mask) -> str | None:
    """Why a kernel that takes block maps only does not run a mask, or None."""
    return None if isinstance(mask, BlockMap) else "takes dynamic block masks only (mask=block_...); dense kernels run this one"


def cut_blocks(mask: Mask, name: str) -> str | None:
    """Why a kernel that computes whole blocks only does not run a mask, or None."""
    if isinstance(mask, BlockMap) and (cut := mask.blocks_cut):
        return f"{name} takes whole blocks only: {cut} of {len(mask)} kept blocks are cut by the mask that they lie within"
    return None


def other_blocks(mask: Mask, size: int, name: str, *, divide: bool = False) -> str | None:
    """Why a kernel that knows uniform blocks of one size does not run a mask, or None; ``divide``: they divide the sequence."""
    if not isinstance(mask, BlockMap):
        return None
    whole = not divide or mask.num_q % size == mask.num_k % size == 0
    if whole and uniform_blocks(mask, size):
        return None
    dividing = " that divide the sequence" if divide else ""
    return (
        f"{name} takes uniform blocks of {size} tokens{dividing} (mask.block_size={size} mask.sizes=uniform, or of a selector "
        f"selector.q_block={size} selector.k_block={size})"
    )
