"""The gated delta rule in Triton, by chunks of 64 tokens: Yang et al., arXiv 2412.06464, section 3.3, by the WY representation of
arXiv 2406.06484, section 3.

What a token adds to the state is u_i = b_i (v_i - what the state before it says of k_i). The u of a chunk that begins with state S
solve (1 + lower) u = b (v - left k S), with lower_ij = b_i kept_ij k_i k_j for j < i: a unit lower triangular system. Its inverse
is worked out once for a chunk, so that u = values - erased S with values = inverse (b v) and erased = inverse (b left k); from
chunk to chunk S' = keep S + (gone k)^T u. Backward goes through the same system transposed. Each number is written by one program,
so that results repeat bit by bit.

Of log decays kept_ij is exp of the sum of tokens j + 1 ... i, left_i of those up to i, gone_i of those behind i, keep of all. No
sum is taken from another, so every exponent is at most 0. Only the gradient of decays is a difference of sums, within a chunk. It
needs no gradient of kept: multiply the state after every token t by c_t > 0, and v_t by c_t, q_t by 1 / c_t and a_t by
c_t / c_(t-1) with it, and results stay as they are. So da_t - da_(t+1) = q_t dq_t - v_t dv_t, da being the gradient of a log decay,
and that of the last token of a chunk has the product of the state behind it with its gradient besides.

Names and launches: ``triton_scan``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lcbench.kernels.base import accumulation_dtype, heads_whole
from lcbench.kernels.linear import Summary, Tokens
from lcbench.kernels.triton_scan import BLOCK, CHUNK, ByTriton, chunks_of, dpairs_kernel, load_rows, out_kernel, strides, whole


class Inside(NamedTuple):
    """What is worked out of each chunk without a state, in the inputs' type.

    Attributes:
        inverse: of 1 + lower, (chunks, Hk, 64, 64).
        erased: (T, Hk, Dk).
        values: (T, Hk, Dv).
    """

    inverse: torch.Tensor
    erased: torch.Tensor
    values: torch.Tensor


class Local(NamedTuple):
    """What a stretch computes before its state is there; ``pairs``: (chunks, Hq, 64, 64), in the inputs' type."""

    inside: Inside
    pairs: torch.Tensor


class Ran(NamedTuple):
    """What backward takes: the tokens, each head's numbers side by side, the state that they began with, and what needed none."""

    x: Tokens
    begin: torch.Tensor
    local: Local


class PreparedTritonDelta(ByTriton):
    """The rule ``gated_delta_rule`` for heads."""

    def _sizes(self, x: Tokens, *, tall: bool = False) -> dict[str, Any]:
        """A program has few columns, since its registers hold more than one sum of them; without tensor cores a thread holds rows
        and columns of a product whole, so that fewer of both fit."""
        sizes = super()._sizes(x, tall=tall)
        if x.q.dtype == accumulation_dtype(x.q.dtype):
            return sizes | {"COLUMNS": 16, "DIMS": 16}
        return sizes | {"COLUMNS": min(sizes["COLUMNS"], 32 if sizes["PAD"] <= 128 else 16)}

    def summary(self, x: Tokens) -> Summary:
        x = whole(x)
        inside = self._inside(x)
        return Summary(self._states(x, inside, None, None, None), self._transition(x, inside))

    def local(self, x: Tokens) -> Local:
        x = whole(x)
        pairs = x.q.new_empty(chunks_of(x), self.heads.q, CHUNK, CHUNK)
        if len(x.q):
            delta_pairs_kernel[chunks_of(x), self.heads.q](
                x.q, x.k, x.decay, pairs, *strides(x.q, x.k, x.decay), len(x.q), self.scale, **self._sizes(x, tall=True)
            )
        return Local(self._inside(x), pairs)

    def forward(self, x: Tokens, state: torch.Tensor | None, local: Local | None = None) -> tuple[torch.Tensor, torch.Tensor, Ran]:
        x = whole(x)
        local, begin = self.local(x) if local is None else local, self._zeros(x) if state is None else state.contiguous()
        states = begin.new_empty(chunks_of(x), *begin.shape, dtype=x.q.dtype)
        u = torch.empty_like(local.inside.values)
        end = self._states(x, local.inside, begin, states, u)
        out = x.q.new_empty(len(x.q), self.heads.q, self.heads.v)
        if len(x.q):
            out_kernel[chunks_of(x), self.heads.q, self._columns(x)](
                x.q, u, x.decay, local.pairs, states, out, *strides(x.q, u, x.decay, out), len(x.q), self.scale, EACH=False,
                **self._sizes(x, tall=True),
            )  # fmt: skip
        return out, end, Ran(x, begin, local)

    def summary_backward(self, dout: torch.Tensor, saved: Ran) -> Summary:
        x, inside = saved.x, saved.local.inside
        state = self._dstates(x, saved.local, heads_whole(dout), None, None, None)
        return Summary(state, self._transition(x, inside).mT.contiguous())

    def backward(self, dout: torch.Tensor, saved: Ran, dstate: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
        (x, begin, local), dout, heads = saved, heads_whole(dout), self.heads
        assert x.beta is not None
        dend = self._zeros(x) if dstate is None else dstate.contiguous()
        dk, ddecay, dbeta = (torch.empty_like(part) for part in (x.k, x.decay, x.beta))
        if not len(x.q):
            return Tokens(torch.empty_like(x.q), dk, torch.empty_like(x.v), ddecay, dbeta), dend
        tokens, chunks, sizes, wide = len(x.q), chunks_of(x), self._sizes(x, tall=True), begin.dtype
        states, u = begin.new_empty(chunks + 1, *begin.shape), torch.empty_like(local.inside.values)
        states[-1] = self._states(x, local.inside, begin, states, u)
        dends, du = begin.new_empty(chunks, *begin.shape), torch.empty_like(u)
        dbegin = self._dstates(x, local, dout, dend, dends, du)
        # The gradient of decays is a difference of sums of these.
        dq, dv = (torch.empty(part.shape, dtype=wide, device=part.device) for part in (x.q, x.v))
        dpairs, dinside = torch.empty_like(local.pairs, dtype=wide), torch.empty_like(local.inside.inverse)
        keys = triton.cdiv(heads.dim, sizes["DIMS"])
        delta_dv_kernel[chunks, heads.kv](
            x.k, x.v, x.decay, x.beta, local.inside.inverse, states, u, du, dinside, dv, dbeta,
            *strides(x.k, x.v, x.decay, x.beta, u, dbeta), tokens, **sizes,
        )  # fmt: skip
        dpairs_kernel[chunks, heads.q](u, dout, dpairs, *strides(u, dout), tokens, **self._sizes(x))
        delta_dq_kernel[chunks, heads.q, keys](
            x.k, x.decay, dpairs, states, dout, dq, *strides(x.k, x.decay, dout, dq), tokens, self.scale, **sizes
        )
        delta_dk_kernel[chunks, heads.kv, keys](
            x.q, x.k, x.decay, dpairs, dinside, states, dends, u, dv, dk,
            *strides(x.q, x.k, x.decay, u, dk), tokens, self.scale, **sizes,
        )  # fmt: skip
        delta_ddecay_kernel[chunks, heads.kv](
            x.q, x.v, dq, dv, states, dends, ddecay, *strides(x.q, x.v, dq, dv, ddecay), tokens, **sizes
        )
        return Tokens(dq.to(x.q.dtype), dk, dv.to(x.v.dtype), ddecay, dbeta), dbegin

    def _inside(self, x: Tokens) -> Inside:
        assert x.beta is not None
        tokens, heads = len(x.q), self.heads
        inside = Inside(
            x.k.new_empty(chunks_of(x), heads.kv, CHUNK, CHUNK),
            x.k.new_empty(tokens, heads.kv, heads.dim),
            x.v.new_empty(tokens, heads.kv, heads.v),
        )
        if not tokens:
            return inside
        grid, sizes = (chunks_of(x), heads.kv), self._sizes(x, tall=True)
        lower = torch.empty_like(inside.inverse, dtype=accumulation_dtype(x.k.dtype))
        delta_lower_kernel[grid](x.k, x.decay, x.beta, lower, *strides(x.k, x.decay, x.beta), tokens, **sizes)
        delta_inverse_kernel[*grid, CHUNK // BLOCK](
            lower, inside.inverse, HEADS=sizes["HEADS"], GROUP=sizes["GROUP"], SUM=sizes["SUM"], num_warps=1
        )
        delta_inside_kernel[grid](x.k, x.v, x.decay, x.beta, *inside, *strides(x.k, x.v, x.decay, x.beta), tokens, **sizes)
        return inside

    def _transition(self, x: Tokens, inside: Inside) -> torch.Tensor:
        """M (Hk, Dk, Dk): what the tokens make of the identity, were their values zero."""
        square = PreparedTritonDelta(replace(self.heads, dim_v=None), self.scale)
        one = square._zeros(x)
        one.diagonal(dim1=1, dim2=2).fill_(1)
        return square._states(x, inside._replace(values=inside.erased), one, None, None, valued=False)

    def _states(
        self,
        x: Tokens,
        inside: Inside,
        begin: torch.Tensor | None,
        states: torch.Tensor | None,
        u: torch.Tensor | None,
        *,
        valued: bool = True,
    ) -> torch.Tensor:
        """The state behind the last token; writes those before each chunk into ``states`` (chunks, Hk, D, V), and into u."""
        end = self._zeros(x)
        delta_states_kernel[self.heads.kv, self._columns(x)](
            x.k, x.decay, inside.erased, inside.values, end if begin is None else begin, end if states is None else states,
            end if u is None else u, end, *strides(x.k, x.decay), len(x.k), chunks_of(x), BEGINS=begin is not None,
            KEPT=states is not None, VALUED=valued, **self._sizes(x, tall=True),
        )  # fmt: skip
        return end

    def _dstates(
        self,
        x: Tokens,
        local: Local,
        dout: torch.Tensor,
        dend: torch.Tensor | None,
        dends: torch.Tensor | None,
        du: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient of the state before the first token; writes those behind each chunk into ``dends``, and into du."""
        begin = self._zeros(x)
        delta_dstates_kernel[self.heads.kv, self._columns(x)](
            x.q, x.k, x.decay, local.pairs, local.inside.erased, dout, begin if dend is None else dend,
            begin if dends is None else dends, begin if du is None else du, begin, *strides(x.q, x.k, x.decay, dout), len(x.q),
            chunks_of(x), self.scale, BEGINS=dend is not None, KEPT=dends is not None, **self._sizes(x, tall=True),
        )  # fmt: skip
        return begin


# Tensors of ours have no strides given: (T, Hk, D or V), (chunks, H, 64, 64), (chunks, Hk, D, V).
@triton.jit
def _numbers(x, token, at, tokens, x_t):
    """A number of each of the tokens, whose head begins at ``at``; zeros from the last token on."""
    return tl.load(x + at + token.to(tl.int64) * x_t, mask=token < tokens, other=0.0)


@triton.jit
def _between(decay, token, tokens, at, a_t):
    """exp of the sums of log decays of tokens j + 1 ... i of a chunk, (64, 64) by i and j, 0 where i < j."""
    row = tl.arange(0, 64)
    decays = _numbers(decay, token, at, tokens, a_t)
    sums = tl.cumsum(tl.where(row[:, None] > row[None, :], decays[:, None], 0.0), 0)
    return tl.where(row[:, None] >= row[None, :], tl.exp(sums), 0.0)


@triton.jit
def _left(decay, token, tokens, at, a_t):
    """What is left at each token of the state before its chunk, (64,)."""
    return tl.exp(tl.cumsum(_numbers(decay, token, at, tokens, a_t), 0))


@triton.jit
def _gone(decay, token, tokens, at, a_t):
    """What is left of each token at the end of its chunk, (64,)."""
    row = tl.arange(0, 64)
    later = _numbers(decay, tl.where(row < 63, token + 1, tokens), at, tokens, a_t)
    return tl.exp(tl.cumsum(later, 0, reverse=True))


@triton.jit
def _products(one, other, token, tokens, one_at, other_at, one_t, other_t, D: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr):
    """Products of all numbers of two heads' vectors, (64, 64)."""
    found = tl.zeros([64, 64], SUM)
    for first in range(0, D, DIMS):
        d = first + tl.arange(0, DIMS)
        rows, columns = load_rows(one, token, one_at, tokens, d, D, one_t), load_rows(other, token, other_at, tokens, d, D, other_t)
        found = tl.dot(rows, tl.trans(columns), found, input_precision="ieee", out_dtype=SUM)
    return found


@triton.jit
def delta_pairs_kernel(
    q, k, decay, pairs, q_t, q_h, k_t, k_h, a_t, a_h, tokens, scale, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, query head): pairs of the chunk's tokens."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv, row = head // GROUP, tl.arange(0, 64)
    token = chunk * 64 + row
    found = _products(q, k, token, tokens, head * q_h, kv * k_h, q_t, k_t, D, DIMS, SUM)
    found *= _between(decay, token, tokens, kv * a_h, a_t) * scale
    at = pairs + ((chunk * HEADS + head) * 64 + row)[:, None] * 64 + row[None, :]
    tl.store(at, found.to(pairs.dtype.element_ty))


@triton.jit
def delta_lower_kernel(
    k, decay, beta, lower, k_t, k_h, a_t, a_h, b_t, b_h, tokens, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head): the system's matrix below its diagonal; what is above is zero."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 64)
    token = chunk * 64 + row
    found = _products(k, k, token, tokens, head * k_h, head * k_h, k_t, k_t, D, DIMS, SUM)
    found *= _between(decay, token, tokens, head * a_h, a_t) * _numbers(beta, token, head * b_h, tokens, b_t)[:, None]
    at = lower + ((chunk * (HEADS // GROUP) + head) * 64 + row)[:, None] * 64 + row[None, :]
    tl.store(at, tl.where(row[:, None] > row[None, :], found, 0.0))


@triton.jit
def delta_inverse_kernel(lower, inverse, HEADS: tl.constexpr, GROUP: tl.constexpr, SUM: tl.constexpr):
    """Program (chunk, key/value head, 16 columns): the inverse of 1 + lower, row after row from the first that is not zero."""
    matrix = tl.program_id(0).to(tl.int64) * (HEADS // GROUP) + tl.program_id(1)
    first, row = tl.program_id(2) * 16, tl.arange(0, 64)
    column = first + tl.arange(0, 16)
    found = tl.zeros([64, 16], SUM) + tl.where(row[:, None] == column[None, :], 1.0, 0.0)
    for i in range(first + 1, 64):
        factors = tl.load(lower + (matrix * 64 + i) * 64 + row)
        found = tl.where((row == i)[:, None], found - tl.sum(factors[:, None] * found, 0)[None, :], found)
    at = inverse + (matrix * 64 + row)[:, None] * 64 + column[None, :]
    tl.store(at, found.to(inverse.dtype.element_ty))


@triton.jit
def delta_inside_kernel(
    k, v, decay, beta, inverse, erased, values, k_t, k_h, v_t, v_h, a_t, a_h, b_t, b_h, tokens, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head): what the inverse makes of values and of keys."""
    chunk, head, kvs = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), HEADS // GROUP
    row = tl.arange(0, 64)
    token = chunk * 64 + row
    strength = _numbers(beta, token, head * b_h, tokens, b_t)
    solved = tl.load(inverse + ((chunk * kvs + head) * 64 + row)[:, None] * 64 + row[None, :])
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        own = (load_rows(v, token, head * v_h, tokens, column, V, v_t).to(SUM) * strength[:, None]).to(k.dtype.element_ty)
        found = tl.dot(solved, own, input_precision="ieee", out_dtype=SUM)
        at = values + (token * kvs + head)[:, None] * V + column[None, :]
        tl.store(at, found.to(k.dtype.element_ty), mask=(token < tokens)[:, None] & (column < V)[None, :])
    strength *= _left(decay, token, tokens, head * a_h, a_t)
    for first in range(0, D, DIMS):
        d = first + tl.arange(0, DIMS)
        own = (load_rows(k, token, head * k_h, tokens, d, D, k_t).to(SUM) * strength[:, None]).to(k.dtype.element_ty)
        found = tl.dot(solved, own, input_precision="ieee", out_dtype=SUM)
        at = erased + (token * kvs + head)[:, None] * D + d[None, :]
        tl.store(at, found.to(k.dtype.element_ty), mask=(token < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def delta_states_kernel(
    k, decay, erased, values, begin, states, us, end, k_t, k_h, a_t, a_h, tokens, chunks, BEGINS: tl.constexpr, KEPT: tl.constexpr,
    VALUED: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, columns of values): states from chunk to chunk; values that are not ``VALUED`` are zero."""
    head, kvs = tl.program_id(0).to(tl.int64), HEADS // GROUP
    row, d, column = tl.arange(0, 64), tl.arange(0, PAD), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (column < V)[None, :]
    place = (head * D + d)[:, None] * V + column[None, :]
    state = tl.zeros([PAD, COLUMNS], SUM)
    if BEGINS:
        state = tl.load(begin + place, mask=inside, other=0.0)
    for chunk in range(chunks):
        if KEPT:
            tl.store(states + place, state.to(states.dtype.element_ty), mask=inside)
            states += kvs * D * V
        token = chunk * 64 + row
        erases = load_rows(erased, token, head * D, tokens, d, D, kvs * D)
        u = -tl.dot(erases, state.to(k.dtype.element_ty), input_precision="ieee", out_dtype=SUM)
        if VALUED:
            u += load_rows(values, token, head * V, tokens, column, V, kvs * V).to(SUM)
        u = u.to(k.dtype.element_ty)
        if KEPT:
            at = us + (token.to(tl.int64) * kvs + head)[:, None] * V + column[None, :]
            tl.store(at, u, mask=(token < tokens)[:, None] & (column < V)[None, :])
        gone = _gone(decay, token, tokens, head * a_h, a_t)
        keys = (load_rows(k, token, head * k_h, tokens, d, D, k_t).to(SUM) * gone[:, None]).to(k.dtype.element_ty)
        state *= tl.exp(tl.sum(_numbers(decay, token, head * a_h, tokens, a_t), 0))
        state = tl.dot(tl.trans(keys), u, state, input_precision="ieee", out_dtype=SUM)
    tl.store(end + place, state, mask=inside)


@triton.jit
def delta_dstates_kernel(
    q, k, decay, pairs, erased, dout, dend, dends, dus, dbegin, q_t, q_h, k_t, k_h, a_t, a_h, o_t, o_h, tokens, chunks, scale,
    BEGINS: tl.constexpr, KEPT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, columns of values): gradients of u and of states, from the last chunk to the first."""
    head, kvs = tl.program_id(0).to(tl.int64), HEADS // GROUP
    row, d, column = tl.arange(0, 64), tl.arange(0, PAD), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (column < V)[None, :]
    place = (head * D + d)[:, None] * V + column[None, :]
    dstate = tl.zeros([PAD, COLUMNS], SUM)
    if BEGINS:
        dstate = tl.load(dend + place, mask=inside, other=0.0)
    for back in range(chunks):
        chunk = (chunks - 1 - back).to(tl.int64)
        if KEPT:
            tl.store(dends + chunk * kvs * D * V + place, dstate, mask=inside)
        token = chunk * 64 + row
        # Decays are applied to the smaller tiles: keys and queries are read as they are.
        keys = load_rows(k, token, head * k_h, tokens, d, D, k_t)
        du = tl.dot(keys, dstate.to(k.dtype.element_ty), input_precision="ieee", out_dtype=SUM)
        du *= _gone(decay, token, tokens, head * a_h, a_t)[:, None]
        dstate *= tl.exp(tl.sum(_numbers(decay, token, head * a_h, tokens, a_t), 0))
        left = _left(decay, token, tokens, head * a_h, a_t) * scale
        for each in range(GROUP):
            query = head * GROUP + each
            queries = load_rows(q, token, query * q_h, tokens, d, D, q_t)
            douts = load_rows(dout, token, query * o_h, tokens, column, V, o_t)
            own = tl.load(pairs + ((chunk * HEADS + query) * 64 + row)[:, None] * 64 + row[None, :])
            du = tl.dot(tl.trans(own), douts, du, input_precision="ieee", out_dtype=SUM)
            douts = (douts.to(SUM) * left[:, None]).to(k.dtype.element_ty)
            dstate = tl.dot(tl.trans(queries), douts, dstate, input_precision="ieee", out_dtype=SUM)
        du = du.to(k.dtype.element_ty)
        if KEPT:
            at = dus + (token * kvs + head)[:, None] * V + column[None, :]
            tl.store(at, du, mask=(token < tokens)[:, None] & (column < V)[None, :])
        erases = load_rows(erased, token, head * D, tokens, d, D, kvs * D)
        dstate -= tl.dot(tl.trans(erases), du, input_precision="ieee", out_dtype=SUM)
    tl.store(dbegin + place, dstate, mask=inside)


@triton.jit
def delta_dv_kernel(
    k, v, decay, beta, inverse, states, us, dus, dinside, dv, dbeta, k_t, k_h, v_t, v_h, a_t, a_h, b_t, b_h, u_t, u_h, db_t, db_h,
    tokens, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr,
    DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head): dv and gradients of strengths, and of products of keys of the chunk: ``dinside``.

    With the gradient r of the system's right side, which is the transposed system's solution for du, dv = b r, the gradient of
    lower_ij is -r_i u_j, and b_i stands before all that row i of the system says beside u_i.
    """
    chunk, head, kvs = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), HEADS // GROUP
    row = tl.arange(0, 64)
    token = chunk * 64 + row
    strength = _numbers(beta, token, head * b_h, tokens, b_t)
    left = _left(decay, token, tokens, head * a_h, a_t)
    square = ((chunk * kvs + head) * 64 + row)[:, None] * 64 + row[None, :]
    solved = tl.load(inverse + square)
    dlower, dstrength = tl.zeros([64, 64], SUM), tl.sum(tl.zeros([64, 16], SUM), 1)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        grads = load_rows(dus, token, head * u_h, tokens, column, V, u_t)
        right = tl.dot(tl.trans(solved), grads, input_precision="ieee", out_dtype=SUM)
        at = dv + (token * kvs + head)[:, None] * V + column[None, :]
        tl.store(at, right * strength[:, None], mask=(token < tokens)[:, None] & (column < V)[None, :])
        known = tl.zeros([64, COLUMNS], SUM)
        for start in range(0, D, DIMS):
            d = start + tl.arange(0, DIMS)
            keys = load_rows(k, token, head * k_h, tokens, d, D, k_t)
            place = ((chunk * kvs + head) * D + d)[:, None] * V + column[None, :]
            state = tl.load(states + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0).to(keys.dtype)
            known = tl.dot(keys, state, known, input_precision="ieee", out_dtype=SUM)
        values = load_rows(v, token, head * v_h, tokens, column, V, v_t).to(SUM)
        dstrength += tl.sum(right * (values - known * left[:, None]), 1)
        u = load_rows(us, token, head * u_h, tokens, column, V, u_t)
        dlower = tl.dot(right.to(u.dtype), tl.trans(u), dlower, input_precision="ieee", out_dtype=SUM)
    dlower *= tl.where(row[:, None] > row[None, :], -_between(decay, token, tokens, head * a_h, a_t), 0.0)
    products = _products(k, k, token, tokens, head * k_h, head * k_h, k_t, k_t, D, DIMS, SUM)
    dstrength += tl.sum(dlower * products, 1)
    tl.store(dbeta + head * db_h + token * db_t, dstrength, mask=token < tokens)
    tl.store(dinside + square, (dlower * strength[:, None]).to(dinside.dtype.element_ty))


@triton.jit
def delta_dq_kernel(
    k, decay, dpairs, states, dout, dq, k_t, k_h, a_t, a_h, o_t, o_h, dq_t, dq_h, tokens, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, query head, numbers of a key): dq."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv, row, d = head // GROUP, tl.arange(0, 64), tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    token, found = chunk * 64 + row, tl.zeros([64, DIMS], SUM)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        douts = load_rows(dout, token, head * o_h, tokens, column, V, o_t)
        place = ((chunk * (HEADS // GROUP) + kv) * D + d)[:, None] * V + column[None, :]
        state = tl.load(states + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0).to(douts.dtype)
        found = tl.dot(douts, tl.trans(state), found, input_precision="ieee", out_dtype=SUM)
    found *= _left(decay, token, tokens, kv * a_h, a_t)[:, None]
    grads = tl.load(dpairs + ((chunk * HEADS + head) * 64 + row)[:, None] * 64 + row[None, :])
    grads = (grads * _between(decay, token, tokens, kv * a_h, a_t)).to(k.dtype.element_ty)
    keys = load_rows(k, token, kv * k_h, tokens, d, D, k_t)
    found = tl.dot(grads, keys, found, input_precision="ieee", out_dtype=SUM)
    at = dq + head * dq_h + token[:, None] * dq_t + d[None, :]
    tl.store(at, found * scale, mask=(token < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def delta_dk_kernel(
    q, k, decay, dpairs, dinside, states, dends, us, dv, dk, q_t, q_h, k_t, k_h, a_t, a_h, u_t, u_h, dk_t, dk_h, tokens, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr,
    DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head, numbers of a key): dk, from what keys read of the state before the chunk and add to the one
    behind it, from one another, and from queries of the chunk."""
    chunk, head, kvs = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), HEADS // GROUP
    row, d = tl.arange(0, 64), tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    token = chunk * 64 + row
    read, added = tl.zeros([64, DIMS], SUM), tl.zeros([64, DIMS], SUM)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        place, inside = ((chunk * kvs + head) * D + d)[:, None] * V + column[None, :], (d < D)[:, None] & (column < V)[None, :]
        u = load_rows(us, token, head * u_h, tokens, column, V, u_t)
        grads = load_rows(dv, token, head * u_h, tokens, column, V, u_t).to(u.dtype)
        state = tl.load(states + place, mask=inside, other=0.0).to(u.dtype)
        dstate = tl.load(dends + place, mask=inside, other=0.0).to(u.dtype)
        read = tl.dot(grads, tl.trans(state), read, input_precision="ieee", out_dtype=SUM)
        added = tl.dot(u, tl.trans(dstate), added, input_precision="ieee", out_dtype=SUM)
    found = added * _gone(decay, token, tokens, head * a_h, a_t)[:, None]
    found -= read * _left(decay, token, tokens, head * a_h, a_t)[:, None]
    keys = load_rows(k, token, head * k_h, tokens, d, D, k_t)
    own = tl.load(dinside + ((chunk * kvs + head) * 64 + row)[:, None] * 64 + row[None, :])
    found = tl.dot(own, keys, found, input_precision="ieee", out_dtype=SUM)
    found = tl.dot(tl.trans(own), keys, found, input_precision="ieee", out_dtype=SUM)
    kept = _between(decay, token, tokens, head * a_h, a_t) * scale
    for each in range(GROUP):
        query = head * GROUP + each
        pairs = tl.load(dpairs + ((chunk * HEADS + query) * 64 + row)[:, None] * 64 + row[None, :])
        queries = load_rows(q, token, query * q_h, tokens, d, D, q_t)
        found = tl.dot(tl.trans((pairs * kept).to(queries.dtype)), queries, found, input_precision="ieee", out_dtype=SUM)
    at = dk + head * dk_h + token[:, None] * dk_t + d[None, :]
    tl.store(at, found.to(dk.dtype.element_ty), mask=(token < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def delta_ddecay_kernel(
    q, v, dq, dv, states, dends, ddecay, q_t, q_h, v_t, v_h, dq_t, dq_h, dv_t, dv_h, a_t, a_h, tokens, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head): gradients of log decays."""
    chunk, head, kvs = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), HEADS // GROUP
    row = tl.arange(0, 64)
    token, found, ends = chunk * 64 + row, tl.sum(tl.zeros([64, 16], SUM), 1), tl.sum(tl.zeros([DIMS, 16], SUM), 1)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        values = load_rows(v, token, head * v_h, tokens, column, V, v_t).to(SUM)
        found -= tl.sum(values * load_rows(dv, token, head * dv_h, tokens, column, V, dv_t), 1)
        for start in range(0, D, DIMS):
            d = start + tl.arange(0, DIMS)
            place, inside = (head * D + d)[:, None] * V + column[None, :], (d < D)[:, None] & (column < V)[None, :]
            end = tl.load(states + (chunk + 1) * kvs * D * V + place, mask=inside, other=0.0)
            ends += tl.sum(end * tl.load(dends + chunk * kvs * D * V + place, mask=inside, other=0.0), 1)
    for start in range(0, D, DIMS):
        d = start + tl.arange(0, DIMS)
        for each in range(GROUP):
            query = head * GROUP + each
            queries = load_rows(q, token, query * q_h, tokens, d, D, q_t).to(SUM)
            found += tl.sum(queries * load_rows(dq, token, query * dq_h, tokens, d, D, dq_t), 1)
    found = tl.cumsum(found, 0, reverse=True) + tl.sum(ends, 0)
    tl.store(ddecay + head * a_h + token * a_t, found, mask=token < tokens)
