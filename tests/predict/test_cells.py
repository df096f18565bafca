"""Measured cells as observations, what CPU kernels are said to do, and how well cells that no fit has seen are predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lcbench.grid.build import build_kernel, build_strategy
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.kernels.base import Platform, Work
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.band import BandMask
from lcbench.masks.block_random import block_random
from lcbench.masks.causal import causal
from lcbench.masks.document import document
from lcbench.masks.full import full
from lcbench.masks.lengths import Fixed, Uniform
from lcbench.masks.mask import Mask
from lcbench.masks.sliding_window import sliding_window
from lcbench.predict.cells import cell_times
from lcbench.predict.counted import counted
from lcbench.predict.draws import draws_of
from lcbench.predict.fit import fit
from lcbench.predict.fitted import Coefficients, KernelFit
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.problem import Heads, Problem, Scale
from lcbench.runs.attempt import Attempt, Failure
from lcbench.schedule.machine import Link
from lcbench.schedule.simulate import Prepared, play, prepare
from tests.predict import held_out

THIS = replace(machine_of("this"), cores=2)
CPU = Platform("cpu")


def cells(*words: str) -> list[Cell]:
    return [planned.cell for planned in look(["dtype=float32", "site.device=cpu", "scale=1x2", "heads=6x3x16", *words]).cells]


def attempt(cell: Cell, number: int, blocks: dict[str, list[float]], **more: Any) -> Attempt:
    metrics = {f"time/{phase}/median_s": float(np.mean(seconds)) for phase, seconds in blocks.items()}
    metrics |= {
        "time/total/median_s": 9.0,
        "overlap/forward/compute_s": 0.1 * number,
        "overlap/forward/communication_s": 0.5 / number,
    }
    provenance = {"device": "some CPU", "cpus": 2, "cuda": None, **more.pop("provenance", {})}
    return Attempt(
        cell.id, "s", number, more.pop("status", "ok"), metrics=metrics, provenance=provenance, config=cell.config,
        samples={f"block_{phase}_s": seconds for phase, seconds in blocks.items()}, **more,
    )  # fmt: skip


# -- observations --------------------------------------------------------------------------------------------------------


def test_the_fastest_block_of_all_good_attempts_counts() -> None:
    cell, other = cells("cp=ring", "mask=causal", "seqlen=640,896")
    tries = [
        attempt(cell, 1, {"forward": [3.0, 2.5], "backward": [5.0, 7.0]}),
        attempt(cell, 2, {"forward": [2.75, 2.0], "backward": [6.0, 6.5]}),
        attempt(cell, 3, {"forward": [0.1], "backward": [0.1]}, status="failed", failure=Failure("crash", "it fell")),
        attempt(cell, 4, {"forward": [0.2], "backward": [0.2]}, provenance={"check": {"no_speed": "ranks share a GPU"}}),
    ]
    (found,) = cell_times([(cell, tries), (other, [])], THIS, "a sweep")
    assert found.cell == cell
    assert found.phases == {"forward": 2.0, "backward": 5.0}
    # Timed in the first block: as they would be in the fastest one.
    assert found.compute == {"forward": pytest.approx(0.1 * 2.5 / 3.0)}
    assert found.communication == {"forward": pytest.approx(0.25 * 2.0 / 2.75)}
    assert (found.group, found.source, found.own) == ("causal", "a sweep", True)


def test_a_sweep_of_another_device_or_without_results_is_refused() -> None:
    (cell,) = cells("cp=ulysses", "mask=full", "seqlen=640")
    blocks = {"forward": [1.0], "backward": [1.0]}
    with pytest.raises(ValueError, match=r"^a sweep: no cell has a good result with a time$"):
        cell_times([(cell, [])], THIS, "a sweep")
    (several,) = cells("cp=ulysses", "mask=full", "seqlen=640", "mesh.dp=2")
    with pytest.raises(ValueError, match=r"^a sweep: no cell has a good result with a time$"):
        cell_times([(several, [attempt(several, 1, blocks)])], THIS, "a sweep")
    gpu = attempt(cell, 1, blocks, provenance={"device": "NVIDIA H200", "cuda": {"capability": "9.0"}})
    assert len(cell_times([(cell, [gpu])], machine_of("h200"), "a sweep")) == 1
    for machine in ("this", "h100"):
        with pytest.raises(ValueError, match=rf"^a sweep was measured on NVIDIA H200, .* machine={machine} "):
            cell_times([(cell, [gpu])], machine_of(machine), "a sweep")
    with pytest.raises(ValueError, match=r"^a sweep was measured on 16 cores, and this machine has 2; "):
        cell_times([(cell, [attempt(cell, 1, blocks, provenance={"cpus": 16})])], THIS, "a sweep")


# -- what a CPU kernel does ----------------------------------------------------------------------------------------------

MASKS: dict[str, BandMask] = {
    "full": full(700),
    "causal": causal(1900),
    "window": sliding_window(1500, left=300, right=0),
    "both sides": sliding_window(1100, left=200, right=350),
    "equal documents": document(900, lengths=Fixed(150), seed=(0, 0)),
    "documents": document(1700, lengths=Uniform(40, 800), seed=(3, 0)),
}


@pytest.mark.parametrize("name", MASKS)
def test_work_is_what_the_kernel_runs(name: str) -> None:
    mask, kernel = MASKS[name], Recording()
    kernel.prepare(mask, Heads(2, 1, 8), torch.float32, torch.device("cpu")).forward(
        torch.ones(mask.num_q, 2, 8), torch.ones(mask.num_k, 1, 8), torch.ones(mask.num_k, 1, 8), softmax_scale=1.0
    )
    found = SDPAFlash().work(mask, CPU)
    assert found is not None
    assert found.calls == len(kernel.seen)
    assert found.pairs == sum(b * computed(rows, keys, causal=is_causal) for b, rows, keys, is_causal in kernel.seen)
    alone = kernel.seen[0][:3] == (1, mask.num_q, mask.num_k)
    assert found.gathered_rows == (0 if alone else sum(b * rows for b, rows, _, _ in kernel.seen))
    assert found.gathered_keys == (0 if alone else sum(b * keys for b, _, keys, _ in kernel.seen))


class Recording(SDPAFlash):
    """Notes (pieces, rows, keys, causal) of every call."""

    def __init__(self) -> None:
        object.__setattr__(self, "seen", [])

    seen: list[tuple[int, int, int, bool]]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Any:
        self.seen.append((len(q), q.shape[2], k.shape[2], causal))
        return super().attend(q, k, v, causal, scale)


def computed(rows: int, keys: int, *, causal: bool) -> int:
    """Pairs that torch's loops over blocks go through (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
    height, total = 256 if rows >= 768 else 64 if rows >= 192 else 32, 0
    for begin in range(0, rows, height):
        last = min(begin + height, keys) if causal else keys
        for first in range(0, last, 512):
            total += min(height, rows - begin) * min(512, keys - first)
    return total


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "groupcast", "tokenring", "allgather"])
@pytest.mark.parametrize(
    "mask",
    [
        MASKS["documents"],
        block_random(1024, heads=Heads(6, 3, 16), seed=(0, 0), density=0.3, block_size=128, sizes="uniform", per="kv_head"),
    ],
)
def test_tiles_are_counted_as_their_kernels_are_made_ready(strategy: str, mask: Mask) -> None:
    (cell, *_) = cells(f"cp={strategy}", "mask=full", "seqlen=640")
    problem = Problem(mask.num_q, Heads(6, 3, 16), Scale(1, 2), "float32", "forward_backward")
    modelled = build_strategy(cell.config["cp"]).modelled(problem, mask)
    assert modelled is not None
    before = prepare(modelled).tiling
    after, schedule = counted(before, modelled, SDPAFlash()), modelled.schedule
    calls = []
    for _, group, q, k in np.concatenate([step.tiles for step in schedule.steps]).tolist():
        heads = schedule.heads[group]
        tile = heads.part(mask, 6).tile(schedule.q.runs(schedule.q.bundles[q]), schedule.k.runs(schedule.k.bundles[k])).merged()
        calls.append(kernel_calls(tile))
    assert after.tiles.calls.tolist() == calls
    np.testing.assert_array_equal(after.tiles.pairs, before.tiles.pairs)
    assert (after.tiles.covered >= np.floor(after.tiles.pairs)).all()


def kernel_calls(tile: Mask) -> int:
    if isinstance(tile, BandMask):
        return SDPAFlash().calls(tile, CPU)
    return sum(SDPAFlash().calls(tile.bands(number), CPU) for number in range(tile.maps))


def test_a_kernel_that_says_nothing_leaves_tiles_as_they_were() -> None:
    (cell,) = cells("cp=ring", "mask=causal", "seqlen=640", "kernel=reference")
    prepared = next(draws_of(cell, THIS)).prepared
    assert counted(prepared.tiling, prepared.modelled, build_kernel(cell.config["kernel"])) is prepared.tiling
    assert SDPAFlash().work(MASKS["full"], Platform("cuda", (9, 0))) is None
    assert SDPAFlash().work(BandMask(4, 4, np.empty((0, 6), dtype=np.int64)), CPU) == Work(0, 0)


def test_ranks_share_the_cores_of_their_node() -> None:
    model = KernelFit(kernel="k", dtype="float32", forward=Coefficients(flop_s=1e-10), backward=Coefficients(flop_s=1e-10), cores=8)
    seconds = {}
    for ranks in (1, 2, 3, 16):
        (cell,) = cells("cp=ring", "mask=full", "seqlen=960", f"scale=1x{ranks}")
        prepared = next(draws_of(cell, THIS)).prepared
        seconds[ranks] = play(prepared.without_messages(), THIS, model, memory=False).phases["forward"].compute_s * ranks
    # Threads: 8, 4, 2 of 8 / 3, and half a core.
    assert seconds[2] / seconds[1] == pytest.approx(2)
    assert seconds[3] / seconds[1] == pytest.approx(4)
    assert seconds[16] / seconds[1] == pytest.approx(16)


# -- how well cells are predicted ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_known_coefficients_are_found_again() -> None:
    truth = KernelFit(
        kernel="sdpa_flash", dtype="float32", cores=2,
        forward=Coefficients(call_s=4e-5, flop_s=3e-11, waste_s=6e-11, gather_s=8e-9), backward=Coefficients(),
    )  # fmt: skip
    real = replace(THIS, inside=Link(3e-4, 0.6e9))

    def timed(cell: Cell) -> CellTime:
        seen = {}
        for name, change in (("whole", None), ("compute", Prepared.without_messages), ("communication", Prepared.without_kernels)):
            every = (draw.prepared for draw in draws_of(cell, real))
            draws = [change(prepared) if change else prepared for prepared in every]
            seen[name] = {"forward": float(np.mean([play(d, real, truth, memory=False).phases["forward"].seconds for d in draws]))}
        return CellTime(cell, seen["whole"], cell.label, "made up", True, seen["compute"], seen["communication"])

    shape = ("direction=forward", "lengths=fixed", "lengths.length=192")
    seen = cells("cp=ring,ulysses", "mask=causal,document,causal_document", "seqlen=1536", "heads=4x2x32", *shape)
    others = cells("cp=groupcast,allgather", "mask=share_question,sliding_window", "seqlen=3k", "heads=8x2x32", *shape)
    alone = cells("cp=none", "mask=document", "seqlen=3k", "heads=8x2x32", "scale=1x1", *shape)
    fitted = fit([timed(cell) for cell in seen], THIS, folds=1)
    assert fitted.links.inside is not None
    assert fitted.links.inside.bytes_per_s == pytest.approx(0.6e9, rel=0.2)
    rows = held_out.judged(fitted, [timed(cell) for cell in (*others, *alone)])
    assert max(abs(row.error) for row in rows) < 0.12, held_out.table(rows)


@pytest.mark.slow
def test_sixty_measured_cells_are_predicted_from_twelve() -> None:
    times = held_out.read(held_out.DATA / "cpu_seconds.json")
    rows = held_out.judged(fit(times["fit"], THIS, folds=1), times["others"], one_thread=True)
    assert (len(times["fit"]), len(rows)) == (12, 60)
    assert {t.cell.scale.world_size for t in times["fit"]} == {2}
    assert {row.cell.scale.world_size for row in rows} == {1, 2}
    assert held_out.holds(rows), held_out.table(rows)
    slow = [replace(row, predicted={name: 2 * seconds for name, seconds in row.predicted.items()}) for row in rows]
    assert not held_out.holds(slow)


@pytest.mark.slow
def test_the_recorded_cells_are_those_that_are_measured() -> None:
    times = held_out.read(held_out.DATA / "cpu_seconds.json")
    for name, grids in (("fit", (held_out.FIT,)), ("others", held_out.OTHERS)):
        assert [t.cell.id for t in times[name]] == [cell.id for cell in held_out.cells(*grids)]
