"""What strategies of other libraries share: which masks they can express, and a run by autograd."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from lcbench.cp.base import Place, RankRun, Strategy
from lcbench.cp.ring import Ring
from lcbench.kernels.base import HALVES, Kernel, Platform
from lcbench.masks.band import BandMask
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.layout import Layout

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from lcbench.schedule.groups import Groups


# Libraries' messages go by communicators of their own, whatever the order in which they post them.
CHANNEL = "library"


class Segments(NamedTuple):
    """A mask as libraries know it: stretches ``bounds[i]:bounds[i+1]`` that see themselves, whole or causally."""

    bounds: list[int]
    causal: bool


def segments(mask: Mask) -> Segments | None:
    """The mask as segments, or None where it is anything else."""
    if not isinstance(mask, BandMask):
        return None
    bounds, kinds = [0], set()
    for band in sorted(mask):
        size = band.q1 - band.q0
        if (band.q0, band.q1) != (band.k0, band.k1) or band.q0 != bounds[-1]:
            return None
        causal = band.cuts_above and band.hi == 0 and not band.cuts_below
        if (band.cuts_above or band.cuts_below) and not causal:
            return None
        bounds.append(band.q1)
        kinds |= {causal} if size > 1 else set()  # a single token is both
    if bounds[-1] != mask.num_q or len(kinds) > 1:
        return None
    return Segments(bounds, causal=True in kinds)


def refused_mask(mask: Mask, *, known: str) -> str | None:
    """Why a mask that is not one causal or full segment is refused."""
    found = segments(mask)
    if found is None or len(found.bounds) != 2:
        return f"knows the masks {known} only"
    return None


def refused_length(problem: Problem, parts: int) -> str | None:
    return None if problem.seqlen % parts == 0 else f"needs a length that {parts} chunks divide, not {problem.seqlen}"


def refused_problem(problem: Problem, *, value_dims: bool) -> str | None:
    """Why a library for self-attention with a plain softmax does not take a problem, or None.

    Args:
        value_dims: whether it takes values of another dimension than keys.
    """
    heads, softmax = problem.heads, problem.softmax
    if problem.rectangular:
        return f"computes all tokens that it is given, and batch={problem.batch} has keys without queries"
    if heads.latent:
        return f"takes keys and values apart, and those of heads={heads} are numbers of one latent"
    if heads.dim != heads.v and not value_dims:
        return f"takes values of the keys' dimension only, and heads={heads} has {heads.dim} and {heads.v}"
    if softmax.sink or softmax.softcap:
        return f"knows neither a sink nor a softcap: softmax={softmax}"
    return None


def refused_platform(problem: Problem, platform: Platform, library: str) -> str | None:
    """Why a library for half types on CUDA does not run on a platform, or None."""
    if platform.type != "cuda":
        return f"{library} runs on CUDA devices only"
    if problem.dtype not in HALVES:
        return f"{library} takes {' and '.join(HALVES)}, not {problem.dtype}"
    return None


def grid(groups: Groups, ranks: int, degree: int) -> list[dist.ProcessGroup]:
    """A rank's two communicators of a grid: ``degree`` neighbours, and the ring of every ``degree``-th rank. Collective.

    Every rank makes every group, in the same order.
    """
    every = tuple(range(ranks))
    sets = [every[i : i + degree] for i in range(0, ranks, degree)] + [every[i::degree] for i in range(degree)]
    return [group for group in [groups.among(members, CHANNEL) for members in sets] if group is not None]


class LibraryStrategy(Strategy):
    """A strategy of another library, run by that library and checked like ours: for comparison."""

    own_kernel: ClassVar[bool] = True

    @property
    def value_dims(self) -> bool:
        """Whether the library takes values of another dimension than keys."""
        return False

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return refused_problem(problem, value_dims=self.value_dims) or self.refused(problem, mask)

    @abstractmethod
    def refused(self, problem: Problem, mask: Mask) -> str | None:
        """Why the library does not run a problem that ``refused_problem`` lets pass, or None."""

    @abstractmethod
    def layout(self, problem: Problem) -> Layout:
        """How the library deals tokens out to ranks."""


class AutogradRun(RankRun):
    """A run of a library's differentiable attention.

    Args:
        attend: q (1, T, Hq, D), k (1, T, Hk, D), v (1, T, Hk, Dv) of this rank to out, (1, T, Hq, Dv) or (1, T, Hq * Dv).
        layout: tokens of every rank.
        kernel: computes the LSE, by a ring of our own: libraries do not all return it, and the check needs it.
        place: this rank, its device, and the communicators of that ring.

    Attributes:
        own_lse: False: the LSE is that of a ring of our own, so the check compares it with nothing and says that the library's is
            unchecked.
    """

    own_lse = False

    def __init__(
        self,
        attend: Callable[[Any, Any, Any], Any],
        problem: Problem,
        mask: Mask,
        layout: Layout,
        kernel: Kernel,
        place: Place,
    ) -> None:
        from lcbench.schedule.execute import Executor  # with torch, which planning does without

        self._attend, self._problem, self.tokens = attend, problem, layout.tokens(place.rank)
        forward = replace(problem, direction="forward")
        ring = Ring().schedule(forward, mask)
        side = replace(ring.q, shards=layout)
        schedule = replace(ring, q=side, k=side)
        self._lse = Executor(schedule, mask, kernel, forward, rank=place.rank, device=place.device, groups=place.groups)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        import torch

        leaves = [x.detach()[None].requires_grad_(self._problem.backward) for x in (q, k, v)]
        with torch.set_grad_enabled(self._problem.backward):
            out = self._attend(*leaves)
        return out.detach().view(*q.shape[:2], v.shape[2]), (out, leaves)

    def lse(self, saved: Any) -> torch.Tensor:
        _, leaves = saved
        _, kept = self._lse.forward(*(x.detach()[0] for x in leaves))
        return self._lse.lse(kept)

    def backward(self, dout: torch.Tensor, saved: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        out, leaves = saved
        dq, dk, dv = torch.autograd.grad(out, leaves, dout.reshape(out.shape))
        return dq[0], dk[0], dv[0]
