"""The protocol of kernels of linear attention: recurrences over tokens with a state of fixed size for each key/value head.

With a state S (Dk, Dv) per head, decays a_t in (0, 1] and strengths b_t, a token t does, in this order:

- ``gla``, gated linear attention (Yang et al., arXiv 2312.06635): S_t = diag(a_t) S_{t-1} + k_t v_t^T, a_t (Dk,);
- ``gated_delta_rule`` (Yang et al., arXiv 2412.06464): S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, a_t and b_t numbers;

and gives out_t = scale S_t^T q_t. Query head h reads the state of key/value head ``h // (Hq // Hk)``.

Both are affine in the state that they begin with: over a stretch of tokens, S_end = M S_begin + L. M is diagonal for ``gla``. So
ranks that hold stretches need of one another (M, L), or what comes out of the rank before; never keys or values.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from lcbench.kernels.base import Kernel, Prepared, Unsupported
from lcbench.masks.mask import Mask
from lcbench.problem import Heads

if TYPE_CHECKING:
    import torch

Rule = Literal["gla", "gated_delta_rule"]


class Tokens(NamedTuple):
    """What a stretch of tokens is given; gradients have the same shapes.

    Attributes:
        q: (T, Hq, Dk).
        k: (T, Hk, Dk).
        v: (T, Hk, Dv).
        decay: log a_t, finite and at most 0, in the accumulation type: (T, Hk, Dk) for ``gla``, (T, Hk) for ``gated_delta_rule``.
        beta: b_t in (0, 1), in the accumulation type, (T, Hk); None for ``gla``.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor | None = None


class Summary(NamedTuple):
    """What a stretch does to a state, in the accumulation type: S_end = M S_begin + L.

    Attributes:
        state: L, (Hk, Dk, Dv).
        transition: M, (Hk, Dk) where it is diagonal, else (Hk, Dk, Dk).
    """

    state: torch.Tensor
    transition: torch.Tensor


class PreparedScan(Protocol):
    """A kernel of linear attention made ready for stretches of one sequence on one device. T may be any number, also 0.

    Forward of a stretch comes in parts where the state that it begins with comes from another rank: ``summary``, whose results
    leave first, ``local`` while states are on their way, then ``forward``. Where the state is there, ``forward`` is all of it.
    Backward has two parts, ``summary_backward`` and ``backward``. What two parts need both is worked out by each, as libraries do.

    States, given or made, are of the accumulation type. Nothing that is given is written to.
    """

    def summary(self, x: Tokens) -> Summary:
        """What the stretch does to any state."""
        ...

    def local(self, x: Tokens) -> Any:
        """What of ``forward`` needs no state, for it to go on from; None: nothing that this kernel could do apart."""
        ...

    def forward(self, x: Tokens, state: torch.Tensor | None, local: Any = None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """(out (T, Hq, Dv) in the inputs' type, S_end (Hk, Dk, Dv), what backward needs) from the state that the stretch begins
        with; None: zero."""
        ...

    def summary_backward(self, dout: torch.Tensor, saved: Any) -> Summary:
        """What the stretch does to the gradient of a state on its way back, from dout alone: dS_begin = M dS_end + L, where this M,
        the summary's ``transition``, is the transpose of that of forward."""
        ...

    def backward(self, dout: torch.Tensor, saved: Any, dstate: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
        """(gradients of the tokens, each in the type of what it is of, and dS_begin (Hk, Dk, Dv)) from the gradient of S_end; None:
        zero."""
        ...


class LinearKernel(Kernel, Protocol):
    """One way to compute linear attention. ``rules``: the recurrences that it knows."""

    operator: ClassVar[str] = "linear"
    rules: ClassVar[tuple[Rule, ...]] = ()

    @abstractmethod
    def scan(self, rule: Rule, heads: Heads, dtype: torch.dtype, device: torch.device, *, scale: float) -> PreparedScan:
        """Make it ready for a rule that it knows.

        Raises:
            Unsupported: it cannot run these heads.
        """
        ...

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        raise Unsupported("computes linear attention, and no masks")
