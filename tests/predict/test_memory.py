"""What kernels allocate inside: found again where it is known, and peaks of cells that no fit has seen within their bands."""

from __future__ import annotations

import json
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.kernels.base import Kernel, Platform, Saved
from lcbench.kernels.flex import Flex
from lcbench.kernels.naive import Naive
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.kernels.sdpa_math import SDPAMath
from lcbench.masks.band import BandMask
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Explicit, Fixed
from lcbench.masks.sliding_window import sliding_window
from lcbench.predict import tables
from lcbench.predict.cells import cell_peaks
from lcbench.predict.fit import fit
from lcbench.predict.fitted import Fit, Workspace
from lcbench.predict.machines import machine_of
from lcbench.predict.memory import LEAST, memory_fits
from lcbench.predict.observations import CellMemory
from lcbench.predict.predictor import Prediction, Predictor
from lcbench.problem import Heads
from lcbench.runs.store import Sweep
from tests.predict import held_out

H200, THIS = machine_of("h200"), machine_of("this")
STORED = Path(__file__).parents[2] / "results" / "h200"
CPU = Platform("cpu")


def cells(*words: str) -> list[Cell]:
    planned = look(["kernel=flash_attn2", "dtype=bfloat16", "heads=24x4x64", "site=local", *words]).cells
    return [each.cell for each in planned if each.skip is None]


# -- fits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_known_workspace_is_found_again_and_peaks_are_within_their_bands() -> None:
    truth = Workspace(call=3e6, row=4.0, spread=2.5)
    noise = np.random.default_rng(7)

    def peak(cell: Cell) -> float:
        fitted = Fit(machine="h200", memory=(made_up.model_copy(update={"workspace": truth}),))
        return Predictor(H200, fitted).predict(cell).peak_bytes

    grid = cells("cp=ring,allgather", "mask=causal,full", "seqlen=16k,64k", "heads=24x4x64,24x12x64", "scale=1x4")
    (made_up,) = memory_fits([CellMemory(grid[0], 1e8, "a", "made")], H200)
    assert (made_up.error, made_up.cells, made_up.sources) == (0.5, 1, ("made",)), "one group says nothing of how far off it may be"
    seen = [
        CellMemory(cell, peak(cell) * float(np.exp(noise.normal(0, 0.01))), f"{cell.words['cp']} {cell.words['mask']}", "made")
        for cell in grid
    ]
    fitted = fit(seen, H200)
    (found,) = fitted.memory
    assert (found.kernel, found.dtype, found.backward, found.cells) == ("flash_attn2", "bfloat16", True, 16)
    assert LEAST <= found.error < 0.15
    others = cells("cp=ulysses,usp,tokenring", "mask=causal", "seqlen=32k,128k", "heads=24x4x64,24x8x64", "scale=1x4")
    assert len(others) >= 6
    for other in others:
        low, high = Predictor(H200, fitted).predict(other).peak_interval
        assert low < peak(other) < high
    forward = Predictor(H200, fitted).predict(cells("cp=ring", "seqlen=16k", "scale=1x4", "direction=forward")[0])
    assert forward.peak_bytes == max(draw.own_bytes for draw in forward.draws), "of forward alone nothing was measured"


def test_the_band_is_that_of_groups_that_were_left_out() -> None:
    """Two masks whose peaks differ by two while the model says the same: neither tells of the other."""
    grid = cells("cp=none", "mask=causal,full", "seqlen=16k,32k", "scale=1x1")
    peaks = {"causal": 1.0, "full": 2.0}
    predicted = {c.id: Predictor(H200).predict(c).peak_bytes for c in grid}
    seen = [CellMemory(c, 2 * peaks[c.words["mask"]] * predicted[c.id], c.words["mask"], "made") for c in grid]
    (found,) = memory_fits(seen, H200)
    assert 0.7 < found.error < 1.2


@cache
def checked() -> tuple[CellMemory, ...]:
    """What a check of kernels on an H200 has stored."""
    found = tables.read(STORED / "first" / "gpu-check.json", H200).observations
    return tuple(each for each in found if isinstance(each, CellMemory))


def on_two_ranks() -> list[CellMemory]:
    """Stored cells of two ranks, which shared an H200."""
    found = []
    for record in Sweep(STORED, "cells").look().records.values():
        if record.last is not None and record.last.status == "ok" and record.entry.cell.scale.world_size == 2:
            found.append(CellMemory(record.entry.cell, record.last.metrics["memory/peak_bytes"], "", "cells"))
    return found


@pytest.mark.slow
def test_peaks_of_two_gpus_are_predicted_from_those_of_one() -> None:
    """Measured on H200: kernels alone are fitted, cells of four strategies on two ranks are held against that."""
    records = Sweep(STORED, "long").look().records.values()
    one = [*cell_peaks([(record.entry.cell, record.attempts) for record in records], H200, "long"), *checked()]
    two = on_two_ranks()
    assert len(two) == 16
    fitted, before = Predictor(H200, Fit(machine="h200", memory=memory_fits(one, H200))), Predictor(H200)
    ratios = np.array([fitted.predict(each.cell).peak_bytes / each.peak_bytes for each in two])
    plain = np.array([before.predict(each.cell).peak_bytes / each.peak_bytes for each in two])
    assert np.abs(plain - 1).max() > 0.4
    assert np.median(np.abs(ratios - 1)) < 0.05
    assert np.abs(ratios - 1).max() < 0.25
    unfitted = [inside(before.predict(each.cell), each) for each in (*one, *two)]
    assert sum(unfitted) >= 0.95 * len(unfitted), "of what was not fitted the band is wide enough"


def inside(prediction: Prediction, seen: CellMemory) -> bool:
    low, high = prediction.peak_interval
    return low <= seen.peak_bytes <= high


@pytest.mark.slow
def test_peaks_of_cpu_ranks_are_predicted_from_twelve_cells() -> None:
    known = json.loads((held_out.DATA / "cpu_peaks.json").read_text())
    seen, others = (
        [CellMemory(Cell.from_config(c["config"]), c["peak_bytes"], c["group"], name) for c in known[name]]
        for name in ("fit", "others")
    )
    assert (len(seen), len(others)) == (12, 34)
    assert {each.cell.scale.world_size for each in others} == {1, 2}
    predictor = Predictor(THIS, Fit(machine="this", memory=memory_fits(seen, THIS)))
    found = [(predictor.predict(each.cell), each) for each in others]
    errors = np.abs([prediction.peak_bytes / each.peak_bytes - 1 for prediction, each in found])
    before = np.abs([max(d.own_bytes for d in prediction.draws) / each.peak_bytes - 1 for prediction, each in found])
    assert np.median(before) > 0.3
    assert np.median(errors) < 0.12
    assert sum(inside(*each) for each in found) >= 0.95 * len(found)


# -- what kernels say ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_that_hold_all_scores_say_so_and_are_guessed_so() -> None:
    assert all(kernel.holds_scores(CPU) for kernel in (Naive(), SDPAMath(), Flex()))
    assert not Flex().holds_scores(Platform("cuda", (9, 0)))
    assert not SDPAFlash().holds_scores(CPU)
    (short, long) = cells("cp=none", "kernel=naive", "mask=full", "seqlen=2k,4k", "scale=1x1")
    predictor = Predictor.of("h200")
    assert predictor.predict(long).peak_bytes > 3.8 * predictor.predict(short).peak_bytes
    for stored in checked():
        if stored.cell.words["kernel"] in ("naive", "sdpa_math"):
            assert predictor.predict(stored.cell).peak_bytes == pytest.approx(stored.peak_bytes, rel=0.02)


class Live(TorchDispatchMode):
    """Counts bytes of storages that were made in here and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.known.keys():
                storage = x.untyped_storage()
                self.known[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.known.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.known.values()))
        return found


@pytest.mark.parametrize(
    "mask",
    [
        full(512), sliding_window(512, left=64, right=0), document(512, lengths=Fixed(64), seed=(0, 0)),
        document(512, lengths=Explicit([300, 212]), seed=(0, 0)),
    ],
    ids=["full", "window", "equal documents", "documents"],
)  # fmt: skip
@pytest.mark.slow
def test_copies_that_a_kernel_says_it_holds_are_those_that_it_holds(mask: BandMask) -> None:
    kernel: Kernel = SDPAFlash()
    heads, item = Heads(4, 2, 32), 4
    work = kernel.work(mask, CPU)
    assert work is not None
    q, dout, out = (torch.randn(512, heads.q, heads.dim) for _ in range(3))
    k, v = (torch.randn(512, heads.kv, heads.dim) for _ in range(2))
    prepared = kernel.prepare(mask, heads, torch.float32, torch.device("cpu"))
    with Live() as live:
        grads = prepared.backward(dout, Saved(q, k, v, out, torch.zeros(512, heads.q)), softmax_scale=1.0)
    results = sum(grad.numel() * item for grad in grads)
    said = item * heads.dim * (work.most_rows * heads.q + 2 * work.most_keys * heads.kv)
    assert live.most - results == pytest.approx(said, rel=0.3, abs=0.05 * results)
