"""Which rank has which weights: tensor parallelism, FSDP2, and the sums of gradients over the ranks that have the same weights.

Tensor parallelism is torch's ``parallelize_module`` in Megatron-LM's division (arXiv 1909.08053): in attention and in the MLP the
first projections by columns, the last by rows, so that each sums its output once in forward, its input's gradient once in backward.
Sharding is FSDP2's ``fully_shard`` (arXiv 2304.11277 describes its first version). Gradients are added up in float32, float64 for
float64 weights, either way, and then have the weights' type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lcbench.kernels.base import accumulation_dtype
from lcbench.schedule.messages import wait_all
from lcbench.workloads.transformer import Division, Half

BUCKET = 1 << 24  # elements of gradients that are summed in one message: 64 MiB in float32


@dataclass(frozen=True)
class Sharing:
    """How a model's weights are shared among ranks.

    Attributes:
        mesh: see ``Gang.device_mesh``. Its communicators are no strategy's, so what goes over them is counted apart.
        sharded: whether weights are sharded over the ranks that have the same ones.
    """

    mesh: DeviceMesh | None = None
    sharded: bool = False

    @cached_property
    def tp(self) -> DeviceMesh | None:
        """Ranks that have parts of each weight for the same tokens; None where a rank has it whole."""
        return self._along("tp")

    @cached_property
    def same(self) -> DeviceMesh | None:
        """Ranks that have the same weights, and other tokens or other sequences; None where there are no others."""
        return self._along("dp_cp")

    def _along(self, dimension: str) -> DeviceMesh | None:
        return self.mesh[dimension] if self.mesh is not None and dimension in (self.mesh.mesh_dim_names or ()) else None

    @property
    def reduces(self) -> bool:
        """Whether gradients are to be summed after backward."""
        return self.same is not None and not self.sharded

    def divide(self, module: Half, *, reshard: bool = True) -> None:
        """Leave this rank its part of a module's weights, which all ranks have made alike. Collective.

        Args:
            reshard: whether the whole weights are given back after each forward, and gathered again for backward.
        """
        if self.tp is not None:
            from torch.distributed.tensor.parallel import parallelize_module  # slow to import

            # Every rank takes its own part of what it has: nothing is sent.
            parallelize_module(module, self.tp, _plan(module.division), src_data_rank=None)
        if self.same is not None and self.sharded:
            (dtype,) = {weight.dtype for weight in module.parameters()}
            policy = MixedPrecisionPolicy(reduce_dtype=accumulation_dtype(dtype))
            unit = fully_shard(module, mesh=self.same, reshard_after_forward=reshard, mp_policy=policy)
            # The loss is divided by all that it is a mean over, so gradients are sums.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def unite(self, module: nn.Module) -> None:
        """Take modules that are divided as parts of one, whose forward runs them in their order."""
        if self.same is not None and self.sharded:
            fully_shard(module, mesh=self.same)
            # Values leave a half as a view of its projection. Nobody writes to it in place, which is what the warning is of.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def sum_gradients(self, weights: Iterable[torch.Tensor]) -> None:
        """Sum gradients over the ranks that have the same weights, in float32 or wider, a bucket at a time and two under way."""
        assert self.same is not None
        sum_over(self.same.get_group(), [local(weight.grad).view(-1) for weight in weights if weight.grad is not None])

    def settle(self, weights: Iterable[torch.Tensor]) -> None:
        """Sum what ranks of tensor parallelism have each a part of: gradients of norms that saw some of the heads."""
        for weight in weights:
            if isinstance(weight, DTensor) and isinstance(weight.grad, DTensor) and weight.grad.placements != weight.placements:
                weight.grad = weight.grad.redistribute(placements=weight.placements)

    def whole_loss(self) -> AbstractContextManager[None]:
        """Where a loss of logits that are divided among ranks is computed, with its backward."""
        if self.tp is None:
            return nullcontext()
        from torch.distributed.tensor.parallel import loss_parallel  # slow to import

        return loss_parallel()


class Accumulation:
    """Gradients of a module that runs forward and backward several times in a step: added up in float32 or wider. Where weights are
    sharded, they are gathered once, and gradients reduced once, with the last run."""

    def __init__(self, module: nn.Module) -> None:
        self._unit = module if isinstance(module, FSDPModule) else None
        self._module = module
        self._sums: list[torch.Tensor] = []

    def begin(self, *, last: bool) -> None:
        """Before a run's forward."""
        if self._unit is not None:
            self._unit.set_reshard_after_backward(last)
            self._unit.set_requires_gradient_sync(last)
            # The layers' backward is still to come, in the order that their forward has left.
            self._unit.set_is_last_backward(False)

    def end(self, *, last: bool) -> None:
        """After a run's backward."""
        if self._unit is not None:
            if last:
                self._unit.set_is_last_backward(True)
            return
        weights = list(self._module.parameters())
        wide = accumulation_dtype(weights[0].dtype)
        if wide == weights[0].dtype:
            return  # autograd adds them up in place
        grads = [weight.grad for weight in weights if weight.grad is not None]
        if not self._sums:
            self._sums = [grad.to(wide) for grad in grads]
        else:
            torch._foreach_add_([local(x) for x in self._sums], [local(grad) for grad in grads])
        for weight, total in zip(weights, self._sums, strict=True):
            weight.grad = total.to(weight.dtype) if last else None
        if last:
            self._sums = []


def sum_over(group: dist.ProcessGroup, flat: Iterable[torch.Tensor]) -> None:
    """Sum flat tensors of one type in place, in float32 or wider, a bucket at a time and two under way. Collective."""
    waiting: list[tuple[list[torch.Tensor], torch.Tensor, Any]] = []
    for bucket in _buckets(flat):
        whole = torch.cat(bucket).to(accumulation_dtype(bucket[0].dtype))
        waiting.append((bucket, whole, dist.all_reduce(whole, group=group, async_op=True)))
        if len(waiting) == 2:
            _take(*waiting.pop(0))
    for summed in waiting:
        _take(*summed)


def local(x: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def like(x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes a tensor that is shared among ranks as ``x`` is, of what this rank has of it."""
    if not isinstance(x, DTensor):
        return lambda own: own
    mesh, placements, shape, stride = x.device_mesh, x.placements, x.shape, x.stride()
    return lambda own: DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def whole(x: torch.Tensor) -> torch.Tensor:
    """A tensor of which ranks have parts, whole on each of them. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def memory_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors hold on this rank, those that they share counted once."""
    storages = (local(x).untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _plan(division: Division) -> dict[str, Any]:
    """torch's style of each module that is divided."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleOutput, RowwiseParallel, SequenceParallel

    everywhere = Replicate()
    styles = {
        # One tensor for all that take it, so that the gradients which come back are added before they are summed over ranks.
        "whole": PrepareModuleOutput(output_layouts=everywhere, desired_output_layouts=everywhere, use_local_output=False),
        "columns": ColwiseParallel(),
        "rows": RowwiseParallel(),
        "by_head": SequenceParallel(sequence_dim=1, use_local_output=True),
        "classes": ColwiseParallel(use_local_output=False),
    }
    return {name: style for kind, style in styles.items() for name in getattr(division, kind)}


def _buckets(flat: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Flat tensors of one type as lists of their stretches, each ``BUCKET`` elements but the last."""
    bucket: list[torch.Tensor] = []
    room = BUCKET
    for x in flat:
        while len(x):
            bucket.append(x[:room])
            x, room = x[room:], room - len(bucket[-1])
            if not room:
                yield bucket
                bucket, room = [], BUCKET
    if bucket:
        yield bucket


def _take(bucket: list[torch.Tensor], flat: torch.Tensor, work: dist.Work) -> None:
    wait_all([work])
    for x, summed in zip(bucket, flat.split([len(x) for x in bucket]), strict=True):
        x.copy_(summed)
