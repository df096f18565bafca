"""Our Triton kernels compile for GPUs that are not here, and what they take of a GPU: registers, spills, shared memory.

Launch shapes are those that ``triton_shapes`` gives each device. Registers and spills are what the ``ptxas`` that comes with Triton
reports, which needs no driver.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.testing.compiled import rows_of

pytestmark = pytest.mark.slow

# Shared memory that one block can have, in bytes (CUDA programming guide, technical specifications).
SHARED = {80: 163 << 10, 90: 227 << 10}

PROGRAM = """
import json
import triton.language as tl
from triton.compiler import ASTSource
from lcbench.kernels.triton_band import TritonBand
from lcbench.kernels.triton_block_sparse import TritonBlockSparse
from lcbench.kernels.triton_shapes import Shape, key_width, value_width
from lcbench.kernels.triton_tiles import DELTA_ROWS, DELTA_WARPS, delta_kernel, dkv_kernel, dq_kernel, forward_kernel
from lcbench.problem import Heads
from lcbench.testing.compiled import taken

TABLES = ("block_rows", "order", "whole_at", "whole", "tested_at", "tested", "bands")

def compiled(function, shape, heads, tested, capability, kind, capped):
    width, value = key_width(heads.dim), value_width(heads.v)
    # What a descriptor reads is a box of at most 256 numbers a side, and here of at most 256 bytes.
    described = shape.described and capability >= 90 and max(width.padded, value) <= 128
    narrow = shape.tested if tested else 0
    constants = {"GROUP": heads.q // heads.kv, "PER_MAP": heads.q, "D": width.first, "PAD": width.padded, "REST": width.rest,
                 "PAD_REST": width.rest_padded, "DV": heads.v, "PAD_V": value, "CAPPED": capped, "HEIGHT": shape.rows,
                 "WIDTH": shape.columns, "TESTED": narrow, "SINGLE": True, "DESCRIBED": described, "SUM": tl.float32}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in TABLES:
            signature[name] = "*i32"
        elif name in ("lse", "stats"):
            signature[name] = "*fp32"
        elif described and name.endswith(("_tiles", "_narrow")):
            rows = shape.columns if name.endswith("_tiles") else narrow or shape.columns
            wide = value if name[0] in "vd" else width.rest_padded or width.padded if "_rest_" in name else width.padded
            signature[name] = f"tensordesc<{kind}[{rows}, {wide}]>"
        elif name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") or name.endswith(("_tiles", "_narrow", "_rest")):
            signature[name] = "*" + kind
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
        if signature[name][0] == "*" or name.endswith(("_t", "_h", "padded_q")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    return taken(source, capability, options)

PLAIN = [(Heads(64, 8, 128), 90, "bf16"), (Heads(64, 8, 64), 90, "fp16"), (Heads(64, 8, 128), 80, "bf16")]
APART = [(Heads(128, 128, 192, 128), 90, "bf16"), (Heads(128, 1, 576, 512, True), 90, "bf16")]
CASES = [(TritonBand(), True, False, each) for each in PLAIN + APART]
CASES += [(TritonBlockSparse(), False, False, each) for each in PLAIN] + [(TritonBand(), True, True, PLAIN[0])]
for kernel, tested, capped, (heads, capability, kind) in CASES:
    shapes = kernel.shapes(heads, 2, (capability // 10, capability % 10))
    row_stats = Shape(DELTA_ROWS, 16, 16, DELTA_WARPS, 1)
    for function, shape in zip((forward_kernel, dq_kernel, dkv_kernel, delta_kernel), (*shapes, row_stats)):
        head = {"name": function.fn.__name__, "heads": str(heads), "tested": tested, "capped": capped, "shape": shape}
        found = compiled(function, shape, heads, tested, capability, kind, capped)
        print(json.dumps({**head, "capability": capability, **found}), flush=True)
"""


def test_kernels_compile_for_gpus_without_spills_and_use_their_tensor_cores(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    rows = rows_of(PROGRAM, tmp_path)
    assert len(rows) == 36
    for row in rows:
        capability, name = row["capability"], row["name"]
        assert row["shared"] <= SHARED[capability], row
        hopper = "wgmma" if row["shape"][0] >= 64 else "mma"  # which a warp group's product takes 64 rows for
        assert row["mma"] == ("" if name == "delta_kernel" else {90: hopper, 80: "mma"}[capability]), row
        long = row["heads"].endswith("576:512")  # longer than what descriptors read
        assert row["by_tma"] == (capability == 90 and name != "delta_kernel" and not long), row
        if capability == 90:
            assert row["registers"] <= 255, row
            # Sums of long heads, and slopes of softcapped scores, leave a few numbers no register.
            assert row["spilled"] <= (256 if long or row["capped"] else 0), row
