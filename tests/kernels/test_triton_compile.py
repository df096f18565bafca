"""Our Triton kernels compile for GPUs that are not here: for compute capability 8.0 and 9.0, within what a block may have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# Shared memory that one block can have, in bytes (CUDA C programming guide, technical specifications).
SHARED = {80: 163 << 10, 90: 227 << 10}

PROGRAM = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lcbench.kernels.triton_band import TritonBand
from lcbench.kernels.triton_block_sparse import TritonBlockSparse
from lcbench.kernels.triton_tiles import DELTA, DKV, DQ, FORWARD, delta_kernel, dkv_kernel, dq_kernel, forward_kernel

def compiled(function, height, width, launch, dim, tested, capability, kind):
    constants = {"GROUP": 8, "PER_MAP": 64, "D": dim, "PAD": triton.next_power_of_2(dim), "HEIGHT": height, "WIDTH": width,
                 "TESTED": tested, "SUM": tl.float32}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    tables = ("block_rows", "order", "whole_at", "whole", "tested_at", "tested", "bands")
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in tables:
            signature[name] = "*i32"
        elif name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
            signature[name] = "*" + kind
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        if signature[name][0] == "*" or name.endswith(("_t", "_h")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch._asdict())

for kernel, tested in ((TritonBand(), True), (TritonBlockSparse(), False)):
    queries, keys = (kernel.block_q, kernel.block_k), (kernel.block_dk, kernel.block_dq)
    for function, tile, launch in (
        (forward_kernel, queries, FORWARD), (dq_kernel, queries, DQ), (dkv_kernel, keys, DKV), (delta_kernel, queries, DELTA)
    ):
        for dim, capability, kind in ((128, 90, "bf16"), (64, 90, "fp16"), (128, 80, "bf16")):
            made = compiled(function, *tile, launch, dim, tested, capability, kind)
            tensor_cores = "wgmma" if "wgmma" in made.asm["ptx"] else "mma" if "mma.sync" in made.asm["ptx"] else ""
            print(json.dumps([function.fn.__name__, capability, made.metadata.shared, tensor_cores]))
"""


def test_kernels_compile_for_gpus_and_use_their_tensor_cores(tmp_path: object) -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # which would not compile
    # From a file: Triton reads the source of its functions.
    program = f"{tmp_path}/compile.py"
    with open(program, "w") as file:
        file.write(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 24
    for name, capability, shared, tensor_cores in rows:
        assert shared <= SHARED[capability]
        assert tensor_cores == {90: "wgmma", 80: "mma"}[capability] or (name, tensor_cores) == ("delta_kernel", "")
