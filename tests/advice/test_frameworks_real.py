"""What is exported goes through the frameworks' own parsers and configurations, on CPU, out of their wheels.

Wheels of a few megabytes are unpacked for the test. vLLM, whose wheel has hundreds, and DeepSpeed, which has none, are read where
they are installed.
"""

from __future__ import annotations

import argparse
import ast
import os
import site
import subprocess
import sys
import typing
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lcbench.advice.frameworks.base import argv, exported, overrides
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.testing import wheels

HEADS, LENGTH = "heads=48x12x64", "seqlen=96k"
WHEELS = {
    "megatron": ("megatron-core==0.19.2",),
    "te": ("transformer-engine==2.20.2",),
    "torchtitan": ("torchtitan==0.3.0", "tyro==1.0.17", "typeguard==4.6.1", "docstring-parser==0.18.0", "shtab==1.13.0"),
    "verl": ("verl==0.9.1",),
}
PYTHON = {"megatron": "3.12"}  # the oldest that it asks for
INSTALLED = {"deepspeed": "deepspeed", "vllm": "vllm"}
WORKS = {
    "megatron": (
        "cp=none scale=1x1 kernel=te_fused", "cp=ring scale=2x4 kernel=flash_attn2 mask=causal_document",
        "cp=allgather scale=1x6 kernel=flash_attn4 mask=sliding_window mask.left=700", "cp=ulysses scale=1x4 kernel=cudnn",
        "cp=usp cp.ulysses_degree=4 scale=3x4 kernel=flash_attn3 dtype=float16",
    ),
    "te": (
        "cp=none scale=1x1 kernel=te_fused mask=full", "cp=usp scale=3x4 kernel=flash_attn3",
        "cp=allgather scale=1x6 kernel=flash_attn4 mask=sliding_window_full", "cp=ring scale=1x4 kernel=flash_attn2 mask=document",
    ),
    "torchtitan": (
        "cp=none scale=1x1 kernel=flex", "cp=allgather scale=1x6 kernel=flex dtype=float32",
        "cp=allgather cp.layout=contiguous scale=2x4 kernel=flex", "cp=allgather scale=2x4 kernel=flex mask=causal_document",
    ),
    "verl": (
        "cp=ulysses scale=1x6 kernel=flash_attn3", "cp=ring scale=3x4 kernel=te_fused", "cp=allgather scale=1x4 kernel=flash_attn2",
        "cp=te_a2a scale=1x4",
    ),
    "deepspeed": (
        "cp=none scale=1x1 kernel=flex", "cp=ulysses scale=1x6 kernel=flash_attn3",
        "cp=ulysses scale=1x4 kernel=sdpa_math dtype=float32",
    ),
    "vllm": (
        "cp=none scale=1x1 kernel=flashinfer direction=forward", "cp=none scale=1x1 kernel=flash_attn2 direction=forward",
        "cp=allgather scale=1x4 heads=16x16x128 kernel=flash_attn3 direction=forward",
    ),
}  # fmt: skip


def cells(name: str) -> list[Cell]:
    found = []
    for words in WORKS[name]:
        typed = words.split()
        own = [] if "heads=" in words else [HEADS]
        (planned,) = look([*typed, *own, LENGTH]).cells
        found.append(planned.cell)
    return found


def megatron(folder: Path) -> None:
    """Its parser, which is all of its arguments."""
    vars(typing).setdefault("override", lambda method: method)  # of what is newer than Python 3.11 it uses this
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    for cell in cells("megatron"):
        settings = exported(cell, "megatron").settings
        taken = vars(parser.parse_args(argv(settings)))
        for flag, value in settings.items():
            got = taken[flag.replace("-", "_")]
            assert (got.name if hasattr(got, "name") else got) in (value, [value]), (flag, got)
        assert taken["seq_length"] == cell.problem.seqlen


def te(folder: Path) -> None:
    """The signatures and the words that its source compares with: importing it takes its compiled part."""
    where = folder / "transformer_engine" / "pytorch" / "attention" / "dot_product_attention"
    tree = ast.parse((where / "dot_product_attention.py").read_text())
    taken = {
        method.name: {a.arg for a in (*method.args.args, *method.args.kwonlyargs)}
        for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) and kind.name == "DotProductAttention"
        for method in kind.body if isinstance(method, ast.FunctionDef)
    }  # fmt: skip
    sources = [path.read_text() for path in where.glob("*.py")]
    words = {node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    methods = {"DotProductAttention": "__init__", "set_context_parallel_group": "set_context_parallel_group"}
    for cell in cells("te"):
        found = exported(cell, "te")
        for call, given in found.settings.items():
            assert set(given) <= taken[methods[call]], call
            assert {value for value in given.values() if isinstance(value, str)} <= words
        assert set(found.environment) <= words


def torchtitan(folder: Path) -> None:
    """Its configuration, by the parser that its trainer uses, with its rules for it."""
    from dataclasses import dataclass, field

    import tyro
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.config.manager import custom_registry

    @dataclass
    class Config:
        training: Any = field(default_factory=TrainingConfig)
        parallelism: Any = field(default_factory=ParallelismConfig)

    Config.__annotations__ |= {"training": TrainingConfig, "parallelism": ParallelismConfig}
    for cell in cells("torchtitan"):
        settings = exported(cell, "torchtitan").settings
        taken = tyro.cli(Config, args=argv(settings), registry=custom_registry)
        for key, value in settings.items():
            part, name = key.split(".")
            assert getattr(getattr(taken, part), name) == (None if value == "None" else value), key


def verl(folder: Path) -> None:
    """Its configuration, composed by Hydra as its trainer does."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(folder / "verl" / "trainer" / "config"), version_base=None):
        for cell in cells("verl"):
            settings = exported(cell, "verl").settings
            taken = compose("ppo_trainer", overrides=overrides(settings))
            for key, value in settings.items():
                name = key.removeprefix("+")
                assert name == "model_engine" or OmegaConf.select(taken, name) == value, key
            engine = "megatron" if settings["model_engine"] == "megatron" else "fsdp"
            assert taken.actor_rollout_ref.actor.strategy == engine


def deepspeed(folder: Path) -> None:
    """Its configuration, and the signature that takes the rest."""
    import inspect

    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    call = inspect.signature(UlyssesSPAttentionHF.register_with_transformers)
    for cell in cells("deepspeed"):
        settings = exported(cell, "deepspeed").settings
        taken = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **settings["config"]})
        assert taken.bfloat16_config.enabled == (cell.problem.dtype == "bfloat16")
        call.bind("model", **settings["register_with_transformers"])


def vllm(folder: Path) -> None:
    """The flags, and the names of backends, in its source: importing it takes its compiled part."""
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    where = Path(found.origin).parent
    flags = (where / "engine" / "arg_utils.py").read_text()
    attention = (where / "config" / "attention.py").read_text()
    backends = "".join(path.read_text() for path in (where / "v1" / "attention" / "backends").rglob("registry.py"))
    for cell in cells("vllm"):
        for flag, value in exported(cell, "vllm").settings.items():
            own, _, option = flag.partition(".")
            assert f'"--{own}"' in flags, flag
            assert not option or f"\n    {option}: " in attention, flag
            assert "backend" not in flag or f"\n    {value} = " in backends, value


CHECKS: dict[str, Callable[[Path], None]] = {f.__name__: f for f in (megatron, te, torchtitan, verl, deepspeed, vllm)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_framework_takes_what_is_exported(name: str, tmp_path: Path) -> None:
    if name in INSTALLED and find_spec(INSTALLED[name]) is None:
        pytest.skip(f"{INSTALLED[name]} is not installed, and no small wheel has it")
    if name in WHEELS and (reason := wheels.install(tmp_path, *WHEELS[name], python=PYTHON.get(name))):
        pytest.skip(reason)
    paths = [str(Path(__file__).resolve().parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, name, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    site.addsitedir(str(folder))
    CHECKS[sys.argv[1]](folder)
