"""CPU seconds of layers with a memory on one rank with a thread, as of ``cpu_seconds``: some to fit on, and others.

python -m tests.predict.memory_seconds FILE    # measures all, writes FILE, and prints each with its prediction
"""

from __future__ import annotations

import sys

from tests.predict.step_seconds import run

ITERATIONS = 3
MODEL = ("workload=recurrent_memory", "model=tiny", "model.heads_q=8", "model.heads_kv=4", "model.head_dim=64", "dtype=float32",
         "site.device=cpu", "mask=causal", "scale=1x1", "cp=none", "kernel=sdpa_flash")  # fmt: skip
SMALL = ("model.hidden=256", "model.ffn=704", "model.vocab=1024")
LARGE = ("model.hidden=384", "model.ffn=1056", "model.vocab=2048")
FIT = (
    (*MODEL, *SMALL, "seqlen=1k", "workload.segment=128,512", "workload.order=sequential,diagonal"),
    (*MODEL, *LARGE, "seqlen=1k", "workload.segment=256", "layers=2"),
)
OTHERS = (
    (*MODEL, *LARGE, "seqlen=2k", "workload.segment=256,1k", "workload.order=sequential,diagonal"),
    (*MODEL, *SMALL, "seqlen=2k", "workload.segment=64", "workload.order=sequential,diagonal"),
    (*MODEL, *LARGE, "seqlen=1k", "workload.segment=256", "workload.memory_dim=16", "layers=3"),
    (*MODEL, *SMALL, "seqlen=1k", "workload.segment=256", "direction=forward", "workload.order=sequential,diagonal"),
)


if __name__ == "__main__":
    sys.exit(run(FIT, OTHERS, ITERATIONS, one_thread=False))
