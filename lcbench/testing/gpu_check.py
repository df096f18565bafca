"""On a machine with a CUDA device: kernels against the float64 reference, tile by tile, then whole cells, checked and timed.

Needs torch and numpy only. ``python -m lcbench.testing.gpu_check [results/gpu-check.json]``; exit code 1 if a check fails.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lcbench.cp.execute import Groups
from lcbench.cp.layout import zigzag
from lcbench.cp.none import Local
from lcbench.kernels.base import prepare
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.attention_sink import attention_sink
from lcbench.masks.band import Band, BandMask
from lcbench.masks.block_causal import block_causal
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.causal_document import causal_document
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit, Uniform
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.measure.cell import Gang, Work, measure_cell
from lcbench.measure.environment import describe
from lcbench.measure.inputs import draw
from lcbench.problem import Heads, Problem, Scale

DEFAULT_OUTPUT = Path("results/gpu-check.json")
TILE_TOKENS = 1536
# Half-precision products summed in fp32: this much of the largest value of a result.
TILE_BOUND = {"bfloat16": 2e-2, "float16": 4e-3}
SETTINGS = {"warmup": 5, "min_iterations": 20, "max_iterations": 200, "budget_s": 3.0, "precision": 0.01, "timeline": False}
# Data sheets: NVIDIA H100 and H200 SXM, dense bfloat16 and float16.
DEVICES = [{"match": name, "peak_tflops": {"bfloat16": 989, "float16": 989}} for name in ("H100", "H200")]


def masks(seqlen: int) -> dict[str, Mask]:
    return {
        "full": full(seqlen),
        "causal": causal(seqlen),
        "sliding_window left=1k": sliding_window(seqlen, left=1024, right=0),
        "sliding_window_full 1k": sliding_window(seqlen, left=1024, right=1024),
        "document 1-8k": document(seqlen, seed=(0, 0), lengths=Uniform(1, 8192)),
        "causal_document 1-8k": causal_document(seqlen, seed=(0, 0), lengths=Uniform(1, 8192)),
        "block_causal 1k": block_causal(seqlen, block_size=1024),
        "attention_sink 4+1k": attention_sink(seqlen, sink=4, left=1024),
    }


def tiles(seqlen: int) -> dict[str, Mask]:
    """What a context-parallel rank hands to its kernel: tiles of a zigzag ring, and masks with empty rows and gaps."""
    layout = zigzag(2 * seqlen, 2)
    lengths = [1, 7, 130, 64, 2 * seqlen - 202]
    whole = {
        "causal": causal(2 * seqlen),
        "window": sliding_window(2 * seqlen, left=200, right=0),
        "documents": causal_document(2 * seqlen, seed=(3, 0), lengths=Uniform(1, 200)),
        "listed documents": document(2 * seqlen, seed=(0, 0), lengths=Explicit(lengths)),
    }
    found = {f"{name} q{q}k{k}": layout.tile(mask, q, k).merged() for name, mask in whole.items() for q in (0, 1) for k in (0, 1)}
    bands = [Band(5, 700, 0, 300), Band(900, 1400, 400, 1100, -300, -100)]
    blocks = block_random(seqlen, heads=Heads(4, 2, 64), seed=(0, 0), density=0.3, block_size=64, sizes="variable", per="all_heads")
    return found | {"holes": BandMask.of(seqlen, seqlen, bands), "blocks": blocks}


def check_tiles(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    everything = np.arange(TILE_TOKENS)
    for dtype in TILE_BOUND:
        for heads in (Heads(8, 2, 128), Heads(4, 4, 64)):
            problem = Problem(TILE_TOKENS, heads, Scale(1, 1), dtype, "forward_backward")
            q, k, v, dout = (draw(name, everything, problem, 1, device) for name in ("q", "k", "v", "dout"))
            for name, mask in tiles(TILE_TOKENS).items():
                kernel, exact = prepare(SDPAFlash(), mask, device), prepare(Reference(), mask, device)
                scale = problem.softmax_scale
                want_out, want_lse = exact.forward(q, k, v, softmax_scale=scale)
                want = [want_out, want_lse, *exact.backward(dout, q, k, v, want_out, want_lse, softmax_scale=scale)]
                out, lse = kernel.forward(q, k, v, softmax_scale=scale)
                got = [out, lse, *kernel.backward(dout, q, k, v, out.to(q.dtype), lse.float(), softmax_scale=scale)]
                errors = {}
                for tensor, mine, reference in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
                    difference = torch.where(mine.double() == reference, 0.0, (mine.double() - reference).abs())
                    largest = reference[torch.isfinite(reference)].abs().max() if len(mask) else 1.0
                    errors[tensor] = float(difference.max() / largest)
                ok = all(error <= TILE_BOUND[dtype] for error in errors.values())  # NaN is not
                rows.append({"tile": name, "dtype": dtype, "heads": str(heads), "calls": kernel.calls, "ok": ok, "errors": errors})
    return rows


def measure_cells(device: torch.device) -> list[dict[str, Any]]:
    rows = []
    gang = Gang(0, 1, device, Groups(), DEVICES)
    for seqlen in (2048, 8192, 32768):
        for heads in (Heads(64, 8, 128), Heads(64, 64, 128)):
            for name, mask in masks(seqlen).items():
                problem = Problem(seqlen, heads, Scale(1, 1), "bfloat16", "forward_backward")
                row: dict[str, Any] = {"mask": name, "seqlen": seqlen, "heads": str(heads), "dtype": "bfloat16"}
                try:
                    measured = measure_cell(
                        Work(problem, partial(_whichever, mask), SDPAFlash(), Local(), SETTINGS, 0), gang, lambda _: None
                    )
                except torch.OutOfMemoryError as error:
                    rows.append(row | {"ok": False, "failure": f"oom: {error}"[:200]})
                    continue
                assert measured.check is not None
                row |= {"ok": not measured.check.failures, "failure": "; ".join(measured.check.failures)}
                rows.append(row | {"metrics": measured.metrics, "check": measured.check.as_dict(), "notes": measured.notes})
                print(_line(rows[-1]), flush=True)
    return rows


def _whichever(mask: Mask, draw: int) -> Mask:
    return mask


def _line(row: dict[str, Any]) -> str:
    m = row["metrics"]
    if not row["ok"]:
        return f"FAILED {row['mask']} {row['seqlen']} {row['heads']}: {row['failure']}"
    return (
        f"{row['mask']:<26}{row['seqlen']:>7} {row['heads']:<10} fwd {m['time/forward/median_s'] * 1e3:8.3f} ms "
        f"{m['compute/forward/tflops_per_gpu']:6.1f} TFLOP/s  bwd {m['time/backward/median_s'] * 1e3:8.3f} ms "
        f"{m['compute/backward/tflops_per_gpu']:6.1f} TFLOP/s  peak {m['memory/peak_bytes'] / 2**20:8.1f} MiB  "
        f"calls {row['notes']['kernel_calls'][0]}"
    )


def main(output: Path) -> int:
    if not torch.cuda.is_available():
        print("gpu-check needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    began = time.time()
    tile_rows = check_tiles(device)
    bad = [row for row in tile_rows if not row["ok"]]
    print(f"{len(tile_rows)} tiles against the reference, {len(bad)} wrong", flush=True)
    for row in bad:
        print(f"WRONG {row}")
    cells = measure_cells(device)
    report = {
        "provenance": describe(device), "measured_at": began, "seconds": time.time() - began, "settings": SETTINGS,
        "tile_bounds": TILE_BOUND, "tiles": tile_rows, "cells": cells,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}")
    return 1 if bad or any(not row["ok"] for row in cells) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUTPUT))
