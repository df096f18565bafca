"""Megatron-LM: flags of its training scripts. Its attention is Transformer Engine's.

Read in the wheel megatron-core 0.19.2 (``megatron/training/arguments.py``, ``megatron/core/model_parallel_config.py``,
``transformer_config.py``, ``extensions/transformer_engine.py``) and in the repository at d98e8a6.
"""

from __future__ import annotations

from typing import Any

from lcbench.advice.frameworks import te
from lcbench.advice.frameworks.base import Choice, Export, check_causal, flags, ranks_note

CHECKED = "megatron-core 0.19.2"
HALVES = {"bfloat16": "bf16", "float16": "fp16"}


def export(choice: Choice) -> Export:
    comm, degrees = te.communication(choice)
    check_causal(choice, "a decoder layer of Megatron")
    heads, version = choice.problem.heads, te.backend(choice, comm)
    settings: dict[str, Any] = {"transformer-impl": "transformer_engine", "context-parallel-size": choice.ranks}
    if comm is not None:
        settings["cp-comm-type"] = comm
    if degrees:
        settings["hierarchical-context-parallel-sizes"] = degrees
    settings |= {"seq-length": choice.problem.seqlen, "num-attention-heads": heads.q, "kv-channels": heads.dim}
    if heads.kv != heads.q:
        settings |= {"group-query-attention": True, "num-query-groups": heads.kv}
    settings[HALVES[choice.problem.dtype]] = True
    if version is not None:
        settings["attention-backend"] = "flash" if version else "fused"
    if version:
        settings["flash-attention-version"] = version
    if choice.shape.windowed:
        settings["window-size"] = te.window(choice)
    if choice.shape.documents:
        settings["dataloader-inter-document-masking"] = True
    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if comm is not None else {}
    return Export(settings, flags(settings, variables), variables, left_out=_left_out(choice), notes=_notes(choice, comm))


def _left_out(choice: Choice) -> tuple[str, ...]:
    only = "direction=forward: training runs backward too, which was not measured"
    return () if choice.problem.backward else (only,)


def _notes(choice: Choice, comm: str | None) -> tuple[str, ...]:
    found = te.notes(choice, comm)
    if comm is not None:
        found.append("CUDA_DEVICE_MAX_CONNECTIONS=1 is asked for before Blackwell, and not together with FSDP")
    if comm == "all_gather":
        found.append("its help writes allgather, which Transformer Engine refuses: the word is all_gather")
    return (*found, ranks_note(choice))
