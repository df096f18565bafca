"""Our decode kernel compiles for GPUs that are not here, at the shapes that it chooses, within what they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.testing.compiled import rows_of

pytestmark = pytest.mark.slow

PROGRAM = """
import json, re
import triton.language as tl
from triton.compiler import ASTSource
from lcbench.kernels.triton_decode import TritonDecode
from lcbench.kernels.triton_split import Dims, merge_parts_kernel, split_kernel
from lcbench.problem import Heads
from lcbench.testing.compiled import taken

INTEGERS = ("items", "sequences", "table", "merges")
WIDE = ("lse", "parts", "part_lse", "k_scales", "v_scales")
for heads, rows, stored, capability, page in (
    (Heads(64, 8, 128), 1, "bf16", 90, 16), (Heads(64, 8, 128), 1, "fp8e4nv", 90, 16), (Heads(64, 8, 128), 2048, "bf16", 90, 0),
    (Heads(128, 1, 576, 512, True), 1, "bf16", 90, 64), (Heads(128, 1, 576, 512, True), 1, "fp8e4nv", 90, 64),
    (Heads(128, 128, 192, 128), 1, "bf16", 90, 0), (Heads(64, 8, 128), 1, "bf16", 80, 16), (Heads(8, 8, 80), 1, "fp8e4nv", 90, 1),
):
    shape, dims = TritonDecode().shape(heads, rows, 2, divmod(capability, 10)), Dims.of(heads)
    for function in (split_kernel, merge_parts_kernel):
        constants = {"GROUP": heads.q // heads.kv, "D": heads.dim, "FIRST": dims.first, "REST": dims.rest, "DV": heads.v,
                     "VALUE": dims.value, "HEIGHT": shape.rows, "WIDTH": shape.columns, "PAGE": page,
                     "SCALED": stored == "fp8e4nv", "SHARED": heads.latent, "CAPPED": False, "SUM": tl.float32}
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        types = {**dict.fromkeys(INTEGERS, "*i32"), **dict.fromkeys(WIDE, "*fp32"), "q": "*bf16", "out": "*bf16",
                 "k": "*" + stored, "v": "*" + stored, "scale": "fp32", "softcap": "fp32"}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
                   if signature[name][0] == "*" or re.fullmatch("[qkvo]_[pth]|split", name)}
        source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": shape.warps, "num_stages": shape.stages}
        print(json.dumps({
            "name": function.fn.__name__, "heads": str(heads), "rows": rows, "stored": stored, "capability": capability,
            "shape": list(shape), **taken(source, capability, options),
        }))
"""


def test_the_decode_kernel_compiles_without_spills_and_uses_tensor_cores(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    rows = rows_of(PROGRAM, tmp_path)
    assert len(rows) == 16
    for row in rows:
        assert row["shared"] <= row["room"], row
        assert row["spilled"] == 0, row
        assert (bool(row["mma"]), row["asynchronous"]) == (row["name"] == "split_kernel",) * 2, row
