"""A cell of sparse attention on one rank: it chooses, plans and computes in every pass, and each of these is checked.

    who owns what      whole tokens, each on one rank, before anything is chosen; a plan leaves them where they are
    choice             blocks of queries chosen once more by one rank alone, on inputs that it draws itself: the same bit for bit;
                       no query is left without a key; passes on the same inputs choose the same
    first pass         out, LSE and gradients against float64, by the mask that the pass chose
    level, zero        probe passes of the plan for that mask, every row and column in closed form
    recall             counted by blocks and, apart from that, by the LSE of the pass and of full attention
    last timed pass    negated inputs: the same choice and the negative results; of a selector that then chooses anew, float64 again
    last pass          on other inputs: their own choice, chosen by one rank alone too, and float64 by that mask
    full attention     what it is compared with, where it was timed: float64 by the cell's mask

What full attention would give is no part of these: ``check/distance`` says how far it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from lcbench.cp.base import RankRun, Scheduled
from lcbench.cp.selection import Selection, kept
from lcbench.inputs.base import Wanted
from lcbench.masks.band import BandMask, Ints, spread
from lcbench.masks.block import BlockMap, Keep, chosen
from lcbench.masks.mask import Mask
from lcbench.masks.sums import Visible
from lcbench.measure.blocks import short_warmup
from lcbench.measure.bounds import Check
from lcbench.measure.numerics import Result, forward
from lcbench.measure.owners import owners
from lcbench.measure.ranks import EVERY, first_refusal
from lcbench.measure.recall import Recall, recall, sample
from lcbench.measure.reference import Shard, collected
from lcbench.measure.session import Cost, Counted, Gang, Phases, Say
from lcbench.measure.stopping import Stopping
from lcbench.measure.timing import measure
from lcbench.schedule.held import Held, Part
from lcbench.selectors.base import Features, Rows, pairs_of
from lcbench.workloads.attention import AttentionSession, shard_of
from lcbench.workloads.base import Work
from lcbench.workloads.started import OnAllRanks, Sent, Started, distance, run_of_all

CHOICE, RECALL = "choice", "recall"
BLOCKS = 8  # of queries that are chosen once more by one rank alone, however long the sequence is
ALL_BLOCKS = 1 << 22  # rows times keys of a sequence of which all are
TOGETHER = 16  # blocks of keys that are drawn together


class Passed(NamedTuple):
    """What the phases of a pass came to: what was chosen, the strategy at work on it, out and what backward needs, gradients."""

    choice: BlockMap
    run: RankRun | None = None
    out: torch.Tensor | None = None
    saved: Any = None
    gradients: tuple[torch.Tensor, ...] | None = None


class SparseSession(AttentionSession):
    """One draw of a cell of sparse attention on this rank.

    Args:
        min_recall: the least recall, mean over heads, that is no failure; None: any.

    Attributes:
        within: the cell's own mask, within which blocks are chosen.
        choice: what is chosen for the inputs as they are first drawn; ``mask``: the same.
    """

    def __init__(self, work: Work, number: int, gang: Gang, min_recall: float | None) -> None:
        assert work.selector is not None
        self._work, self._gang, self._min_recall = work, gang, min_recall
        self._selector, self._problem = work.selector, work.problem
        self._sent: dict[str, Sent] = {}
        self._remarks: dict[str, Any] = {}
        self._seed, self.negated = work.seed, False
        self._lse: torch.Tensor | None = None
        self._lse_s = 0.0
        # Selectors that use what an earlier step left choose for the step after it.
        self._step = int(work.selector.needs_lse)
        self.refused = first_refusal(EVERY.all_gather_object(self._begin(number)))

    def _begin(self, number: int) -> str | None:
        """Make ready; why the ranks cannot run it, or None. Collective."""
        begun, work, gang, problem = time.perf_counter(), self._work, self._gang, self._problem
        mask = gang.own_heads(work.make_mask(number), problem.heads.q)
        assert isinstance(mask, BandMask)
        self.within, self._check_seed = mask, [work.seed, work.attempt, number]
        if gang.mesh.count > 1:
            self._check_seed += [gang.dp_index, gang.tp_index]
        assert isinstance(work.strategy, Scheduled)
        self._strategy = work.strategy.settled(problem, mask)
        self._held = self._strategy.schedule(problem, mask).held(gang.cp_rank)
        every_held = gang.ranks.all_gather_object(self._held)
        self._owners = owners(self._held, mask, problem, gang.device, gang.ranks)
        self.wrong = self._owners.wrong
        if self.wrong is None and not self._owners.by_tokens:
            return "its ranks do not hold whole tokens, each once, and blocks are chosen by the ranks that hold them"
        self._selection = Selection(self._selector, problem, mask, self._held, every_held, gang.place)
        self.shard = self._of_step(self._step)
        prepare_s = time.perf_counter() - begun
        if self._selector.needs_lse and (reason := self._look_back()):
            return f"the selector needs the LSE of full attention: {reason}"
        begun = time.perf_counter()
        self.choice = self._choose()
        planned = self._started_for(self.choice)
        if isinstance(planned, str):
            return planned
        self._started, self.mask, self.pairs = planned, self.choice, planned.pairs
        self.prepare_s = prepare_s + time.perf_counter() - begun
        self.examination = planned.examination(passed=self._of_probe)
        return None

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _drawn(self, name: str, held: Held) -> torch.Tensor:
        return self._draw_step(name, held, self._step)

    def _draw_step(self, name: str, held: Held, step: int) -> torch.Tensor:
        part = {"q": held.q, "k": held.kv, "v": held.kv, "dout": held.out}[name]
        gang, group = self._gang, (self._gang.dp_index, self._gang.tp_index)
        return self._work.inputs.draw(
            Wanted(name, part.tokens, self._problem, self._seed, gang.device, group, part.heads, step=step)
        )  # fmt: skip

    def _of_step(self, step: int) -> Shard:
        """This rank's inputs of a step."""
        drawn = {name: self._draw_step(name, self._held, step) for name in self._names()}
        return shard_of(self._held, drawn, self._problem)

    def vary(self) -> None:
        """Negate all inputs in place: scores stay, so a selector that goes by them chooses the same, and results are negated."""
        for x in self._inputs().values():
            x.neg_()
        self.negated = not self.negated

    def _look_back(self) -> str | None:
        """Have full attention of the step before, whose LSE a selector is given; why the ranks cannot run it. Collective."""
        full = self._all_started()
        if isinstance(full, str):
            return full
        earlier = self._of_step(self._step - 1)
        begun = time.perf_counter()
        _, saved = forward(full.run, earlier)
        self._lse = full.run.lse(saved)
        if self._gang.device.type == "cuda":
            torch.cuda.synchronize(self._gang.device)
        self._lse_s = time.perf_counter() - begun
        return None

    # -- passes ----------------------------------------------------------------------------------------------------

    def _choose(self) -> BlockMap:
        return self._selection.choose(self.shard.q, self.shard.k, self._lse)

    def _plan(self, mask: Mask) -> RankRun:
        """The strategy at work on a part of the cell's mask. Collective.

        Raises:
            ValueError: it wants tokens elsewhere.
        """
        gang = self._gang
        run: RankRun = self._strategy.start(self._problem, mask, self._work.kernel, gang.place)
        held = run.held
        for own, wanted in ((self._held.q, held.q), (self._held.kv, held.kv), (self._held.out, held.out)):
            if own is not wanted and not (wanted.heads is None and np.array_equal(own.tokens, wanted.tokens)):
                raise ValueError(f"{type(self._work.strategy).__name__} deals tokens out by what is chosen, after inputs are there")
        return run

    def _started_for(self, mask: Mask) -> Started | str:
        """The strategy at work on this rank, or why the ranks cannot run it. Collective."""
        run = run_of_all(lambda: self._plan(mask))
        return run if isinstance(run, str) else self._at_work(mask, run)

    def _all_started(self) -> Started | str:
        """Full attention on this rank, of the cell's mask or, where a kernel takes blocks alone, of all of its blocks; or why the
        ranks cannot run it. Collective."""
        kernel, problem = self._work.kernel, self._problem
        reason = kernel.unsupported(problem, self.within)
        if reason is None:
            return self._started_for(self.within)
        every = chosen(np.broadcast_to(True, self._selection.shape), *self._selection.edges, self.within)
        return self._started_for(every) if kernel.unsupported(problem, every) is None else f"kernel: {reason}"

    def _at_work(self, mask: Mask, run: OnAllRanks) -> Started:
        pairs, heads = mask.pairs(self._problem.heads.q), self._problem.heads.q
        asked = self.within if pairs < self.within.pairs(heads) else None
        return Started(self._work, self._gang, mask, asked, pairs, run.own, self._owners, run.calls, 0.0, self._check_seed)

    def phases(self) -> Phases:
        shard = self.shard

        def computed(passed: Passed) -> Passed:
            assert passed.run is not None
            out, saved = forward(passed.run, shard)
            return passed._replace(out=out, saved=saved)

        phases: dict[str, Callable[[Any], Any]] = {
            "select": lambda _: Passed(self._choose()),
            "plan": lambda passed: passed._replace(run=self._plan(passed.choice)),
            "forward": computed,
        }
        if shard.dout is not None:
            dout = shard.dout
            phases["backward"] = lambda passed: passed._replace(gradients=passed.run.backward(dout, passed.saved))
        return phases

    def _whole_pass(self) -> tuple[Passed, Result]:
        """All phases once, and what they gave; the bytes of each are counted. Collective."""
        passed: Any = None
        lse = None
        for phase, run in self.phases().items():
            passed = run(passed)
            if phase == "select":
                self._sent[phase] = Sent(self._selection.bytes_sent, self._selection.bytes_between_nodes)
            elif phase != "plan" and (counters := passed.run.counters()):
                self._sent[phase] = Sent(counters.bytes_sent, counters.bytes_between_nodes)
            if phase == "forward":  # before backward takes its buffers
                lse = passed.run.lse(passed.saved)
        return passed, self._given(passed, lse)

    def _given(self, passed: Passed, lse: torch.Tensor | None = None) -> Result:
        """The result of a pass. Collective."""
        assert passed.run is not None
        gradients = () if passed.gradients is None else (passed.gradients,)
        return Result.of(self._problem, passed.run, (passed.out, passed.saved, *gradients), lse)

    def first_pass(self) -> None:
        self._pass = self._whole_pass()

    def _of_probe(self, shard: Shard) -> Result:
        """A pass of a probe's inputs, by the plan for what was chosen for others. Collective."""
        return self._started.passed(shard)

    def variants(self) -> dict[str, Phases]:
        run = self._plan(self.choice)
        alone = {
            "compute": run.replay(compute=True, communicate=False),
            "communication": run.replay(compute=False, communicate=True),
        }
        found = {name: passes for name, passes in alone.items() if passes is not None}
        if not found:
            return {}
        _, saved = forward(run, self.shard)
        return {name: self._alone(passes, saved) for name, passes in found.items()}

    def alone(self) -> Phases:
        """None: planning may make communicators, which takes the ranks of all groups."""
        return {}

    def timeline(self) -> list[list[float]] | None:
        shard = self.shard
        return self._plan(self.choice).timeline(shard.q, shard.k, shard.v, shard.dout, shard.sink)

    # -- checks ----------------------------------------------------------------------------------------------------

    def check_first(self, say: Say) -> None:
        passed, result = self._pass
        say("checking what was chosen, by one rank alone")
        self._check_repeated("the first pass", passed.choice)
        self._check_choice("the first pass", passed.choice)
        say("checking the first pass against the float64 reference")
        self.examination.first(self.shard, result)
        say("counting the recall")
        self._recall = self._recalled(passed.choice, result)
        del self._pass
        say("checking every row and column by probes")
        for probe in self.examination.probes:
            self.examination.probe(probe, self.shard)
        self.draw()

    def check_again(self) -> None:
        passed, result = self._whole_pass()
        self._check_repeated("the first pass", passed.choice)
        self._check_choice("the first pass", passed.choice)
        if self.examination.probes:
            self.examination.begin(result)
            self.examination.probe("level", self.shard)
        else:
            self.examination.first(self.shard, result)
        self.draw()
        self._let_go()

    def _let_go(self) -> None:
        """Forget the plan of the checks: its buffers are no memory of a pass, which plans anew."""
        self._started = replace(self._started, run=cast("RankRun", None))

    def check_timed(self, passed: Passed) -> None:
        part = "last timed pass"
        result = self._given(passed)
        if not self.negated or self._differing(self.choice, passed.choice) == 0:
            self._check_repeated(part, passed.choice)
            self.examination.last(part, result, self.negated)
            return
        self._check_choice(part, passed.choice)  # the selector does not go by scores alone
        self._examine(passed, result)

    def check_last(self) -> None:
        self._seed += 1
        self.draw()
        self.vary()
        if self._selector.needs_lse:
            refused = self._look_back()
            assert refused is None, refused
        passed, result = self._whole_pass()
        self._check_choice("last pass", passed.choice)
        self._examine(passed, result)

    def _examine(self, passed: Passed, result: Result) -> None:
        """Compare a later pass with float64, by the mask that it chose. Collective."""
        assert passed.run is not None
        self._against_reference(self._at_work(passed.choice, OnAllRanks(passed.run, self._started.calls)), result)

    def _against_reference(self, started: Started, result: Result) -> None:
        later = replace(started, asked=None).examination(1)
        later.judge = self.examination.judge
        later.first(self.shard, result)

    def _differing(self, one: BlockMap, other: BlockMap) -> int:
        """Blocks that one choice of this rank keeps and another does not, over all ranks. Collective."""
        own = sum(int((one.keep(i) != other.keep(i)).sum()) for i in range(one.maps))
        return sum(self._gang.ranks.all_gather_object(own))

    def _check_repeated(self, part: str, choice: BlockMap) -> None:
        """The same inputs, the same choice. Collective."""
        self.examination.judge.number(
            CHOICE, "blocks", float(self._differing(self.choice, choice)), 0.0, f"{part}: chosen otherwise"
        )

    def _check_choice(self, part: str, choice: BlockMap) -> None:
        """What a pass on the inputs as they are has chosen, against what one rank alone does; queries without a key. Collective."""
        judge, ranks = self.examination.judge, self._gang.ranks
        digests = ranks.all_gather_object([blake2b(choice.keep(i).tobytes()).digest() for i in range(choice.maps)])
        judge.number(CHOICE, "ranks", float(sum(each != digests[0] for each in digests)), 0.0, f"{part}: ranks with other maps")
        numbers = self._again(choice)
        mine = numbers[self._gang.cp_rank :: len(digests)].tolist()
        wrong = [number for number, keep in self._chosen_alone(numbers, mine) if (keep != _of_row(choice, number)).any()]
        judge.number(CHOICE, "one rank", float(len(wrong)), 0.0, f"{part}: one rank alone chooses others for blocks {wrong[:3]}")
        judge.number(CHOICE, "queries", float(self._blind(choice)), 0.0, f"{part}: queries that see none of the keys kept")

    def _again(self, choice: BlockMap) -> Ints:
        """The blocks of queries that are chosen once more: all of a short sequence, else the last one and a draw of others."""
        blocks = len(choice.q_edges) - 1
        if self._problem.queries * self._problem.seqlen <= ALL_BLOCKS or blocks <= BLOCKS:
            return np.arange(blocks)
        drawn = np.random.default_rng([*self._check_seed, blocks]).choice(blocks - 1, BLOCKS - 1, replace=False)
        return np.append(np.sort(drawn), blocks - 1)

    def _blind(self, choice: BlockMap) -> int:
        """Queries of this rank, over the maps, that see a key by the cell's mask and none by what was chosen."""
        device, tokens = self._gang.device, self._held.q.tokens
        ones = torch.ones((1, self._problem.seqlen), device=device)
        sees = Visible(self.within, tokens, device).sums(ones, whole=True)[0] > 0
        some = (Visible(choice, tokens, device, one).sums(ones, whole=True)[0] == 0 for one in range(choice.maps))
        return sum(int((none & sees).sum()) for none in some)

    def _chosen_alone(self, numbers: Ints, mine: Sequence[int]) -> list[tuple[int, Keep]]:
        """What this rank keeps for some blocks of queries when it looks at all blocks itself, on inputs that it draws. Collective.

        Args:
            numbers: the blocks that any rank chooses for; ``mine``: those of this one.
        """
        selector, problem = self._selector, self._problem
        k_edges, blocks = self._selection.keys.edges, len(self._selection.queries.sizes)
        rounds = selector.rounds(problem)
        asked = [one.blocks(blocks) for one in rounds if one.queries is not None]
        lse = self._lse_of(np.unique(np.concatenate([numbers, *asked])))
        known: Features = {}
        for one in rounds:
            parts: list[list[Features]] = [[], []]
            if one.keys is not None:
                parts[0] = [one.keys(k, np.array([len(k)]), known) for k in self._keys_alone()]
            if one.queries is not None:
                parts[1] = [one.queries(self._rows_alone(number, lse), known) for number in one.blocks(blocks).tolist()]
            told = {name: torch.cat([part[name] for part in side]) for side in parts if side for name in side[0]}
            known = one.all(known | told, k_edges)
        return [(number, kept(selector, self._rows_alone(number, lse), known, k_edges, problem)) for number in mine]

    def _lse_of(self, numbers: Ints) -> dict[int, torch.Tensor | None]:
        """The LSE that a selector is given, by block of queries. Collective."""
        edges = self._selection.queries.edges
        if self._lse is None:
            return dict.fromkeys(numbers.tolist())
        tokens = spread(edges[numbers], edges[numbers + 1])[1]
        found = collected([self._lse], self._held.q.tokens, tokens, self._gang.ranks)[0].to(self._lse.dtype)
        return dict(zip(numbers.tolist(), found.split(np.diff(edges)[numbers].tolist()), strict=True))

    def _row_drawn(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows of an input as it is now, drawn by this rank."""
        part = Part(np.arange(begin, end))
        x = self._drawn(name, Held(part, part, part))
        return x.neg() if self.negated else x

    def _keys_alone(self) -> Iterator[torch.Tensor]:
        """Every block of keys."""
        edges = self._selection.keys.edges.tolist()
        for first in range(0, len(edges) - 1, TOGETHER):
            some = edges[first : first + TOGETHER + 1]
            drawn = self._row_drawn("k", some[0], some[-1])
            yield from (drawn[begin - some[0] : end - some[0]] for begin, end in pairwise(some))

    def _rows_alone(self, number: int, lse: Mapping[int, torch.Tensor | None]) -> Rows:
        """A block of queries."""
        begin, end = self._selection.queries.edges[number : number + 2].tolist()
        own = self.within.crop(begin, end, 0, self.mask.num_k)
        return Rows(number, self._row_drawn("q", begin, end), pairs_of(own, self._selection.keys.edges), own, lse[number])

    def _recalled(self, choice: BlockMap, result: Result) -> Recall:
        """The recall of a choice, counted in two ways. Collective."""
        problem, q_block = self._problem, self._selector.q_block
        numbers = sample(self.within, q_block, problem.heads.q, self._check_seed)
        found = recall(choice, self.within, problem, self.shard, result.lse, numbers, self._gang.ranks)
        by_blocks, by_lse = found.apart
        # The LSE is off by its own bound, and the mass by as much of itself.
        mine = torch.from_numpy(np.argsort(self._held.q.tokens)[np.searchsorted(np.sort(self._held.q.tokens), found.tokens)])
        lse = result.lse[mine.to(result.lse.device)].double().nan_to_num(neginf=0.0)
        bound = by_blocks * self._started.bounds.lse(lse, found.spread) + torch.finfo(torch.float64).eps
        self.examination.judge.elements(RECALL, "mass", by_lse, by_blocks, bound, found.tokens)
        return found

    def check(self) -> Check:
        check = self.examination.check()
        least, found = self._min_recall, getattr(self, "_recall", None)
        if least is None or found is None:
            return check
        worst = min(self._gang.of_groups(float(found.kept.mean())))
        if worst >= least:
            return check
        low = f"recall: {worst:.4g} of the softmax's mass is kept, less than workload.min_recall={least}"
        return replace(check, failures=[*check.failures, low])

    # -- what it is made of ----------------------------------------------------------------------------------------

    def costs(self) -> dict[str, Cost]:
        """Cost by phase; choosing and planning are no part of what attention costs."""
        found = {"select": Cost(0.0, 0.0, 0.0), "plan": Cost(0.0, 0.0, 0.0)} | self._of_passes()
        return {phase: found[phase] for phase in self.phases()}

    def counted(self) -> Counted:
        gang, heads, found = self._gang, self._problem.heads.q, self._recall
        counted = self._started.counted(self._sent, [phase for phase in self.phases() if phase != "plan"])
        pairs = gang.ranks.reduce(torch.from_numpy(self._selection.pairs(self.choice)).to(gang.device)).cpu().numpy()
        if (own := int(pairs.sum()) * (heads // len(pairs))) != self._started.pairs:
            raise AssertionError(f"selection counts {own} pairs over all query heads, the chosen mask has {self._started.pairs}")
        density = np.repeat(pairs / max(1, self.within.area), heads // len(pairs))
        every: list[tuple[Any, Any, Any]] = gang.of_groups((found.kept, found.best, density))
        kept_of, best_of, density_of = (np.concatenate(each) for each in zip(*every, strict=True))
        counted.metrics.update({
            "select/recall": float(kept_of.mean()), "select/oracle_recall": float(best_of.mean()),
            "select/recall_min_head": float(kept_of.min()), "select/recall_max_head": float(kept_of.max()),
            "select/density": float(density_of.mean()),
            "select/density_min_head": float(density_of.min()), "select/density_max_head": float(density_of.max()),
            "select/every": float(self._selector.every),
        })  # fmt: skip
        if self._selector.needs_lse:
            counted.metrics["time/earlier_step_s"] = max(EVERY.all_gather_object(self._lse_s))
        counted.metrics.update(distance(self.examination, gang))
        counted.notes.update(self._work.stated(gang))
        counted.notes["selection"] = {
            "recall": kept_of.tolist(), "oracle_recall": best_of.tolist(), "density": density_of.tolist(),
            "rows": found.rows, "blocks": found.blocks,
        }  # fmt: skip
        self._let_go()
        return counted

    def shares(self) -> dict[str, float]:
        """How long full attention takes by the same strategy and kernel, with nothing to choose or plan."""
        full = self._all_started()
        if isinstance(full, str):
            self._remarks["dense"] = f"full attention was not timed: {full}"
            return {}
        self._against_reference(full, full.passed(self.shard))
        shard, settings = self.shard, self._work.settings
        phases: Phases = {"forward": lambda _: forward(full.run, shard)}
        if shard.dout is not None:
            dout = shard.dout
            phases["backward"] = lambda passed: full.run.backward(dout, passed[1])
        stopping = Stopping.from_config(settings | {"budget_s": settings["budget_s"] / 4})
        timed, _ = measure(phases, stopping, short_warmup(settings), self._gang.device)
        return {"time/dense_s": float(np.median(np.sum(list(timed.slowest.values()), axis=0)))}

    def remarks(self) -> dict[str, Any]:
        return self._remarks


def _of_row(choice: BlockMap, number: int) -> Keep:
    """What a choice keeps for a block of queries, bool (maps, columns)."""
    return np.stack([choice.keep(i)[number] for i in range(choice.maps)])
