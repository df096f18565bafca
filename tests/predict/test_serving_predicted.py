"""Batches with a cache, predicted: a cache is read at the speed of memory, collectives of split caches are those that are counted,
and what a fit has not seen is said.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcbench.cp.dcp import DCP
from lcbench.cp.helix import Helix
from lcbench.cp.split_cache import MERGES, Merge
from lcbench.grid.build import cell_mask
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.kernels.cache import CacheKind
from lcbench.masks.band import BandMask
from lcbench.masks.requests import of_requests
from lcbench.predict.cells import group_of
from lcbench.predict.fit import error_key, fit
from lcbench.predict.fitted import Coefficients, Fit, KernelFit, regime
from lcbench.predict.machines import machine_of
from lcbench.predict.observations import CellTime
from lcbench.predict.predictor import UNSEEN_ERROR, CannotPredict, Predictor
from lcbench.problem import Batch, Heads, Problem, Requests, Scale
from lcbench.runs.passes import cached_bytes, passes_on
from lcbench.schedule.machine import Tiles
from lcbench.testing.dense import dense_mask
from tests.predict import held_out

H100 = machine_of("h100")
READS = 3350e9  # bytes/s of its data sheet
SERVING = Path(__file__).parent / "data" / "serving_seconds.json"
KV = 8 * (128 + 128) * 2  # bytes of a token's keys and values


def cell_of(*words: str) -> Cell:
    known = {word.partition("=")[0] for word in words}
    base = ("kernel=flash_attn3_cache", "heads=32x8x128", "mask=causal", "dtype=bfloat16", "direction=forward", "site=local",
            "cp=none", "scale=1x1")  # fmt: skip
    (planned,) = look([*(word for word in base if word.partition("=")[0] not in known), *words]).cells
    assert planned.skip is None, planned.skip
    return planned.cell


def seconds(*words: str, predictor: Predictor | None = None) -> float:
    return (predictor or Predictor(H100)).predict(cell_of(*words), memory=False).seconds


NO_TIME = Predictor(H100, Fit(machine="h100", kernels=tuple(
    KernelFit(kernel=name, dtype="bfloat16", forward=Coefficients(), backward=Coefficients())
    for name in ("flash_attn3_cache", "flash_attn3", "triton_decode")
)))  # fmt: skip


# -- what is read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (("batch=1q1s1m",), KV << 20),
        (("batch=32q1s128k",), 32 * KV << 17),
        (("batch=1q1s1m", "heads=128x1x576:512", "kernel=triton_decode"), 576 * 2 << 20),
        (("batch=1q1s1m", "heads=32x8x192:128", "kernel=triton_decode"), 8 * 320 * 2 << 20),
        (("batch=4q1s1m", "mask=sliding_window", "mask.left=4095", "kernel=triton_decode"), 4 * KV << 12),
    ],
)
def test_a_decode_takes_at_least_as_long_as_reading_what_its_rows_see(words: tuple[str, ...], read: int) -> None:
    """Of a kernel that is said to take no time whatever, exactly so long; of a guess, longer."""
    assert seconds(*words, predictor=NO_TIME) == pytest.approx(read / READS, rel=1e-3)
    found = Predictor(H100).predict(cell_of(*words), memory=False)
    assert found.seconds >= read / READS
    assert found.interval[0] >= read / READS * (1 - 1e-3) > found.seconds / (1 + found.error)


def test_ranks_read_their_own_keys_only() -> None:
    for cp in ("kvp", "dcp", "helix"):
        more = ("cp=dcp", "cp.degree=8") if cp == "dcp" else ("cp=helix", "cp.kvp=8") if cp == "helix" else ("cp=kvp",)
        found = NO_TIME.predict(cell_of("batch=1q1s8m", "scale=1x8", *more), memory=False)
        assert found.phases["forward"].busiest_s == pytest.approx((KV << 20) / READS, rel=1e-2), cp
        assert found.phases["forward"].exposed_s > 0, cp
        parts = found.phases["forward"]
        assert parts.busiest_s + parts.exposed_s + parts.overhead_s == pytest.approx(parts.seconds), cp


def test_cpu_ranks_have_no_floor_since_caches_hold_what_was_read() -> None:
    assert machine_of("this").read_bytes_per_s == 0
    assert H100.read_bytes_per_s == READS


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(0, 200)), min_size=1, max_size=4),
    window=st.integers(1, 260), ranks=st.integers(1, 4), interleave=st.sampled_from([None, 1, 8]),
)  # fmt: skip
def test_keys_that_are_read_are_those_that_a_row_sees(
    requests: list[tuple[int, int, int]], window: int, ranks: int, interleave: int | None
) -> None:
    """Of tiles of a split cache, by a dense mask; what two of a tile's bands see counts for both, up to all of its keys."""
    from lcbench.cp.kvp import KVP
    from lcbench.schedule.tiling import tiling

    batch = Batch(tuple(Requests(count, new, new + old) for count, new, old in requests))
    mask = of_requests(batch, lambda length, _: sliding(length, window), alike=True)
    assert isinstance(mask, BandMask)
    problem = Problem(batch.tokens, Heads(4, 2, 8), Scale(1, ranks), "float32", "forward", batch=batch)
    schedule = KVP(interleave=interleave).schedule(problem, mask)
    tiles = tiling(schedule, mask).tiles
    allowed = dense_mask(mask.num_q, mask.num_k, mask)
    every = np.concatenate([step.tiles for step in schedule.steps])
    for number, (_, _, q, k) in enumerate(every.tolist()):
        rows, keys = (
            np.concatenate([side.shards.tokens(shard) for shard in side.members(bundle)])
            for side, bundle in ((schedule.q, q), (schedule.k, k))
        )
        seen = int(allowed[np.ix_(rows, keys)].any(axis=0).sum())
        assert seen <= tiles.read[number] <= len(keys)
        if len(batch) == len(rows):  # one row of each request
            assert tiles.read[number] == seen


def sliding(length: int, window: int) -> BandMask:
    return BandMask.of(length, length, np.array([[0, length, 0, length, 1 - window, 0]]))


@settings(max_examples=5, deadline=None)
@given(
    shape=st.sampled_from(["{n}q1s{t}k", "4q256s{t}k_{n}q1s{t}k", "{n}q2ks{t}k"]), count=st.integers(1, 5),
    lengths=st.lists(st.integers(3, 64), min_size=2, max_size=3, unique=True).map(sorted),
    choice=st.sampled_from([("cp=none", "scale=1x1"), ("cp=kvp", "scale=1x2"), ("cp=dcp", "cp.degree=4", "scale=1x4"),
                            ("cp=allgather", "scale=1x4")]),
)  # fmt: skip
@pytest.mark.slow
def test_more_context_is_never_predicted_faster(shape: str, count: int, lengths: list[int], choice: tuple[str, ...]) -> None:
    cells = [cell_of(f"batch={shape.format(n=count, t=length)}", *choice) for length in lengths]
    for predictor in (Predictor(H100), NO_TIME):
        found = [predictor.predict(cell, memory=False).seconds for cell in cells]
        assert found == sorted(found), list(zip(lengths, found, strict=True))


# -- how it is stored --------------------------------------------------------------------------------------------------------


def test_a_cache_in_fewer_bytes_is_read_faster_where_it_lies_and_copied_out_first_elsewhere() -> None:
    words = ("batch=8q1s128k", "kernel=triton_decode", "workload=serving")
    plain, small = (NO_TIME.predict(cell_of(*words, f"workload.storage={kind}"), memory=False) for kind in ("input", "float8"))
    assert plain.seconds == pytest.approx(2 * small.seconds, rel=1e-3), "triton_decode reads float8"
    copied = NO_TIME.predict(cell_of(*words[:1], "kernel=flash_attn3", "workload=serving", "workload.storage=float8"))
    numbers = 8 * KV / 2 * 2**17
    extra = numbers * (1 + 2 + 2 * 2) / H100.memory_bytes_per_s
    assert copied.seconds == pytest.approx(numbers * 2 / READS + extra, rel=1e-3)
    assert copied.peak_bytes > numbers * 2, "the copy is held while it is computed on"
    assert small.metrics()["serving/cache_bytes"] == numbers
    assert small.metrics()["serving/cache_bytes_per_token"] == numbers / 8
    assert small.metrics()["serving/us_per_token"] == pytest.approx(1e6 * small.seconds / 8)
    assert small.metrics()["serving/cache_gb_per_s"] == pytest.approx(READS / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "dtype", "read"),
    [
        (CacheKind(), "bfloat16", 0),
        (CacheKind(storage="bfloat16"), "bfloat16", 0),
        (CacheKind(16), "bfloat16", 4),
        (CacheKind(storage="bfloat16"), "float32", 6),
        (CacheKind(16, "float8"), "float32", 2 + 5 + 8),
    ],
)
def test_bytes_of_copying_a_number_out(kind: CacheKind, dtype: str, read: int) -> None:
    assert kind.read_bytes(dtype) == read


# -- split caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", MERGES)
def test_what_is_sent_around_tiles_is_what_the_strategies_say(merge: Merge) -> None:
    """By the formulas of their files, which their own tests hold against counted bytes."""
    problem = cell_of("batch=4q1s64k", "cp=dcp", "cp.degree=4", "scale=1x8").problem
    mask = cell_mask(cell_of("batch=4q1s64k", "scale=1x1"), 0)
    d, h, b, r, s = 4, 32 // 8, 2, 4, 4
    gathered = h * 128 * b
    merged = h * (128 * r + (d if merge == "reduce_scatter" else 1) * s)
    modelled = DCP(degree=d, merge=merge).modelled(problem, mask)
    assert sum(each.block * (len(each.sets[0]) - 1) for each in modelled.around) == 4 * (d - 1) * (gathered + merged)
    assert modelled.replicas == 1
    helix = Helix(kvp=d).modelled(problem, mask)
    assert sum(each.block * (d - 1) for each in helix.around) == 4 * (d - 1) * h * (128 * r + s)


def test_a_strategy_whose_decode_nobody_knows_says_so() -> None:
    with pytest.raises(CannotPredict, match="nothing says how cp=star works"):
        seconds("batch=4q1s64k", "cp=star", "scale=1x4")


def test_rows_that_hold_the_same_heads_hold_them_twice() -> None:
    cell = cell_of("batch=1q1s1m", "cp=dcp", "cp.degree=2", "scale=1x4", "heads=32x1x128", "workload=serving")
    found = NO_TIME.predict(cell)
    assert found.metrics()["serving/cache_bytes_per_token"] == 2 * 256 * 2 * 2**20
    assert found.buffer_bytes > 0


def test_without_messages_or_kernels_a_split_cache_takes_less() -> None:
    from lcbench.predict.composed import Composed
    from lcbench.predict.fit import guess, guess_dense
    from lcbench.schedule.simulate import Prepared

    cell = cell_of("batch=4q1s64k", "cp=dcp", "cp.degree=4", "scale=1x8")
    mere = guess(H100, "bfloat16")
    kernel = KernelFit(kernel="flash_attn3_cache", dtype="bfloat16", forward=mere, backward=mere)
    whole = Composed.of(cell, H100, memory=False)
    times = [
        each.play(H100, kernel, guess_dense(H100, "bfloat16")).phases["forward"].seconds
        for each in (whole, whole.varied(Prepared.without_messages), whole.varied(Prepared.without_kernels))
    ]
    assert times[0] > max(times[1:])
    assert times[1] + times[2] >= times[0]


# -- what a fit has seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "is_"), [("16q1s4k", "decode"), ("q512s4k", "cache"), ("q1k_4q1s2k", "cache"), ("4q1k", "whole")]
)
def test_regimes(batch: str, is_: str) -> None:
    cell = cell_of(f"batch={batch}")
    assert regime(cell.problem) == is_
    assert error_key(cell, "forward") == ("forward" if is_ == "whole" else f"{is_}/forward")
    assert (batch in group_of(cell)) == (is_ != "whole")


def test_a_fit_without_decodes_has_a_wide_band_of_them_and_says_so() -> None:
    known = Fit(
        machine="h100", error={"forward": 0.1, "backward": 0.1},
        kernels=(NO_TIME.fitted.kernels[0].model_copy(update={"sources": ("made",)}),),  # type: ignore[union-attr]
    )  # fmt: skip
    predictor = Predictor(H100, known)
    decode = predictor.predict(cell_of("batch=8q1s64k"), memory=False)
    assert decode.error == UNSEEN_ERROR["decode"] == 3.0
    assert "was fitted on nothing like a decode" in decode.basis
    chunk = predictor.predict(cell_of("batch=q2ks64k"), memory=False)
    assert chunk.error == UNSEEN_ERROR["cache"]
    whole = predictor.predict(cell_of("batch=4q4k"), memory=False)
    assert whole.error == 0.1
    assert Predictor(H100).predict(cell_of("batch=8q1s64k"), memory=False).error == 3.0


@pytest.mark.slow
def test_a_fit_on_decodes_finds_them_again_and_holds_their_error_apart() -> None:
    truth = Predictor(H100, Fit(machine="h100", kernels=(KernelFit(
        kernel="flash_attn3_cache", dtype="bfloat16", backward=Coefficients(),
        forward=Coefficients(call_s=9e-6, flop_s=1 / 600e12, row_s=2e-12, key_s=4 / 2.1e12),
    ),)))  # fmt: skip
    batches = ("4q1s8k", "16q1s8k", "16q1s32k", "2q1s256k", "64q1s16k", "q2ks32k", "q4ks8k", "4q4k")
    cells = [cell_of(f"batch={batch}") for batch in batches]
    seen = [
        CellTime(c, {"forward": truth.predict(c, memory=False).seconds}, group_of(c), "made", own=True) for c in cells
    ]  # fmt: skip
    fitted = fit(seen, H100, folds=4)
    (kernel,) = fitted.kernels
    assert kernel.regimes == ("cache", "decode", "whole")
    assert {"forward", "decode/forward", "cache/forward"} <= fitted.error.keys()
    predictor = Predictor(fitted.links.of(H100), fitted)
    for batch in ("8q1s64k", "32q1s64k", "1q1s1m"):
        found = predictor.predict(cell_of(f"batch={batch}"), memory=False)
        assert found.seconds == pytest.approx(seconds(f"batch={batch}", predictor=truth), rel=0.1), batch
        assert found.error < UNSEEN_ERROR["decode"]
        assert "nothing like" not in found.basis


def test_a_fit_of_before_has_seen_whole_sequences() -> None:
    old = json.loads(NO_TIME.fitted.kernels[0].model_dump_json())  # type: ignore[union-attr]
    for name in ("regimes", "key_bytes", "packed", "read_bytes_per_s"):
        del old[name]
    assert KernelFit.model_validate(old).regimes == ("whole",)


def test_packed_heads_share_the_blocks_of_a_decode() -> None:
    """32 rows of one key/value head are one block of 128, not 32 of them."""
    tiles = Tiles(
        pairs=np.array([1000.0]), covered=np.array([128_000.0]), rows=np.array([1]), keys=np.array([1000]), pieces=np.array([1]),
        q_heads=np.array([32]), kv_heads=np.array([1]),
    )  # fmt: skip
    problem = Problem(1, Heads(32, 1, 64), Scale(1, 1), "bfloat16", "forward")
    kernel = KernelFit(kernel="k", dtype="bfloat16", forward=Coefficients(waste_s=1.0), backward=Coefficients())
    whole, packed = (float(kernel.model_copy(update={"packed": p}).seconds(tiles, problem, backward=False)[0]) for p in (0, 1))
    assert whole == 32 * 4 * 64 * 127_000
    assert packed == 32 * 4 * 64 * 3_000


# -- estimates and what was measured -----------------------------------------------------------------------------------------


def test_what_is_not_simulated_takes_at_least_as_long_as_reading_its_cache() -> None:
    passes = replace(passes_on(None), allowance=0, _simulated={}, _refused={}, _paces={})
    cell = cell_of("batch=16q1s64k", "kernel=sdpa_flash", "dtype=float32", "cp=helix", "scale=1x2")
    expected = passes.of(cell)
    assert not expected.simulated
    assert expected.seconds >= cached_bytes(cell.problem) / 2 / passes.predictor.machine.memory_bytes_per_s


@pytest.mark.slow
def test_measured_passes_over_a_cache_are_predicted_from_others() -> None:
    """CPU seconds: decodes, chunks and mixtures on one rank and two, fitted, and other batches, strategies and caches."""
    times = held_out.read(SERVING)
    cores = json.loads(SERVING.read_text())["provenance"]["cpus"]
    rows = held_out.judged(fit(times["fit"], replace(machine_of("this"), cores=cores), folds=1), times["others"], one_thread=True)
    away = np.abs(np.log1p([row.error for row in rows]))
    assert np.median(away) <= np.log(1.5), held_out.table(rows)
    assert away.max() <= np.log(2.5), held_out.table(rows)
