"""What a strategy is to the rest: options as a frozen dataclass, an honest refusal, and a run on every rank.

Our own strategies are ``Scheduled``: they give a schedule, and the engine runs it. A strategy of another library starts itself.
"""

# No postponed annotations: subclasses in other modules are asked for the types of their options, ``lowering`` among them.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from lcbench.kernels.base import Kernel, Platform, Unsupported
from lcbench.masks.band import Ints
from lcbench.masks.by_head import BandsByHead
from lcbench.masks.mask import Mask
from lcbench.problem import Problem
from lcbench.schedule.build import DOCUMENTS, Order, check_count, check_order, largest_degree, too_short
from lcbench.schedule.held import Held, Part
from lcbench.schedule.lowering import Lowering
from lcbench.schedule.schedule import Schedule

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from lcbench.kernels.cache import Cache, CacheKind
    from lcbench.kernels.linear import LinearKernel
    from lcbench.schedule.execute import Counters, Executor
    from lcbench.schedule.groups import Groups
    from lcbench.schedule.scan import ScanRun
    from lcbench.schedule.simulate import Modelled


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        rank: its number among the ranks of its context-parallel group, 0 ... P-1.
        device: its device.
        groups: communicators among them, which outlive the cell.
    """

    rank: int
    device: "torch.device"
    groups: "Groups"

    @property
    def group(self) -> "dist.ProcessGroup":
        """The communicator of the context-parallel group. Collective on first use."""
        return self.groups.of("main")


class Passes(Protocol):
    """Forward and backward on one rank. Tensors are packed and hold what the rank holds (``Held``). All methods are collective."""

    def forward(
        self, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", sink: "torch.Tensor | None" = None
    ) -> "tuple[torch.Tensor, Any]":
        """out (Tq, Hq, Dv) from q (Tq, Hq, D), k (Tk, Hk, D) and v (Tk, Hk, Dv), and what backward needs.

        Args:
            sink: (Hq,) of all query heads, in the type of sums; only where the problem's softmax has one.
        """
        ...

    def forward_cache(self, q: "torch.Tensor", cache: "Cache", sink: "torch.Tensor | None" = None) -> "tuple[torch.Tensor, Any]":
        """``forward`` over what a cache holds, in the order of this rank's keys."""
        return self.forward(q, *cache.read(), sink)

    def backward(self, dout: "torch.Tensor", saved: Any) -> "tuple[torch.Tensor, ...]":
        """dq (Tq, Hq, D), dk (Tk, Hk, D) and dv (Tk, Hk, Dv) from dout (Tq, Hq, Dv); where values are numbers of keys, dk has
        their gradient in it and dv is left out; where there is a sink, last its gradient (Hq,): this rank's part of the sum."""
        ...


class RankRun(Passes, Protocol):
    """A strategy at work on one rank. A subclass takes the defaults below; ``schedule.execute.Executor`` has all members itself.

    Attributes:
        tokens: global indices of this rank's queries, in the order of its tensors; where there is nothing more to say of it, also
            of its keys.
        own_lse: whether ``lse`` belongs to ``forward``. False: other code computes it, so the check compares it with nothing and
            says so.
        sums_are_wide: whether gradients are added up in float32 or wider on their way between ranks. The check allows the
            roundings of as many additions as there are ranks where that is not known.
        resumes: whether it is known what forward saves: ``apart`` gives the tensors, and ``resume`` does without computing.
        negates: whether inputs that are all negated give the negative results. Not so where inputs choose anew what is computed.
        gives: whether inputs are to come one by one before ``forward`` or ``resume``, and gradients to be waited for one by one.
    """

    tokens: Ints
    own_lse: bool = True
    sums_are_wide: bool = False
    resumes: bool = False
    gives: bool = False
    negates: bool = True

    @property
    def held(self) -> Held:
        """What this rank is given and gives."""
        own = Part(self.tokens)
        return Held(own, own, own)

    def lse(self, saved: Any) -> "torch.Tensor":
        """(Tq, Hq) of what this rank gives, natural logarithm, with the sink in it where there is one. Collective."""
        ...

    def reads(self, kind: "CacheKind") -> str | None:
        """Why it does not read such a cache of this rank's keys and values where it lies, but a copy of it; None: it does."""
        return f"{type(self).__name__} takes keys and values as they are"

    def share(self, other: "RankRun") -> None:
        """Put buffers where those of another run are, as far as these are large enough: of such runs one is at work at a time."""
        return

    def for_lse(self, saved: Any) -> Any:
        """What ``lse`` needs of what ``forward`` has saved, while other passes run; backward needs more."""
        return saved

    def hold(self, saved: Any) -> Any:
        """What ``forward`` has just saved, as it has to be kept while other forward passes run before its backward."""
        return saved

    def apart(self, saved: Any) -> "tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], Any]]":
        """The tensors that backward needs of what was saved, and how to put tensors of the same values together again; no tensors
        where only the library knows them."""
        return [], lambda _: saved

    def keeps(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Besides inputs and results of own tokens: bytes of each buffer that lives from forward to backward, and tokens and heads
        of each result for other ranks that this one alone computes and backward needs."""
        return [], []

    def inputs(self, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "list[torch.Tensor]":
        """The tensors with which ``apart`` begins where these are the inputs, and rows of them where these are rows of the inputs.

        Raises:
            Unsupported: not where ``resumes``.
        """
        raise Unsupported(f"what {type(self).__name__} keeps for backward is known to its library alone")

    def results(self, saved: Any) -> "list[torch.Tensor]":
        """What ``resume`` needs of a pass besides its inputs, out (T, Hq, D) first.

        Raises:
            Unsupported: not where ``resumes``.
        """
        raise Unsupported(f"what {type(self).__name__} keeps for backward is known to its library alone")

    def resume(self, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor", results: "Sequence[torch.Tensor]") -> Any:
        """What ``forward`` saves for these inputs, without computing the ``results`` again. Collective.

        Raises:
            Unsupported: not where ``resumes``.
        """
        raise Unsupported(f"what {type(self).__name__} keeps for backward is known to its library alone")

    def give(self, kind: str, x: "torch.Tensor") -> None:
        """Begin the messages of an input, ``q``, ``k`` or ``v`` in this order, of the next ``forward`` or ``resume``. Collective.

        Raises:
            Unsupported: not where ``gives``.
        """
        raise Unsupported(f"{type(self).__name__} takes its inputs together")

    def begin_backward(self, dout: "torch.Tensor", saved: Any) -> None:
        """``backward`` up to where its gradients are on their way home. Collective.

        Raises:
            Unsupported: not where ``gives``.
        """
        raise Unsupported(f"{type(self).__name__} gives its gradients together")

    def gradient(self, kind: str) -> "torch.Tensor":
        """After ``begin_backward``, the gradient of ``v``, ``k`` or ``q`` once it is there, each once. Collective.

        Raises:
            Unsupported: not where ``gives``.
        """
        raise Unsupported(f"{type(self).__name__} gives its gradients together")

    def counters(self) -> "Counters | None":
        """What this rank computes, holds and has sent in the last pass; None where nobody counts."""
        return None

    def replay(self, *, compute: bool, communicate: bool) -> Passes | None:
        """The same passes without kernels or without messages, whose results mean nothing; None where there are no such passes."""
        return None

    def timeline(
        self,
        q: "torch.Tensor",
        k: "torch.Tensor",
        v: "torch.Tensor",
        dout: "torch.Tensor | None",
        sink: "torch.Tensor | None" = None,
    ) -> list[list[float]] | None:
        """Seconds of each step of one iteration, as of ``Executor.timeline``; None where steps are not known. Collective."""
        return None

    def chosen(self, saved: Any) -> BandsByHead | None:
        """Of a run that chooses by its inputs which pairs it computes: the mask of this pass, over all queries and keys. None:
        it computes the mask that it was started with. Collective."""
        return None


class Strategy(ABC):
    """A way to share attention among ranks.

    Attributes:
        one_rank: whether it is for a single rank: where nobody asks for a scale it gets 1x1.
        own_kernel: whether it brings its own kernel, so that a cell's kernel changes nothing of what is timed.
        operators: what attention it shares among ranks: ``softmax``, ``linear`` or both.
    """

    one_rank: ClassVar[bool] = False
    own_kernel: ClassVar[bool] = False
    operators: ClassVar[tuple[str, ...]] = ("softmax",)

    @abstractmethod
    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        """None if it can run this problem, else the reason, stored word for word in the skipped result.

        A library must refuse a mask that it would not respect.

        Args:
            mask: the cell's own, (queries, keys).
        """

    def computes(self, problem: Problem, mask: Mask) -> Mask:
        """The mask that it computes where a cell asks for ``mask``: the same, unless it approximates. ``start`` gets this one, its
        results are checked against this one, and how far they are from the cell's own mask is a metric."""
        return mask

    def approximates(self, problem: Problem, mask: Mask) -> bool:
        """Whether its results are not those of the cell's mask. ``unsupported`` has nothing against the problem."""
        return self.computes(problem, mask) is not mask

    def settled(self, problem: Problem, mask: Mask) -> "Strategy":
        """The same strategy with tokens dealt out as for ``mask``, the cell's own: started for any part of that mask, its ranks
        hold what they hold for all of it. Inputs lie where they are before anything is chosen."""
        return self

    @property
    def inside(self) -> "dict[str, Scheduled]":
        """By which strategies a sub-group of ranks may share documents of a batch, by name; none: by no schedule of ours."""
        return {}

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        """Why it does not run on such a machine, whatever is installed; None: it does."""
        return None

    def only_in_a_step(self) -> str | None:
        """What of its options means something in a training step only; None: nothing."""
        return None

    def missing(self) -> str | None:
        """Why it does not run in this process: which library is not installed, or is of another release. Asked by every rank."""
        return None

    def modelled(self, problem: Problem, mask: Mask) -> "Modelled | None":
        """What is simulated for it (``schedule/simulate.py``); None: nobody knows how it works."""
        return None

    @abstractmethod
    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> RankRun:
        """Make this rank ready to run. Collective.

        Raises:
            Unsupported: the kernel cannot run a tile of this rank.
        """

    def start_linear(self, problem: Problem, mask: Mask, kernel: "LinearKernel", place: Place) -> "ScanRun":
        """``start`` for linear attention, where ``operators`` has that. Collective.

        Raises:
            Unsupported: the kernel cannot run these heads.
        """
        raise Unsupported(f"{type(self).__name__} shares no linear attention among ranks")


@dataclass(frozen=True)
class Scheduled(Strategy):
    """A strategy as data, which the engine runs.

    Attributes:
        lowering: ``auto``: what moves within whole sets of ranks goes by collectives; ``p2p``: everything from point to point.
        by_mask: whether the schedule depends on the mask; then a part of a mask is run by the schedule of all of it (``settled``).
    """

    by_mask: ClassVar[bool] = False

    # At its default it is no part of a cell, whose id is from before there was a choice.
    lowering: Lowering = field(default="auto", kw_only=True, metadata={"left_out": True})

    @property
    def inside(self) -> "dict[str, Scheduled]":
        """Itself; a layout ``auto`` is then that of documents, of which every rank of a sub-group gets its share."""
        own = replace(self, layout=DOCUMENTS) if getattr(self, "layout", None) == "auto" else self  # type: ignore[call-arg]
        return {type(self).__name__.lower(): own}

    @property
    def apart(self) -> bool:
        """Whether q, k and v are exchanged one by one, as a layer projects them."""
        return False

    def settled(self, problem: Problem, mask: Mask) -> "Scheduled":
        return Settled(self, mask, lowering=self.lowering) if self.by_mask else self

    @abstractmethod
    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        """Who owns which tokens, and what each rank computes and sends in each step."""

    def modelled(self, problem: Problem, mask: Mask) -> "Modelled":
        from lcbench.schedule.simulate import Modelled  # with scipy, which planning does without

        return Modelled(self.schedule(problem, mask), mask, problem)

    def start(self, problem: Problem, mask: Mask, kernel: Kernel, place: Place) -> "Executor":
        from lcbench.schedule import execute  # with torch, which planning does without

        return execute.Executor(
            self.schedule(problem, mask), mask, kernel, problem,
            rank=place.rank, device=place.device, groups=place.groups, lowering=self.lowering, apart=self.apart,
        )  # fmt: skip

    def start_linear(self, problem: Problem, mask: Mask, kernel: "LinearKernel", place: Place) -> "ScanRun":
        from lcbench.schedule import scan  # with torch, which planning does without

        return scan.ScanRun(
            self.schedule(problem, mask), kernel, problem,
            rank=place.rank, device=place.device, groups=place.groups, lowering=self.lowering,
        )  # fmt: skip


@dataclass(frozen=True)
class LinearOnly(Scheduled):
    """A strategy that moves states of linear attention: ranks have stretches of the tokens in their order, of any length."""

    operators: ClassVar[tuple[str, ...]] = ("linear",)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return None if problem.rule is not None else "is for linear attention: workload=linear_attention"


@dataclass(frozen=True)
class Settled(Scheduled):
    """A strategy that runs a part of a mask by the schedule of all of it: tokens lie, and travel, as for the whole mask, and tiles
    without a pair are left out.

    Attributes:
        strategy: whose schedule it is.
        mask: for which.
    """

    strategy: Scheduled
    mask: Mask

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return self.strategy.unsupported(problem, self.mask)

    @property
    def apart(self) -> bool:
        return self.strategy.apart

    def schedule(self, problem: Problem, mask: Mask) -> Schedule:
        return self.strategy.schedule(problem, self.mask)


@dataclass(frozen=True)
class Dealt(Scheduled):
    """A strategy with a shard of tokens per rank.

    Attributes:
        layout: how tokens are dealt out; ``auto``: zigzag or contiguous, whichever is better balanced by exact area.
    """

    by_mask: ClassVar[bool] = True

    layout: Order = "auto"

    def __post_init__(self) -> None:
        check_order(self.layout)

    def unsupported(self, problem: Problem, mask: Mask) -> str | None:
        return too_short(problem, problem.scale.world_size)


@dataclass(frozen=True)
class HeadGrid:
    """The options of a strategy that exchanges heads in groups of U ranks, and does something else across these.

    Attributes:
        ulysses_degree: U, or ``auto``: the largest that divides the GPUs of a node and splits the heads.
    """

    ulysses_degree: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.ulysses_degree != "auto":
            check_count("ulysses_degree", self.ulysses_degree)

    def degree(self, problem: Problem) -> int:
        """U, ranks of a head exchange."""
        return largest_degree(problem) if self.ulysses_degree == "auto" else self.ulysses_degree
