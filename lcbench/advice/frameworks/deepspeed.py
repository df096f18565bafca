"""DeepSpeed: Ulysses for models of transformers (ALST), registered in a program, and its JSON configuration.

Read in the source distribution deepspeed 0.19.6 (``runtime/sequence_parallel/ulysses_sp.py``, ``runtime/config.py``,
``__init__.py``) and in the repository at edaa722. Names of attention are those of transformers 5.
"""

from __future__ import annotations

import json
from typing import Any

from lcbench.advice.frameworks.base import Cannot, Choice, Export, check_causal, check_heads, ranks_note
from lcbench.kernels.base import Kernel
from lcbench.kernels.flash_attn2 import FlashAttn2
from lcbench.kernels.flash_attn3 import FlashAttn3
from lcbench.kernels.flash_attn4 import FlashAttn4
from lcbench.kernels.flex import Flex
from lcbench.kernels.sdpa_cudnn import SDPACudnn
from lcbench.kernels.sdpa_efficient import SDPAEfficient
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.kernels.sdpa_math import SDPAMath

CHECKED = "deepspeed 0.19.6"
FLASH: dict[type[Kernel], str] = {
    FlashAttn2: "flash_attention_2", FlashAttn3: "flash_attention_3", FlashAttn4: "flash_attention_4",
}  # fmt: skip
TORCH: dict[type[Kernel], str] = {
    Flex: "flex_attention", SDPAFlash: "sdpa", SDPACudnn: "sdpa", SDPAEfficient: "sdpa", SDPAMath: "sdpa",
}  # fmt: skip
DTYPES = {"bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}, "float32": {}}


def export(choice: Choice) -> Export:
    pattern = choice.pattern
    if pattern.ring > 1 or pattern.gathered > 1:
        raise Cannot("its sequence parallelism is Ulysses, an exchange of heads among all ranks; it has no ring and no gather")
    if choice.problem.dtype not in DTYPES:
        raise Cannot(f"it trains in {', '.join(DTYPES)}, not in {choice.problem.dtype}")
    check_causal(choice, "its sequence parallelism")
    check_heads(choice, replicated=True)
    if choice.problem.seqlen % choice.ranks:
        raise Cannot(f"{choice.ranks} ranks cannot share {choice.problem.seqlen} tokens evenly")
    attention = attention_of(choice)
    config: dict[str, Any] = {"sequence_parallel_size": choice.ranks, **DTYPES[choice.problem.dtype]}
    call: dict[str, Any] = {
        "core_attn_implementation": attention, "sequence_parallel_size": choice.ranks, "micro_batch_size": 1,
        "seq_length": choice.problem.seqlen, "seq_length_is_variable": False,
    }  # fmt: skip
    settings = {"config": config, "register_with_transformers": call}
    return Export(
        settings, _program(config, call), left_out=_left_out(choice), notes=(*_notes(choice, attention), ranks_note(choice))
    )


def attention_of(choice: Choice) -> str:
    """The word of transformers for the kernel.

    Raises:
        Cannot: it has none, or that one does not respect the mask there.
    """
    attention = choice.of_kernel({**FLASH, **TORCH}, FLASH[FlashAttn2])
    if attention not in FLASH.values() and (choice.shape.documents or choice.shape.windowed):
        what = "documents" if choice.shape.documents else "windows"
        raise Cannot(f"{what} take flash attention: {attention} there gets no mask but the causal one")
    return attention


def model_window(choice: Choice) -> list[str]:
    """What the model's configuration has to say of a window, where there is one."""
    if not choice.shape.windowed:
        return []
    assert choice.shape.left is not None
    return [f"the window is the model's own: sliding_window={choice.shape.left + 1} in its config, which counts the query too"]


def _program(config: dict[str, Any], call: dict[str, Any]) -> str:
    lines = [
        "import deepspeed", "from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF", "",
        f"config = {_literal(config)}", "mpu = UlyssesSPAttentionHF.register_with_transformers(", "    model,",
        *(f"    {name}={value!r}," for name, value in call.items()), ")",
        "engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)",
    ]  # fmt: skip
    return "\n".join(lines)


def _literal(config: dict[str, Any]) -> str:
    return json.dumps(config).replace("true", "True").replace("false", "False")


def _left_out(choice: Choice) -> tuple[str, ...]:
    found = [f"heads={choice.problem.heads}: those of the model"]
    if not choice.problem.backward:
        found.append("direction=forward: training runs backward too, which was not measured")
    return tuple(found)


def _notes(choice: Choice, attention: str) -> tuple[str, ...]:
    found = [f"load the model with attn_implementation={attention!r}, which has to be the same"]
    if attention == "sdpa":
        found.append(f"torch picks the backend of sdpa; {choice.word('kernel')} is one of them")
    if choice.kernel is None:
        found.append("the kernel was the library's own; flash_attention_2 is written here")
    if choice.ranks > 1:
        found.append("every batch has position_ids, which UlyssesSPDataLoaderAdapter shards")
    if choice.shape.documents:
        found.append("position_ids begin at 0 in each document")
    found += model_window(choice)
    if choice.ranks > 1:
        found.append("this is DeepSpeed's code, not that which was measured")
    return tuple(found)
