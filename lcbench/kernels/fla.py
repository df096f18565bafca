"""flash-linear-attention: linear attention by chunks in Triton.

The library's functions are called as models call them, with its own backward (``torch.autograd``). It has no call for what a
stretch does to a state, so a summary is a whole pass: that of forward is one in which the gated delta rule has Dk columns more,
whose state begins with the identity; that of backward is one of backward and, for that rule, one of forward with Dk columns. One
rank alone asks for none. The library takes as many key/value as query heads: where heads are grouped, k, v and gates are repeated
for the group, and each query head has a state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from lcbench.kernels.base import Platform, accumulation_dtype, half_on_cuda, per_kv_head, per_query_head
from lcbench.kernels.library import LibraryCall, release_of, unfit
from lcbench.kernels.linear import LinearKernel, PreparedScan, Rule, Summary, Tokens
from lcbench.problem import Heads, Problem

if TYPE_CHECKING:
    import torch

OLDEST = (0, 4)  # before it, heads may come before tokens
STATES = ("scale", "initial_state", "output_final_state")
CALLS = (
    LibraryCall("fla.ops.gla", "chunk_gla", 4, STATES),
    LibraryCall("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", 5, STATES),
)


@dataclass(frozen=True)
class FLA(LinearKernel):
    """Both rules, half types on CUDA, head dims up to 256."""

    rules: ClassVar[tuple[Rule, ...]] = ("gla", "gated_delta_rule")
    libraries: ClassVar[tuple[str, ...]] = ("fla-core",)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return half_on_cuda(problem, platform, "flash-linear-attention")

    def missing(self) -> str | None:
        return unfit(*CALLS) or _too_old(release_of("fla"))

    def scan(self, rule: Rule, heads: Heads, dtype: torch.dtype, device: torch.device, *, scale: float) -> PreparedScan:
        return PreparedFLA(rule, heads, scale)


def _too_old(release: tuple[int, ...]) -> str | None:
    if release >= OLDEST:
        return None
    return f"flash-linear-attention {'.'.join(map(str, release))} is older than {'.'.join(map(str, OLDEST))}"


class Ran(NamedTuple):
    """A pass that backward can go through.

    Attributes:
        x: the tokens as given.
        leaves: what the library was given, (1, T, Hq, ...), and the state that it began with, (1, Hq, Dk, Dv); none for no tokens.
        results: out (1, T, Hq, Dv) and the state behind the last token (1, Hq, Dk, Dv).
    """

    x: Tokens
    leaves: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class PreparedFLA:
    """A rule for heads."""

    rule: Rule
    heads: Heads
    scale: float

    def summary(self, x: Tokens) -> Summary:
        import torch

        state, transition = self._zeros(x, self.heads.v), self._transition(x)
        if not len(x.q):
            return Summary(state, transition)
        if transition.dim() == 2:
            return Summary(self._ends(x, state), transition)
        dim, one = self.heads.dim, self._one(x)
        columns = x._replace(v=torch.nn.functional.pad(x.v, (0, dim)))
        state, transition = self._ends(columns, torch.cat([state, one], -1)).split([self.heads.v, dim], -1)
        return Summary(state.contiguous(), transition.contiguous())

    def local(self, x: Tokens) -> None:
        """The library has no call for it."""

    def forward(self, x: Tokens, state: torch.Tensor | None, local: None = None) -> tuple[torch.Tensor, torch.Tensor, Ran]:
        import torch

        begin = self._zeros(x, self.heads.v) if state is None else state
        if not len(x.q):
            return x.v.new_empty(0, self.heads.q, self.heads.v), begin, Ran(x, (), ())
        given = [per_query_head(part, self.heads.q, 1)[None] for part in x if part is not None]
        leaves = [part.detach().requires_grad_() for part in (*given, per_query_head(begin, self.heads.q, 0)[None])]
        with torch.enable_grad():
            results = self._call(*leaves)
        out, end = (part.detach()[0] for part in results)
        return out, end[:: self.heads.q // self.heads.kv].contiguous(), Ran(x, tuple(leaves), results)

    def summary_backward(self, dout: torch.Tensor, saved: Ran) -> Summary:
        """``saved`` stays as it is, so that ``backward`` can go through it again."""
        import torch

        x = saved.x
        transition, state = self._transition(x), self._zeros(x, self.heads.v)
        if not len(x.q):
            return Summary(state, transition)
        (grad,) = torch.autograd.grad(saved.results[0], saved.leaves[-1:], dout[None], retain_graph=True)
        if transition.dim() == 3:
            none = x.v.new_zeros(*x.v.shape[:2], self.heads.dim)
            transition = self._ends(x._replace(v=none), self._one(x)).mT.contiguous()
        return Summary(per_kv_head(grad[0], self.heads.kv, 0), transition)

    def backward(self, dout: torch.Tensor, saved: Ran, dstate: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
        import torch

        x, heads = saved.x, self.heads
        dend = self._zeros(x, heads.v) if dstate is None else dstate
        if not len(x.q):
            return Tokens(*(None if part is None else torch.zeros_like(part) for part in x)), dend  # type: ignore[arg-type]
        # The end of each group's first query head is the one that forward gave.
        each = dend.new_zeros(1, heads.q, heads.dim, heads.v)
        each[0, :: heads.q // heads.kv] = dend
        dq, *others, dbegin = torch.autograd.grad(saved.results, saved.leaves, (dout[None], each), retain_graph=True)
        grads = [
            per_kv_head(grad[0], heads.kv, 1).to(part.dtype) for grad, part in zip(others, x[1:], strict=False) if part is not None
        ]
        return Tokens(dq[0], *grads), per_kv_head(dbegin[0], heads.kv, 0)

    def _call(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The library's function of tokens (1, T, H, ...) and a state (1, H, Dk, Dv)."""
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla

        function = chunk_gla if self.rule == "gla" else chunk_gated_delta_rule
        return function(*given[:-1], scale=self.scale, initial_state=given[-1], output_final_state=True)

    def _ends(self, x: Tokens, state: torch.Tensor) -> torch.Tensor:
        """What tokens make of a state, whatever they read of it: of each key/value head once."""
        import torch

        given = (x.q[:, :: self.heads.q // self.heads.kv], *x[1:], state)
        with torch.no_grad():
            return self._call(*(part[None] for part in given if part is not None))[1][0]

    def _transition(self, x: Tokens) -> torch.Tensor:
        """Of ``gla``; of the other rule it is the identity without tokens, and otherwise found by a pass."""
        wide = accumulation_dtype(x.v.dtype)
        return x.decay.to(wide).sum(0).exp() if self.rule == "gla" else self._one(x)

    def _zeros(self, x: Tokens, columns: int) -> torch.Tensor:
        return x.v.new_zeros(self.heads.kv, self.heads.dim, columns, dtype=accumulation_dtype(x.v.dtype))

    def _one(self, x: Tokens) -> torch.Tensor:
        """The identity, (Hk, Dk, Dk)."""
        one = self._zeros(x, self.heads.dim)
        one.diagonal(dim1=1, dim2=2).fill_(1)
        return one
