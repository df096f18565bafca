"""What a plan of a model's step says, in tables and sentences, and for programs. All of it is predicted, and says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lcbench.advice.answers import band
from lcbench.advice.pipeline import Plan, Stage
from lcbench.advice.planning import Planned, Rival
from lcbench.advice.sizing import GIB
from lcbench.advice.ways import Asked, Way
from lcbench.predict.machines import peak_flops
from lcbench.predict.predictor import Predictor
from lcbench.report.amounts import digits, duration, more, percent, size, times
from lcbench.report.fitted import Column, Fitted

MOST_RIVALS = 12  # that the table has
PARTS = {  # of a step, and why one that has more of it loses
    "computing": "computing", "recomputing": "recomputing", "exposed communication": "exposed communication",
    "gradients and optimizer": "gradients and optimizer", "bubble": "bubble of the pipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What is said of a search: ``asked``, what was ``found``, by which ``predictor``."""

    asked: Asked
    found: Planned
    predictor: Predictor

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.asked.batch * self.asked.cells[0].problem.seqlen

    def table(self) -> Fitted:
        """The stages of the plan with their layers; those that are run alike share a row."""
        plan = self.found.plan
        assert plan is not None
        table = Fitted(f"plan for machine {self.predictor.machine.name}, predicted, not measured: {self._problem}", [
            Column("stage", right=True), Column("ranks", 2), Column("layers"), Column("tp", right=True), Column("cp", right=True),
            Column("strategy"), Column("dp", right=True), Column("ZeRO", right=True), Column("recompute"),
            Column("GiB a rank", right=True), Column("ms a\nmicro-batch", 1, right=True),
        ])  # fmt: skip
        for stage, first, runs in _laid_out(plan):
            ranks = stage.ways[0].ranks
            for number, (begin, end, way) in enumerate(runs):
                new = number == 0
                table.add(
                    str(stage.number) if new else "", f"{stage.number * ranks}-{(stage.number + 1) * ranks - 1}" if new else "",
                    f"{first + begin}-{first + end - 1}", str(way.tp), str(way.cp), way.strategy, str(way.dp), str(way.zero),
                    way.recompute, digits(stage.bytes / GIB) if new else "", digits(1e3 * stage.batch_s) if new else "",
                )  # fmt: skip
        return table

    @property
    def _problem(self) -> str:
        words = self.asked.cells[0].words
        model = self.asked.cells[0].config["workload"]["model"]["name"]
        return (
            f"{model}, mask {words['mask']}, seqlen {words['seqlen']}, {_count(self.asked.batch, 'sequence')} a step, "
            f"scale {self.asked.scale}, kernel {words['kernel']}"
        )

    def lines(self) -> Iterator[str]:
        """What the plan takes, and what that rests on."""
        plan, budget = self.found.plan, self.asked.budget
        if plan is None:
            yield f"no plan fits into {size(budget)} a rank for {self._problem}"
            if self.found.rivals:
                near = self.found.rivals[0]
                yield f"nearest: {degrees(near.plan)}, {_how(near.plan.ways)}, which needs {size(near.plan.bytes)}: {_over(near)}"
            return
        low, high = plan.interval
        rate = f"{self.tokens / plan.seconds:,.0f} tokens/s"
        mfu = self._mfu(plan)
        yield (
            f"a step: {duration(plan.seconds)} predicted (95 %: {duration(low)} to {duration(high)}), {rate}"
            f"{'' if mfu is None else f', MFU {percent(mfu)}'}, {size(plan.bytes)} of {size(budget)} a rank"
        )
        yield (
            f"{_count(len(plan.stages), 'stage')}, {_count(plan.batches, 'micro-batch', 'es')} of "
            f"{_count(plan.sequences, 'sequence')}; where the time goes: "
            + ", ".join(f"{name} {duration(seconds)}" for name, seconds in plan.parts.items() if seconds)
        )
        yield f"predicted times are {band(plan.error)} in 95 % of cases; {plan.basis}"
        yield f"looked at {self.found.ways} ways to run a layer; every mix of them over layers and stages that fits was compared"

    def _mfu(self, plan: Plan) -> float | None:
        """FLOPs that have not been done before over what the GPUs could do; None where their peak is not known."""
        peak = peak_flops(self.predictor.machine, self.asked.cells[0].problem.dtype)
        return plan.flops / plan.seconds / self.asked.scale.world_size / peak if peak else None

    def rivals(self) -> Fitted:
        """The best of each number of stages and pair of degrees, and why it loses."""
        best = self.found.plan
        table = Fitted("what it was up against: the best of each pp, tp and cp, predicted", [
            Column("pp", right=True), Column("tp", right=True), Column("cp", right=True), Column("dp", right=True),
            Column("layers are run by", 3, folds=True, wanted=36), Column("s,\npredicted", right=True),
            Column("vs best", right=True),
            *(Column(part.replace(" ", "\n", 1), 2, right=True) for part in PARTS),
            Column("GiB a\nrank", right=True), Column("loses by", folds=True, wanted=24),
        ])  # fmt: skip
        for rival in self.found.rivals[:MOST_RIVALS]:
            plan = rival.plan
            way, seconds = plan.ways[0], plan.seconds
            ratio = seconds / best.seconds if best is not None and rival.fits else None
            against = "-" if ratio is None else times(1.0) if ratio <= 1 else more(ratio)
            table.add(
                str(len(plan.stages)), str(way.tp), str(way.cp), str(way.dp), _how(plan.ways), digits(seconds), against,
                *(digits(plan.parts[part]) for part in PARTS), digits(plan.bytes / GIB), why(rival, best),
            )  # fmt: skip
        return table

    def reasons(self) -> Iterator[str]:
        """What the table of rivals leaves out, and why strategies are out."""
        rest = self.found.rivals[MOST_RIVALS:]
        if fit := sum(rival.fits for rival in rest):
            yield f"{fit} more fit and are slower; output=json has all"
        if out := sum(not rival.fits for rival in rest):
            yield f"{out} more do not fit"
        for reason, where in self.found.refused.items():
            yield f"cannot run: {reason} (first at {where})"

    def as_dict(self) -> dict[str, Any]:
        """For a program; keys of what is predicted say so."""
        plan = self.found.plan
        return {
            "model": self.asked.cells[0].config["workload"]["model"]["name"], "machine": self.predictor.machine.name,
            "scale": str(self.asked.scale), "seqlen": self.asked.cells[0].problem.seqlen, "global_batch": self.asked.batch,
            "budget_bytes": self.asked.budget, "plan": None if plan is None else self._plan(plan),
            "rivals": [
                {**self._plan(rival.plan), "fits": rival.fits, "over_bytes": rival.over, "why": why(rival, plan)}
                for rival in self.found.rivals
            ],
            "refused": dict(self.found.refused), "ways": self.found.ways,
        }  # fmt: skip

    def _plan(self, plan: Plan) -> dict[str, Any]:
        low, high = plan.interval
        return {
            "predicted": {
                "seconds": plan.seconds, "low_s": low, "high_s": high, "tokens_per_s": self.tokens / plan.seconds,
                "mfu": self._mfu(plan), "bytes": plan.bytes, "split_s": plan.parts,
                "basis": plan.basis,
            },
            "micro_batches": plan.batches, "sequences": plan.sequences,
            "stages": [
                {
                    "ranks": [stage.number * stage.ways[0].ranks, (stage.number + 1) * stage.ways[0].ranks - 1],
                    "predicted_bytes": stage.bytes, "predicted_batch_s": stage.batch_s,
                    "layers": [
                        {
                            "first": first + begin, "last": first + end - 1, "tp": way.tp, "cp": way.cp, "dp": way.dp,
                            "strategy": way.strategy, "zero": way.zero, "recompute": way.recompute,
                        }
                        for begin, end, way in runs
                    ],
                }
                for stage, first, runs in _laid_out(plan)
            ],
        }  # fmt: skip


def why(rival: Rival, best: Plan | None) -> str:
    """What a plan has most more of than the best one, or by how much it does not fit."""
    if not rival.fits:
        return _over(rival)
    assert best is not None
    if rival.plan.seconds <= best.seconds:
        return "it is the plan"
    more_of = {part: rival.plan.parts[part] - best.parts[part] for part in PARTS}
    part = max(PARTS, key=lambda name: more_of[name])
    return f"{duration(more_of[part])} more {PARTS[part]}"


def _count(number: int, what: str, many: str = "s") -> str:
    return f"{number} {what}{many if number > 1 else ''}"


def _over(rival: Rival) -> str:
    return f"does not fit by {size(rival.over)}"


def degrees(plan: Plan) -> str:
    """A plan's stages and the degrees of its first layer."""
    way = plan.ways[0]
    return f"pp={len(plan.stages)} tp={way.tp} cp={way.cp} dp={way.dp}"


def _how(ways: Sequence[Way]) -> str:
    """How layers are run, with how many of each way: ``20x ring ZeRO 3 selective, 12x ring ZeRO 3``."""
    counts: dict[tuple[str, int, str], int] = {}
    for way in ways:
        key = (way.strategy, way.zero, way.recompute)
        counts[key] = counts.get(key, 0) + 1
    several = len(counts) > 1
    return ", ".join(
        f"{f'{count}x ' if several else ''}{strategy}, ZeRO {zero}, recompute {recompute}"
        for (strategy, zero, recompute), count in counts.items()
    )


def _laid_out(plan: Plan) -> Iterator[tuple[Stage, int, list[tuple[int, int, Way]]]]:
    """Each stage with the number of its first layer, and its runs of layers that are run alike: begin, end and way."""
    first = 0
    for stage in plan.stages:
        runs, begin = [], 0
        for way, same in groupby(stage.ways):
            end = begin + len(list(same))
            runs.append((begin, end, way))
            begin = end
        yield stage, first, runs
        first += len(stage.ways)
