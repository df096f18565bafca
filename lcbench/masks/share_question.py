"""Share-question mask: the first document is a question, each later one an answer that sees the question and itself.

All are causal inside (reward models and DPO over several answers; LongCA-bench, arXiv 2510.17896, "shared question").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lcbench.masks.band import Band, BandMask
from lcbench.masks.document import squares
from lcbench.masks.lengths import Lengths, document_bounds


def share_question(seqlen: int, *, seed: Sequence[int], lengths: Lengths) -> BandMask:
    """Query q sees key k when k <= q and k is in the document of q or in the first one."""
    bounds = document_bounds(seqlen, lengths, seed)
    answers = Band(int(bounds[1]), seqlen, 0, int(bounds[1]))
    return BandMask.of(seqlen, seqlen, np.concatenate([squares(bounds, hi=0), [answers]]))
