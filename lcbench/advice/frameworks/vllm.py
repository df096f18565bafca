"""vLLM: flags of ``vllm serve``. Its prefill context parallelism gathers, for models with multi-head latent attention (MLA) only.

Read in the wheel vllm 0.33.0 (``config/parallel.py``, ``config/attention.py``, ``engine/arg_utils.py``,
``v1/attention/backend.py``, ``v1/worker/gpu/pcp_manager.py``). Its decode context parallelism shards the keys of one query per
request, and lcbench measures none of that.
"""

from __future__ import annotations

from typing import Any

from lcbench.advice.frameworks.base import Cannot, Choice, Export, check_causal, check_layout, flags, ranks_note
from lcbench.advice.frameworks.deepspeed import model_window
from lcbench.kernels.base import Kernel
from lcbench.kernels.flash_attn2 import FlashAttn2
from lcbench.kernels.flash_attn3 import FlashAttn3
from lcbench.kernels.flash_attn4 import FlashAttn4
from lcbench.kernels.flashinfer import FlashInfer
from lcbench.kernels.flex import Flex

CHECKED = "vllm 0.33.0"
# The backend, and of flash-attention the version.
BACKENDS: dict[type[Kernel], tuple[str, int]] = {
    FlashAttn2: ("FLASH_ATTN", 2), FlashAttn3: ("FLASH_ATTN", 3), FlashAttn4: ("FLASH_ATTN", 4), FlashInfer: ("FLASHINFER", 0),
    Flex: ("FLEX_ATTENTION", 0),
}  # fmt: skip
MLA: dict[type[Kernel], str] = {FlashAttn3: "FLASH_ATTN", FlashAttn4: "FLASH_ATTN", FlashInfer: "FLASHINFER"}
DTYPES = ("bfloat16", "float16", "float32")


def export(choice: Choice) -> Export:
    if choice.problem.backward:
        raise Cannot("it serves, and has no backward pass: direction=forward is what it runs")
    if choice.problem.dtype not in DTYPES:
        raise Cannot(f"it takes {', '.join(DTYPES)}, not {choice.problem.dtype}")
    check_causal(choice, "its prefill")
    settings: dict[str, Any] = {
        "max-model-len": max(choice.shape.lengths),
        "dtype": choice.problem.dtype,
        "tensor-parallel-size": 1,
    }
    settings |= _prefill(choice) if choice.ranks > 1 else _one(choice)
    if choice.problem.scale.nodes > 1:
        settings["nnodes"] = choice.problem.scale.nodes
    lines = flags(settings)
    left_out = (f"heads={choice.problem.heads}: those of the model",)
    return Export(settings, f"vllm serve <model> \\\n{lines}", left_out=left_out, notes=(*_notes(choice), ranks_note(choice)))


def _one(choice: Choice) -> dict[str, Any]:
    """Attention on one GPU."""
    backend, version = choice.of_kernel(BACKENDS, ("FLASH_ATTN", 0))
    settings: dict[str, Any] = {"attention-backend": backend}
    if version:
        settings["attention-config.flash_attn_version"] = version
    return settings


def _prefill(choice: Choice) -> dict[str, Any]:
    """Prefill context parallelism."""
    pattern, heads = choice.pattern, choice.problem.heads
    if pattern.gathered != choice.ranks:
        raise Cannot("its prefill context parallelism gathers keys and values; it has no ring and no exchange of heads")
    if heads.q != heads.kv:
        raise Cannot(
            f"its prefill context parallelism is for models with latent attention (MLA), whose prefill has a key/value head for "
            f"each of its query heads, not {heads.kv} for {heads.q}"
        )
    if choice.shape.windowed:
        raise Cannot("its models with latent attention (MLA) have no window")
    check_layout(choice, "zigzag")
    return {
        "prefill-context-parallel-size": choice.ranks, "decode-context-parallel-size": 1,
        "attention-config.mla_prefill_backend": choice.of_kernel(MLA, "FLASH_ATTN"),
    }  # fmt: skip


def _notes(choice: Choice) -> tuple[str, ...]:
    found = ["this is vLLM's code, not that which was measured, and its pages of the cache are written besides"]
    if choice.ranks > 1:
        found.append("for models with latent attention (MLA) only: what it gathers are latent keys, fewer bytes than were measured")
    if choice.shape.documents:
        found.append("documents are requests of one batch; set --max-num-batched-tokens to hold them")
    return (*found, *model_window(choice))
