"""Linear attention by chunks in operations of torch, on any device and in any type: within a chunk by products of matrices, from
chunk to chunk by the state.

Gated linear attention: Yang et al., arXiv 2312.06635, section 4. Gated delta rule: Yang et al., arXiv 2412.06464, section 3.3,
by the WY representation of arXiv 2406.06484, section 3.

Decays are summed where they are needed, and no sum is taken from another: every exponent is at most 0 and as exact as its terms.
So no decay overflows, however strong, and one of minus infinity, which forgets the state, makes no NaN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from lcbench.kernels.base import Platform, accumulation_dtype
from lcbench.kernels.linear import LinearKernel, PreparedScan, Rule, Summary, Tokens
from lcbench.problem import Heads, Problem, check_whole

if TYPE_CHECKING:
    import torch

BLOCK = 16  # tokens of a chunk between which decays by dimension are worked out pair by pair
TOGETHER = 1 << 22  # numbers of the largest tensor of the chunks that are worked on together


@dataclass(frozen=True)
class Chunked(LinearKernel):
    """Both rules, forward and backward.

    Attributes:
        chunk: tokens of a chunk.

    Raises:
        ValueError: a chunk below 1.
    """

    rules: ClassVar[tuple[Rule, ...]] = ("gla", "gated_delta_rule")
    chunk: int = 64

    def __post_init__(self) -> None:
        check_whole("kernel.chunk", self.chunk, 1)

    def unavailable(self, problem: Problem, platform: Platform) -> str | None:
        return None

    def scan(self, rule: Rule, heads: Heads, dtype: torch.dtype, device: torch.device, *, scale: float) -> PreparedScan:
        return PreparedChunked(GatedLinear(scale) if rule == "gla" else GatedDelta(scale), heads, self.chunk)


class Chunks(NamedTuple):
    """n chunks of C tokens in the accumulation type, with zeros behind the last token; their gradients have the same shapes.

    Attributes:
        q: (n, Hk, G, C, Dk); G query heads read a key/value head.
        k: (n, Hk, C, Dk).
        v: (n, Hk, C, Dv).
        decay: (n, Hk, C, Dk or 1).
        beta: (n, Hk, C, 1).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    decay: torch.Tensor
    beta: torch.Tensor | None


class Carry(NamedTuple):
    """What chunks do to the states that they begin with: S_end = keep * S + keys^T u, with u = values - erased S.

    Attributes:
        keep: (n, Hk, Dk or 1, 1).
        keys: each token's key by what is left of it at the end, (n, Hk, C, Dk).
        values: (n, Hk, C, Dv).
        erased: (n, Hk, C, Dk); None: nothing is erased, and u = values.
    """

    keep: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    erased: torch.Tensor | None


class Read(NamedTuple):
    """What chunks read: out = queries S + pairs u.

    Attributes:
        queries: each token's query by what is left of S, (n, Hk, G, C, Dk).
        pairs: (n, Hk, G, C, C), zero above the diagonal.
    """

    queries: torch.Tensor
    pairs: torch.Tensor


class Pass(NamedTuple):
    """Values and gradients of a pass through chunks, in the names of ``Carry`` and ``Read``.

    Attributes:
        state, u: S and u.
        dkeep: (n, Hk, Dk, 1).
        dkeys, du, dqueries, dpairs: of the shapes of what they are gradients of.
    """

    state: torch.Tensor
    u: torch.Tensor
    dkeep: torch.Tensor
    dkeys: torch.Tensor
    du: torch.Tensor
    dqueries: torch.Tensor
    dpairs: torch.Tensor


class ByChunks(Protocol):
    """A rule within chunks. ``erases``: whether tokens erase what is in the state, so that the transition is a matrix."""

    erases: ClassVar[bool]

    @abstractmethod
    def carry(self, x: Chunks) -> Carry: ...

    @abstractmethod
    def read(self, x: Chunks) -> Read: ...

    @abstractmethod
    def backward(self, x: Chunks, carry: Carry, read: Read, of: Pass) -> Chunks:
        """Gradients of the tokens."""
        ...


@dataclass(frozen=True)
class GatedLinear(ByChunks):
    """Gated linear attention. Pairs of one block of tokens are worked out one by one; those of two blocks are a product, in which
    the queries decay from the later block's first token on, and the keys up to it."""

    erases: ClassVar[bool] = False
    scale: float

    def carry(self, x: Chunks) -> Carry:
        return Carry(x.decay.sum(-2).exp()[..., None], x.k * behind(x.decay).exp(), x.v, None)

    def read(self, x: Chunks) -> Read:
        import torch

        pairs = x.q.new_zeros(*x.q.shape[:-1], x.q.shape[-2])
        for own, past in _blocks(x.k.shape[-2]):
            q, decay = x.q[..., own, :] * self.scale, x.decay[..., own, :]
            if past.stop:
                earlier = x.k[..., past, :] * behind(x.decay[..., past, :]).exp()
                pairs[..., own, past] = (q * decay.cumsum(-2).exp()[:, :, None]) @ earlier.mT[:, :, None]
            keys = x.k[..., None, own, :] * between(decay)
            pairs[..., own, own] = torch.einsum("nhgid,nhijd->nhgij", q, keys)
        return Read(x.q * self.scale * x.decay.cumsum(-2).exp()[:, :, None], pairs)

    def backward(self, x: Chunks, carry: Carry, read: Read, of: Pass) -> Chunks:
        import torch

        dq = of.dqueries * self.scale * x.decay.cumsum(-2).exp()[:, :, None]
        dk = of.dkeys * behind(x.decay).exp()
        ddecay = from_here((of.dqueries * read.queries).sum(2)) + before(of.dkeys * carry.keys) + (of.dkeep * carry.keep).mT
        for own, past in _blocks(x.k.shape[-2]):
            q, decay, dpairs = x.q[..., own, :] * self.scale, x.decay[..., own, :], of.dpairs[..., own, :]
            if past.stop:
                left, gone = decay.cumsum(-2).exp()[:, :, None], behind(x.decay[..., past, :]).exp()
                later, earlier = q * left, x.k[..., past, :] * gone
                dlater = dpairs[..., past] @ earlier[:, :, None]
                dearlier = (dpairs[..., past].mT @ later).sum(2)
                dq[..., own, :] += dlater * left * self.scale
                dk[..., past, :] += dearlier * gone
                ddecay[..., own, :] += from_here((dlater * later).sum(2))
                ddecay[..., past, :] += before(dearlier * earlier)
            kept = between(decay)
            keys = x.k[..., None, own, :] * kept
            dkeys = torch.einsum("nhgij,nhgid->nhijd", dpairs[..., own], q)
            dq[..., own, :] += torch.einsum("nhgij,nhijd->nhgid", dpairs[..., own], keys) * self.scale
            dk[..., own, :] += (dkeys * kept).sum(-3)
            ddecay[..., own, :] += between_backward(dkeys * keys)
        return Chunks(dq, dk, of.du, ddecay, None)


@dataclass(frozen=True)
class GatedDelta(ByChunks):
    """The gated delta rule. What a token adds to the state is u_i = b_i (v_i - what the state before it says of k_i), and the u of
    a chunk solve (1 + lower) u = b (v - decayed k S): a triangular system, of which S is one right side and v the other."""

    erases: ClassVar[bool] = True
    scale: float

    def _lower(self, x: Chunks) -> torch.Tensor:
        """(n, Hk, C, C), zero on the diagonal and above it."""
        assert x.beta is not None
        return (x.beta * between(x.decay)[..., 0] * (x.k @ x.k.mT)).tril(-1)

    def carry(self, x: Chunks) -> Carry:
        import torch

        assert x.beta is not None
        right = torch.cat([x.v, x.k * x.decay.cumsum(-2).exp()], -1) * x.beta
        solved = torch.linalg.solve_triangular(self._lower(x), right, upper=False, unitriangular=True)
        values, erased = solved.split([x.v.shape[-1], x.k.shape[-1]], -1)
        return Carry(x.decay.sum(-2).exp()[..., None], x.k * behind(x.decay).exp(), values, erased)

    def read(self, x: Chunks) -> Read:
        queries = x.q * self.scale
        pairs = queries @ x.k.mT[:, :, None] * between(x.decay)[:, :, None, ..., 0]
        return Read(queries * x.decay.cumsum(-2).exp()[:, :, None], pairs)

    def backward(self, x: Chunks, carry: Carry, read: Read, of: Pass) -> Chunks:
        import torch

        assert x.beta is not None
        kept, left, gone = between(x.decay)[..., 0], x.decay.cumsum(-2).exp(), behind(x.decay).exp()
        products, lower = x.k @ x.k.mT, self._lower(x)
        known = left * (x.k @ of.state)
        dright = torch.linalg.solve_triangular(lower.mT, of.du, upper=True, unitriangular=True)
        dlower = -(dright @ of.u.mT).tril(-1)
        dv = x.beta * dright
        dbeta = (dright * (x.v - known)).sum(-1, keepdim=True) + (dlower * kept * products).sum(-1, keepdim=True)
        dproducts = x.beta * dlower * kept
        dscores = of.dpairs * kept[:, :, None] * self.scale
        dq = of.dqueries * left[:, :, None] * self.scale + dscores @ x.k[:, :, None]
        dk = (dproducts + dproducts.mT) @ x.k + (dscores.mT @ x.q).sum(2) - left * (dv @ of.state.mT) + of.dkeys * gone
        dleft = (of.dqueries * read.queries).sum((2, -1))[..., None] - (dv * known).sum(-1, keepdim=True)
        dkept = dlower * lower + (of.dpairs * read.pairs).sum(2)
        ddecay = from_here(dleft) + before((of.dkeys * carry.keys).sum(-1, keepdim=True)) + between_backward(dkept[..., None])
        return Chunks(dq, dk, dv, ddecay + (of.dkeep * carry.keep).sum(-2, keepdim=True), dbeta)


class Kept(NamedTuple):
    """What backward needs: the tokens, and the state that they began with."""

    x: Tokens
    state: torch.Tensor


class PreparedChunked:
    """A rule for heads. Chunks are worked on together as far as ``TOGETHER`` allows, and states go from one to the next; backward
    works all of it out again, from states that it keeps before every so many chunks."""

    def __init__(self, rule: ByChunks, heads: Heads, chunk: int) -> None:
        self._rule, self._heads, self._chunk = rule, heads, chunk
        group, block = heads.q // heads.kv, 1 if rule.erases else min(chunk, BLOCK)
        largest = max(group * chunk * chunk, block * block * heads.dim, chunk * heads.dim * group, heads.dim * heads.v)
        self._tokens = chunk * max(1, TOGETHER // (heads.kv * largest))

    def summary(self, x: Tokens) -> Summary:
        state = self._beside_one(x) if self._rule.erases else self._zeros(x)
        for part in self._parts(len(x.q)):
            state = _states(self._rule.carry(self._cut(x, part)), state)[2]
        return self._summary(state, x)

    def local(self, x: Tokens) -> list[tuple[Carry, Read]]:
        return list(self._local(x))

    def forward(
        self, x: Tokens, state: torch.Tensor | None, local: list[tuple[Carry, Read]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:
        begin = self._zeros(x) if state is None else state
        out, end = x.v.new_empty(len(x.q), self._heads.q, self._heads.v), begin
        for part, (carry, read) in zip(self._parts(len(x.q)), self._local(x) if local is None else local, strict=True):
            states, u, end = _states(carry, end)
            _join(out, part, read.queries @ states[:, :, None] + read.pairs @ u[:, :, None])
        return out, end, Kept(x, begin)

    def _local(self, x: Tokens) -> Iterator[tuple[Carry, Read]]:
        for part in self._parts(len(x.q)):
            chunks = self._cut(x, part)
            yield self._rule.carry(chunks), self._rule.read(chunks)

    def summary_backward(self, dout: torch.Tensor, saved: Kept) -> Summary:
        import torch

        x, heads = saved.x, self._heads
        dstate = self._beside_one(x) if self._rule.erases else self._zeros(x)
        for part in reversed(self._parts(len(x.q))):
            chunks = self._cut(x, part)
            read, douts = self._rule.read(chunks), self._queries(dout, part)
            dread, du = (read.queries.mT @ douts).sum(2), (read.pairs.mT @ douts).sum(2)
            if self._rule.erases:  # the columns beside come from the end alone
                dread, du = (torch.nn.functional.pad(grad, (0, heads.dim)) for grad in (dread, du))
            dstate = _dstates(self._rule.carry(chunks), dread, du, dstate)[2]
        return self._summary(dstate, x)

    def backward(self, dout: torch.Tensor, saved: Kept, dstate: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
        import torch

        x, state = saved
        parts, begins = self._parts(len(x.q)), [state]
        for part in parts[:-1]:
            begins.append(_states(self._rule.carry(self._cut(x, part)), begins[-1])[2])
        grads = Tokens(*(torch.empty_like(given) for given in x if given is not None))
        dstate = self._zeros(x) if dstate is None else dstate
        for part, begin in zip(reversed(parts), reversed(begins), strict=False):
            chunks, douts = self._cut(x, part), self._queries(dout, part)
            carry, read = self._rule.carry(chunks), self._rule.read(chunks)
            states, u, _ = _states(carry, begin)
            dends, du, dstate = _dstates(carry, (read.queries.mT @ douts).sum(2), (read.pairs.mT @ douts).sum(2), dstate)
            of = Pass(
                states,
                u,
                (states * dends).sum(-1, keepdim=True),
                u @ dends.mT,
                du,
                douts @ states.mT[:, :, None],
                (douts @ u.mT[:, :, None]).tril(),
            )
            for whole, grad in zip(grads, self._rule.backward(chunks, carry, read, of), strict=True):
                if whole is not None and grad is not None:
                    _join(whole, part, grad)
        return grads, dstate

    def _parts(self, count: int) -> list[slice]:
        """The tokens whose chunks are worked on together."""
        return [slice(begin, min(begin + self._tokens, count)) for begin in range(0, count, self._tokens)]

    def _chunks(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        """(T, H, ...) to (n, H, C, ...) in the accumulation type."""
        import torch

        taken = x[part].to(accumulation_dtype(x.dtype))
        missing = -len(taken) % self._chunk
        if missing:
            taken = torch.cat([taken, taken.new_zeros(missing, *taken.shape[1:])])
        return taken.unflatten(0, (-1, self._chunk)).transpose(1, 2)

    def _queries(self, x: torch.Tensor, part: slice) -> torch.Tensor:
        """(T, Hq, D) to (n, Hk, G, C, D)."""
        return self._chunks(x, part).unflatten(1, (self._heads.kv, -1))

    def _cut(self, x: Tokens, part: slice) -> Chunks:
        gates = x.decay if x.decay.dim() == 3 else x.decay[..., None]
        beta = None if x.beta is None else self._chunks(x.beta[..., None], part)
        return Chunks(self._queries(x.q, part), self._chunks(x.k, part), self._chunks(x.v, part), self._chunks(gates, part), beta)

    def _zeros(self, x: Tokens) -> torch.Tensor:
        return x.v.new_zeros(self._heads.kv, self._heads.dim, self._heads.v, dtype=accumulation_dtype(x.v.dtype))

    def _beside_one(self, x: Tokens) -> torch.Tensor:
        """Zero with the columns of the identity beside it: what a stretch makes of them is its transition."""
        import torch

        zeros = self._zeros(x)
        one = torch.eye(self._heads.dim, dtype=zeros.dtype, device=zeros.device)
        return torch.cat([zeros, one.expand(len(zeros), -1, -1)], -1)

    def _summary(self, state: torch.Tensor, x: Tokens) -> Summary:
        """Of what the stretch makes of zero, with the identity beside it where tokens erase."""
        if not self._rule.erases:
            return Summary(state, x.decay.to(state.dtype).sum(0).exp())
        own, transition = state.split([self._heads.v, self._heads.dim], -1)
        return Summary(own.contiguous(), transition.contiguous())


def _blocks(size: int) -> Iterator[tuple[slice, slice]]:
    """The blocks of a chunk, each with all tokens before it."""
    for begin in range(0, size, BLOCK):
        yield slice(begin, min(begin + BLOCK, size)), slice(0, begin)


def _states(carry: Carry, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The states that chunks begin with, their u, and the state behind them. ``begin`` may have columns beside those of values."""
    import torch

    keys, states, us = carry.keys.mT, [], []
    beside = begin.shape[-1] - carry.values.shape[-1]
    values = torch.nn.functional.pad(carry.values, (0, beside)) if beside else carry.values
    for i in range(len(keys)):
        u = values[i] if carry.erased is None else values[i] - carry.erased[i] @ begin
        states.append(begin)
        us.append(u)
        begin = carry.keep[i] * begin + keys[i] @ u
    return torch.stack(states), torch.stack(us), begin


def _dstates(
    carry: Carry, dread: torch.Tensor, du: torch.Tensor, dend: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the states that chunks end with, of their u, and of the state that the first begins with.

    Args:
        dread: gradients of the states that chunks begin with, from what is read of them.
        du: gradients of u from what is read of it.
        dend: gradient of the state behind the last chunk.
    """
    import torch

    dends, dus = [], []
    for i in reversed(range(len(du))):
        dends.append(dend)
        dus.append(du[i] + carry.keys[i] @ dend)
        dend = carry.keep[i] * dend + dread[i]
        if carry.erased is not None:
            dend = dend - carry.erased[i].mT @ dus[-1]
    return torch.stack(dends[::-1]), torch.stack(dus[::-1]), dend


def _join(whole: torch.Tensor, part: slice, chunks: torch.Tensor) -> None:
    """Chunks (n, Hk, ..., C, D), or (n, H, C, 1) of what has no D, to the tokens (T, H, D) or (T, H) that they are of."""
    tokens = chunks.flatten(1, -3).transpose(1, 2).flatten(0, 1)[: part.stop - part.start]
    whole[part] = tokens if whole.dim() == 3 else tokens[..., 0]


def before(x: torch.Tensor) -> torch.Tensor:
    """Sums of dimension -2 over all before each."""
    import torch

    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)], -2)


def from_here(x: torch.Tensor) -> torch.Tensor:
    """Sums of dimension -2 over each and all behind it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def behind(x: torch.Tensor) -> torch.Tensor:
    """Sums of dimension -2 over all behind each."""
    return before(x.flip(-2)).flip(-2)


def between(decay: torch.Tensor) -> torch.Tensor:
    """exp of the sums of log decays of tokens j + 1 ... i: (..., C, D) to (..., C, C, D) by i and j, 0 where i < j."""
    import torch

    size = decay.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)[..., None]
    sums = decay[..., :, None, :].expand(*decay.shape[:-1], size, decay.shape[-1]).masked_fill(~later, 0.0).cumsum(-3)
    return sums.masked_fill(later.transpose(0, 1), -torch.inf).exp()


def between_backward(dsums: torch.Tensor) -> torch.Tensor:
    """Gradient of log decays (..., C, D) from that of the sums in ``between``, (..., C, C, D) by i and j."""
    import torch

    size = dsums.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=dsums.device).tril(-1)[..., None]
    return dsums.flip(-3).cumsum(-3).flip(-3).mul(later).sum(-2)
