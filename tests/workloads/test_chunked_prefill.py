"""Prompts in chunks: plans against dense masks, results of all chunks together against dense float64 attention of the whole
prompt on real gloo ranks, whole cells with their own check, pipelines of stages, and faults that the check must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcbench.cp.base import Strategy
from lcbench.cp.kvp import KVP
from lcbench.grid.build import build_strategy
from lcbench.inputs.drawing import draw, draw_sink
from lcbench.kernels.base import Kernel
from lcbench.kernels.reference import Reference
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.causal import causal
from lcbench.masks.full import full
from lcbench.masks.mask import Mask
from lcbench.measure.cell import measure_again, measure_cell
from lcbench.measure.measured import Measured
from lcbench.measure.metrics import metric_of
from lcbench.measure.session import Gang
from lcbench.problem import PLAIN, Batch, Heads, Mesh, Problem, Requests, Scale, Softmax
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_mask
from lcbench.testing.masks import load, names
from lcbench.testing.spawn import run_ranks
from lcbench.workloads.base import Work
from lcbench.workloads.chunked_prefill import ChunkedPrefill
from lcbench.workloads.chunks import Chunk
from lcbench.workloads.prefilling import Cached, Link, PrefillSession
from tests.cp.batches import BOUND, CPU, HEADS, SEES, dense, mask_of, near, seen
from tests.turns import due

SETTINGS = {"warmup": 1, "min_iterations": 2, "max_iterations": 2, "budget_s": 0.5, "precision": 1e-9, "timeline": False}
SEED = 5
LATER = Batch((Requests(1, 44, 60),))  # behind a prefix of 16 tokens, and with a last chunk that is shorter
TWO = Batch((Requests(2, 36, 36),))


def problem_of(batch: Batch, heads: Heads, ranks: int, dtype: str = "float64", softmax: Softmax = PLAIN) -> Problem:
    return Problem(batch.tokens, heads, Scale(1, ranks), dtype, "forward", batch=batch, softmax=softmax)


# -- plans -------------------------------------------------------------------------------------------------------------


def whole(requests: Requests, name: str) -> tuple[Problem, Mask]:
    batch = Batch((requests,))
    return problem_of(batch, HEADS["GQA"], 1), mask_of(batch, SEES[name][0])


@pytest.mark.slow
@given(
    st.integers(1, 3), st.integers(1, 60), st.integers(0, 40), st.integers(1, 25), st.integers(1, 25), st.booleans(),
    st.sampled_from(["causal", "window"]),
)  # fmt: skip
def test_chunks_are_the_prompt_cut_and_adaptive_ones_keep_the_work(
    count: int, new: int, prefix: int, chunk: int, least: int, adaptive: bool, name: str
) -> None:
    requests = Requests(count, new, prefix + new)
    problem, mask = whole(requests, name)
    chunks = ChunkedPrefill(chunk, adaptive, min(least, chunk)).chunks(problem, mask)
    matrix = dense_mask(mask.num_q, mask.num_k, mask)
    assert [chunk.begin for chunk in chunks] == [prefix, *(chunk.end for chunk in chunks[:-1])]
    assert chunks[-1].end == requests.total
    for one in chunks:
        own, part = one.problem(problem), one.mask(mask)
        assert (own.queries, own.seqlen) == (len(one.queries), len(one.keys)) == (part.num_q, part.num_k)
        assert (dense_mask(part.num_q, part.num_k, part) == matrix[np.ix_(one.queries, one.keys)]).all()
        # The mask of a chunk is that of the requests that its problem has.
        assert own.batch is not None
        assert (dense_mask(part.num_q, part.num_k, part) == seen(own.batch, SEES[name][1]).numpy()).all()
        assert one.pairs(mask) == matrix[one.queries].sum()
        assert not one.sees_ahead(mask)
    sizes = [one.end - one.begin for one in chunks]
    assert max(sizes) <= chunk
    if not adaptive:
        assert sizes[:-1] == [chunk] * (len(sizes) - 1)
        return
    least, work = min(least, chunk), int(matrix[chunks[0].queries].sum())
    for one, size in zip(chunks[1:], sizes[1:], strict=True):
        last = one.end == requests.total
        assert last or size % least == 0
        assert size <= least or matrix[one.queries].sum() <= work
        if not last and size + least <= chunk:
            longer = Chunk(requests, one.begin, one.end + least)
            assert longer.end > requests.total or matrix[longer.queries].sum() > work


def test_adaptive_chunks_shrink_as_the_cache_grows() -> None:
    requests = Requests(1, 1 << 20, 1 << 20)
    problem, mask = whole(requests, "causal")
    chunks = ChunkedPrefill(64 << 10, adaptive=True, least=1 << 10).chunks(problem, mask)
    sizes = [one.end - one.begin for one in chunks]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    first = chunks[0].pairs(mask)
    assert all(one.pairs(mask) <= first for one in chunks if one.end - one.begin > 1 << 10)
    assert sizes[0] == 64 << 10
    assert sizes[-2] < 4 << 10


def test_what_cannot_be_chunked_says_why() -> None:
    plain = ChunkedPrefill(16)
    ring = build_strategy(load("cp", "ring"))
    problem, mask = whole(LATER.groups[0], "causal")
    problem = replace(problem, scale=Scale(1, 4))

    def reason(options: ChunkedPrefill = plain, of: Problem = problem, seen: Mask = mask, cp: Strategy = ring) -> str:
        return options.unsupported(of, seen, SDPAFlash(), cp, None) or ""

    assert not reason()
    assert not reason(of=replace(problem, batch=None), seen=causal(60))
    assert reason(of=replace(problem, direction="forward_backward")) == (
        "a prompt is prefilled without backward: write direction=forward"
    )
    mixed = Batch((Requests(1, 16, 16), Requests(1, 8, 16)))
    assert "batch=q16_q8s16: the requests of a chunk are as long" in reason(of=replace(problem, batch=mixed, seqlen=32))
    assert reason(seen=mask_of(LATER, full)).startswith("the chunk of tokens 16 to 31 sees keys behind it")
    ulysses = build_strategy(load("cp", "ulysses"))
    assert reason(of=replace(problem, heads=Heads(3, 3, 8)), cp=ulysses).startswith("the chunk of tokens 16 to 31: ")
    assert reason(cp=build_strategy(load("cp", "lightseq")))
    assert (
        ChunkedPrefill(pipeline=True).misfit(Mesh()) == "workload.pipeline=true: mesh.dp=1 is one stage, and a pipeline has several"
    )
    assert "workload.layers=3 cannot be dealt out evenly to the mesh.dp=2 stages" in (
        ChunkedPrefill(layers=3, pipeline=True).misfit(Mesh(dp=2)) or ""
    )
    assert ChunkedPrefill(layers=3).misfit(Mesh(dp=2)) is None
    for options, message in (
        ({"chunk": 0}, "workload.chunk=0 is no number"), ({"layers": None}, "workload.layers=all is no number"),
        ({"chunk": 8, "adaptive": True}, "workload.least=256 is above the first chunk's workload.chunk=8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ChunkedPrefill(**options)  # type: ignore[arg-type]


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    cp: Strategy | str = "ring"
    batch: Batch = LATER
    heads: str = "GQA"
    options: ChunkedPrefill = field(default_factory=lambda: ChunkedPrefill(12))
    dtype: str = "float64"
    mask: str = "causal"
    softmax: Softmax = PLAIN
    mesh: Mesh = field(default_factory=Mesh)
    kernel: Kernel = field(default_factory=SDPAFlash)

    @property
    def strategy(self) -> Strategy:
        return build_strategy(load("cp", self.cp)) if isinstance(self.cp, str) else self.cp

    def problem(self, ranks: int) -> Problem:
        heads, scale = self.mesh.heads(HEADS[self.heads]), self.mesh.group_scale(Scale(1, ranks))
        return problem_of(self.batch, heads, scale.world_size, self.dtype, self.softmax)

    def work(self, ranks: int) -> Work:
        mask = mask_of(self.batch, SEES[self.mask][0])
        return Work(
            self.options, self.problem(ranks), lambda _: mask, self.kernel, self.strategy, SETTINGS, SEED, mesh=self.mesh,
            scale=Scale(1, ranks),
        )  # fmt: skip

    def measured(self, rank: int, ranks: int, groups: Groups, one: Callable[..., Measured] = measure_cell) -> Measured:
        return one(self.work(ranks), Gang(rank, ranks, CPU, groups, []), lambda _: None)

    def approximates(self, ranks: int) -> bool:
        """Whether it computes something else of some chunk."""
        work, strategy = self.work(ranks), self.strategy
        problem, mask = work.problem, work.make_mask(0)
        parts = ((one.problem(problem), one.mask(mask)) for one in self.options.chunks(problem, mask))
        return any(strategy.computes(own, part) is not part for own, part in parts)

    def refused(self, ranks: int) -> str | None:
        work = self.work(ranks)
        return self.options.unsupported(work.problem, work.make_mask(0), work.kernel, work.strategy, None)


def densely(cell: Cell, problem: Problem, layers: int, stages: int, tp: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """out and LSE of the whole prompt, of each layer of each stage."""
    allowed = seen(cell.batch, SEES[cell.mask][1])
    before: torch.Tensor | None = None
    for stage in range(stages):
        found = []
        for layer in range(layers):
            some = np.arange(problem.queries), np.arange(problem.seqlen)
            q, k, v = (draw(name, some[name != "q"], problem, SEED, CPU, (stage, tp), None, layer) for name in ("q", "k", "v"))
            if before is not None and layer == 0:
                width = min(q.shape[-1], before.shape[-1])
                q[..., :width] += before[..., :width]
            inputs = {"q": q, "k": k, "v": v}
            if problem.softmax.sink:
                inputs["sink"] = draw_sink(problem, float(allowed.sum()) / len(allowed), SEED, CPU, (stage, tp))
            found.append(dense(problem, allowed, inputs))
        before = found[-1][0]
        yield found


def check_runs(rank: int, ranks: int) -> None:
    """All chunks together are the prompt at once."""
    groups, ran = Groups(), set()
    for cell in [*every_strategy(ranks), *pipelines(ranks)]:
        if cell.refused(ranks) or cell.approximates(ranks):
            continue
        work, case = cell.work(ranks), f"{cell}"
        gang = work.arranged(Gang(rank, ranks, CPU, groups, []))
        session = PrefillSession(cell.options, work, 0, gang)
        assert session.refused is None, f"{case}: {session.refused}"
        assert session.wrong is None, case
        assert session._cached.moved == moved(session), case
        stages = cell.options.stages(cell.mesh)
        layers = cell.options.layers // stages
        exact = list(densely(cell, work.problem, layers, stages, gang.tp_index))[gang.dp_index if stages > 1 else 0]
        for _ in range(2):
            session.vary()
            sign = -1.0 if session.negated else 1.0
            given = session.phases()["forward"](None)
            for chunk, (of_chunk, begun) in enumerate(zip(given, session._begun, strict=True)):
                part, one = begun.run.held.out, session.chunks[chunk]
                heads = part.heads or range(work.problem.heads.q)
                rows = one.queries[part.tokens]
                for (out, saved), (want, lse) in zip(of_chunk, exact, strict=True):
                    near(f"{case} out {chunk}", out, sign * want[rows][:, heads.start : heads.stop])
                    near(f"{case} lse {chunk}", begun.run.lse(saved), lse[rows][:, heads.start : heads.stop])
        ran.add(cell.cp)
    assert ran >= TAKE_PREFIXES if ranks > 1 else ran >= TAKE_PREFIXES | {"none"}


def moved(session: PrefillSession) -> int:
    """Tokens that this rank has in a chunk, not in the one before, though they were there: request and place in it, one by one."""
    before, found = None, 0
    for chunk, begun in zip(session.chunks, session._begun, strict=True):
        own = {divmod(token, chunk.end) for token in begun.run.held.kv.tokens.tolist()}
        if before is not None:
            found += sum(place < chunk.begin for _, place in own - before)
        before = own
    return found


TAKE_PREFIXES = {
    "ring", "ulysses", "usp", "loongtrain", "allgather", "groupcast", "tokenring", "dcp", "helix", "kvp", "pcp",
}  # fmt: skip


def every_strategy(ranks: int) -> Iterator[Cell]:
    for number, name in enumerate(names("cp")):
        if build_strategy(load("cp", name)).missing() is not None:
            continue
        yield Cell(name)
        if ranks < 4 or number % 2 == 0:
            yield Cell(name, TWO, "MHA", ChunkedPrefill(20, adaptive=True, least=4), softmax=Softmax(sink=True))
        if number % 3 == 0:
            yield Cell(name, heads="latent", mask="window", options=ChunkedPrefill(12, layers=2), kernel=Reference())


def pipelines(ranks: int) -> Iterator[Cell]:
    if ranks > 1:
        dp = Mesh(dp=2)
        yield Cell("ring", options=ChunkedPrefill(12, layers=2, pipeline=True), mesh=dp)
        yield Cell("ulysses", TWO, "MHA", ChunkedPrefill(20, True, 4, layers=4, pipeline=True), mesh=dp, softmax=Softmax(sink=True))
        yield Cell("allgather", heads="MLA", options=ChunkedPrefill(8, layers=2, pipeline=True), mesh=dp)
        yield Cell("dcp", heads="MLA", options=ChunkedPrefill(12, layers=2, pipeline=True), mesh=dp)
    if ranks == 4:
        yield Cell("none", options=ChunkedPrefill(8, layers=4, pipeline=True), mesh=Mesh(dp=4))
        yield Cell("none", options=ChunkedPrefill(8, layers=2, pipeline=True), mesh=Mesh(dp=2, tp=2, order="cp-dp-tp"))


def check_cells(rank: int, ranks: int) -> None:
    groups = Groups()
    for cell in sound(ranks):
        found = cell.measured(rank, ranks, groups)
        assert found.unavailable is None, f"{cell}: {found.unavailable}"
        assert found.implausible is None, f"{cell}: {found.implausible}"
        assert found.check is not None
        assert not found.check.failures, f"{cell}: {found.check.failures}"
        stages = cell.options.stages(cell.mesh)
        parts = {"reference", "cache", "level", "last timed pass", "last pass"} | ({"between stages"} if stages > 1 else set())
        assert set(found.check.ratios) >= parts, cell
        if cell.dtype == "float64":
            assert found.check.errors["out"] <= BOUND, cell
        check_metrics(cell, found, ranks)
        again = cell.measured(rank, ranks, groups, measure_again)
        assert again.check is not None
        assert not again.check.failures, f"{cell}: {again.check.failures}"


def sound(ranks: int) -> list[Cell]:
    cells = [Cell("ring" if ranks > 1 else "none", dtype="bfloat16", options=ChunkedPrefill(12, layers=2))]
    if ranks == 2:
        cells += [Cell("helix", softmax=Softmax(sink=True)), Cell("kvp")]
        cells += [Cell(KVP(interleave=2), TWO, "MLA", ChunkedPrefill(20, True, 4))]
        cells += [Cell("none", options=ChunkedPrefill(12, layers=2, pipeline=True), mesh=Mesh(dp=2))]
    if ranks == 4:
        dp = Mesh(dp=2)
        cells += [
            Cell("ring", options=ChunkedPrefill(12, layers=4, pipeline=True), mesh=dp),
            Cell("ulysses", options=ChunkedPrefill(12, layers=2, pipeline=True), mesh=dp, dtype="bfloat16"),
            Cell("dcp", options=ChunkedPrefill(16, layers=2, pipeline=True), mesh=dp),
            Cell("allgather", TWO, mesh=dp), Cell("ring", heads="latent", mesh=Mesh(tp=2)),
        ]  # fmt: skip
    return cells


def check_metrics(cell: Cell, found: Measured, ranks: int) -> None:
    metrics, options, stages = found.metrics, cell.options, cell.options.stages(cell.mesh)
    assert all(metric_of(key) for key in metrics)
    problem, work = cell.problem(ranks), cell.work(ranks)
    mask = work.make_mask(0)
    chunks = options.chunks(problem, mask)
    assert metrics["chunk/count"] == len(chunks) == len(found.samples["chunk_s"])
    assert found.notes["chunk_tokens"] == [one.end - one.begin for one in chunks]
    assert metrics["chunk/first_s"] == found.samples["chunk_s"][0] <= metrics["chunk/slowest_s"] == max(found.samples["chunk_s"])
    assert metrics["mask/area"] == sum(one.pairs(mask) for one in chunks)
    tokens = problem.queries * (1 if stages > 1 else cell.mesh.dp)
    assert metrics["serving/new_tokens"] == tokens
    assert metrics["serving/tokens_per_s"] == pytest.approx(tokens / metrics["time/forward/median_s"])
    width = problem.heads.kv * problem.heads.kv_width * problem.itemsize * options.layers
    copies = cell.mesh.tp * (
        1 if stages > 1 else cell.mesh.dp
    )  # of what follows, which heads of a rank divide or requests multiply
    if cell.cp != "helix":
        read = sum(len(one.keys) for one in chunks) * width * copies
        assert metrics["serving/cache_bytes_per_token"] == pytest.approx(read / tokens)
    assert ("chunk/bubble" in metrics) == ("chunk/least_bubble" in metrics) == (stages > 1)
    if stages > 1:
        assert metrics["chunk/least_bubble"] == (stages - 1) / (len(chunks) + stages - 1)
        assert 0 < metrics["chunk/bubble"] < 1
        # Between stages each rank sends what it gives, once.
        passed_on = problem.queries // problem.scale.world_size * problem.heads.q * problem.heads.v * problem.itemsize
        if cell.cp in ("none", "dcp"):  # a rank by itself, and heads of whole sequences
            assert metrics["comm/forward/bytes"] == passed_on
        else:
            assert metrics["comm/forward/bytes"] > passed_on
    # Heads of whole sequences stay where they are, and so do tokens that are dealt out in turn, and whole requests.
    stays = problem.scale.world_size == 1 or cell.cp in ("helix", "dcp", "allgather") or isinstance(cell.cp, KVP)
    assert (metrics["chunk/moved_tokens"] == 0) == stays, cell


# -- faults ------------------------------------------------------------------------------------------------------------

WRITE, TAKE, LEAVE, READ = Cached.write, Link.take, Link.leave, Cached.read


def a_chunk_short(cached: Cached, cache: torch.Tensor, chunk: int) -> torch.Tensor:
    """The last chunk reads the new keys of the one before as they were before that."""
    found = READ(cached, cache, chunk)
    if chunk < len(cached._read) - 1:
        return found
    found = found.clone()
    found[-24:-12] = 0.0  # where the chunk before lies on one rank
    return found


def stored_too_late(cached: Cached, cache: torch.Tensor, new: torch.Tensor, chunk: int) -> None:
    if chunk:
        WRITE(cached, cache, new, chunk - 1)
    if chunk == len(cached._written) - 1:
        WRITE(cached, cache, new, chunk)


def stored_once(cached: Cached, cache: torch.Tensor, new: torch.Tensor, chunk: int) -> None:
    """A pass after the first stores nothing of the second chunk."""
    done = cached.__dict__.setdefault("done", [])
    if chunk != 1 or len(done) < 2:
        WRITE(cached, cache, new, chunk)
        done += [chunk] if chunk == 1 else []


def of_another_chunk(cached: Cached, cache: torch.Tensor, new: torch.Tensor, chunk: int) -> None:
    WRITE(cached, cache, new.roll(1, 0) if chunk == 1 else new, chunk)


def before_it_came(link: Link, chunk: int) -> torch.Tensor | None:
    """A stage works on what its memory has before its input is there."""
    if not link._coming:
        return None
    into, _ = link._coming[0]
    early = torch.zeros_like(into)
    TAKE(link, chunk)
    return early


def of_the_chunk_before(link: Link, chunk: int) -> torch.Tensor | None:
    found = TAKE(link, chunk)
    last = link.__dict__.get("last")
    link.__dict__["last"] = found
    return found if last is None or found is None or last.shape != found.shape else last


def half_of_it(link: Link, out: torch.Tensor) -> None:
    LEAVE(link, 0.5 * out)


ALONE = Cell("none")
PIPED = Cell("none", options=ChunkedPrefill(12, layers=2, pipeline=True), mesh=Mesh(dp=2))
FAULTS: dict[str, tuple[Any, str, Any, Cell, str]] = {
    "a prefix one chunk short": (Cached, "read", a_chunk_short, ALONE, "reference"),
    "stored after it is read": (Cached, "write", stored_too_late, ALONE, "reference"),
    "stored in the first pass only": (Cached, "write", stored_once, ALONE, "last timed pass"),
    "rows of another chunk": (Cached, "write", of_another_chunk, ALONE, "cache"),
    "before its input came": (Link, "take", before_it_came, PIPED, "between stages"),
    "the chunk before": (Link, "take", of_the_chunk_before, PIPED, "between stages"),
    "half of what is passed on": (Link, "leave", half_of_it, PIPED, "between stages"),
}


def check_faults(rank: int, ranks: int) -> None:
    groups = Groups()
    for dtype, (name, (owner, method, fault, cell, part)) in due(product(("float64", "bfloat16"), FAULTS.items())):
        cell = replace(cell, dtype=dtype)
        if cell is not PIPED and not cell.options.pipeline:
            cell = replace(cell, mesh=Mesh(dp=ranks))
        with patch.object(owner, method, fault):
            found = cell.measured(rank, ranks, groups)
        assert found.check is not None, name
        assert any(part in failure for failure in found.check.failures), f"{name} {dtype}: {found.check.failures}"


@pytest.mark.gloo
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.slow
def test_chunks_together_are_the_prompt_at_once(ranks: int) -> None:
    run_ranks(ranks, check_runs, ranks)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cells_pass_their_check_and_say_what_chunks_take(ranks: int) -> None:
    run_ranks(ranks, check_cells, ranks)


@pytest.mark.slow
@pytest.mark.gloo
def test_every_fault_is_found() -> None:
    run_ranks(2, check_faults, 2)
