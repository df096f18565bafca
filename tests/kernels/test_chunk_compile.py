"""Our kernels of linear attention compile for GPUs that are not here, within what they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcbench.testing.compiled import rows_of

pytestmark = pytest.mark.slow

PROGRAM = """
import json
import torch
from triton.compiler import ASTSource
from lcbench.kernels import triton_delta, triton_scan
from lcbench.kernels.linear import Tokens
from lcbench.problem import Heads
from lcbench.testing.compiled import taken

KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
for heads, kind, capability in (
    (Heads(8, 8, 128), "bf16", 90), (Heads(16, 4, 128, 256), "bf16", 90), (Heads(8, 8, 128), "bf16", 80),
    (Heads(8, 8, 64, 128), "fp32", 90), (Heads(4, 4, 256), "bf16", 90),
):
    sides = (heads.q, heads.dim), (heads.kv, heads.dim), (heads.kv, heads.v)
    x = Tokens(*(torch.empty(0, count, dim, dtype=KINDS[kind]) for count, dim in sides), None)
    functions = {name: function for module in (triton_scan, triton_delta) for name, function in vars(module).items()}
    for name in sorted(name for name in functions if name.endswith("_kernel")):
        function = functions[name]
        tall = name.startswith("delta_") or name in ("states_kernel", "out_kernel", "dstates_kernel", "dv_kernel")
        prepared = triton_delta.PreparedTritonDelta if name.startswith("delta_") else triton_scan.PreparedTritonChunk
        sizes = prepared(heads, 1.0)._sizes(x, tall=tall)
        options = {"num_warps": 1} if name == "delta_inverse_kernel" else {of: sizes[of] for of in ("num_warps", "num_stages")}
        halves = {"q", "k", "v", "dout", "out", "pairs", "inverse", "erased", "values", "us", "dus", "dinside"}
        if name.startswith("delta_"):
            halves |= {"dk"} | ({"states"} if name == "delta_states_kernel" else set())
        else:
            halves |= {"dv"} | ({"states"} if name in ("states_kernel", "out_kernel") else set())
        flags = dict.fromkeys(("BEGINS", "KEPT", "VALUED", "EACH"), True)
        constants = {k: v for k, v in {**sizes, **flags}.items() if k in function.arg_names}
        signature = {}
        for argument in function.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in ("tokens", "chunks") or argument.endswith(("_t", "_h")):
                signature[argument] = "i32"
            else:
                signature[argument] = "fp32" if argument == "scale" else "*" + (kind if argument in halves else "fp32")
        aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(function.arg_names)
                   if signature[argument][0] == "*" or argument.endswith(("_t", "_h"))}
        source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
        head = {"name": name, "heads": str(heads), "kind": kind, "capability": capability}
        print(json.dumps(head | taken(source, capability, options)))
"""
NO_PRODUCTS = ("ddecay_kernel", "delta_ddecay_kernel", "delta_inverse_kernel")


def test_the_chunk_kernels_compile_and_use_tensor_cores(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    rows = rows_of(PROGRAM, tmp_path)
    assert len(rows) == 5 * 19
    for row in rows:
        assert row["shared"] <= row["room"], row
        assert row["spilled"] <= 64, row
        assert bool(row["mma"]) == (row["kind"] == "bf16" and row["name"] not in NO_PRODUCTS), row
