"""A training step as parts: what ``lcbench.workloads.training`` does, counted without doing it. No torch.

Bytes of what goes element by element are those of torch's operations one by one, as ``lcbench.workloads.transformer`` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lcbench.workloads.models import Model
from lcbench.workloads.parts import BATCH, GATHERED, REDUCED, Attend, Compute, Exchange, Made, Part, Room, Share, ToHost
from lcbench.workloads.recompute.base import Recompute
from lcbench.workloads.recompute.sizes import Held, LayerBytes, layer_bytes, step_peak
from lcbench.workloads.trained import Trained

SAME = ("dp", "cp")  # ranks that have the same weights differ in these
# Elements that are read and written per element, in the weights' type and in float32, by torch's operations one by one.
NORM, NORM_BACK, ADD, GATE, GATE_BACK = 2, 5, 3, 5, 9
ROTATE, ROTATE_WIDE = 2, 11  # of q and k: to float32, four products, a difference, a sum, put together, and back
LOSS, LOSS_WIDE = 4, 9  # of logits: written, widened, log-softmax, its backward, narrowed, read twice
STEP = {"none": 0, "adamw": 7}  # per weight: it, its gradient and two moments are read, and all but the gradient written
LAYER_KERNELS, LAYER_KERNELS_BACK, CHUNK_KERNELS = 40, 70, 25
MOMENTS = {"none": 0, "adamw": 2}


def made_of(options: Trained, share: Share, recompute: Recompute) -> Made:
    """A step of some layers and the head on one rank."""
    return _Step(options, share, recompute, *_of_rank(options.model, share)).made()


def batch_made_of(options: Trained, share: Share, recompute: Recompute) -> Made:
    """A step of a batch on a rank with so many tokens, as one micro-batch of them: ``batch`` is forward, head and backward."""
    step = _Step(options, share, recompute, *_of_rank(options.model, share))
    made = step.made()
    parts = ("forward", "head", "backward")
    batch = tuple(part for name in parts for part in made.phases[name])
    others = {name: phase for name, phase in made.phases.items() if name not in parts}
    return replace(made, phases={BATCH: batch} | others)


def layers_keep(options: Trained, share: Share) -> float:
    """Bytes that its layers keep of a token from forward to backward where nothing is computed again."""
    return options.depth * _of_rank(options.model, share)[1].all / share.tokens


def _of_rank(model: Model, share: Share) -> tuple[Model, LayerBytes]:
    """The model as a rank has it, and what one of its layers saves."""
    own = model.divided(share.mesh.tp)
    saved = layer_bytes(own, share.tokens, share.problem.dtype, fused_norms=share.fused, finals=share.finals, buffers=share.buffers)
    return own, saved


@dataclass(frozen=True)
class _Step:
    """A step under way to its parts. ``own``: the model as a rank has it."""

    options: Trained
    share: Share
    recompute: Recompute
    own: Model
    saved: LayerBytes

    @property
    def layers(self) -> int:
        return self.options.depth

    @property
    def _size(self) -> int:
        return self.share.problem.itemsize

    @property
    def _wide(self) -> int:
        return self.share.problem.sum_itemsize

    @property
    def _same(self) -> int:
        """Ranks that have the same weights."""
        return self.share.problem.scale.world_size * self.share.mesh.dp

    @property
    def _sharded(self) -> bool:
        return self.options.sharded and self._same > 1

    @property
    def _summed(self) -> bool:
        return not self.options.sharded and self._same > 1

    def made(self) -> Made:
        policy = self.recompute.foreseen(self.saved, self.share.hides(self._layer_forward()))
        held, again = policy.kept(self.saved), policy.again()
        forward = (*_times(self._layer_forward(), self.layers), *self._gathered(self.layers), *_to_host(held, self.layers))
        repeated: tuple[Part, ...] = (
            Attend("forward", self.layers * again.attention, again=True),
            self._token_wise().times(self.layers * again.token_wise, again=True),
            *self._sums(2 * self.layers * again.token_wise),
        )
        backward = (
            Attend("backward", self.layers), self._token_wise_back().times(self.layers), *self._sums(2 * self.layers),
            *(part for part in repeated if again != type(again)()), *self._gathered(self.layers), *self._scattered(self.layers),
            *_to_host(held, self.layers),
        )  # fmt: skip
        phases: dict[str, tuple[Part, ...]] = {"forward": forward, "head": self._head(), "backward": backward}
        if self._summed:
            phases["reduce"] = self._reduce()
        if steps := STEP[self.options.optimizer]:
            local = self._weights / (self._same if self._sharded else 1)
            phases["optimizer"] = (Compute(moved_bytes=steps * local * self._size, launches=4.0 * self.layers),)
        return Made(phases, self._room(policy, held), self._metrics(tuple(phases), again.token_wise, again.attention))

    # -- times -----------------------------------------------------------------------------------------------------

    def _layer_forward(self) -> tuple[Part, ...]:
        return (Attend("forward"), self._token_wise(), *self._sums(2))

    def _products(self, times: int, weights: int) -> Compute:
        """Products of all tokens with weights, ``times`` of them with each."""
        tokens = self.share.tokens
        return Compute(2.0 * times * weights * tokens, times * self._size * weights)

    def _token_wise(self) -> Compute:
        own, heads = self.own, self.own.heads()
        turned = (heads.q + heads.kv) * heads.dim
        elements = (2 * NORM + 2 * ADD) * own.hidden + GATE * own.ffn + (ROTATE + NORM * own.qk_norm) * turned
        moved = self.share.tokens * (elements * self._size + ROTATE_WIDE * turned * self._wide)
        return replace(self._products(1, own.layer_parameters()), moved_bytes=moved, launches=float(LAYER_KERNELS))

    def _token_wise_back(self) -> Compute:
        own, heads = self.own, self.own.heads()
        turned = (heads.q + heads.kv) * heads.dim
        sums = 5 * ADD  # of gradients of what several read: three projections, two of the MLP, two residuals
        elements = (2 * NORM_BACK + sums) * own.hidden + GATE_BACK * own.ffn + (ROTATE + NORM_BACK * own.qk_norm) * turned
        moved = self.share.tokens * (elements * self._size + ROTATE_WIDE * turned * self._wide)
        return replace(self._products(2, own.layer_parameters()), moved_bytes=moved, launches=float(LAYER_KERNELS_BACK))

    def _head(self) -> tuple[Part, ...]:
        own, options = self.own, self.options
        tokens = math.ceil(self.share.tokens * (options.labelled if options.masked_logits else 1.0))
        weights, chunks = own.head_parameters(), math.ceil(tokens / self.options.loss_chunk)
        of_logits = tokens * own.vocab * (LOSS * self._size + LOSS_WIDE * self._wide)
        of_hidden = tokens * (NORM + NORM_BACK) * own.hidden * self._size
        of_sums = chunks * weights * ((self._size + 2 * self._wide) if self._wide > self._size else 3 * self._size)
        products = Compute(6.0 * weights * tokens, 3.0 * self._size * weights)
        compute = replace(
            products, operand_bytes=chunks * products.operand_bytes, moved_bytes=of_logits + of_hidden + of_sums,
            launches=float(CHUNK_KERNELS * chunks), useful=1.0 if options.masked_logits else options.labelled,
        )  # fmt: skip
        sums: tuple[Part, ...] = ()
        if self.share.mesh.tp > 1:  # gradients of what the head gets; three numbers of each token
            sums = (Exchange(REDUCED, ("tp",), tokens * (own.hidden * self._size + 3 * self._wide) / chunks, chunks),)
        return (compute, *sums, *self._of_weights(GATHERED, weights, self._size, 1), *self._of_weights(
            ("reduce_scatter",), weights, self._wide, 1))  # fmt: skip

    def _sums(self, times: float) -> tuple[Part, ...]:
        """Of tensor parallelism: what a layer's half gives, or the gradient of what it gets, summed over ranks."""
        if self.share.mesh.tp == 1 or not times:
            return ()
        return (Exchange(REDUCED, ("tp",), self.share.tokens * self.own.hidden * self._size, times),)

    def _gathered(self, times: int) -> tuple[Part, ...]:
        return self._of_weights(GATHERED, self.own.layer_parameters(), self._size, times)

    def _scattered(self, times: int) -> tuple[Part, ...]:
        return self._of_weights(("reduce_scatter",), self.own.layer_parameters(), self._wide, times)

    def _of_weights(self, operations: tuple[str, ...], weights: int, size: int, times: int) -> tuple[Part, ...]:
        """Sharded weights, gathered while what is before them computes, and their gradients, summed while what is behind does."""
        return (Exchange(operations, SAME, weights * size, times, beside=True),) if self._sharded else ()

    def _reduce(self) -> tuple[Part, ...]:
        """Gradients summed after backward, in float32 or wider: copied into a message and back."""
        copies = self._weights * 2 * (self._size + self._wide)
        return (Exchange(REDUCED, SAME, self._weights * self._wide), Compute(moved_bytes=copies))

    @property
    def _weights(self) -> int:
        return self.layers * self.own.layer_parameters() + self.own.head_parameters()

    # -- memory ----------------------------------------------------------------------------------------------------

    def _room(self, policy: Recompute, held: Held) -> Room:
        own, layers, saved, options = self.own, self.layers, self.saved, self.options
        shards = self._same if self._sharded else 1
        weights = self._weights * self._size / shards
        steady = weights * (1 + MOMENTS[options.optimizer])
        peak = step_peak(
            own, saved, policy.kept, layers=layers, dtype=self.share.problem.dtype, loss_chunk=options.loss_chunk, shards=shards
        )
        kept = layers * held.device - held.inputs + saved.x.bytes
        working = held.attending or held.working - (0 if held.buffered else saved.after.bytes)
        of_one = own.layer_parameters() * self._size
        attending = kept + saved.x.bytes + working + of_one + own.head_parameters() * self._size / shards
        classes = {
            "weights": weights, "gradients": weights, "optimizer": MOMENTS[options.optimizer] * weights, "activations": float(kept),
        }  # fmt: skip
        return Room(classes, steady + peak, steady + attending)

    # -- what sessions count -----------------------------------------------------------------------------------------

    def _metrics(self, phases: tuple[str, ...], token_wise: float, attention: float) -> dict[str, float]:
        """By keys of ``measure.metrics``; what depends on the mask is the predictor's."""
        seqlen, mesh = self.share.problem.seqlen, self.share.mesh
        ranks = self.share.problem.scale.world_size * mesh.count
        return {
            "step/layers": float(self.layers), "step/labelled_tokens": float(round(seqlen * self.options.labelled) * mesh.dp),
            "step/tokens_per_gpu": seqlen * mesh.dp / ranks,
            **{f"model/{phase}/repeats": repeats for phase, repeats in self.options.repeats(phases).items()},
        }  # fmt: skip


def _times(parts: tuple[Part, ...], count: int) -> Iterator[Part]:
    for part in parts:
        match part:
            case Attend():
                yield replace(part, times=count * part.times)
            case Compute():
                yield part.times(count)
            case Exchange():
                yield replace(part, times=count * part.times)
            case ToHost():
                yield ToHost(count * part.bytes)


def _to_host(held: Held, layers: int) -> tuple[Part, ...]:
    return (ToHost(float(layers * held.host)),) if held.host else ()
