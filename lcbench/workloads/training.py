"""A stack of layers and its head in training, on one rank: weights, inputs, and the phases of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lcbench.inputs.drawing import draw_rows
from lcbench.measure.memory import in_use
from lcbench.measure.session import Gang, Phases
from lcbench.workloads.loss import UNLABELLED, ChunkedLoss, labels_of
from lcbench.workloads.recompute.base import Again, Recompute, Started
from lcbench.workloads.recompute.plan import Plan, planned
from lcbench.workloads.recompute.sizes import layer_bytes
from lcbench.workloads.reshard import BACK, PHASE, Reshard
from lcbench.workloads.sharing import Sharing, memory_of
from lcbench.workloads.spans import answers, images
from lcbench.workloads.traffic import Traffic
from lcbench.workloads.transformer import Attention, Half, Head, Layer, Stack, give_weights, rotations
from lcbench.workloads.watch import Watch

if TYPE_CHECKING:
    from lcbench.workloads.base import Work
    from lcbench.workloads.trained import Trained

META = torch.device("meta")
Done = Callable[[str, Any], None]  # takes the name of a part of a phase, and what that part gave


class Whole(nn.Module):
    """All layers and the head as one module, which is what FSDP2 takes the order of its units from."""

    def __init__(self, stack: Stack, head: Head) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(stack.layers), head

    def forward(self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Run the layers, as ``run`` does, on x (T, hidden)."""
        return run(x)


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of this rank that go through the layers and the head together.

    Attributes:
        stack: the layers, around the attention of these tokens.
        x: (T, hidden), what the first layer gets.
        recompute: what the layers' forward keeps, ready to run.
        loss: the head, by chunks of the tokens that it is computed for.
    """

    stack: Stack
    x: torch.Tensor
    recompute: Started
    loss: ChunkedLoss


class Training:
    """The layers and the head on this rank, and its share of a sequence.

    Attributes:
        heads: of its attention on this rank.
        x: (T, hidden), what the first layer gets; the same on all ranks of tensor parallelism.
        recompute: what the layers' forward keeps, ready to run.
        labels: (T,), what the head is to say of each token; ``labelled``: how many of the whole sequence have one.
        micro_batches: what goes through the layers one after the other; here it is one, of all tokens.
        reshard: between the ranks of images and those of tokens; None: there are no images.
        loss: the head, by chunks of the tokens that it is computed for.
        sharing: which ranks have which weights. Those that are divided or sharded are torch's DTensors, and so are their gradients.
        optimizer: None where no step is taken.

    Raises:
        Unsupported: on all ranks, where activations do not fit the memory of some host.
    """

    def __init__(self, block: Trained, work: Work, attention: Attention, recompute: Recompute, gang: Gang) -> None:
        model, problem, tokens, device = block.model, work.problem, attention.run.tokens, gang.device
        self.sharing = sharing = Sharing(gang.device_mesh, block.sharded)
        self._block, self._device = block, device
        self.heads = problem.heads
        dtype: torch.dtype = getattr(torch, problem.dtype)
        layers = []
        # A half after the other is made whole and divided, so that no rank ever has more than one of them whole.
        make = partial(self._make, seed=work.seed)
        for number in range(block.depth):
            layer = Layer(model, attention, dtype, META)
            make(layer.before, f"layers.{number}.before")
            make(layer.after, f"layers.{number}.after")
            layers.append(layer)
        self.head = Head(model, dtype, META)
        make(self.head, "head", reshard=False)
        self.stack = Stack(layers, rotations(tokens, model, dtype, device))
        self._whole = Whole(self.stack, self.head)
        sharing.unite(self._whole)
        self.optimizer = self._optimizer() if block.optimizer != "none" else None
        sequence = gang.dp_index, 0  # every rank of tensor parallelism has all of the same tokens
        self.x = draw_rows("x", tokens, (model.hidden,), dtype, work.seed, device, sequence)
        self.reshard: Reshard | None = None
        if block.shown:
            shown = images(problem.seqlen, block.shown, [work.seed, *sequence, 2])
            self.reshard = Reshard(shown, tokens, problem.scale.world_size, gang)
            self.images = draw_rows("x", self.reshard.tokens, (model.hidden,), dtype, work.seed, device, sequence)
        self._whole(lambda x: x, self.x)  # units know that they are parts of it, before a layer runs by itself
        spoken = answers(problem.seqlen, block.labelled, [work.seed, *sequence]) if block.labelled < 1 else None
        self.labels = labels_of(tokens, model.vocab, work.seed, device, sequence, spoken)
        self.labelled = int(gang.ranks.reduce((self.labels != UNLABELLED).sum()))
        self._share = 1 / max(1, self.labelled) / gang.mesh.dp
        self.micro_batches = self._micro_batches(recompute)

    def _micro_batches(self, recompute: Recompute) -> list[MicroBatch]:
        ready = recompute.start(self.stack, self.x, self._block.model.layers)
        return [MicroBatch(self.stack, self.x, ready, self._loss(self.labels))]

    def _loss(self, labels: torch.Tensor) -> ChunkedLoss:
        """Of some of this rank's tokens; those of all tokens of all ranks sum to the mean over the labelled ones."""
        block = self._block
        return ChunkedLoss(self.head, labels, block.loss_chunk, self._share, self.sharing, masked=block.masked_logits)

    @property
    def recompute(self) -> Started:
        return self.micro_batches[0].recompute

    @property
    def loss(self) -> ChunkedLoss:
        return self.micro_batches[0].loss

    @property
    def again(self) -> Again:
        """What of forward backward computes again."""
        return self.recompute.policy.again()

    @property
    def host_bytes(self) -> int:
        """Memory of the host that this rank holds for what it puts there."""
        return self.recompute.host_bytes

    def offloaded(self) -> dict[str, float]:
        """Metrics of what this rank has put there in its last step."""
        return self.recompute.metrics()

    @property
    def notes(self) -> dict[str, Any]:
        """What was measured and chosen for recomputation."""
        return self.recompute.notes

    @property
    def head_labels(self) -> torch.Tensor:
        """Labels of the tokens that the head gets in a step, in their order."""
        return torch.cat([self.labels[:0], *(each.loss.labels for each in self.micro_batches)])

    def _make(self, half: Half, name: str, seed: int, reshard: bool = True) -> None:
        half.to_empty(device=self._device)
        give_weights(half, name, seed)
        self.sharing.divide(half, reshard=reshard)

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW with a learning rate of 0: it reads and writes all that it ever does, and the weights stay.

        Its two moments have the weights' type. Weights of one mesh are stepped together, since one operation takes no others.
        """
        groups: dict[object, list[torch.Tensor]] = {}
        for weight in self.weights().values():
            groups.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
        fused = self._device.type == "cuda"
        return torch.optim.AdamW([{"params": weights} for weights in groups.values()], lr=0.0, fused=fused)

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """All weights by name."""
        named = {
            f"layers.{i}.{name}": weight for i, layer in enumerate(self.stack.layers) for name, weight in layer.named_parameters()
        }
        return named | {f"head.{name}": weight for name, weight in self.head.named_parameters()}

    def step(self, done: Done = lambda part, passed: None) -> Any:
        """A step; what its last phase gave.

        Args:
            done: called after each phase, and after each part of a phase that has several.
        """
        passed: Any = None
        for name, phase in self.phases(done).items():
            passed = phase(passed)
            done(name, passed)
        return passed

    def phases(self, done: Done = lambda part, passed: None) -> Phases:
        """Forward gives (x, y); head (x, y, dy, loss); backward and what comes after it (dx, loss), and then the weights have their
        gradients, summed over all ranks of context and data parallelism.

        ``loss`` is this rank's part: those of all ranks of context and data parallelism sum to the mean over sequences of the mean
        over a sequence's labelled tokens. ``dx`` and the gradients are this sum's derivatives.

        Args:
            done: as of ``step``, for parts of a phase.
        """
        phases: dict[str, Callable[[Any], Any]] = {}
        if self.reshard is not None:
            reshard = self.reshard
            phases[PHASE] = lambda _: reshard.forward(self.images, self.x)
        phases |= {
            "forward": lambda x: self.forward(x),
            "head": lambda passed: (*passed, *self.loss(passed[1])),
            "backward": self._backward,
        }
        if self.reshard is not None:
            phases[BACK] = self._reshard_backward
        return phases | self._of_weights()

    def _of_weights(self) -> Phases:
        """What comes after backward."""
        phases: Phases = {}
        if self.sharing.reduces:
            phases["reduce"] = self._reduce
        if self.optimizer is not None:
            phases["optimizer"] = self._step
        return phases

    def negate(self) -> None:
        """Negate the inputs in place."""
        self.x.neg_()
        if self.reshard is not None:
            self.images.neg_()

    def forward(self, x: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """``x``: what the first layer gets where that has come from elsewhere."""
        self._forget()
        return self._through(self.micro_batches[0], self.x if x is None else x)

    def _through(self, micro_batch: MicroBatch, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layers get, as a leaf of autograd, and what the last one gives."""
        x = x.detach().requires_grad_()
        return x, self._whole(micro_batch.recompute.forward, x)

    def _forget(self) -> None:
        for weight in self.weights().values():
            weight.grad = None

    def _backward(self, passed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, dy, loss = passed
        y.backward(dy)
        self.sharing.settle(self.weights().values())
        return x.grad, loss

    def _reshard_backward(self, passed: Any) -> Any:
        assert self.reshard is not None
        self.reshard.backward(passed[0])
        return passed

    def _reduce(self, passed: Any) -> Any:
        self.sharing.sum_gradients(self.weights().values())
        return passed

    def _step(self, passed: Any) -> Any:
        assert self.optimizer is not None
        self.optimizer.step()
        return passed

    # -- what it is made of ----------------------------------------------------------------------------------------

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count what this rank sends of weights, their gradients and sums of tensor parallelism within. Not for timings."""
        groups = {"tp": self.sharing.tp, "weights": self.sharing.same}
        with Traffic({kind: mesh.get_group() for kind, mesh in groups.items() if mesh is not None}) as traffic:
            yield traffic

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """Note how long each pass of attention takes within."""
        watch = Watch(self._device.type == "cuda")
        attentions = [each.stack.attention for each in self.micro_batches]
        for attention in attentions:
            attention.watch = watch
        try:
            yield watch
        finally:
            for attention in attentions:
                attention.watch = None

    def held_between_steps(self) -> int:
        """Bytes of this rank's weights and of the optimizer's states."""
        return memory_of(self.weights().values()) + self._of_optimizer()

    def _of_optimizer(self) -> int:
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return memory_of(x for state in states for x in state.values())

    def planned(self) -> Plan | None:
        """The plan of this rank's memory in a step, whose weights are not sharded: of the micro-batch with most tokens; None: it
        has no tokens."""
        if not self.micro_batches:
            return None
        tp, block = self.sharing.tp, self._block
        most = max(self.micro_batches, key=lambda each: len(each.x))
        model = block.model.divided(1 if tp is None else tp.size())
        buffers, finals = most.stack.attention.run.keeps()
        dtype = str(self.x.dtype).removeprefix("torch.")
        layer = layer_bytes(
            model, len(most.x), dtype, fused_norms=self._device.type == "cuda", finals=finals, buffers=buffers
        )  # fmt: skip
        return planned(
            model, layer, most.recompute.policy, layers=len(self.stack.layers), dtype=dtype,
            loss_rows=min(block.loss_chunk, len(most.loss.labels)),
        )  # fmt: skip

    def memory(self) -> dict[str, int]:
        """Bytes that this rank holds, by class; runs a step for it. Collective.

        ``weights``, ``gradients``, ``optimizer``: of this rank's parts, at the end of the step. ``activations``: what is allocated
        at the end of a forward and was not at its begin, which is all that backward needs of it, and the output; the most of all
        micro-batches. Weights that are gathered for a while are in none of them.
        """
        self._forget()
        activations, before = 0, in_use(self._device)

        def done(part: str, _: Any) -> None:
            nonlocal activations, before
            now = in_use(self._device)
            if part == "forward":
                activations = max(activations, now - before)
            before = now

        self.step(done)
        weights = list(self.weights().values())
        return {
            "weights": memory_of(weights),
            "gradients": memory_of(weight.grad for weight in weights if weight.grad is not None),
            "optimizer": self._of_optimizer(),
            "activations": activations,
        }
