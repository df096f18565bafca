"""What messages hold: one table, which everything that derives, counts, places or runs traffic reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lcbench.problem import Heads, Problem, Rule
from lcbench.schedule.schedule import HeadGroup, Kind

Precision = Literal["input", "sum", "reduce"]
Width = Literal["key", "value", "key and value", "gates", "state", "summary", ""]


@dataclass(frozen=True)
class Payload:
    """What a kind of message holds per token and head, or, of a state, per head, and what its receiver does with it.

    Attributes:
        operand: the operand whose rows it is about: results lie with their queries, a final gradient with the sum that it was.
        side: whose heads and tokens it has: those of queries, or of keys and values.
        width: which head dimensions it has per token and head; ``gates``: decay and strength of linear attention; ``state``: a
            state of it; ``summary``: what some tokens do to any state.
        extra: elements besides.
        precision: ``input``: the inputs' type; ``sum``: the accumulation type; ``reduce``: as ``Problem.reduce_dtype`` says.
        combine: what the receiver does: ``replace``: it uses them as they are; ``merge``: it merges partial results by their LSE;
            ``add``: it adds gradients up; ``scan``: it goes on from a state, or puts summaries behind one another.
        gradient: the kind of message that takes its gradient back; empty for what has none.
        final: the kind as which it travels once nothing is merged with it or added to it any more; empty where it is that already.
        plane: 0 or 1: keys, or values, of an operand that has both; None: all of it.
    """

    operand: str
    side: Kind
    width: Width
    extra: int
    precision: Precision
    combine: Literal["replace", "merge", "add", "scan"]
    gradient: str = ""
    final: str = ""
    plane: Literal[0, 1] | None = None

    @property
    def held(self) -> Precision:
        """The precision in which a buffer holds it: sums in the accumulation type, whatever they travel in."""
        return "sum" if self.combine == "add" else self.precision

    @property
    def partial_sum(self) -> bool:
        """Whether it is a gradient that others are added to."""
        return self.combine == "add" and bool(self.final)

    @property
    def per_token(self) -> bool:
        """Whether it is larger for more tokens. A state is not."""
        return self.combine != "scan"

    def elements(self, heads: Heads, rule: Rule | None = None) -> int:
        """Elements per token and head, or per head."""
        state, diagonal = heads.dim * heads.v, rule != "gated_delta_rule"
        widths: dict[Width, int] = {
            "": 0, "key": heads.dim, "value": heads.v, "key and value": heads.kv_width, "gates": heads.dim if diagonal else 2,
            "state": state, "summary": state + heads.dim * (1 if diagonal else heads.dim),
        }  # fmt: skip
        return widths[self.width] + self.extra


PAYLOADS = {
    "q": Payload("q", "q", "key", 0, "input", "replace", gradient="dq"),
    "kv": Payload("kv", "kv", "key and value", 0, "input", "replace", gradient="dkv"),
    "out": Payload("q", "q", "value", 0, "reduce", "merge", final="final"),  # over some of the keys
    "lse": Payload("q", "q", "", 1, "sum", "merge"),  # of that out
    "final": Payload("q", "q", "value", 0, "input", "merge"),  # out over all keys of its rows
    "dout": Payload("dout", "q", "value", 0, "input", "replace"),
    "stats": Payload("stats", "q", "", 2, "sum", "replace"),  # lse and delta
    "dq": Payload("dq", "q", "key", 0, "reduce", "add", final="final_dq"),
    "dkv": Payload("dkv", "kv", "key and value", 0, "reduce", "add", final="final_dkv"),
    "final_dq": Payload("dq", "q", "key", 0, "input", "add"),
    "final_dkv": Payload("dkv", "kv", "key and value", 0, "input", "add"),
    # Keys and values apart, where each travels as soon as it is there.
    "k": Payload("kv", "kv", "key", 0, "input", "replace", gradient="dk", plane=0),
    "v": Payload("kv", "kv", "value", 0, "input", "replace", gradient="dv", plane=1),
    "dk": Payload("dkv", "kv", "key", 0, "reduce", "add", final="final_dk", plane=0),
    "dv": Payload("dkv", "kv", "value", 0, "reduce", "add", final="final_dv", plane=1),
    "final_dk": Payload("dkv", "kv", "key", 0, "input", "add", plane=0),
    "final_dv": Payload("dkv", "kv", "value", 0, "input", "add", plane=1),
    # Of linear attention: decay and strength go where keys and values go, and states instead of these.
    "gates": Payload("gates", "kv", "gates", 0, "sum", "replace", gradient="dgates"),
    "dgates": Payload("dgates", "kv", "gates", 0, "sum", "add", final="final_dgates"),
    "final_dgates": Payload("dgates", "kv", "gates", 0, "sum", "add"),
    "state": Payload("state", "kv", "state", 0, "sum", "scan", gradient="dstate"),  # after a shard and all before it
    "summary": Payload("summary", "kv", "summary", 0, "sum", "scan", gradient="dsummary"),  # what a shard does to any state
    "dstate": Payload("dstate", "kv", "state", 0, "sum", "scan"),  # gradient of that state, from all shards after it
    "dsummary": Payload("dsummary", "kv", "summary", 0, "sum", "scan"),
}
GATES = {"kv": "gates", "dkv": "dgates", "final_dkv": "final_dgates"}  # what goes along with keys and values, and their gradients
APART = {"kv": ("k", "v"), "dkv": ("dv", "dk"), "final_dkv": ("final_dv", "final_dk")}  # in the order in which they are there


def gradients_of(kind: str) -> tuple[str, str]:
    """The kinds of message that take the gradient of a kind back: as a part of a sum, and as all of it."""
    gradient = PAYLOADS[kind].gradient
    return gradient, PAYLOADS[gradient].final


def element_bytes(precision: Precision, problem: Problem) -> int:
    """Bytes of an element of a precision class; sums are float32, or float64 for float64 inputs."""
    low = precision == "input" or (precision == "reduce" and problem.reduce_dtype == "input")
    return problem.itemsize if low else problem.sum_itemsize


def bytes_per_head(kind: str, problem: Problem, precision: Precision | None = None) -> int:
    """Bytes per head and token of a message of a kind, or per head of a state; with ``precision``, of what it holds in that one."""
    payload = PAYLOADS[kind]
    return payload.elements(problem.heads, problem.rule) * element_bytes(precision or payload.precision, problem)


def token_bytes(kind: str, group: HeadGroup, problem: Problem, precision: Precision | None = None) -> int:
    """``bytes_per_head`` of all heads of a group."""
    return group.count(PAYLOADS[kind].side) * bytes_per_head(kind, problem, precision)
