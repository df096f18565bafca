"""What one attention computation is: its heads, its scale, its numbers' type.

A leaf module: everything imports it, it imports nothing of lcbench and neither torch nor Hydra, so that planning
ten thousand cells on a login node costs no torch import.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

DTYPES = ("bfloat16", "float16", "float32", "float64")
DIRECTIONS = ("forward", "forward_backward")
REDUCE_DTYPES = ("float32", "input")

# Recurrences of linear attention (``kernels.linear``).
Rule = Literal["gla", "gated_delta_rule"]
RULES: tuple[Rule, ...] = get_args(Rule)


def itemsize(dtype: str) -> int:
    """Bytes per element."""
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def check_whole(option: str, value: object, least: int) -> None:
    """Raises ValueError unless the value of an option, such as ``mesh.tp``, is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{option}={value} is no whole number of at least {least}")


def format_tokens(tokens: int) -> str:
    """``65536 -> 64k``; a count that is no whole number of k stays as it is."""
    for suffix, unit in (("m", 1 << 20), ("k", 1 << 10)):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def _shortest(number: float) -> str:
    """A number above 0 in as few characters as say exactly it."""
    short = f"{number:g}"
    return (short if float(short) == number else repr(number)).replace("e+", "e")


@dataclass(frozen=True)
class Heads:
    """Head counts and dimensions.

    Attributes:
        q: query heads.
        kv: key/value heads (GQA when fewer than ``q``).
        dim: of a query and a key.
        dim_v: of a value and a result; None: as ``dim``.
        latent: whether values are the first numbers of keys, neither stored nor sent by themselves: multi-head latent attention in
            its absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1). ``heads=128x1x576:512`` is read so.
    """

    q: int
    kv: int
    dim: int
    dim_v: int | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if self.dim_v == self.dim:
            object.__setattr__(self, "dim_v", None)  # one way to say it, so that equal heads are equal

    @property
    def v(self) -> int:
        """The dimension of a value and of a result."""
        return self.dim if self.dim_v is None else self.dim_v

    @property
    def kv_width(self) -> int:
        """Numbers that a token's key and value have together, of each key/value head."""
        return self.dim if self.latent else self.dim + self.v

    def of(self, q: int, kv: int) -> Heads:
        """The same dimensions with other counts."""
        return replace(self, q=q, kv=kv)

    def __str__(self) -> str:
        return f"{self.q}x{self.kv}x{self.dim}" + ("" if self.dim_v is None else f":{self.dim_v}")


@dataclass(frozen=True)
class Softmax:
    """How scores become weights.

    Attributes:
        sink: each query head has a learned number that takes part in its softmax as a score without a value (gpt-oss; arXiv
            2309.17453): weights then sum to less than 1, and LSE has it in it.
        softcap: scores are ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118); 0: they are as they are.
        scale: what products of queries and keys are multiplied with; None: ``dim ** -0.5``.

    Raises:
        ValueError: a softcap below 0, or a scale that is not above 0.
    """

    sink: bool = False
    softcap: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.softcap < float("inf"):
            raise ValueError(f"softcap={self.softcap} is no number above 0")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} is no number above 0")

    def __str__(self) -> str:
        words = ["sink"] if self.sink else []
        words += [f"softcap{_shortest(self.softcap)}"] if self.softcap else []
        words += [f"scale{_shortest(self.scale)}"] if self.scale is not None else []
        return "_".join(words) or "plain"


PLAIN = Softmax()


@dataclass(frozen=True)
class Requests:
    """Equal requests.

    Attributes:
        count: how many.
        new: tokens of each whose queries are computed: all of a prompt, a chunk of it, or one that is decoded.
        total: its tokens whose keys and values there are, the new ones among them as the last.

    Raises:
        ValueError: no request, a request without a new token, or with fewer tokens in all than new ones.
    """

    count: int
    new: int
    total: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.new < 1:
            raise ValueError(f"{self.count} requests of {self.new} new tokens are none")
        if self.total < self.new:
            raise ValueError(f"a request of {self.total} tokens in all cannot have {self.new} new ones")

    def __str__(self) -> str:
        """As ``batch=`` has it: ``32q1s128k``; a count of 1 is left out, and so is a total of new tokens only."""
        count, total = "" if self.count == 1 else self.count, "" if self.total == self.new else f"s{format_tokens(self.total)}"
        return f"{count}q{format_tokens(self.new)}{total}"


@dataclass(frozen=True)
class Batch:
    """Requests that are computed together: their new tokens are packed back to back, and so are all their tokens.

    Attributes:
        groups: the requests in their order; adjacent groups of equal requests become one, so that equal batches are equal.
    """

    groups: tuple[Requests, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a batch needs a request")
        alike = groupby(self.groups, key=lambda group: (group.new, group.total))
        joined = tuple(Requests(sum(group.count for group in groups), *size) for size, groups in alike)
        object.__setattr__(self, "groups", joined)

    def __len__(self) -> int:
        return sum(group.count for group in self.groups)

    def __str__(self) -> str:
        return "_".join(map(str, self.groups))

    @property
    def new(self) -> NDArray[np.int64]:
        """New tokens of each request, (requests,)."""
        return np.repeat([g.new for g in self.groups], [g.count for g in self.groups]).astype(np.int64)

    @property
    def total(self) -> NDArray[np.int64]:
        """All tokens of each request, (requests,)."""
        return np.repeat([g.total for g in self.groups], [g.count for g in self.groups]).astype(np.int64)

    @property
    def q_bounds(self) -> NDArray[np.int64]:
        """Where each request's new tokens begin among all new ones, and the end, (requests + 1,)."""
        return np.concatenate([[0], np.cumsum(self.new)]).astype(np.int64)

    @property
    def k_bounds(self) -> NDArray[np.int64]:
        """Where each request's tokens begin among all tokens, and the end, (requests + 1,)."""
        return np.concatenate([[0], np.cumsum(self.total)]).astype(np.int64)

    @property
    def queries(self) -> int:
        """New tokens of all requests."""
        return sum(group.count * group.new for group in self.groups)

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return sum(group.count * group.total for group in self.groups)

    @property
    def plane(self) -> int:
        """Pairs of a new token and a token of the same request: what all masks of a batch are a part of."""
        return sum(group.count * group.new * group.total for group in self.groups)

    @property
    def decodes(self) -> bool:
        """Whether every request has one new token and others before it."""
        return all(group.new == 1 and group.total > 1 for group in self.groups)


@dataclass(frozen=True)
class Scale:
    """Nodes x GPUs per node; their product is the number of ranks, P of a context-parallel group that has them all."""

    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}"


@dataclass(frozen=True)
class Mesh:
    """Several context-parallel groups at once: ``tp`` of them share the heads of a sequence, and ``dp`` sequences are computed.

    The ranks of a scale are a grid of tp x cp x dp, cp being what is left: ranks / (tp * dp). A context-parallel group is the cp
    ranks that agree in the other two.

    Attributes:
        tp: tensor-parallel ranks: each has q / tp query heads and kv / tp key/value heads of the whole sequence. The one latent
            key of a token is read by all query heads, so each rank has it, as in vLLM and SGLang.
        dp: data-parallel replicas: each has a sequence, or a batch of requests, of its own.
        order: the three dimensions from the innermost, whose neighbours are adjacent ranks, outwards: Megatron-LM's order string
            (``tp-cp-ep-dp-pp`` there, ``megatron/core/parallel_state.py``).

    Raises:
        ValueError: a count below 1, or an order that does not name each dimension once.
    """

    DIMENSIONS: ClassVar[tuple[str, ...]] = ("tp", "cp", "dp")

    tp: int = 1
    dp: int = 1
    order: str = "tp-cp-dp"

    def __post_init__(self) -> None:
        for name, count in (("tp", self.tp), ("dp", self.dp)):
            check_whole(f"mesh.{name}", count, 1)
        if sorted(str(self.order).split("-")) != sorted(self.DIMENSIONS):
            raise ValueError(f"mesh.order={self.order} is no order of tp, cp and dp from the innermost out, such as tp-cp-dp")

    @property
    def count(self) -> int:
        """Context-parallel groups."""
        return self.tp * self.dp

    def heads(self, heads: Heads) -> Heads:
        """The heads of one context-parallel group.

        Raises:
            ValueError: tp does not divide the query heads or the key/value heads.
        """
        shared = [("query", heads.q)] if heads.latent else [("query", heads.q), ("key/value", heads.kv)]
        for name, count in shared:
            if count % self.tp:
                raise ValueError(f"mesh.tp={self.tp} does not divide the {count} {name} heads of heads={heads}")
        return heads.of(heads.q // self.tp, heads.kv if heads.latent else heads.kv // self.tp)

    def groups(self, scale: Scale) -> NDArray[np.int64]:
        """(dp, tp, cp): the global ranks of a scale; ``[i, j]`` are those of the context-parallel group (i, j), ascending.

        Raises:
            ValueError: tp * dp does not divide the ranks.
        """
        ranks = scale.world_size
        if ranks % self.count:
            raise ValueError(f"mesh.tp={self.tp} times mesh.dp={self.dp} does not divide the {ranks} ranks of scale={scale}")
        sizes = {"tp": self.tp, "cp": ranks // self.count, "dp": self.dp}
        inwards = self.order.split("-")[::-1]
        grid = np.arange(ranks, dtype=np.int64).reshape([sizes[name] for name in inwards])
        return np.ascontiguousarray(grid.transpose([inwards.index(name) for name in ("dp", "tp", "cp")]))

    def group_scale(self, scale: Scale) -> Scale:
        """The nodes that one context-parallel group spans x its ranks on each.

        Raises:
            ValueError: tp * dp does not divide the ranks, or some group has more ranks on one node than on another, or than other
                groups have.
        """
        groups = self.groups(scale).reshape(self.count, -1)
        # By group: its ranks on each node, without the nodes that it has none on.
        shares = [[count for count in np.bincount(nodes).tolist() if count] for nodes in groups // scale.gpus_per_node]
        odd = next((i for i, own in enumerate(shares) if own != [shares[0][0]] * len(shares[0])), None)
        if odd is not None:
            ranks, counts = (" ".join(map(str, each)) for each in (groups[odd].tolist(), shares[odd]))
            raise ValueError(
                f"{self} lays context-parallel groups unevenly over the nodes of scale={scale}: of ranks {ranks} they have {counts}"
                + (f", of the first group's {' '.join(map(str, shares[0]))}" if odd else "")
            )
        return Scale(len(shares[0]), shares[0][0])

    def __str__(self) -> str:
        return f"mesh.tp={self.tp} mesh.dp={self.dp} mesh.order={self.order}"


ALONE = Mesh()  # all ranks are one context-parallel group


@dataclass(frozen=True)
class Problem:
    """Everything a kernel or a strategy may ask about before it says whether it can run: of one context-parallel group.

    Attributes:
        seqlen: tokens over the context-parallel group whose keys and values there are.
        heads: head counts and dimensions.
        scale: nodes that the group spans x its GPUs on each.
        dtype: one of ``DTYPES``.
        direction: ``forward`` or ``forward_backward``.
        reduce_dtype: type of partial results and gradients under way between ranks: ``float32`` (float64 for float64 inputs), or
            ``input``, the inputs' type, which is fewer bytes and less exact.
        batch: requests, of which the new tokens have queries; None: one sequence, all of whose tokens have.
        softmax: how scores become weights.
        rule: the recurrence of linear attention; None: attention is a softmax over keys.
    """

    seqlen: int
    heads: Heads
    scale: Scale
    dtype: str
    direction: str
    reduce_dtype: str = "float32"
    batch: Batch | None = None
    softmax: Softmax = PLAIN
    rule: Rule | None = None

    @property
    def requests(self) -> Batch:
        """The batch; of a sequence, one request all of whose tokens are new."""
        return self.batch or Batch((Requests(1, self.seqlen, self.seqlen),))

    @property
    def queries(self) -> int:
        """Tokens over the context-parallel group that have queries."""
        return self.seqlen if self.batch is None else self.batch.queries

    @property
    def rectangular(self) -> bool:
        """Whether there are keys without queries: a cache."""
        return self.queries != self.seqlen

    @property
    def plane(self) -> int:
        """(query, key) pairs of one sequence, or of the same request: what every mask is a part of."""
        return self.seqlen**2 if self.batch is None else self.batch.plane

    @property
    def itemsize(self) -> int:
        """Bytes per element of the inputs."""
        return itemsize(self.dtype)

    @property
    def sum_itemsize(self) -> int:
        """Bytes per element of sums: float32, or float64 for float64 inputs."""
        return max(self.itemsize, 4)

    @property
    def backward(self) -> bool:
        return self.direction == "forward_backward"

    @property
    def input_bytes(self) -> float:
        """Bytes of q, k, v and, with backward, dout of a rank that has its even share of the tokens."""
        heads = self.heads
        per_query = heads.q * (heads.dim + (heads.v if self.backward else 0))
        return (self.queries * per_query + self.seqlen * heads.kv * heads.kv_width) * self.itemsize / self.scale.world_size

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return float(self.heads.dim**-0.5) if self.softmax.scale is None else self.softmax.scale
