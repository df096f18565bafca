"""Torchtitan: flags of its trainer. Its context parallelism gathers keys and values.

Read in the wheel torchtitan 0.3.0 (``config/configs.py``, ``distributed/context_parallel/api.py``, ``distributed/full_dtensor.py``,
``models/llama3``, ``models/common/config_utils.py``) and in the repository at b5bcd76. Up to 0.2.2 its language models had scaled
dot-product attention, and ``context_parallel_rotate_method`` with ``alltoall``, a ring.
"""

from __future__ import annotations

from typing import Any

from lcbench.advice.frameworks.base import Cannot, Choice, Export, check_causal, check_chunks, check_layout, flags, ranks_note
from lcbench.kernels.base import Kernel
from lcbench.kernels.flex import Flex

CHECKED = "torchtitan 0.3.0"
# attn_backend of a language model that context parallelism takes.
BACKENDS: dict[type[Kernel], str] = {Flex: "flex"}
ORDERS = {"zigzag": "headtail", "contiguous": "None"}
BLOCK = 128  # of a block mask, queries
DTYPES = ("bfloat16", "float32")


def export(choice: Choice) -> Export:
    pattern, shape = choice.pattern, choice.shape
    if pattern.heads > 1 or pattern.ring > 1:
        raise Cannot(f"{CHECKED} gathers keys and values; it has no ring and no exchange of heads")
    if choice.problem.dtype not in DTYPES:
        raise Cannot(f"it trains in {' and '.join(DTYPES)}, not in {choice.problem.dtype}")
    check_causal(choice, "a decoder layer of torchtitan")
    if shape.windowed:
        raise Cannot("no setting makes its models' attention a window")
    backend = choice.of_kernel(BACKENDS, "flex")
    check_layout(choice, *ORDERS)
    check_chunks(choice)
    if choice.ranks > 1 and choice.problem.seqlen % (choice.ranks * BLOCK):
        raise Cannot(f"its block masks need a length that {choice.ranks} x {BLOCK} tokens divide, not {choice.problem.seqlen}")
    settings: dict[str, Any] = {
        "training.seq_len": choice.problem.seqlen, "training.mixed_precision_param": choice.problem.dtype,
        "parallelism.context_parallel_degree": choice.ranks,
    }  # fmt: skip
    if choice.ranks > 1:
        settings["parallelism.context_parallel_load_balancer"] = _balancer(choice)
    return Export(settings, flags(settings), left_out=_left_out(choice), notes=(*_notes(choice, backend), ranks_note(choice)))


def _balancer(choice: Choice) -> str:
    """How tokens are dealt out; ``ptrr`` deals out blocks by their work, which is for masks that are not one triangle."""
    if choice.pattern.layout == "auto":
        return "ptrr" if choice.shape.documents else ORDERS["zigzag"]
    return ORDERS[choice.pattern.layout]


def _left_out(choice: Choice) -> tuple[str, ...]:
    found = [f"heads={choice.problem.heads}: those of the model's configuration, which a flag does not change"]
    if not choice.problem.backward:
        found.append("direction=forward: training runs backward too, which was not measured")
    return tuple(found)


def _notes(choice: Choice, backend: str) -> tuple[str, ...]:
    found = [f"attn_backend of the model is {backend}, in the function of its config_registry that --config names"]
    if not choice.shape.documents:
        found.append("its attention is causal per document, so this is a sequence of one document")
    if choice.ranks > 1:
        found.append("this is torchtitan's code, not that which was measured")
    return tuple(found)
