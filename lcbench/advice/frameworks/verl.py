"""verl: overrides of its trainer's configuration. FSDP's engine has Ulysses; Megatron's has Transformer Engine's ways.

Read in the wheel verl 0.9.1 (``trainer/config``, ``workers/engine/{fsdp,megatron}/transformer_impl.py``,
``models/transformers/monkey_patch.py``, ``models/mcore/util.py``) and in the repository at 1dda039.
"""

from __future__ import annotations

from typing import Any

from lcbench.advice.frameworks import te
from lcbench.advice.frameworks.base import Cannot, Choice, Export, check_causal, check_halves, check_heads, overrides, ranks_note
from lcbench.advice.frameworks.deepspeed import model_window
from lcbench.kernels.base import Kernel
from lcbench.kernels.flash_attn2 import FlashAttn2
from lcbench.kernels.flash_attn3 import FlashAttn3

CHECKED = "verl 0.9.1"
ACTOR = "actor_rollout_ref.actor"
MODEL = "actor_rollout_ref.model"
FLASH: dict[type[Kernel], str] = {FlashAttn2: "flash_attention_2", FlashAttn3: "flash_attention_3"}


def export(choice: Choice) -> Export:
    check_halves(choice, "verl")
    check_causal(choice, "its training")
    pattern = choice.pattern
    exchange = pattern.ring == 1 and pattern.gathered == 1
    # With the kernels that FSDP's engine does not take, an exchange of heads is Megatron's.
    settings, notes = _fsdp(choice) if exchange and type(choice.kernel) in FLASH else _megatron(choice)
    scale = choice.problem.scale
    settings |= {"trainer.nnodes": scale.nodes, "trainer.n_gpus_per_node": scale.gpus_per_node}
    lines = ["python -m verl.trainer.main_ppo", *(f"'{word}'" for word in overrides(settings))]
    return Export(settings, " \\\n".join(lines), left_out=_left_out(choice), notes=(*notes, *_notes(choice)))


def _fsdp(choice: Choice) -> tuple[dict[str, Any], list[str]]:
    """Ulysses."""
    check_heads(choice, replicated=True)
    settings = {
        "model_engine": "dp", f"{MODEL}.use_remove_padding": True,
        f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size": choice.ranks, f"{ACTOR}.fsdp_config.dtype": choice.problem.dtype,
        f"+{MODEL}.override_config.attn_implementation": choice.of_kernel(FLASH, FLASH[FlashAttn2]),
    }  # fmt: skip
    notes = ["this is verl's code, not that which was measured"] if choice.ranks > 1 else []
    return settings, notes + model_window(choice)


def _megatron(choice: Choice) -> tuple[dict[str, Any], list[str]]:
    """Context parallelism of Megatron's engine, whose sequences are packed."""
    comm, degrees = te.communication(choice)
    if degrees:
        raise Cannot("its Megatron engine makes no hierarchical groups, which a2a+p2p needs")
    if choice.shape.windowed:
        raise Cannot("the configuration of its Megatron engine has no window")
    version = te.backend(choice, comm)
    there = f"{ACTOR}.megatron"
    settings = {
        "model_engine": "megatron", f"{there}.context_parallel_size": choice.ranks, f"{there}.use_remove_padding": True,
        f"{there}.dtype": choice.problem.dtype,
    }  # fmt: skip
    if comm is not None:
        settings[f"+{there}.override_transformer_config.cp_comm_type"] = comm
    chosen = "auto" if version is None else "flash" if version else "fused"  # unsaid it is flash
    settings[f"{there}.override_transformer_config.attention_backend"] = chosen
    if version:
        settings[f"+{there}.override_transformer_config.flash_attention_version"] = version
    return settings, te.notes(choice, comm)


def _left_out(choice: Choice) -> tuple[str, ...]:
    found = [f"heads={choice.problem.heads}: those of the model", f"seqlen={choice.problem.seqlen}: as long as the data packs"]
    if not choice.problem.backward:
        found.append("direction=forward: training runs backward too, which was not measured")
    return tuple(found)


def _notes(choice: Choice) -> tuple[str, ...]:
    found = ["the actor is set, and the reference model follows it; a critic has settings of its own"]
    if not choice.shape.documents:
        found.append("it packs its samples, each causal, so this is a batch of one sample")
    return (*found, ranks_note(choice))
