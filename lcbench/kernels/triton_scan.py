"""Gated linear attention in Triton, by chunks of 64 tokens: Yang et al., arXiv 2312.06635, section 4.

Forward: pairs of tokens of a chunk, the states that chunks begin with, out. Backward: the gradients of the states that chunks end
with, then those of tokens, each number written by one program, so that results repeat bit by bit.

Decays are summed where they are needed, and no sum is taken from another: between two blocks of 16 tokens from the later block's
first token on and up to it, within a block pair by pair. So every exponent is at most 0, however strong decays are. Only the
gradient of decays is a difference of sums, within a chunk: a token's is what later queries of the chunk, and the state at its end,
get of all before it.

Names: D numbers of a key, V of a value, padded to powers of two. ``_t`` and ``_h``: strides over tokens and heads. The code is
compiled for CUDA. Under ``TRITON_INTERPRET=1`` it runs on a CPU, slowly; tests run it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lcbench.kernels.base import accumulation_dtype, heads_whole
from lcbench.kernels.linear import Summary, Tokens
from lcbench.kernels.triton_split import padded
from lcbench.problem import Heads

CHUNK, BLOCK = 64, 16
BLOCKS = CHUNK // BLOCK


class Ran(NamedTuple):
    """What backward takes: the tokens, each head's numbers side by side, the state that they began with, and their pairs."""

    x: Tokens
    begin: torch.Tensor
    pairs: torch.Tensor


@dataclass(frozen=True)
class ByTriton:
    """What a rule's kernels of heads are compiled for, and how they are launched."""

    heads: Heads
    scale: float

    def _zeros(self, x: Tokens) -> torch.Tensor:
        return x.v.new_zeros(self.heads.kv, self.heads.dim, self.heads.v, dtype=accumulation_dtype(x.v.dtype))

    def _columns(self, x: Tokens) -> int:
        return int(triton.cdiv(self.heads.v, self._sizes(x)["COLUMNS"]))

    def _sizes(self, x: Tokens, *, tall: bool = False) -> dict[str, Any]:
        """What every kernel is compiled for, and its launch: COLUMNS of values and DIMS of keys are those of a program, which is
        ``tall`` if it has all tokens of a chunk with whole keys."""
        dim, value = padded(self.heads.dim), padded(self.heads.v)
        wide = accumulation_dtype(x.q.dtype)
        return {
            "HEADS": self.heads.q, "GROUP": self.heads.q // self.heads.kv, "D": self.heads.dim, "PAD": dim, "V": self.heads.v,
            "COLUMNS": min(value, 64 if dim <= 128 else 32), "DIMS": min(dim, 32),
            "SUM": tl.float64 if wide == torch.float64 else tl.float32,
            "num_warps": 8 if tall and (dim > 64 or x.q.dtype == wide) else 4, "num_stages": 2 if dim <= 128 else 1,
        }  # fmt: skip


class PreparedTritonChunk(ByTriton):
    """The rule ``gla`` for heads."""

    def summary(self, x: Tokens) -> Summary:
        return Summary(self._states(whole(x), None, None), _transition(x))

    def local(self, x: Tokens) -> torch.Tensor:
        """Pairs (chunks, Hq, 64, 64), in the inputs' type."""
        x = whole(x)
        pairs = x.q.new_zeros(chunks_of(x), self.heads.q, CHUNK, CHUNK)
        if len(x.q):
            pairs_kernel[chunks_of(x) * BLOCKS, self.heads.q](
                x.q, x.k, x.decay, pairs, *strides(x.q, x.k, x.decay), len(x.q), self.scale, **self._sizes(x)
            )
        return pairs

    def forward(
        self, x: Tokens, state: torch.Tensor | None, local: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Ran]:
        x = whole(x)
        pairs, begin = self.local(x) if local is None else local, self._zeros(x) if state is None else state.contiguous()
        states = begin.new_empty(chunks_of(x), *begin.shape, dtype=x.q.dtype)
        end = self._states(x, begin, states)
        out = x.q.new_empty(len(x.q), self.heads.q, self.heads.v)
        if len(x.q):
            out_kernel[chunks_of(x), self.heads.q, self._columns(x)](
                x.q,
                x.v,
                x.decay,
                pairs,
                states,
                out,
                *strides(x.q, x.v, x.decay, out),
                len(x.q),
                self.scale,
                EACH=True,
                **self._sizes(x, tall=True),
            )
        return out, end, Ran(x, begin, pairs)

    def summary_backward(self, dout: torch.Tensor, saved: Ran) -> Summary:
        return Summary(self._dstates(saved.x, heads_whole(dout), None, None), _transition(saved.x))

    def backward(self, dout: torch.Tensor, saved: Ran, dstate: torch.Tensor | None) -> tuple[Tokens, torch.Tensor]:
        x, begin, pairs = saved
        dout, wide, tokens = heads_whole(dout), begin.dtype, len(x.q)
        dend = self._zeros(x) if dstate is None else dstate.contiguous()
        dends = begin.new_empty(chunks_of(x), *begin.shape)
        dbegin = self._dstates(x, dout, dend, dends)
        # The gradient of decays is a difference of sums of these.
        dq, dk = (torch.empty(part.shape, dtype=wide, device=part.device) for part in (x.q, x.k))
        dv, ddecay = torch.empty_like(x.v), torch.empty_like(x.decay)
        if not tokens:
            return Tokens(dq.to(x.q.dtype), dk.to(x.k.dtype), dv, ddecay), dbegin
        states = begin.new_empty(chunks_of(x) + 1, *begin.shape)
        states[-1] = self._states(x, begin, states)
        dpairs = torch.empty_like(pairs, dtype=wide)
        chunks, heads, sizes = chunks_of(x), self.heads, self._sizes(x)
        keys = triton.cdiv(heads.dim, sizes["DIMS"])
        dv_kernel[chunks, heads.kv, self._columns(x)](
            x.k, x.decay, pairs, dends, dout, dv, *strides(x.k, x.decay, dout, dv), tokens, **self._sizes(x, tall=True)
        )
        dpairs_kernel[chunks, heads.q](x.v, dout, dpairs, *strides(x.v, dout), tokens, **sizes)
        dq_kernel[chunks * BLOCKS, heads.q, keys](
            x.k, x.decay, dpairs, states, dout, dq, *strides(x.k, x.decay, dout, dq), tokens, self.scale, **sizes
        )
        dk_kernel[chunks * BLOCKS, heads.kv, keys](
            x.q, x.v, x.decay, dpairs, dends, dk, *strides(x.q, x.v, x.decay, dk), tokens, self.scale, **sizes
        )
        ddecay_kernel[chunks, heads.kv, keys](
            x.q, x.k, dq, dk, states, dends, ddecay, *strides(x.q, x.k, dq, dk, ddecay), tokens, **sizes
        )
        return Tokens(dq.to(x.q.dtype), dk.to(x.k.dtype), dv, ddecay), dbegin

    def _states(self, x: Tokens, begin: torch.Tensor | None, states: torch.Tensor | None) -> torch.Tensor:
        """The state behind the last token; writes those before each chunk into ``states`` (chunks, Hk, D, V)."""
        end = self._zeros(x)
        states_kernel[self.heads.kv, self._columns(x)](
            x.k, x.v, x.decay, end if begin is None else begin, end if states is None else states, end,
            *strides(x.k, x.v, x.decay), len(x.k), chunks_of(x), BEGINS=begin is not None, KEPT=states is not None,
            **self._sizes(x, tall=True),
        )  # fmt: skip
        return end

    def _dstates(self, x: Tokens, dout: torch.Tensor, dend: torch.Tensor | None, dends: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the state before the first token; writes those behind each chunk into ``dends``."""
        begin = self._zeros(x)
        dstates_kernel[self.heads.kv, self._columns(x)](
            x.q, x.decay, dout, begin if dend is None else dend, begin if dends is None else dends[-1:], begin,
            *strides(x.q, x.decay, dout), len(x.q), chunks_of(x), self.scale, BEGINS=dend is not None, KEPT=dends is not None,
            **self._sizes(x, tall=True),
        )  # fmt: skip
        return begin


def whole(x: Tokens) -> Tokens:
    """The tokens with each head's numbers side by side in memory."""
    return Tokens(*(None if part is None else heads_whole(part) for part in x))  # type: ignore[arg-type]


def chunks_of(x: Tokens) -> int:
    return -(-len(x.q) // CHUNK)


def _transition(x: Tokens) -> torch.Tensor:
    return x.decay.sum(0).exp()


def strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Over tokens and heads."""
    return tuple(step for x in tensors for step in x.stride()[:2])


# Every kernel takes all of ``_sizes``; one that needs less of it takes the rest unread.
@triton.jit
def load_rows(x, token, at, END, d, LAST: tl.constexpr, x_t):
    """Numbers d of the tokens, whose head begins at ``at``; zeros from token END and number LAST on."""
    inside = (token < END)[:, None] & (d < LAST)[None, :]
    return tl.load(x + at + token.to(tl.int64)[:, None] * x_t + d[None, :], mask=inside, other=0.0)


@triton.jit
def _sum_of(decay, begin, end, tokens, at, d, D: tl.constexpr, decay_t, SUM: tl.constexpr):
    """Sums of log decays of tokens begin ... end - 1, both multiples of 16, for numbers d."""
    total = tl.sum(tl.zeros([16, d.shape[0]], SUM), 0)
    for first in range(begin, end, 16):
        total += tl.sum(load_rows(decay, first + tl.arange(0, 16), at, tokens, d, D, decay_t), 0)
    return total


@triton.jit
def _kept(decay, token, END, tokens, at, d, D: tl.constexpr, decay_t):
    """Sums of log decays behind each token up to END, which is no later than the next chunk: (tokens, d)."""
    later = load_rows(decay, tl.where(token + 1 < END, token + 1, tokens), at, tokens, d, D, decay_t)
    return tl.cumsum(later, 0, reverse=True)


@triton.jit
def pairs_kernel(
    q, k, decay, pairs, q_t, q_h, k_t, k_h, a_t, a_h, tokens, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (block of 16 tokens, query head): its rows of pairs with all tokens of the chunk up to each."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv, own, chunk = head // GROUP, block % 4, block // 4
    row, d = tl.arange(0, 16), tl.arange(0, PAD)
    first = block * 16
    into = pairs + ((chunk.to(tl.int64) * HEADS + head) * 64 + own * 16 + row)[:, None] * 64
    queries = load_rows(q, first + row, head * q_h, tokens, d, D, q_t).to(SUM) * scale
    decays = load_rows(decay, first + row, kv * a_h, tokens, d, D, a_t)
    left = (queries * tl.exp(tl.cumsum(decays, 0))).to(q.dtype.element_ty)
    between = tl.sum(tl.zeros([16, PAD], SUM), 0)
    for back in range(1, own + 1):
        start = first - back * 16
        gone = tl.exp(_kept(decay, start + row, start + 16, tokens, kv * a_h, d, D, a_t) + between[None, :])
        keys = (load_rows(k, start + row, kv * k_h, tokens, d, D, k_t).to(SUM) * gone).to(q.dtype.element_ty)
        found = tl.dot(left, tl.trans(keys), input_precision="ieee", out_dtype=SUM)
        tl.store(into + ((own - back) * 16 + row)[None, :], found.to(pairs.dtype.element_ty))
        between += tl.sum(load_rows(decay, start + row, kv * a_h, tokens, d, D, a_t), 0)
    found = tl.zeros([16, 16], SUM)
    for j in range(16):
        key = tl.load(k + (first + j).to(tl.int64) * k_t + kv * k_h + d, mask=(d < D) & (first + j < tokens), other=0.0).to(SUM)
        kept = tl.exp(tl.cumsum(tl.where((row > j)[:, None], decays, 0.0), 0))
        one = tl.sum(queries * kept * key[None, :], 1)
        found = tl.where((row[None, :] == j) & (row[:, None] >= j), one[:, None], found)
    tl.store(into + (own * 16 + row)[None, :], found.to(pairs.dtype.element_ty))


@triton.jit
def states_kernel(
    k, v, decay, begin, states, end, k_t, k_h, v_t, v_h, a_t, a_h, tokens, chunks, BEGINS: tl.constexpr, KEPT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr,
    DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, columns of values): states from chunk to chunk."""
    head = tl.program_id(0).to(tl.int64)
    row, d, column = tl.arange(0, 64), tl.arange(0, PAD), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (column < V)[None, :]
    place = (head * D + d)[:, None] * V + column[None, :]
    state = tl.zeros([PAD, COLUMNS], SUM)
    if BEGINS:
        state = tl.load(begin + place, mask=inside, other=0.0)
    for chunk in range(chunks):
        if KEPT:
            tl.store(states + place, state.to(states.dtype.element_ty), mask=inside)
            states += HEADS // GROUP * D * V
        token = chunk * 64 + row
        gone = tl.exp(_kept(decay, token, chunk * 64 + 64, tokens, head * a_h, d, D, a_t))
        keys = (load_rows(k, token, head * k_h, tokens, d, D, k_t).to(SUM) * gone).to(k.dtype.element_ty)
        total = tl.sum(load_rows(decay, token, head * a_h, tokens, d, D, a_t), 0)
        values = load_rows(v, token, head * v_h, tokens, column, V, v_t)
        state = state * tl.exp(total)[:, None] + tl.dot(tl.trans(keys), values, input_precision="ieee", out_dtype=SUM)
    tl.store(end + place, state, mask=inside)


@triton.jit
def out_kernel(
    q, v, decay, pairs, states, out, q_t, q_h, v_t, v_h, a_t, a_h, o_t, o_h, tokens, scale, EACH: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr,
    DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, query head, columns of values): what the chunk reads of the state before it and of its own tokens. ``EACH``
    number of a key decays by itself, or all as one."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv, row, d = head // GROUP, tl.arange(0, 64), tl.arange(0, PAD)
    token, column = chunk * 64 + row, tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if EACH:
        decays = load_rows(decay, token, kv * a_h, tokens, d, D, a_t)
    else:
        decays = tl.load(decay + kv * a_h + token * a_t, mask=token < tokens, other=0.0)[:, None]
    left = tl.exp(tl.cumsum(decays, 0))
    queries = (load_rows(q, token, head * q_h, tokens, d, D, q_t).to(SUM) * scale * left).to(q.dtype.element_ty)
    place = ((chunk * (HEADS // GROUP) + kv) * D + d)[:, None] * V + column[None, :]
    state = tl.load(states + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0)
    found = tl.dot(queries, state, input_precision="ieee", out_dtype=SUM)
    own = tl.load(pairs + ((chunk * HEADS + head) * 64 + row)[:, None] * 64 + row[None, :])
    values = load_rows(v, token, kv * v_h, tokens, column, V, v_t)
    found = tl.dot(own, values, found, input_precision="ieee", out_dtype=SUM)
    at = out + head * o_h + token[:, None] * o_t + column[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < V)[None, :])


@triton.jit
def dstates_kernel(
    q, decay, dout, dend, dends, dbegin, q_t, q_h, a_t, a_h, o_t, o_h, tokens, chunks, scale, BEGINS: tl.constexpr,
    KEPT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, columns of values): gradients of states from the last chunk, where ``dends`` is, to the first."""
    head = tl.program_id(0).to(tl.int64)
    row, d, column = tl.arange(0, 64), tl.arange(0, PAD), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (d < D)[:, None] & (column < V)[None, :]
    place = (head * D + d)[:, None] * V + column[None, :]
    dstate = tl.zeros([PAD, COLUMNS], SUM)
    if BEGINS:
        dstate = tl.load(dend + place, mask=inside, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        if KEPT:
            tl.store(dends + place, dstate, mask=inside)
            dends -= HEADS // GROUP * D * V
        token = chunk * 64 + row
        decays = load_rows(decay, token, head * a_h, tokens, d, D, a_t)
        left = tl.exp(tl.cumsum(decays, 0)) * scale
        dstate = dstate * tl.exp(tl.sum(decays, 0))[:, None]
        for each in range(GROUP):
            query = head * GROUP + each
            queries = (load_rows(q, token, query * q_h, tokens, d, D, q_t).to(SUM) * left).to(q.dtype.element_ty)
            douts = load_rows(dout, token, query * o_h, tokens, column, V, o_t)
            dstate = tl.dot(tl.trans(queries), douts, dstate, input_precision="ieee", out_dtype=SUM)
    tl.store(dbegin + place, dstate, mask=inside)


@triton.jit
def dv_kernel(
    k, decay, pairs, dends, dout, dv, k_t, k_h, a_t, a_h, o_t, o_h, dv_t, dv_h, tokens, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head, columns of values): dv."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, d = tl.arange(0, 64), tl.arange(0, PAD)
    token, column = chunk * 64 + row, tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    gone = tl.exp(_kept(decay, token, chunk * 64 + 64, tokens, head * a_h, d, D, a_t))
    keys = (load_rows(k, token, head * k_h, tokens, d, D, k_t).to(SUM) * gone).to(k.dtype.element_ty)
    place = ((chunk * (HEADS // GROUP) + head) * D + d)[:, None] * V + column[None, :]
    dstate = tl.load(dends + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0).to(k.dtype.element_ty)
    found = tl.dot(keys, dstate, input_precision="ieee", out_dtype=SUM)
    for each in range(GROUP):
        query = head * GROUP + each
        own = tl.load(pairs + ((chunk * HEADS + query) * 64 + row)[:, None] * 64 + row[None, :])
        douts = load_rows(dout, token, query * o_h, tokens, column, V, o_t)
        found = tl.dot(tl.trans(own), douts, found, input_precision="ieee", out_dtype=SUM)
    at = dv + head * dv_h + token[:, None] * dv_t + column[None, :]
    tl.store(at, found.to(dv.dtype.element_ty), mask=(token < tokens)[:, None] & (column < V)[None, :])


@triton.jit
def dpairs_kernel(
    v, dout, dpairs, v_t, v_h, o_t, o_h, tokens, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, query head): gradients of pairs; those above the diagonal are written, and nobody reads them."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, 64)
    token, found = chunk * 64 + row, tl.zeros([64, 64], SUM)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        douts = load_rows(dout, token, head * o_h, tokens, column, V, o_t)
        values = load_rows(v, token, head // GROUP * v_h, tokens, column, V, v_t)
        found = tl.dot(douts, tl.trans(values), found, input_precision="ieee", out_dtype=SUM)
    tl.store(dpairs + ((chunk * HEADS + head) * 64 + row)[:, None] * 64 + row[None, :], found)


@triton.jit
def dq_kernel(
    k, decay, dpairs, states, dout, dq, k_t, k_h, a_t, a_h, o_t, o_h, dq_t, dq_h, tokens, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (block of 16 tokens, query head, numbers of a key): dq."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv, own, chunk = head // GROUP, block % 4, (block // 4).to(tl.int64)
    row, d, first = tl.arange(0, 16), tl.program_id(2) * DIMS + tl.arange(0, DIMS), block * 16
    decays = load_rows(decay, first + row, kv * a_h, tokens, d, D, a_t)
    left = tl.exp(tl.cumsum(decays, 0))
    # What the block reads of the state before the chunk, and of tokens of the blocks between; both decay as its own tokens do.
    found = tl.zeros([16, DIMS], SUM)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        douts = load_rows(dout, first + row, head * o_h, tokens, column, V, o_t)
        place = ((chunk * (HEADS // GROUP) + kv) * D + d)[:, None] * V + column[None, :]
        state = tl.load(states + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0).to(douts.dtype)
        found = tl.dot(douts, tl.trans(state), found, input_precision="ieee", out_dtype=SUM)
    found *= tl.exp(_sum_of(decay, first - own * 16, first, tokens, kv * a_h, d, D, a_t, SUM))[None, :]
    rows = dpairs + ((chunk * HEADS + head) * 64 + own * 16 + row)[:, None] * 64
    between = tl.sum(tl.zeros([16, DIMS], SUM), 0)
    for back in range(1, own + 1):
        start = first - back * 16
        gone = tl.exp(_kept(decay, start + row, start + 16, tokens, kv * a_h, d, D, a_t) + between[None, :])
        keys = (load_rows(k, start + row, kv * k_h, tokens, d, D, k_t).to(SUM) * gone).to(k.dtype.element_ty)
        grads = tl.load(rows + ((own - back) * 16 + row)[None, :]).to(k.dtype.element_ty)
        found = tl.dot(grads, keys, found, input_precision="ieee", out_dtype=SUM)
        between += tl.sum(load_rows(decay, start + row, kv * a_h, tokens, d, D, a_t), 0)
    found *= left
    for j in range(16):
        inside = (d < D) & (first + j < tokens)
        key = tl.load(k + (first + j).to(tl.int64) * k_t + kv * k_h + d, mask=inside, other=0.0).to(SUM)
        kept = tl.exp(tl.cumsum(tl.where((row > j)[:, None], decays, 0.0), 0))
        grad = tl.load(dpairs + ((chunk * HEADS + head) * 64 + own * 16 + row) * 64 + own * 16 + j, mask=row >= j, other=0.0)
        found += grad[:, None] * kept * key[None, :]
    at = dq + head * dq_h + (first + row).to(tl.int64)[:, None] * dq_t + d[None, :]
    tl.store(at, found * scale, mask=(first + row < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def dk_kernel(
    q, v, decay, dpairs, dends, dk, q_t, q_h, v_t, v_h, a_t, a_h, dk_t, dk_h, tokens, scale, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (block of 16 tokens, key/value head, numbers of a key): dk."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own, chunk = block % 4, (block // 4).to(tl.int64)
    row, d, first = tl.arange(0, 16), tl.program_id(2) * DIMS + tl.arange(0, DIMS), block * 16
    gone = tl.exp(_kept(decay, first + row, first + 16, tokens, head * a_h, d, D, a_t))
    # What later chunks, by the state at the end, and later blocks read of the block; both decay as its own tokens do.
    found = tl.zeros([16, DIMS], SUM)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = load_rows(v, first + row, head * v_h, tokens, column, V, v_t)
        place = ((chunk * (HEADS // GROUP) + head) * D + d)[:, None] * V + column[None, :]
        dstate = tl.load(dends + place, mask=(d < D)[:, None] & (column < V)[None, :], other=0.0).to(values.dtype)
        found = tl.dot(values, tl.trans(dstate), found, input_precision="ieee", out_dtype=SUM)
    found *= tl.exp(_sum_of(decay, first + 16, first + (4 - own) * 16, tokens, head * a_h, d, D, a_t, SUM))[None, :]
    between = tl.sum(tl.zeros([16, DIMS], SUM), 0)
    for ahead in range(1, 4 - own):
        start = first + ahead * 16
        decays = load_rows(decay, start + row, head * a_h, tokens, d, D, a_t)
        left = tl.exp(tl.cumsum(decays, 0) + between[None, :]) * scale
        for each in range(GROUP):
            query = head * GROUP + each
            queries = (load_rows(q, start + row, query * q_h, tokens, d, D, q_t).to(SUM) * left).to(q.dtype.element_ty)
            rows = dpairs + ((chunk * HEADS + query) * 64 + (own + ahead) * 16 + row)[:, None] * 64
            grads = tl.load(rows + (own * 16 + row)[None, :]).to(q.dtype.element_ty)
            found = tl.dot(tl.trans(grads), queries, found, input_precision="ieee", out_dtype=SUM)
        between += tl.sum(decays, 0)
    found *= gone
    for i in range(16):
        # Tokens behind j up to i decay the pair (i, j).
        later = load_rows(decay, tl.where(row < i, first + row + 1, tokens), head * a_h, tokens, d, D, a_t)
        kept = tl.exp(tl.cumsum(later, 0, reverse=True)) * scale
        inside = (d < D) & (first + i < tokens)
        for each in range(GROUP):
            query = head * GROUP + each
            one = tl.load(q + (first + i).to(tl.int64) * q_t + query * q_h + d, mask=inside, other=0.0).to(SUM)
            grads = dpairs + ((chunk * HEADS + query) * 64 + own * 16 + i) * 64 + own * 16 + row
            found += tl.load(grads, mask=row <= i, other=0.0)[:, None] * kept * one[None, :]
    at = dk + head * dk_h + (first + row).to(tl.int64)[:, None] * dk_t + d[None, :]
    tl.store(at, found, mask=(first + row < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def ddecay_kernel(
    q, k, dq, dk, states, dends, ddecay, q_t, q_h, k_t, k_h, dq_t, dq_h, dk_t, dk_h, a_t, a_h, tokens, HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, DIMS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Program (chunk, key/value head, numbers of a key): gradients of log decays."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, d = tl.arange(0, 64), tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    token = chunk * 64 + row
    found = -load_rows(k, token, head * k_h, tokens, d, D, k_t).to(SUM) * load_rows(dk, token, head * dk_h, tokens, d, D, dk_t)
    for each in range(GROUP):
        query = head * GROUP + each
        queries = load_rows(q, token, query * q_h, tokens, d, D, q_t).to(SUM)
        found += queries * load_rows(dq, token, query * dq_h, tokens, d, D, dq_t)
    atend = tl.sum(tl.zeros([16, DIMS], SUM), 0)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        place, inside = (head * D + d)[:, None] * V + column[None, :], (d < D)[:, None] & (column < V)[None, :]
        step = HEADS // GROUP * D * V
        end = tl.load(states + (chunk + 1) * step + place, mask=inside, other=0.0)
        dend = tl.load(dends + chunk * step + place, mask=inside, other=0.0)
        atend += tl.sum(end * dend, 1)
    found = tl.cumsum(found, 0, reverse=True) + atend[None, :]
    at = ddecay + head * a_h + token[:, None] * a_t + d[None, :]
    tl.store(at, found, mask=(token < tokens)[:, None] & (d < D)[None, :])
