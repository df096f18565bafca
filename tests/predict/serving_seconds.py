"""CPU seconds of passes over a cache on gloo ranks with a thread each, as of ``cpu_seconds``: some to fit on, and others.

python -m tests.predict.serving_seconds FILE    # measures all, writes FILE, and prints each with its prediction
"""

from __future__ import annotations

import sys

from tests.predict.step_seconds import run

ITERATIONS = 20
SERVING = ("workload=serving", "dtype=float32", "direction=forward", "site.device=cpu", "mask=causal", "heads=8x2x64",
           "kernel=sdpa_flash")  # fmt: skip
ONE, TWO = ("scale=1x1", "cp=none"), ("scale=1x2",)
# No copy of keys has the 32 MiB from which on the C library gives memory back, and the next pass waits for all its pages again.
FIT = (
    (*SERVING, *ONE, "batch=16q1s1k,2q1s8k,q512s4k,2q1k"),
    (*SERVING, *TWO, "cp=kvp,helix,allgather", "batch=8q1s1k,2q1s8k,2q512s2k"),
)
OTHERS = (
    (*SERVING, *ONE, "batch=4q1s4k,q1s16k,32q1s512,2q256_8q1s1k,q1ks8k"),
    (*SERVING, *ONE, "batch=8q1s2k", "workload.page=16", "workload.storage=input,float8"),
    (*SERVING, *TWO, "cp=kvp,dcp,helix,allgather", "batch=16q1s1k,q1s16k,q256_8q1s1k"),
)


if __name__ == "__main__":
    sys.exit(run(FIT, OTHERS, ITERATIONS))
