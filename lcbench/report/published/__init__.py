"""Published figures of an H100 (80 GB, SXM), to put beside one's own.

Read off the charts that MagiAttention published (their code, newer than the LongCA-bench paper's, with USP's placement
corrected; no point at 96 GPUs), within 3 TFLOP/s: they are not the paper's own runs. 64 query heads over 8 key/value heads of
128, bfloat16; ``h100_cp.csv`` with 8K tokens per GPU. FLOPs are counted as ours are; time is the mean over ranks, where ours is
the slowest rank's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lcbench.grid.axes import value_of

if TYPE_CHECKING:
    import pandas as pd

LABEL = "H100, read off MagiAttention's charts (±3 TFLOP/s; not the paper's own runs), time as mean over ranks"
HEADS, DTYPE, TOKENS_PER_GPU = "64x8x128", "bfloat16", 8192


def kernels() -> pd.DataFrame:
    """``kernel, mask, seqlen, phase, tflops_per_gpu`` on one GPU."""
    return _read("h100_kernels.csv")


def strategies() -> pd.DataFrame:
    """``cp, mask, world_size, phase, tflops_per_gpu`` at 8192 tokens per GPU."""
    return _read("h100_cp.csv")


def comparable(rows: pd.DataFrame) -> bool:
    """Whether rows of ``frame.reported`` are of the same problem; the device is another question, and ``LABEL`` names theirs."""
    same = set(rows["workload"]) == {value_of({}, "workload")} and set(rows["heads"]) == {HEADS} and set(rows["dtype"]) == {DTYPE}
    return bool(rows["gpu"].all()) and same


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(Path(__file__).parent / name)
