"""How far a strategy's results are from float64, in the types that people run: whether that grows with the ranks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from lcbench.cp.base import Place, Strategy
from lcbench.inputs.drawing import draw
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.full import full
from lcbench.problem import Heads, Problem, Scale
from lcbench.schedule.groups import Groups
from lcbench.testing.dense import dense_attention, dense_heads


def relative_errors(rank: int, ranks: int, strategy: Strategy, reduce_dtype: str, seqlen: int = 1024) -> dict[str, float]:
    """Root mean square error of out, dq, dk, dv over that of their values, bfloat16, a full mask. Collective."""
    problem = Problem(seqlen, Heads(4, 2, 64), Scale(1, ranks), "bfloat16", "forward_backward", reduce_dtype)
    mask, device = full(seqlen), torch.device("cpu")
    q, k, v, dout = (draw(name, np.arange(seqlen), problem, 3, device) for name in ("q", "k", "v", "dout"))
    leaves = q64, k64, v64 = [x.double().requires_grad_() for x in (q, k, v)]
    exact, _ = dense_attention(q64, k64, v64, dense_heads(mask, problem.heads.q), problem.softmax_scale)
    want = [exact.detach(), *torch.autograd.grad(exact, leaves, dout.double())]
    run = strategy.start(problem, mask, SDPAFlash(), Place(rank, device, Groups()))
    tokens = run.tokens
    out, saved = run.forward(q[tokens], k[tokens], v[tokens])
    got = [out, *run.backward(dout[tokens], saved)]
    squares = torch.tensor([float((mine.double() - x[tokens]).square().sum()) for mine, x in zip(got, want, strict=True)])
    dist.all_reduce(squares)
    norms = torch.tensor([float(x.square().sum()) for x in want])
    return dict(zip(("out", "dq", "dk", "dv"), (squares / norms).sqrt().tolist(), strict=True))
