"""Layers with a memory as parts: what ``lcbench.workloads.memory_layers`` does, counted without doing it. No torch.

Bytes of what goes element by element are those of torch's operations one by one. What a group does grows with its members, but for
its launches, which are why groups are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcbench.problem import Problem
from lcbench.workloads.memory_model import MemoryModel, flops, shapes
from lcbench.workloads.parts import Attend, Compute, Made, Part, Room

# Elements that are read and written per element, by torch's operations one by one; of features also per number that they are of.
ADD, NORM, NORM_BACK, GATE, GATE_BACK, ROTATE = 3, 7, 19, 7, 13, 13
FEATURES, LOOKED_UP, RECALL, RECALL_BACK, BACK = 7, 10, 5, 8, 3  # BACK: of features, times those of forward
GATHERED = 2  # what members of a group are given, put side by side, and their gradients taken apart
JOINED, LEARNED = 3, 4  # of gradients: those of a tensor that several read, and of a weight, which is added to what is there
RESIDUALS, RESIDUALS_BACK = 3, 6  # sums in a layer
MEMORIES, MEMORIES_BACK = 5, 10  # of a memory's own elements: side by side, written to
# Operations of a group, and of each member of it besides, which exponentials on a CPU go over one by one.
KERNELS, KERNELS_BACK, EACH = 110, 190, 8


def made_of(options: MemoryModel, problem: Problem, *, fused: bool) -> Made:
    """All segments through all layers on one rank.

    Args:
        fused: whether the device is none that goes over members one by one.
    """
    return _Layers(options, problem, fused).made()


@dataclass(frozen=True)
class _Layers:
    """A pass under way to its parts."""

    options: MemoryModel
    problem: Problem
    fused: bool

    @property
    def _size(self) -> int:
        return self.problem.itemsize

    @property
    def _wide(self) -> int:
        return self.problem.sum_itemsize

    def made(self) -> Made:
        segments = self.options.segments(self.problem)
        sizes = [len(group) for group in self.options.groups(segments)]
        members, groups = float(sum(sizes)), float(len(sizes))
        rows, seqlen = self.options.rows, self.problem.seqlen
        area = segments * rows * (rows + 1) / 2
        share = area * self.options.depth / groups / (seqlen * (seqlen + 1) / 2)
        phases: dict[str, tuple[Part, ...]] = {
            "forward": (Attend("forward", groups, share=share), *self._computed(sizes, backward=False))
        }
        if self.problem.backward:
            zeroed = Compute(moved_bytes=float(self.options.depth * self._parameters * self._wide))
            phases["backward"] = (Attend("backward", groups, share=share), *self._computed(sizes, backward=True), zeroed)
        return Made(phases, self._room(segments, max(sizes)), {
            "mask/area": area, "mask/density": area / seqlen**2, "recurrent/segments": float(segments), "recurrent/groups": groups,
            "recurrent/members": members, "recurrent/tokens": float(seqlen),
        })  # fmt: skip

    def _computed(self, sizes: list[int], *, backward: bool) -> tuple[Part, ...]:
        """Of every size of group what all groups of that size do: a group's launches may take longer than what they launch."""
        one = self._member_back() if backward else self._member()
        launches, each = KERNELS_BACK if backward else KERNELS, 0 if self.fused else EACH
        return tuple(
            Compute(
                count * size * one.flops, count * size * one.operand_bytes, count * size * one.moved_bytes,
                float(count * (launches + each * size)),
            )
            for size in sorted(set(sizes)) for count in [sizes.count(size)]
        )  # fmt: skip

    @property
    def _parameters(self) -> int:
        """Weights of a layer."""
        return sum(math.prod(shape) for shape in shapes(self.options).values())

    @property
    def _turned(self) -> int:
        """Numbers of a token's q and k."""
        heads = self.options.model.heads()
        return (heads.q + heads.kv) * heads.dim

    @property
    def _products(self) -> float:
        """FLOPs of a member."""
        return flops(self.options, 1)[0] / self.options.depth

    @property
    def _features(self) -> int:
        """Elements of what is moved to look up, and to write, of a member, forward."""
        options = self.options
        return (options.rows + options.memory_tokens) * (FEATURES * options.features + LOOKED_UP * options.memory_dim)

    def _member(self) -> Compute:
        """A layer of a segment."""
        options, model = self.options, self.options.model
        rows, memory = options.rows, options.features * (model.hidden + 1)
        tokens = rows * ((GATHERED + ADD * RESIDUALS) * model.hidden + GATE * model.ffn)
        turned = rows * (ROTATE + NORM * model.qk_norm) * self._turned
        wide = rows * (RECALL + 2 * NORM) * model.hidden + turned + self._features + MEMORIES * memory
        read = self._parameters * self._size + 2 * memory * self._wide
        return Compute(self._products, float(read), float(tokens * self._size + wide * self._wide))

    def _member_back(self) -> Compute:
        options, model = self.options, self.options.model
        rows, memory = options.rows, options.features * (model.hidden + 1)
        tokens = rows * ((GATHERED + JOINED * RESIDUALS_BACK) * model.hidden + GATE_BACK * model.ffn)
        turned = rows * (ROTATE + NORM_BACK * model.qk_norm) * self._turned
        wide = rows * (RECALL_BACK + 2 * NORM_BACK) * model.hidden + turned + BACK * self._features + MEMORIES_BACK * memory
        wide += LEARNED * self._parameters
        read = self._parameters * self._size + 4 * memory * self._wide
        return Compute(2 * self._products, float(read), float(tokens * self._size + wide * self._wide))

    # -- memory ----------------------------------------------------------------------------------------------------

    def _saved(self) -> int:
        """Bytes that autograd saves of a member, without the results of its attention and its q, k and v."""
        options, model = self.options, self.options.model
        inner, features = options.memory_dim, options.features
        looked_up = (2 + 2 + 4 * options.nu) * inner + features + 1  # relu of both, both, what is multiplied; the features
        tokens = options.rows * (4 * model.hidden + 4 * model.ffn) + options.memory_tokens * model.hidden
        wide = options.rows * (looked_up + model.hidden + 3) + features * (model.hidden + 1)
        wide += options.memory_tokens * (looked_up + 3 * model.hidden + 4)
        return tokens * self._size + wide * self._wide

    def _attention(self) -> int:
        """Bytes that the attention of a member keeps: q, k, v, out and LSE."""
        heads = self.options.model.heads()
        numbers = heads.q * (heads.dim + heads.v) + heads.kv * heads.kv_width
        return self.options.rows * (numbers * self._size + heads.q * self._wide)

    def _room(self, segments: int, most: int) -> Room:
        options, model = self.options, self.options.model
        weights = float(options.depth * self._parameters * self._size)
        learned = float(options.depth * self._parameters * self._wide) if self.problem.backward else 0.0
        memories = options.depth * options.features * (model.hidden + 1) * self._wide
        given = segments * options.rows * model.hidden * self._size
        working = most * (self._saved() + self._attention())  # of the group that is under way
        kept = segments * options.depth * (self._saved() + self._attention()) if self.problem.backward else 0
        activations = float(max(kept, working) + given + memories)
        held = weights + learned + activations
        classes = {"weights": weights, "gradients": learned, "activations": activations}
        return Room(classes, held + (working if self.problem.backward else 0.0), held)
