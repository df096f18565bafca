"""A prompt in chunks on one rank: what ``workload=chunked_prefill`` runs, times and checks.

    who owns what      of every chunk: results are given once, keys that are used are there
    reference          rows of every chunk of every layer against the float64 reference of the chunk's own problem
    cache              after the pass it holds the keys and values of all chunks, to the bit
    between stages     what a stage begins with is what the stage before gave; and queries have it in them, to the bit
    level              a probe of every chunk: every row in closed form
    last passes        the last timed one, and one after all else: inputs negated in place must negate every chunk's out

Before each iteration the places in the cache of what the pass is to store are set to NaN, so that a chunk that reads them too early
shows. Where shares of the cache move as it grows, tokens that a rank gets later are there from the begin: moving them is not timed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcbench.cp.base import Passes, RankRun
from lcbench.cp.exchange import Exchange
from lcbench.inputs.base import Wanted
from lcbench.inputs.drawing import draw_sink
from lcbench.masks.band import Ints
from lcbench.measure.bounds import Check, Judge, of_groups, verdict
from lcbench.measure.digests import SENT, told
from lcbench.measure.flops import forward_flops
from lcbench.measure.least import Least, least_traffic
from lcbench.measure.numerics import REFERENCE, Examination, Result
from lcbench.measure.ranks import EVERY, Ranks
from lcbench.measure.reference import Shard
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say, Session
from lcbench.schedule.execute import Counters
from lcbench.schedule.held import Held, Part
from lcbench.schedule.messages import Sending, Waits, wait_all
from lcbench.workloads.base import Work
from lcbench.workloads.started import Sent, Started, started
from lcbench.workloads.watch import Watch

if TYPE_CHECKING:
    from lcbench.workloads.chunks import Chunk, Chunks

CACHE, STAGES = "cache", "between stages"
WATCHED = 3  # passes by which chunks are timed
TOLD = 8  # failures that are told one by one: what is wrong in one chunk is wrong in all that come after it
PASS = "pass"
Given = list[list[tuple[torch.Tensor, Any]]]  # out and what its LSE needs, by chunk and layer
Keep = Callable[[int, list[torch.Tensor], torch.Tensor | None], None]  # takes a chunk, its queries by layer, what it began with


@dataclass(frozen=True)
class Own:
    """What a rank has of one chunk; tokens are those of the whole prompt.

    Attributes:
        held: what it is given and gives, in the chunk's own indices.
        queries, keys: that it is given, in the order of its tensors.
        new: which of the keys are of the chunk itself, bool.
    """

    held: Held
    queries: Ints
    keys: Ints
    new: NDArray[np.bool_]

    @classmethod
    def of(cls, chunk: Chunk, held: Held) -> Own:
        new = held.kv.tokens % chunk.end >= chunk.begin
        return cls(held, chunk.queries[held.q.tokens], chunk.keys[held.kv.tokens], new)


class Cached:
    """Where a rank has in its cache what it is given of each chunk.

    Attributes:
        every: the tokens that it ever holds, ascending: those of its cache.
        stored: the tokens that passes store, chunk by chunk.
        copied: how many chunks have keys that are not adjacent in it, so that a pass copies them together.
        moved: tokens of earlier chunks that a chunk has here and the chunk before had not, added up.
    """

    def __init__(self, owns: Sequence[Own], device: torch.device) -> None:
        self.every = np.unique(np.concatenate([own.keys for own in owns]))
        self.stored = np.concatenate([own.keys[own.new] for own in owns])
        places = [np.searchsorted(self.every, own.keys) for own in owns]
        self._read = [_rows(at, device) for at in places]
        self._written = [_rows(at[own.new], device) for at, own in zip(places, owns, strict=True)]
        self._ends = np.cumsum([0, *(int(own.new.sum()) for own in owns)]).tolist()
        self.copied = sum(not isinstance(rows, slice) for rows in self._read)
        pairs = zip(owns[1:], owns, strict=False)
        self.moved = sum(len(np.setdiff1d(later.keys[~later.new], before.keys)) for later, before in pairs)

    def read(self, cache: torch.Tensor, chunk: int) -> torch.Tensor:
        """A chunk's keys, or values, (Tk, Hk, .): where they lie if they are adjacent."""
        return cache[self._read[chunk]]

    def write(self, cache: torch.Tensor, new: torch.Tensor, chunk: int) -> None:
        """Store what is new of a chunk, which ``new`` has at its place among that of all chunks."""
        cache[self._written[chunk]] = new[self._ends[chunk] : self._ends[chunk + 1]]

    def spoil(self, cache: torch.Tensor) -> None:
        """Make what passes store no numbers, so that nobody reads it before."""
        for rows in self._written:
            cache[rows] = torch.nan


def _rows(places: Ints, device: torch.device) -> slice | torch.Tensor:
    """Places as an index, a slice where they are adjacent."""
    if not len(places) or (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
    return torch.from_numpy(places).to(device)


@dataclass
class Layer:
    """One attention layer on this rank.

    Attributes:
        q: queries of all chunks, chunk by chunk.
        k, v: new keys and values of all chunks, chunk by chunk; None: values are numbers of keys.
        cached_k, cached_v: the cache.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    cached_k: torch.Tensor
    cached_v: torch.Tensor | None
    sink: torch.Tensor | None

    @property
    def signed(self) -> list[torch.Tensor]:
        """All that is negated where inputs are."""
        return [x for x in (self.q, self.k, self.v, self.cached_k, self.cached_v) if x is not None]

    @property
    def caches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(cache, what is new of it) of keys and of values."""
        yield self.cached_k, self.k
        if self.cached_v is not None and self.v is not None:
            yield self.cached_v, self.v


class Link:
    """Activations on their way from a stage to the next one, between ranks of the same number.

    Attributes:
        messages: theirs; None: there is one stage.
    """

    def __init__(self, gang: Gang, stages: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self._stage, self._last = (gang.dp_index, stages - 1) if stages > 1 else (0, 0)
        self._shapes, self._dtype, self._device = shapes, dtype, gang.device
        self._coming: deque[tuple[torch.Tensor, list[Waits]]] = deque()
        self._sent: list[Waits] = []
        self.messages: Exchange | None = None
        if stages > 1:
            assert gang.scale is not None
            through_host = gang.groups.goes_through_host(gang.device)
            sending = Sending(gang.rank, gang.scale.gpus_per_node, gang.device, through_host=through_host)
            members = gang.grid[:, gang.tp_index, gang.cp_rank].tolist()
            self.messages = Exchange(members, self._stage, gang.communicator("dp"), sending)

    def begin(self) -> None:
        """A pass begins."""
        if self.messages is not None:
            self.messages.begin()
        self._expect(0)

    def _expect(self, chunk: int) -> None:
        """Begin to receive what a chunk begins with."""
        if self.messages is not None and self._stage > 0 and chunk < len(self._shapes):
            into = torch.empty(self._shapes[chunk], dtype=self._dtype, device=self._device)
            self._coming.append((into, self.messages.receive(into, self._stage - 1)))

    def take(self, chunk: int) -> torch.Tensor | None:
        """What a chunk begins with, once it is there; None at the first stage. That of the next chunk may come meanwhile."""
        if not self._coming:
            return None
        into, works = self._coming.popleft()
        self._expect(chunk + 1)
        wait_all(works)
        return into

    def leave(self, out: torch.Tensor) -> None:
        """Send what a chunk gives to the next stage."""
        if self.messages is not None and self._stage < self._last:
            self._sent += self.messages.send(out.contiguous(), self._stage + 1)

    def finish(self) -> None:
        """Wait until all has been sent."""
        wait_all(self._sent)
        self._sent = []


@dataclass(frozen=True)
class Kept:
    """A chunk of a pass that is checked.

    Attributes:
        queries: of each layer, as its attention took them.
        begun: what came from the stage before; None at the first one.
        results: of each layer.
    """

    queries: list[torch.Tensor]
    begun: torch.Tensor | None
    results: list[Result]


@dataclass(frozen=True)
class _Counting:
    """A run's counters, for what is counted of all chunks together."""

    whole: Counters | None

    def counters(self) -> Counters | None:
        return self.whole


def refuses(run: RankRun, stages: int) -> str | None:
    """Why a run cannot compute a chunk of a prompt, or None."""
    if not run.negates:
        return "which keys it computes is chosen by the inputs, so that its chunks are not parts of one mask"
    q, out = run.held.q, run.held.out
    if stages > 1 and (q.heads != out.heads or not np.array_equal(q.tokens, out.tokens)):
        return "its ranks do not give the results of the queries that they are given, which the next stage begins with"
    return None


class PrefillSession(Session):
    """One draw of a chunked prefill on this rank.

    Attributes:
        chunks: in their order.
        layers: of this rank's stage.
        judge: what the checks of the cache and between stages have found.
    """

    refused: str | None = None
    wrong: str | None = None

    def __init__(self, options: Chunks, work: Work, number: int, gang: Gang) -> None:
        self._options, self._work, self._gang, self.judge = options, work, gang, Judge()
        self._stages = options.stages(gang.mesh)
        self._kept: list[Kept] = []
        self._sent = Sent(0, 0)
        self._chunk_s: list[float] = []
        self.negated = False
        whole = work.make_mask(number)
        self.chunks = options.chunks(work.problem, whole)
        self.mask = gang.own_heads(whole, work.problem.heads.q)
        begun: list[Started] = []
        for chunk in reversed(self.chunks):  # the last has the largest buffers, which the others share
            one = self._begin(chunk, whole, number)
            if isinstance(one, str):
                self.refused = f"{chunk}: {one}"
                return
            if begun:
                one.run.share(begun[-1].run)
            begun.append(one)
        self._begun = begun[::-1]
        self.prepare_s = sum(one.prepare_s for one in begun)
        self.wrong = next((f"{chunk}: {one.owners.wrong}" for chunk, one in self._each() if one.owners.wrong), None)
        self._owns = [Own.of(chunk, one.run.held) for chunk, one in self._each()]
        self._cached = Cached(self._owns, gang.device)
        self._ends = np.cumsum([0, *(len(own.queries) for own in self._owns)]).tolist()
        problem, dtype = work.problem, getattr(torch, work.problem.dtype)
        parts = [own.held.out for own in self._owns]
        shapes = [(len(part.tokens), len(part.heads or range(problem.heads.q)), problem.heads.v) for part in parts]
        self.link = Link(gang, self._stages, shapes, dtype)
        self.layers = [self._made(layer) for layer in range(options.layers // self._stages)]
        self._examinations = [[one.examination(layer) for layer in range(len(self.layers))] for one in self._begun]

    def _begin(self, chunk: Chunk, whole: Any, number: int) -> Started | str:
        """A chunk ready to run, or why the ranks cannot run it. Collective."""
        own = replace(self._work, problem=chunk.problem(self._work.problem), make_mask=lambda _: chunk.mask(whole))
        return started(own, number, self._gang, partial(refuses, stages=self._stages))

    def _each(self) -> Iterator[tuple[Chunk, Started]]:
        return zip(self.chunks, self._begun, strict=True)

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _drawn(self, name: str, tokens: Ints, layer: int, heads: range | None) -> torch.Tensor:
        gang, work = self._gang, self._work
        group = (gang.dp_index, gang.tp_index)
        return work.inputs.draw(Wanted(name, tokens, work.problem, work.seed, gang.device, group, heads, layer))

    def _made(self, layer: int) -> Layer:
        held, gang, work = self._owns[0].held, self._gang, self._work
        latent, cached = work.problem.heads.latent, self._cached
        keys = {name: [self._drawn(name, some, layer, held.kv.heads) for some in (cached.stored, cached.every)] for name in "kv"}
        queries = np.concatenate([own.queries for own in self._owns])
        sink = None
        if work.problem.softmax.sink:
            group = gang.dp_index, gang.tp_index
            sink = draw_sink(work.problem, self.mask.density * self.mask.num_k, work.seed, gang.device, group)
        (k, cached_k), (v, cached_v) = keys["k"], [None, None] if latent else keys["v"]
        found = Layer(self._drawn("q", queries, layer, held.q.heads), k, v, cached_k, cached_v, sink)
        self._spoil(found)
        return found

    def draw(self) -> None:
        """Draw the inputs anew, into the memory that they are in."""
        for number, layer in enumerate(self.layers):
            drawn = self._made(number)
            for into, x in zip(layer.signed, drawn.signed, strict=True):
                into.copy_(x)
            if layer.sink is not None and drawn.sink is not None:
                layer.sink.copy_(drawn.sink)
        self.negated = False

    def _spoil(self, layer: Layer) -> None:
        """Have the cache as a pass is to find it."""
        for cache, _ in layer.caches:
            self._cached.spoil(cache)

    def vary(self) -> None:
        """Negate all inputs in place: the next pass gives the negative out, and the same LSE."""
        for layer in self.layers:
            for x in layer.signed:
                x.neg_()
            self._spoil(layer)
        self.negated = not self.negated

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.signed)

    @property
    def held_bytes(self) -> int:
        return sum(one.held_bytes for of_chunk in self._examinations for one in of_chunk)

    def _keys(self, layer: Layer, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a chunk, of the cache as it is."""
        k = self._cached.read(layer.cached_k, chunk)
        return k, k[..., : self._work.problem.heads.v] if layer.cached_v is None else self._cached.read(layer.cached_v, chunk)

    def _queries(self, layer: Layer, chunk: int) -> torch.Tensor:
        return layer.q[self._ends[chunk] : self._ends[chunk + 1]]

    # -- passes ----------------------------------------------------------------------------------------------------

    def phases(self) -> Phases:
        """Forward gives out and what its LSE needs, of each layer of each chunk."""
        return {"forward": lambda _: self._pass([one.run for one in self._begun])}

    def _pass(self, runs: Sequence[Passes], keep: Keep | None = None, watch: Watch | None = None) -> Given:
        """All chunks, one after the other."""
        given: Given = []
        self.link.begin()
        for chunk, run in enumerate(runs):
            begun = self.link.take(chunk)
            since = watch.now() if watch else None
            given.append([])
            queries: list[torch.Tensor] = []
            for layer in self.layers:
                for cache, new in layer.caches:
                    self._cached.write(cache, new, chunk)
                q = self._queries(layer, chunk)
                q = q if begun is None or queries else _entered(q, begun)
                out, saved = run.forward(q, *self._keys(layer, chunk), *(() if layer.sink is None else (layer.sink,)))
                given[-1].append((out, self._begun[chunk].run.for_lse(saved)))
                queries.append(q)
            self.link.leave(given[-1][-1][0])
            if watch:
                watch.spans.append((str(chunk), since, watch.now()))
            if keep:
                keep(chunk, queries, begun)
        self.link.finish()
        return given

    def _results(self, chunk: int, given: Sequence[tuple[torch.Tensor, Any]]) -> list[Result]:
        """Of each layer of a chunk. Collective."""
        return [Result(out, self._begun[chunk].run.lse(saved)) for out, saved in given]

    def _count(self, chunk: int, queries: list[torch.Tensor], begun: torch.Tensor | None) -> None:
        """Keep what goes into a chunk of the first pass, and count what it has sent."""
        self._kept.append(Kept(queries, begun, []))
        if counters := self._begun[chunk].run.counters():
            # Every layer of a chunk sends as much.
            sent = Sent(len(self.layers) * counters.bytes_sent, len(self.layers) * counters.bytes_between_nodes)
            self._sent = self._sent.plus(sent)

    def first_pass(self) -> None:
        self._kept, self._sent = [], Sent(0, 0)
        given = self._pass([one.run for one in self._begun], self._count)
        self._kept = [replace(kept, results=self._results(chunk, given[chunk])) for chunk, kept in enumerate(self._kept)]
        if (passed_on := self.link.messages) is not None:
            self._sent = self._sent.plus(Sent(passed_on.bytes_sent, passed_on.bytes_between_nodes))

    def variants(self) -> dict[str, Phases]:
        """None of a pipeline, whose stages wait for one another whatever is left out."""
        found: dict[str, Phases] = {}
        for name, compute in (("compute", True), ("communication", False)):
            bare = [one.run.replay(compute=compute, communicate=not compute) for one in self._begun]
            runs = [run for run in bare if run is not None]
            if self._stages == 1 and len(runs) == len(bare):
                found[name] = {"forward": lambda _, runs=runs: self._pass(runs)}  # type: ignore[misc]
        return found

    def alone(self) -> Phases:
        return self.phases() if self._stages == 1 else {}

    def timeline(self) -> None:
        return None

    def shares(self) -> dict[str, float]:
        """What chunks take, by passes that are timed for it. Collective."""
        device = self._gang.device
        times, bubbles = [], []
        for _ in range(WATCHED):
            EVERY.all_gather_object(None)  # ranks begin together
            watch = Watch(device.type == "cuda")
            begun = watch.now()
            self._pass([one.run for one in self._begun], watch=watch)
            watch.spans.append((PASS, begun, watch.now()))
            if watch.cuda:
                torch.cuda.synchronize(device)
            every: list[dict[str, float]] = EVERY.all_gather_object(watch.seconds())
            times.append([max(own[str(chunk)] for own in every) for chunk in range(len(self.chunks))])
            whole = max(own.pop(PASS) for own in every)
            bubbles.append(1 - sum(sum(own.values()) for own in every) / len(every) / whole)
        self._chunk_s = [median(of_chunk) for of_chunk in zip(*times, strict=True)]
        found = {
            "chunk/first_s": self._chunk_s[0], "chunk/median_s": median(self._chunk_s), "chunk/slowest_s": max(self._chunk_s),
        }  # fmt: skip
        return found | ({"chunk/bubble": median(bubbles)} if self._stages > 1 else {})

    def series(self) -> dict[str, list[float]]:
        return {"chunk_s": self._chunk_s}

    # -- checks ----------------------------------------------------------------------------------------------------

    def _checked(self) -> Iterator[tuple[int, int, Examination, Kept]]:
        """(chunk, layer, its check, the chunk of the pass)."""
        for chunk, (kept, of_chunk) in enumerate(zip(self._kept, self._examinations, strict=True)):
            for layer, examination in enumerate(of_chunk):
                yield chunk, layer, examination, kept

    def check_first(self, say: Say) -> None:
        say("checking every chunk of the first pass against the float64 reference")
        self._check_pass()
        say("checking every row of every chunk by probes")
        self._probe()

    def check_again(self) -> None:
        self.first_pass()
        if self._examinations[0][0].probes:
            self._check_places()
            for _, layer, examination, kept in self._checked():
                examination.begin(kept.results[layer])
            self._kept = []
            self._probe()
        else:
            self._check_pass()
            self.draw()

    def _check_pass(self) -> None:
        """The first pass, which is forgotten then."""
        self._check_places()
        for chunk, layer, examination, kept in self._checked():
            by_tokens = self._begun[chunk].owners.by_tokens
            queries = kept.queries[layer]
            exact = self._exact(chunk, layer, queries) if by_tokens else self._by_tokens(chunk, layer, queries)
            examination.first(exact, kept.results[layer], exact)
        self._kept = []

    def _probe(self) -> None:
        first = self.layers[0]
        for chunk, of_chunk in enumerate(self._examinations):
            for probe in of_chunk[0].probes:
                shard = Shard(self._owns[chunk].held, self._queries(first, chunk), *self._keys(first, chunk), sink=first.sink)
                of_chunk[0].probe(probe, shard)
        self.draw()

    def _exact(self, chunk: int, layer: int, queries: torch.Tensor) -> Shard:
        """What a chunk is to be computed from: keys and values drawn anew, whatever the cache has."""
        own = self._owns[chunk]
        k, v = (self._drawn(name, own.keys, layer, own.held.kv.heads) for name in ("k", "v"))
        return Shard(own.held, queries, k, v, sink=self.layers[layer].sink)

    def _by_tokens(self, chunk: int, layer: int, given: torch.Tensor) -> Shard:
        """The inputs of a chunk of as many adjacent queries, and keys, as each rank's, all heads of them; ``given``: this rank's
        queries. Collective."""
        own, ranks, of = self._gang.cp_rank, self._work.problem.scale.world_size, self.chunks[chunk]
        queries, keys = (np.arange(n * own // ranks, n * (own + 1) // ranks) for n in (len(of.queries), len(of.keys)))
        k, v = (self._drawn(name, of.keys[keys], layer, None) for name in ("k", "v"))
        if self._stages > 1 and layer == 0:  # what came from the stage before is in them
            q = self._every_head(self._owns[chunk].held.q, given, len(of.queries))[torch.from_numpy(queries).to(given.device)]
        else:
            q = self._drawn("q", of.queries[queries], layer, None)
        return Shard(Held(Part(queries), Part(keys), Part(queries)), q, k, v, sink=self.layers[layer].sink)

    def _every_head(self, part: Part, given: torch.Tensor, count: int) -> torch.Tensor:
        """All ``count`` queries (T, Hq, D), of which each rank is ``given`` a part, each once. Collective."""
        heads = part.heads or range(self._work.problem.heads.q)
        every = given.new_zeros((count, self._work.problem.heads.q, given.shape[-1]))
        every[torch.from_numpy(part.tokens).to(given.device), heads.start : heads.stop] = given
        return self._gang.ranks.reduce(every)

    def _check_places(self) -> None:
        """What the pass has left in the cache, and what stages have passed on. Collective among the stages."""
        cached, heads = self._cached, self._owns[0].held.kv.heads
        for number, layer in enumerate(self.layers):
            for name, cache in (("k", layer.cached_k), ("v", layer.cached_v)):
                if cache is not None:
                    exact = self._drawn(name, cached.every, number, heads).double()
                    self.judge.elements(CACHE, name, cache.double(), exact, exact.new_zeros(()), cached.every)
        if self._stages == 1:
            return
        left = [told(kept.results[-1].out) for kept in self._kept]
        every = Ranks(self._gang.communicator("dp"), "stages").all_gather_object(left)
        for chunk, kept in enumerate(self._kept):
            if kept.begun is None:
                continue
            q, tokens = self._queries(self.layers[0], chunk), self._owns[chunk].queries
            exact = _entered(q, kept.begun).double()
            self.judge.elements(STAGES, "q", kept.queries[0].double(), exact, exact.new_zeros(()), tokens)
            bound = SENT * float(kept.begun.double().abs().sum())
            for head, (got, want) in enumerate(zip(told(kept.begun), every[self._gang.dp_index - 1][chunk], strict=True)):
                self.judge.number(STAGES, "activations", abs(got - want), bound, f"chunk {chunk}, head {head}")

    def check_timed(self, passed: Given) -> None:
        self._compare_last("last timed pass", passed)

    def check_last(self) -> None:
        self.vary()
        self._compare_last("last pass", self._pass([one.run for one in self._begun]))

    def _compare_last(self, part: str, given: Given) -> None:
        for chunk, of_chunk in enumerate(self._examinations):
            for examination, result in zip(of_chunk, self._results(chunk, given[chunk]), strict=True):
                examination.last(part, result, self.negated)

    def check(self) -> Check:
        checks = {}
        for chunk, of_chunk in enumerate(self._examinations):
            for layer, examination in enumerate(of_chunk):
                checks[f"chunk {chunk}" + (f", layer {layer}" if len(of_chunk) > 1 else "")] = examination.check()
        whole = of_groups(checks)
        own = verdict(self._gang.ranks.all_gather_object(self.judge.found), REFERENCE, 0, 0, True, {})
        places = of_groups(dict(EVERY.all_gather_object((self._gang.ranks.name, own))))
        failures = [*places.failures, *whole.failures]
        if len(failures) > TOLD:
            failures = [*failures[:TOLD], f"and {len(failures) - TOLD} more parts of chunks"]
        return replace(
            whole, rows=sum(check.rows for check in checks.values()), columns=0, ratios=whole.ratios | places.ratios,
            failures=failures,
        )  # fmt: skip

    # -- what it is made of ----------------------------------------------------------------------------------------

    @property
    def _pairs(self) -> int:
        """Of this rank's group: of its stage's layers."""
        return len(self.layers) * sum(one.pairs for one in self._begun)

    def costs(self) -> dict[str, Cost]:
        """FLOPs of the chunks' pairs, and of what one chunk must send and read the most: what others must, may be there from the
        one before."""
        gang, heads = self._gang, self._work.problem.heads
        least: list[Least] = [
            least_traffic(one.mask, chunk.problem(self._work.problem), one.owners, gang.device, gang.ranks)
            for chunk, one in self._each()
        ]
        flops = forward_flops(sum(gang.of_groups(self._pairs)), heads)
        return {"forward": Cost(flops, max(one.sent for one in least), max(one.memory["forward"] for one in least))}

    def counted(self) -> Counted:
        counted = self._everything().counted({"forward": self._sent}, ("forward",))
        metrics, layers, chunks, gang = counted.metrics, len(self.layers), len(self.chunks), self._gang
        metrics["mask/area"] /= layers
        heads = self._work.problem.heads
        tokens = float(self._work.problem.queries * (1 if self._stages > 1 else gang.mesh.dp))
        own = self._owns[0].held.kv.heads or range(heads.kv)
        width = len(own) * heads.kv_width * self._work.problem.itemsize
        read = EVERY.all_gather_object(layers * width * sum(len(of.keys) for of in self._owns))
        moved = max(gang.of_groups(sum(gang.ranks.all_gather_object(self._cached.moved))))
        metrics |= {
            "serving/new_tokens": tokens, "serving/tokens_per_gpu": tokens / gang.world_size,
            "serving/cache_bytes": float(max(read)), "serving/cache_bytes_per_token": sum(read) / tokens,
            "chunk/count": float(chunks), "chunk/moved_tokens": float(moved),
        }  # fmt: skip
        if "forward" in counted.bytes_sent:
            metrics["serving/bytes_sent_per_token"] = counted.bytes_sent["forward"] / tokens
        if self._stages > 1:
            metrics["chunk/least_bubble"] = (self._stages - 1) / (chunks + self._stages - 1)
        if known := [one.distance for of_chunk in self._examinations for one in of_chunk if one.distance is not None]:
            metrics["check/distance"] = max(gang.of_groups(max(known)))
        copied = max(EVERY.all_gather_object(self._cached.copied))
        counted.notes.update(self._work.stated(gang))
        counted.notes["chunk_tokens"] = [chunk.end - chunk.begin for chunk in self.chunks]
        counted.notes["cache"] = (
            f"{moved} cached tokens are on another rank in one chunk than in the chunk before, which is not timed; "
            f"{copied} of {chunks} chunks copy their keys together"
        )
        return counted

    def _everything(self) -> Started:
        """All chunks of all layers as one run, for what is counted."""
        layers = len(self.layers)
        every = [counters for one in self._begun if (counters := one.run.counters())]
        whole = None
        if len(every) == len(self._begun):
            whole = Counters(
                self._sent.bytes, self._sent.between_nodes, max(one.buffer_bytes for one in every),
                layers * sum(one.calls for one in every), layers * sum(one.pairs for one in every),
                sorted({name for one in every for name in one.collectives}),
            )  # fmt: skip
        return replace(self._begun[0], mask=self.mask, pairs=self._pairs, run=_Counting(whole))  # type: ignore[arg-type]


def _entered(q: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """Queries (Tq, Hq, D) with what a stage begins with, (Tq, Hq, Dv), added to as many of their numbers as both have."""
    width = min(q.shape[-1], begun.shape[-1])
    found = q.clone()
    found[..., :width] += begun[..., :width]
    return found
