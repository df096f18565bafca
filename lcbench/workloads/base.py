"""What a workload is: what a cell runs, phase by phase, and how its results are checked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lcbench.cp.base import Strategy
from lcbench.inputs.base import Inputs
from lcbench.inputs.gaussian import Gaussian
from lcbench.kernels.base import Kernel, refusal
from lcbench.masks.mask import Mask
from lcbench.planners.base import Cost, Planner
from lcbench.problem import ALONE, Mesh, Problem, Scale
from lcbench.selectors.base import Selector
from lcbench.workloads.parts import Made, Share, attention_alone

if TYPE_CHECKING:
    from lcbench.measure.session import Gang, Session  # with torch, which planning does without


GAUSSIAN = Gaussian()
Attended = tuple[Problem, Mask, float]


class Workload(Protocol):
    """A frozen dataclass of options, found by conf/workload/<name>.yaml. Methods with a body are defaults.

    An option ``model`` or ``layers`` is said by the axis of that name. A plan asks for ``takes`` and ``unsupported`` on a login
    node, so modules import torch lazily.

    Attributes:
        takes: the axes that cells of it have besides those that all cells have: ``recompute``, ``planner``, ``selector``.
        in_groups: whether sub-groups of ranks share parts of the sequence, so that nobody asks whether the strategy can share all
            of it among all ranks.
        any_inputs: whether its queries, keys and values are what the axis ``inputs`` says, and no results of something else.
        imports: modules of others' that a rank imports when it runs, which takes it seconds. They are imported once for all ranks
            of a node, where ranks are forked; so none may look at a GPU when it is imported.
        operator: what attention it is, ``softmax`` or ``linear``: kernels have one, strategies one or more.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    in_groups: ClassVar[bool] = False
    any_inputs: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ()
    operator: ClassVar[str] = "softmax"

    def unsupported(self, problem: Problem, mask: Mask, kernel: Kernel, strategy: Strategy, recompute: Any) -> str | None:
        """None if it can run this problem with this mask, kernel and strategy, all of which take the problem; else the reason,
        stored word for word in the skipped result.

        Args:
            recompute: as in ``Work``.
        """
        return None

    def misfit(self, mesh: Mesh) -> str | None:
        """Why it does not run with such groups of ranks; None: it does. Asked where ``unsupported`` is."""
        return None

    def made(self, share: Share, recompute: Any) -> Made:
        """What it is made of on a rank with a share of a cell, for predictions (``lcbench.predict``).

        Args:
            recompute: as in ``Work``.
        """
        return attention_alone(share)

    def attends(self, problem: Problem, mask: Mask, selector: Selector | None) -> list[Attended]:
        """What its passes of attention are of, for predictions: (problem, mask, share of the passes) each. Default: the cell's own.

        Args:
            selector: who chooses the keys; None: nobody does.
        """
        return [(problem, mask, 1.0)]

    def layers_keep(self, share: Share) -> tuple[int, float] | None:
        """Layers of its whole model, and bytes that those which are run keep of a token from forward to backward on a rank, where a
        planner may have some of that in the host's memory meanwhile; None: it may not.
        """
        return None

    def unforeseen(self) -> str | None:
        """Why ``made`` leaves out something that takes time, so that cells of it are not predicted; None: it does not."""
        return None

    def input_bytes(self, problem: Problem) -> float:
        """Bytes of what a rank with its even share of the tokens is given, which ``memory/peak_bytes`` leaves out: here q, k, v
        and, with backward, dout.
        """
        return problem.input_bytes

    @abstractmethod
    def start(self, work: Work, draw: int, gang: Gang) -> Session:
        """One draw of a cell, ready to run on this rank. Collective."""
        ...


@dataclass(frozen=True)
class Work:
    """A cell as objects, for ``measure_cell``.

    Attributes:
        make_mask: gives draw 0, 1, ... ``draws - 1`` of the mask, of the heads of all tensor-parallel ranks.
        settings: how long to measure it (``measure`` of one block).
        seed: of the inputs.
        draws: how many masks are drawn.
        attempt: chooses where the check looks.
        problem: of one context-parallel group.
        mesh: which groups are at work at once.
        scale: of all ranks; None: that of the problem, of which there is one group.
        planner: who shares out the documents of a batch; None: the workload has none.
        cost: gives what documents cost, for the planner; None: nobody has said it.
        selector: who chooses the keys of sparse attention; None: the workload chooses none.
        inputs: what q, k and v are.
        recompute: what backward computes again (``lcbench.workloads.recompute``); None: the workload does not take it.
    """

    workload: Workload
    problem: Problem
    make_mask: Callable[[int], Mask]
    kernel: Kernel
    strategy: Strategy
    settings: dict[str, Any]
    seed: int
    draws: int = 1
    attempt: int = 1
    recompute: Any = None
    mesh: Mesh = ALONE
    scale: Scale | None = None
    planner: Planner | None = None
    selector: Selector | None = None
    inputs: Inputs = GAUSSIAN
    cost: Callable[[], Cost] | None = None

    def arranged(self, gang: Gang) -> Gang:
        return gang.arranged(self.mesh, self.scale or self.problem.scale)

    def unavailable(self, gang: Gang) -> str | None:
        chosen = refusal(self.kernel, self.problem, gang.device) or refusal(self.strategy, self.problem, gang.device)
        return chosen or self.inputs.missing() or (self.selector.missing() if self.selector is not None else None)

    def stated(self, gang: Gang) -> dict[str, Any]:
        """What the inputs of a group state of themselves, for the provenance."""
        found = self.inputs.states(self.problem, self.seed, (gang.dp_index, gang.tp_index))
        return {"inputs": found} if found else {}

    def start(self, draw: int, gang: Gang) -> Session:
        return self.workload.start(self, draw, gang)
