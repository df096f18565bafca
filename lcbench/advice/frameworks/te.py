"""Transformer Engine: ``DotProductAttention`` with ``set_context_parallel_group``.

Read in the wheel transformer-engine 2.20.2 (pytorch/attention/dot_product_attention: ``dot_product_attention.py`` for names,
``context_parallel.py`` and ``utils.py`` for what is refused) and in the repository at d0067d0.
"""

from __future__ import annotations

from typing import Any

from lcbench.advice.frameworks.base import Cannot, Choice, Export, check_chunks, check_halves, check_heads, check_layout, ranks_note
from lcbench.kernels.base import Kernel
from lcbench.kernels.cudnn import Cudnn
from lcbench.kernels.flash_attn2 import FlashAttn2
from lcbench.kernels.flash_attn3 import FlashAttn3
from lcbench.kernels.flash_attn4 import FlashAttn4
from lcbench.kernels.sdpa_cudnn import SDPACudnn
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.kernels.te_fused import TEFused

CHECKED = "transformer-engine 2.20.2"
WHO = "Transformer Engine"
# The version of flash-attention, or 0: cuDNN's fused attention.
BACKENDS: dict[type[Kernel], int] = {
    FlashAttn2: 2, FlashAttn3: 3, FlashAttn4: 4, SDPAFlash: 2, Cudnn: 0, TEFused: 0, SDPACudnn: 0,
}  # fmt: skip
FLASH = (2, 3, 4)
WITH_WINDOWS = ("a2a", "all_gather")


def export(choice: Choice) -> Export:
    comm, degrees = communication(choice)
    shape, heads = choice.shape, choice.problem.heads
    mask = "causal" if shape.causal else "no_mask"
    if shape.documents:
        mask = "padding_causal" if shape.causal else "padding"
    attention: dict[str, Any] = {
        "num_attention_heads": heads.q, "kv_channels": heads.dim, "num_gqa_groups": heads.kv, "attention_dropout": 0.0,
        "qkv_format": "thd" if shape.documents else "bshd", "attn_mask_type": mask,
    }  # fmt: skip
    if shape.windowed:
        attention["window_size"] = window(choice)
    settings: dict[str, Any] = {"DotProductAttention": attention}
    if comm is not None:
        settings["set_context_parallel_group"] = {"cp_comm_type": comm}
    variables = environment(backend(choice, comm))
    text = _program(attention, comm, degrees, variables)
    return Export(settings, text, variables, notes=(*notes(choice, comm), ranks_note(choice)))


def communication(choice: Choice) -> tuple[str | None, list[int]]:
    """``cp_comm_type``, None for one rank, and of ``a2a+p2p`` the ranks of an exchange of heads and of a ring.

    Raises:
        Cannot: it has no such context parallelism.
    """
    pattern, shape = choice.pattern, choice.shape
    check_halves(choice, WHO)
    if pattern.windows > 1:
        raise Cannot(f"{WHO} has one ring, not a double one of {pattern.windows} windows")
    if pattern.heads > 1 and pattern.ring > 1 and pattern.apart:
        raise Cannot(f"the ranks of {WHO}'s exchanges of heads are neighbours; these are {pattern.ring} ranks apart")
    check_layout(choice, "zigzag")
    check_chunks(choice)
    check_heads(choice, replicated=False)
    both = pattern.heads > 1 and pattern.ring > 1
    shares = {"a2a+p2p": both, "a2a": pattern.heads > 1, "p2p": pattern.ring > 1, "all_gather": pattern.gathered > 1}
    comm = next((name for name, held in shares.items() if held), None)
    if comm is not None and shape.windowed and comm not in WITH_WINDOWS:
        raise Cannot(f"{WHO} has windows with cp_comm_type {' and '.join(WITH_WINDOWS)}, not with {comm}")
    return comm, [pattern.heads, pattern.ring] if comm == "a2a+p2p" else []


def window(choice: Choice) -> tuple[int, int]:
    """(left, right) in tokens, -1 for no bound; the query itself is seen besides."""
    shape = choice.shape
    right = 0 if shape.causal else -1 if shape.right is None else shape.right
    return -1 if shape.left is None else shape.left, right


def backend(choice: Choice, comm: str | None) -> int | None:
    """The version of flash-attention, 0 for cuDNN's fused attention, None where it may choose.

    Raises:
        Cannot: it has no such kernel.
    """
    found = choice.of_kernel(dict[type[Kernel], int | None](BACKENDS), None)
    if found == max(FLASH) and comm == "a2a+p2p":
        raise Cannot(f"{WHO} does not take flash-attention {found} with cp_comm_type a2a+p2p")
    return found


def environment(version: int | None) -> dict[str, str]:
    """The variables that leave one backend."""
    if version is None:
        return {}
    chosen = {"NVTE_FLASH_ATTN": version > 0, "NVTE_FUSED_ATTN": version == 0, "NVTE_UNFUSED_ATTN": False}
    if version:
        chosen |= {f"NVTE_FLASH_ATTN_V{other}": other == version for other in FLASH}
    return {name: str(int(on)) for name, on in chosen.items()}


def notes(choice: Choice, comm: str | None) -> list[str]:
    """What to know of its context parallelism."""
    found = []
    if comm is not None:
        peer = f"te_{comm.replace('_', '').replace('+', '_')}"
        if choice.word("cp") != f"cp={peer}":
            found.append(f"this is {WHO}'s code, not that which was measured; cp={peer} measures it")
        found.append(f"tokens are dealt out in 2 x {choice.ranks} chunks, rank r the chunks r and {2 * choice.ranks - 1} - r")
    if choice.shape.documents and comm is not None:
        chunks = 2 * choice.ranks
        padded = sum(-(-length // chunks) * chunks for length in choice.shape.lengths)
        found.append(f"each document is padded to a multiple of {chunks}: {choice.problem.seqlen} tokens become {padded}")
    if choice.kernel is None:
        found.append("it chooses the kernel itself, as it did when this was measured")
    elif isinstance(choice.kernel, SDPAFlash | SDPACudnn):
        found.append(f"{choice.word('kernel')} is torch's build of that library; {WHO} calls the library itself")
    return found


def _program(attention: dict[str, Any], comm: str | None, degrees: list[int], variables: dict[str, str]) -> str:
    lines = ["import os", ""] if variables else []
    lines += [f"os.environ[{name!r}] = {value!r}" for name, value in variables.items()]
    lines += ["import torch", "from transformer_engine.pytorch import DotProductAttention", "", "attention = DotProductAttention("]
    lines += [f"    {name}={value!r}," for name, value in attention.items()]
    lines += [")"]
    if comm is None:
        return "\n".join(lines)
    group = "group"
    if degrees:
        heads, _ = degrees
        lines += [f"# heads: {heads} neighbours; ring: every {heads}th rank"]
        group = "[heads, ring]"
    lines += [f"attention.set_context_parallel_group({group}, ranks, torch.cuda.Stream(), cp_comm_type={comm!r})"]
    return "\n".join(lines)
