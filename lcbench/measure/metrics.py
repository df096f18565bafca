"""Every metric that an attempt holds: key, unit, how draws of a mask are joined, and what it means.

``python -m lcbench.measure.metrics`` prints the table of docs/metrics.md. In a key ``<phase>`` stands for a phase of the workload
or ``total``, ``<x>`` for a tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Better = Literal["lower", "higher"] | None


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        key: in ``metrics`` of an attempt, perhaps with ``<phase>`` or ``<x>``.
        unit: SI; ``1`` for a count or a ratio.
        text: what it is, for docs/metrics.md.
        better: which way is better; None where neither is, or where it says nothing of a choice.
        over_draws: what the metric of several draws of a mask is: the mean of theirs, the max, the rate of all their work, or None
            for one that only several draws have.
        sample: under which key ``samples`` has the value of each draw.
    """

    key: str
    unit: str
    text: str
    better: Better = None
    over_draws: Literal["mean", "max", "rate"] | None = "mean"
    sample: str | None = None

    def names(self, key: str) -> bool:
        """Whether a key of an attempt is this metric's."""
        return re.fullmatch(re.sub(r"<\w+>", r"\\w+", self.key), key) is not None


METRICS = (
    Metric(
        "time/<phase>/median_s", "s",
        "the mean of the blocks' medians: a cell is timed in `measure.blocks` blocks, at its turn and again later in its pack",
        "lower", sample="draw_<phase>_median_s",
    ),
    Metric(
        "time/<phase>/p20_s", "s",
        "20 % of the iterations of all blocks are faster; of several draws as far from the median as in the first block", "lower",
    ),
    Metric("time/<phase>/p80_s", "s", "80 % are faster", "lower"),
    Metric(
        "time/blocks", "1",
        "how many blocks were measured; `provenance.lost_blocks` says why there are fewer than were asked for, `provenance.again` "
        "when each was",
    ),
    Metric(
        "time/iterations", "1",
        "how many were timed in all blocks; the tag `lcbench.stopped_by` says why no more in the first: precision, budget, "
        "iterations",
    ),
    Metric("time/noise", "1", "relative half-width of the 95 % interval of the median of the total", "lower", "max"),
    Metric(
        "time/prepare_s", "s",
        "building mask, schedule, messages, buffers and kernel inputs, slowest rank; paid once per mask and layout", "lower",
    ),
    Metric("time/first_pass_s", "s", "the first pass, with what the kernel compiles at first use, slowest rank"),
    Metric(
        "time/check_s", "s",
        "the check of the first block: comparison with the reference, probe passes, the last pass, and its and the timed pass's "
        "comparison with the first",
    ),
    Metric(
        "time/measure_s", "s",
        "all that comes after the check: timing with its warm-up, memory, computing and communicating apart",
    ),
    Metric(
        "compute/<phase>/tflops_per_gpu", "TFLOP/s",
        "FLOPs / (median time x ranks); of attention forward 2 x pairs (area x query heads) x (dim of keys + dim of values), "
        "backward 2 x pairs x (3 x dim of keys + 2 x dim of values), which is 2.5 times that where they are equal; of a training "
        "step besides, per weight and token, 2 forward and 4 backward, of the head 6 per labelled token, and nothing for "
        "what is computed again; of linear attention, per token and Dk x Dv of a head, forward 2 for each query head and 2 "
        "(`gla`) or 4 (`gated_delta_rule`) for each key/value head, as its recurrence has, and twice that backward; of sparse "
        "attention only the pairs that were kept, and nothing for choosing, whose time counts in the total. A phase without FLOPs "
        "has no rate", "higher", "rate",
    ),
    Metric("compute/<phase>/mfu", "0..1", "the same over `compute/peak_tflops`", "higher", "rate"),
    Metric("compute/tflops_per_gpu", "TFLOP/s", "of the total", "higher", "rate"),
    Metric("compute/mfu", "0..1", "of the total", "higher", "rate"),
    Metric(
        "compute/peak_tflops", "TFLOP/s",
        "of one device: `conf/device` for a known one, else measured by a matrix product; `lcbench.peak_source` says which",
    ),
    Metric(
        "compute/hfu", "0..1",
        "of a training step: as `compute/mfu`, with what `recompute` has done once more counted too", "higher",
    ),
    Metric("step/layers", "1", "layers that a training step was measured with"),
    Metric("step/labelled_tokens", "token", "tokens that its loss is the mean of"),
    Metric(
        "step/labelled_max_over_mean", "1",
        "labelled tokens of the rank that has most of them over the mean: with `workload.masked_logits=true`, how much of the head "
        "the busiest rank has", "lower",
    ),
    Metric(
        "step/images_max_over_mean", "1",
        "with `workload.vision`: tokens of images of the rank that has most of them, before they are re-sharded, over the mean",
        "lower",
    ),
    Metric("step/tokens_per_gpu", "token", "tokens of a step over all ranks"),
    Metric(
        "step/recomputed_flops_per_gpu", "FLOP", "of the layers' forward that backward has done once more, no part of MFU", "lower",
    ),
    Metric(
        "step/tokens_per_s_per_gpu", "token/s", "tokens of a step / (its median time x ranks), of the layers that were measured",
        "higher",
    ),
    Metric(
        "attention/share", "0..1",
        "of a training step's time, its attention and the messages of it, backward and what is computed again included; mean over "
        "the ranks, from a pass of its own",
    ),
    Metric("layer/<phase>/median_s", "s", "`forward` or `backward` of a training step over its layers", "lower"),
    Metric("model/<phase>/repeats", "1", "how often a step of the whole model has what was measured of this phase"),
    Metric(
        "model/<phase>/step_s", "s",
        "scaled, not measured: the median of the phase times `repeats`: forward and backward by layers, the head once, sums over "
        "ranks by weights", "lower",
    ),
    Metric("model/step_s", "s", "scaled, not measured: what a step of the whole model would take, without its embedding", "lower"),
    Metric("model/tokens_per_s_per_gpu", "token/s", "scaled, not measured: tokens of a step / (`model/step_s` x ranks)", "higher"),
    Metric("model/mfu", "0..1", "scaled, not measured: FLOPs of the whole model's step over its time and peak", "higher"),
    Metric("denoise/<phase>/steps", "1", "steps of denoising that the phase has"),
    Metric("denoise/<phase>/step_s", "s", "its median over these: what a step takes, all its layers", "lower"),
    Metric(
        "memory/peak_bytes", "byte",
        "worst rank's peak of one iteration above what was in use before the kernel was made ready, without the inputs (CUDA "
        "allocator; on Linux resident peak of the process and the C library's count of what is kept). Of a training step that is "
        "all of the classes below and what is there for a while: gathered weights, logits, what is computed again", "lower", "max",
    ),
    Metric("memory/buffer_bytes", "byte", "of these, what the engine holds for buffers between ranks, worst rank", "lower", "max"),
    Metric(
        "memory/weights_bytes", "byte", "of a training step: the weights that the worst rank has for itself, its shards with FSDP",
        "lower", "max",
    ),
    Metric("memory/gradients_bytes", "byte", "their gradients, as the step leaves them, worst rank", "lower", "max"),
    Metric("memory/optimizer_bytes", "byte", "the optimizer's states, worst rank", "lower", "max"),
    Metric(
        "memory/activations_bytes", "byte",
        "what the layers' forward leaves allocated, worst rank: what backward needs of it, kept buffers between ranks, the output",
        "lower", "max",
    ),
    Metric(
        "memory/host_bytes", "byte",
        "the host's memory that the worst rank holds for activations between forward and backward, no part of `memory/peak_bytes`",
        "lower", "max",
    ),
    Metric(
        "memory/planned_peak_bytes", "byte",
        "what `memory/peak_bytes` of a training step would be with every tensor placed before it runs (recompute.md), without the "
        "room of the attention's kernel; without FSDP, worst rank", "lower", "max",
    ),
    Metric(
        "offload/<phase>/bytes", "byte",
        "of a training step: what the worst rank copies to the host in `forward`, and from it in `backward`", "lower", "max",
    ),
    Metric(
        "kernel/calls", "1",
        "native calls of a forward pass of the rank that has most: 1 per tile is native, more is grouped and merged by LSE",
        "lower",
    ),
    Metric(
        "overlap/<phase>/compute_s", "s",
        "median of the same schedule without its messages; where there is more than one rank", "lower",
    ),
    Metric("overlap/<phase>/communication_s", "s", "median of the same schedule without its kernels", "lower"),
    Metric("overlap/<phase>/exposed_s", "s", "the whole minus `compute_s`, at least 0", "lower"),
    Metric(
        "overlap/<phase>/efficiency", "0..1",
        "(`compute_s` + `communication_s` - the whole) / the smaller of both: how much of what could be hidden is", "higher",
    ),
    Metric("comm/<phase>/bytes", "byte", "sent by the rank that sends most, counted where it is sent", "lower"),
    Metric(
        "comm/<phase>/within_node_bytes", "byte",
        "those of them that stay in the node, of the rank that sends most of these; a collective counts as messages from each of "
        "its ranks straight to each other, whatever way its library takes. Where nobody counts, this and the next are absent",
        "lower",
    ),
    Metric(
        "comm/<phase>/between_nodes_bytes", "byte", "those that leave the node, of the rank that sends most of these", "lower",
    ),
    Metric("comm/bytes", "byte", "of all phases", "lower"),
    Metric(
        "mesh/<phase>/alone_s", "s",
        "median of the same phase with all context-parallel groups of a mesh idle but one, the slowest of them, and of the total",
        "lower",
    ),
    Metric("mesh/<phase>/slowdown", "1", "the median with all groups at work over that", "lower"),
    Metric("mesh/slowdown", "1", "the same of the total: what groups that share links and memory cost one another", "lower"),
    Metric("balance/area_max_over_mean", "1", "unmasked pairs of the busiest rank over the mean", "lower"),
    Metric(
        "mask/area", "pairs", "exact; mean over the heads where they have different block maps", sample="draw_area",
    ),
    Metric("mask/density", "0..1", "`mask/area` over all pairs"),
    Metric("draws/count", "1", "seeded draws of the mask, where there are several", over_draws=None),
    Metric("draws/<phase>/min_s", "s", "the fastest draw's median", over_draws=None),
    Metric("draws/<phase>/max_s", "s", "the slowest draw's median", over_draws=None),
    Metric(
        "draws/<phase>/spread", "1", "the distance of both over the median draw: not noise, but different work", over_draws=None,
    ),
    Metric(
        "check/of_bound", "1",
        "the largest error over its bound of all parts of the check, at most 1; the attempt's `checks` have it by part and tensor, "
        "and what was not checked", "lower", "max",
    ),
    Metric(
        "check/<x>_error", "as x",
        "largest absolute error of out, lse, dq, dk, dv, dsink against the reference; of a training step those of one layer's "
        "attention",
        "lower", "max",
    ),
    Metric("check/<x>_bound", "as x", "what is allowed of that element", None, "max"),
    Metric(
        "check/distance", "1",
        "of a strategy that approximates: how far out is from what the cell's own mask gives of the keys of now, by the rows of "
        "the reference: the root of the sum of the squares of what is between them, over that of what is exact; of denoising in "
        "the steps of its last phase. So of sparse attention that keeps less than all. Its other checks are against what it "
        "computes", "lower", "max",
    ),
    Metric(
        "select/recall", "0..1",
        "of sparse attention: the share of the softmax's mass in full attention that the chosen blocks have, mean over heads and "
        "rows; exact for the rows that are looked at, whole blocks of queries of which `provenance.selection` says how many",
        "higher",
    ),
    Metric(
        "select/oracle_recall", "0..1", "the most that as many blocks of each block of queries can have: the best choice's recall",
    ),
    Metric("select/recall_min_head", "0..1", "`select/recall` of the head that has least", "higher"),
    Metric("select/recall_max_head", "0..1", "of the head that has most"),
    Metric("select/density", "0..1", "pairs of the chosen blocks over those of the cell's mask, mean over heads", "lower"),
    Metric("select/density_min_head", "0..1", "of the head that keeps least"),
    Metric("select/density_max_head", "0..1", "of the head that keeps most"),
    Metric("select/every", "1", "steps that share a choice and a plan: `selector.every`"),
    Metric(
        "select/amortised_s", "s",
        "the median of the total with `select` and `plan` divided by `select/every`: what a step takes in the mean", "lower",
    ),
    Metric("select/share", "0..1", "of that, choosing and planning", "lower"),
    Metric(
        "select/speedup", "1",
        "`time/dense_s` over the median of the total, choosing and planning in every step included", "higher",
    ),
    Metric("select/amortised_speedup", "1", "`time/dense_s` over `select/amortised_s`", "higher"),
    Metric(
        "time/dense_s", "s",
        "of sparse attention: the median of full attention of the cell's mask, by the same strategy and kernel, with nothing to "
        "choose or plan. `provenance.dense` says why it is not there where the kernel cannot run that mask",
        "lower",
    ),
    Metric(
        "time/earlier_step_s", "s",
        "of a selector that is given the LSE of an earlier step: what full attention of that step took, once, slowest rank",
        "lower",
    ),
    Metric("serving/new_tokens", "token", "new tokens of a pass, of all context-parallel groups"),
    Metric("serving/tokens_per_gpu", "token", "the same over the ranks"),
    Metric("serving/us_per_token", "us", "the median of `forward` over its new tokens", "lower"),
    Metric("serving/tokens_per_s", "token/s", "new tokens over the median of `forward`", "higher"),
    Metric("serving/tokens_per_s_per_gpu", "token/s", "`serving/tokens_per_gpu` over the median of `forward`", "higher"),
    Metric(
        "serving/cache_bytes", "byte", "bytes of the cache that `forward` has to read at the least, scales of a quantised one "
        "included, of the rank with most",
    ),
    Metric("serving/cache_bytes_per_token", "byte", "the same of all ranks, over the new tokens", "lower"),
    Metric(
        "serving/cache_gb_per_s", "GB/s",
        "`serving/cache_bytes` over the median of `forward`: near the rate of its memory, a decode step is as fast as its cache "
        "allows", "higher",
    ),
    Metric(
        "serving/bytes_sent_per_token", "byte", "what the rank that sends most sends in `forward`, over the new tokens", "lower",
    ),
    Metric("chunk/count", "1", "chunks of a prompt"),
    Metric("chunk/first_s", "s", "what its first chunk takes, the slowest rank; median over passes of its own", "lower"),
    Metric("chunk/median_s", "s", "the median of its chunks; `chunk_s` of the samples has each", "lower"),
    Metric(
        "chunk/slowest_s", "s", "the slowest of its chunks: as long a decode step that came in between would wait", "lower",
    ),
    Metric(
        "chunk/moved_tokens", "token",
        "cached tokens of a layer that a rank has in a chunk and had not in the chunk before, added up over chunks and ranks: what "
        "moves as the cache grows, which is not timed", "lower",
    ),
    Metric(
        "chunk/bubble", "0..1",
        "of a pipeline: the share of a pass in which ranks wait for chunks to come or for others to end, mean over the ranks",
        "lower",
    ),
    Metric(
        "chunk/least_bubble", "0..1", "the same of stages and chunks that all take as long: (stages - 1) / (chunks + stages - 1)",
    ),
    Metric("batch/tokens", "token", "tokens of a batch of documents"),
    Metric("batch/documents", "1", "its documents"),
    Metric("batch/micro_batches", "1", "micro-batches that its planner has made of it"),
    Metric("batch/groups", "1", "sub-groups of ranks that share documents, in all micro-batches together"),
    Metric("batch/degree", "1", "ranks that share a token's document, mean over the tokens"),
    Metric("batch/tokens_per_s", "token/s", "`batch/tokens` over the median of the whole batch, of all ranks", "higher"),
    Metric(
        "batch/padding", "0..1",
        "what would be padding if all ranks had as many tokens as the fullest one in each micro-batch: 1 - tokens / the sum over "
        "micro-batches of ranks x tokens of the fullest", "lower",
    ),
    Metric(
        "batch/idle_share", "0..1",
        "of the time of a batch without `reduce` in which a rank waits: until the last rank of its sub-group has come, between "
        "micro-batches and behind its last one; mean over the ranks, from passes of its own", "lower",
    ),
    Metric("batch/peak_tokens", "token", "tokens of the fullest rank in a micro-batch", "lower", "max"),
    Metric(
        "batch/with_plan_s", "s", "the median of a batch and `plan/seconds`: nothing is planned while a batch runs", "lower",
    ),
    Metric(
        "batch/pipelined_s", "s", "the longer of both: the next batch is planned on another core while a batch runs", "lower",
    ),
    Metric("plan/seconds", "s", "planning a batch, on one rank, without making its costs ready; in no time of a batch", "lower"),
    Metric("plan/share", "1", "`plan/seconds` over the median of a batch", "lower"),
    Metric("plan/predicted_s", "s", "the time of the batch by the costs that it was planned with"),
    Metric("recurrent/tokens", "token", "tokens of the sequence, without those of the memory"),
    Metric("recurrent/segments", "1", "segments that it is read in"),
    Metric("recurrent/members", "1", "layers of segments that are run: segments x layers"),
    Metric(
        "recurrent/groups", "1", "groups of these that run one after the other: all of them, or segments + layers - 1 in diagonal "
        "order", "lower",
    ),
    Metric("recurrent/tokens_per_s", "token/s", "`recurrent/tokens` over the median of all phases", "higher"),
    Metric(
        "comm/communicators", "1", "of a batch: communicators that its sub-groups use besides the one of all ranks", "lower",
    ),
    Metric(
        "time/communicators_s", "s",
        "what making them and connecting their ranks took when they were first made in this pack, slowest rank", "lower",
    ),
)  # fmt: skip


@cache
def metric_of(key: str) -> Metric:
    """The metric of a key.

    Raises:
        KeyError: a key that no metric names.
    """
    found = next((metric for metric in METRICS if metric.names(key)), None)
    if found is None:
        raise KeyError(f"{key} is no metric of lcbench.measure.metrics")
    return found


def table() -> str:
    """The metrics as a Markdown table."""
    rows = [f"| `{m.key}` | {m.unit} | {m.better or ''} | {m.text} |" for m in METRICS]
    return "\n".join(["| key | unit | better | meaning |", "| --- | --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table())
