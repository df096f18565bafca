"""CPU seconds of sparse attention on gloo ranks with a thread each, as of ``cpu_seconds``: some to fit on, and others.

python -m tests.predict.sparse_seconds FILE    # measures all, writes FILE, and prints each with its prediction
"""

from __future__ import annotations

import sys

from tests.predict.step_seconds import run

ITERATIONS = 2
SPARSE = ("workload=sparse_attention", "dtype=float32", "site.device=cpu", "mask=causal", "inputs=structured", "kernel=sdpa_flash",
          "scale=1x2")  # fmt: skip
FIT = (
    (*SPARSE, "cp=ring,ulysses", "selector=moba", "selector.density=0.2", "seqlen=1k,4k", "heads=4x2x64"),
    (*SPARSE, "cp=ring", "selector=oracle", "selector.density=0.3", "seqlen=2k", "heads=4x2x64"),
)
OTHERS = (
    (*SPARSE, "cp=ring,ulysses,sparse_sequence,sparse_heads", "selector=moba", "selector.density=0.3", "seqlen=2k", "heads=4x2x64"),
    (*SPARSE, "cp=ulysses", "selector=oracle,dsv,nsa,topk,sale,random", "selector.density=0.1", "seqlen=2k", "heads=4x4x64"),
)


if __name__ == "__main__":
    sys.exit(run(FIT, OTHERS, ITERATIONS))
