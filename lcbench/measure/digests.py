"""Few numbers that tell of many: what is left of a tensor where it cannot be kept, or is on another rank."""

from __future__ import annotations

import numpy as np
import torch

SENT = 1e-12  # of the sum of sizes: how far sums of the same numbers on two ranks may be apart


def digest(x: torch.Tensor) -> torch.Tensor:
    """A number per token and head of x (T, H, D), float64 (T, H): elements with signs of their own, added up."""
    signs = torch.from_numpy(np.random.default_rng(x.shape[-1]).choice([-1.0, 1.0], x.shape[-1])).to(x.device)
    return x.double() @ signs


def told(x: torch.Tensor) -> list[float]:
    """A number per head of x (T, H, D), in which every element has a weight of its own."""
    weights = torch.from_numpy(np.random.default_rng(len(x)).uniform(0.5, 1.0, len(x))).to(x.device)
    found: list[float] = (weights @ digest(x)).tolist()
    return found
