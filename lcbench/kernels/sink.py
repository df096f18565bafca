"""A learned sink: a score without a value that takes part in each row's softmax (gpt-oss; arXiv 2309.17453).

It comes in after attention, once, when a row's result is over all of its keys, so kernels and merges know nothing of it: their
backward with the out and LSE from here gives the gradients of q, k and v.
"""

from __future__ import annotations

import torch


def with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results over all keys of their rows with the sink in them.

    Args:
        out: (T, H, Dv).
        lse: (T, H), natural logarithm, in the type of sums; -inf for a row without keys.
        sink: (H,), in the type of sums.

    Returns:
        out in its type, and LSE.
    """
    share = torch.sigmoid(lse - sink)
    return (out.to(lse.dtype) * share[..., None]).to(out.dtype), torch.logaddexp(lse, sink.expand_as(lse))


def sink_gradient(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor, where: torch.Tensor | None = None
) -> torch.Tensor:
    """The sink's gradient (H,) from rows whose out (T, H, Dv) and LSE (T, H) have the sink in them.

    Args:
        where: (T, H): which of these count; None: all.
    """
    delta = (dout.to(lse.dtype) * out).sum(-1)
    terms = torch.exp(sink - lse) * delta
    return -(terms if where is None else torch.where(where, terms, 0.0)).sum(0)
