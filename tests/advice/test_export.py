"""Export: every framework can or cannot every strategy, mask, kernel and type, and nothing else; what it writes is read back."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lcbench.advice.frameworks.base import Cannot, Export, argv, exported, framework, names
from lcbench.advice.patterns import Shape, pattern_of, shape_of
from lcbench.commands.export import main
from lcbench.cp.base import Scheduled
from lcbench.cp.ring import Ring
from lcbench.grid.build import build_strategy, check_options, with_option
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.paths import REPOSITORY
from lcbench.grid.values import parse_tokens
from lcbench.problem import Heads, Problem, Scale
from lcbench.testing.dense import dense_heads
from lcbench.testing.masks import load, small
from lcbench.testing.masks import names as values
from tests.report.made import made_sweep

FRAMEWORKS = ("deepspeed", "megatron", "te", "torchtitan", "verl", "vllm")
# Four nodes: a double ring of two windows, and heads enough for all.
COMMON = {"scale": "4x8", "heads": "64x32x128", "seqlen": "12k", "kernel": "flash_attn3", "mask": "causal"}
SUITED: dict[str, dict[str, str]] = {"torchtitan": {"kernel": "flex"}, "vllm": {"heads": "64x64x128", "direction": "forward"}}
# By hand, from what the frameworks' documents say that they do.
TE = {"none", "ring", "allgather", "ulysses", "usp", "te_p2p", "te_allgather", "te_a2a", "te_a2a_p2p", "torch_cp", "yunchang_usp",
      "ring_flash_attn_zigzag"}  # fmt: skip
CAN = {
    "te": TE,
    "megatron": TE,
    "verl": TE - {"usp", "te_a2a_p2p", "yunchang_usp"},
    "deepspeed": {"none", "ulysses", "te_a2a"},
    "torchtitan": {"none", "allgather", "te_allgather", "torch_cp", "ring_flash_attn_llama3"},
    "vllm": {"none", "allgather", "te_allgather", "torch_cp"},
}


@cache
def base() -> dict[str, Any]:
    (planned,) = look(["cp=ring", "scale=1x4"]).cells
    return planned.cell.config


def made(**axes: Any) -> Cell:
    """A cell as a command line makes it, ``cp__layout`` for cp.layout; Hydra composes the first one only, which takes its time."""
    config, options = dict(base()), {axis: value for axis, value in axes.items() if "__" not in axis}
    for group in ("kernel", "cp", "mask", "lengths"):
        own = {axis.split("__")[1]: value for axis, value in axes.items() if axis.startswith(f"{group}__")}
        name = options.pop(group, "web_text" if group == "lengths" else config.get(group, {}).get("name"))
        config[group] = check_options(group, {**load(group, name), **own})
    config["mask"] = with_option(config["mask"], "lengths", config.pop("lengths"))
    config |= options | {"seqlen": parse_tokens(options.get("seqlen", config["seqlen"]))}
    return Cell.from_config(config)


def suited(name: str, **axes: Any) -> Cell:
    """A cell that differs in ``axes`` from one that this framework takes."""
    return made(**{**COMMON, **SUITED.get(name, {}), **axes})


def outcome(one: Cell, name: str) -> Export | str:
    """An export or a refusal, also of a cell that cannot run here either."""
    try:
        return exported(one, name)
    except Cannot as error:
        return str(error)
    except ValueError as error:
        if (said := str(error)).startswith("this cell cannot run: "):
            return said
        raise


def test_frameworks_are_found_by_their_files() -> None:
    assert tuple(names()) == FRAMEWORKS
    assert all(framework(name).CHECKED.split()[1][0].isdigit() for name in names())


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("cp", values("cp"))
def test_every_framework_can_or_cannot_every_strategy(name: str, cp: str) -> None:
    one = suited(name, cp=cp, **({"scale": "1x1"} if cp == "none" else {}))
    found = outcome(one, name)
    assert isinstance(found, Export) == (cp in CAN[name]), found
    if isinstance(found, str):
        # Strategies for serving refuse the cell before a framework is asked.
        assert found.startswith((f"{name} cannot run cp={cp} ", f"this cell cannot run: cp {cp}: "))
        assert "\n" not in found


def test_the_docs_say_which_strategy_is_where() -> None:
    page = (REPOSITORY / "docs" / "export.md").read_text()
    rows = [[field.strip(" `") for field in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head = next(number for number, row in enumerate(rows) if row[0] == "cp")
    said = {row[0]: row[1:] for row in rows[head + 2 :]}
    assert set(said) == set(values("cp"))
    for column, name in enumerate(rows[head][1:]):
        assert {cp for cp, row in said.items() if row[column] == "yes"} == CAN[name]
    assert all(f"| `{name}` |" in page and framework(name).CHECKED in page for name in names())


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("kernel", values("kernel"))
def test_every_framework_can_or_cannot_every_kernel(name: str, kernel: str) -> None:
    flash, cudnn = {"flash_attn2", "flash_attn3", "flash_attn4"}, {"cudnn", "te_fused", "sdpa_cudnn"}
    torch = {"sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math"}
    can = {
        "te": flash | cudnn | {"sdpa_flash"}, "megatron": flash | cudnn | {"sdpa_flash"}, "deepspeed": flash | torch | {"flex"},
        "torchtitan": {"flex"}, "verl": flash | cudnn | {"sdpa_flash"}, "vllm": flash | {"flashinfer", "flex"},
    }  # fmt: skip
    sparse = {"mask": "block_random"} if kernel.endswith("_sparse") or kernel == "vsa" else {}
    one = suited(name, cp="none" if name in ("vllm", "torchtitan") else "ulysses", kernel=kernel, **sparse)
    if one.config["cp"]["name"] == "none":
        one = suited(name, cp="none", scale="1x1", kernel=kernel, **sparse)
    found = outcome(one, name)
    assert isinstance(found, Export) == (kernel in can[name]), found


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("mask", [mask for mask in values() if not mask.endswith("_file")])
def test_every_framework_can_or_cannot_every_mask(name: str, mask: str) -> None:
    cp, packed = ("allgather" if name in ("torchtitan", "vllm") else "ulysses"), {"causal", "causal_document", "temporal_graph"}
    can = {
        "te": packed | {"full", "document", "sliding_window", "sliding_window_full"}, "megatron": packed | {"sliding_window"},
        "deepspeed": packed | {"sliding_window"}, "verl": packed | {"sliding_window"}, "torchtitan": packed, "vllm": packed,
    }  # fmt: skip
    kernel = (
        {"kernel": "triton_block_sparse"}
        if mask.startswith("block_") and mask not in ("block_causal", "block_causal_document")
        else {}
    )
    found = outcome(suited(name, cp=cp, mask=mask, scale="1x8", **kernel), name)
    assert isinstance(found, Export) == (mask in can[name]), found


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_framework_can_or_cannot_every_type(name: str, dtype: str) -> None:
    can = {
        "torchtitan": {"bfloat16", "float32"},
        "deepspeed": {"bfloat16", "float16", "float32"},
        "vllm": {"bfloat16", "float16", "float32"},
    }
    cp = {"torchtitan": "allgather", "vllm": "none"}.get(name, "ulysses")
    kernel = {"torchtitan": "flex", "deepspeed": "sdpa_math", "vllm": "flex"}.get(name, "flash_attn2")
    found = outcome(suited(name, cp=cp, dtype=dtype, kernel=kernel, scale="1x1" if cp == "none" else "4x8"), name)
    assert isinstance(found, Export) == (dtype in can.get(name, {"bfloat16", "float16"})), found


# -- what a pattern and a shape say is so --------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", values("cp"))
def test_a_pattern_has_all_ranks_and_moves_what_the_schedule_moves(cp: str) -> None:
    strategy = build_strategy(load("cp", cp))
    scale = Scale(1, 1) if cp == "none" else Scale(2, 4)
    problem = Problem(512, Heads(16, 8, 64), scale, "bfloat16", "forward")
    pattern = pattern_of(strategy, problem)
    if pattern is None:
        training = {"groupcast", "hybrid", "lightseq", "tokenring", "sparse_heads", "sparse_sequence", "sparse_hybrid"}
        assert cp in training | {"apb", "dcp", "displaced", "dualparal", "helix", "kvp", "lasp", "lasp2", "pcp", "star", "zeco"}
        return
    assert pattern.ranks == scale.world_size
    if isinstance(strategy, Scheduled):
        schedule = strategy.schedule(problem, small("causal", 512, problem.heads, Path()))
        kinds = {move.kind for step in schedule.steps for move in step.moves}
        assert ("q" in kinds) == (pattern.heads > 1)
        assert any(len(step.returns) for step in schedule.steps) == (pattern.heads > 1)
        assert len(schedule.heads) == pattern.heads


def test_a_strategy_made_from_another_has_no_pattern() -> None:
    class Mine(Ring):
        pass

    problem = Problem(512, Heads(16, 8, 64), Scale(1, 4), "bfloat16", "forward")
    assert pattern_of(Ring(), problem) is not None
    assert pattern_of(Mine(), problem) is None


@pytest.mark.parametrize("mask", values())
def test_a_shape_sees_what_its_mask_sees(mask: str, tmp_path: Path) -> None:
    tokens, heads = 60, Heads(4, 2, 8)
    found = small(mask, tokens, heads, tmp_path, seed=3)
    shape = shape_of(found)
    if shape is not None:
        dense = dense_heads(found, heads.q)
        assert np.array_equal(dense[0], drawn(shape)), shape
        assert mask not in ("star_attention", "dilated_window", "prefix_lm_causal")


def drawn(shape: Shape) -> NDArray[np.bool_]:
    document = np.repeat(np.arange(len(shape.lengths)), shape.lengths)
    q, k = np.indices((sum(shape.lengths),) * 2)
    seen = document[:, None] == document
    seen &= (k <= q) | (not shape.causal)
    seen &= (q - k <= shape.left) if shape.left is not None else True
    seen &= (k - q <= shape.right) if shape.right is not None else True
    return seen


# -- what is written -----------------------------------------------------------------------------------------------------


def test_two_levels_of_ranks_are_written_inside_out() -> None:
    one = made(cp="usp", cp__ulysses_degree=4, scale="3x8", heads="24x12x64", seqlen="48k", kernel="cudnn", dtype="float16")
    settings = exported(one, "megatron").settings
    assert settings["context-parallel-size"] == 24
    assert settings["cp-comm-type"] == "a2a+p2p"
    assert settings["hierarchical-context-parallel-sizes"] == [4, 6]
    assert settings["attention-backend"] == "fused"
    assert settings["fp16"] is True


def test_a_window_counts_as_each_framework_counts() -> None:
    axes = {"cp": "ulysses", "scale": "1x4", "heads": "8x4x64", "seqlen": "32k", "mask": "sliding_window", "mask__left": 700}
    te = exported(made(**axes, kernel="flash_attn3"), "te").settings["DotProductAttention"]
    assert te["window_size"] == (700, 0)
    assert "--window-size 700,0" in exported(made(**axes, kernel="flash_attn3"), "megatron").text
    for name in ("deepspeed", "verl"):
        assert any("sliding_window=701 " in note for note in exported(made(**axes, kernel="flash_attn2"), name).notes)
    both = {**axes, "mask": "sliding_window_full", "mask__right": 300}
    assert exported(made(**both, kernel="flash_attn3"), "te").settings["DotProductAttention"]["window_size"] == (700, 300)
    with pytest.raises(Cannot, match="windows with cp_comm_type a2a and all_gather, not with p2p"):
        exported(made(**{**axes, "cp": "ring"}, kernel="flash_attn3"), "te")


def test_documents_are_packed_and_padded() -> None:
    axes = {"cp": "ring", "scale": "1x4", "heads": "8x4x64", "seqlen": 64, "mask": "causal_document", "lengths": "explicit"}
    found = exported(made(**axes, lengths__values=[30, 1, 33], kernel="flash_attn2"), "te")
    assert found.settings["DotProductAttention"]["qkv_format"] == "thd"
    assert found.settings["DotProductAttention"]["attn_mask_type"] == "padding_causal"
    assert any("64 tokens become 80" in note for note in found.notes)  # 32 + 8 + 40
    assert any(word.startswith("lengths=explicit:") for word in found.left_out)


@pytest.mark.parametrize(
    ("axes", "name", "why"),
    [
        ({"cp": "ulysses", "heads": "64x4x128", "scale": "1x8"}, "megatron", "8 ranks cannot share 4 key/value heads evenly, and"),
        ({"cp": "ring", "seqlen": 4104, "scale": "1x8"}, "te", "2 x 8 chunks divide, not 4104"),
        ({"cp": "allgather", "seqlen": "9k", "kernel": "flex"}, "torchtitan", "32 x 128 tokens divide, not 9216"),
        ({"cp": "ring", "cp__layout": "striped"}, "megatron", "order zigzag, not striped"),
        ({"cp": "usp", "cp__ulysses": "outside"}, "te", "neighbours"),
        ({"cp": "loongtrain"}, "te", "not a double one of 2 windows"),
        ({"cp": "usp", "kernel": "flash_attn4"}, "te", "flash-attention 4 with cp_comm_type a2a[+]p2p"),
        ({"cp": "ulysses", "mask": "full", "kernel": "te_fused"}, "megatron", "causal, and no setting"),
        ({"cp": "usp"}, "verl", "no hierarchical groups"),
        ({"cp": "ring", "kernel": "flex"}, "torchtitan", "no ring and no exchange of heads"),
        ({"cp": "ulysses", "mask": "causal_document", "kernel": "sdpa_flash"}, "deepspeed", "documents take flash attention"),
        ({"cp": "allgather", "direction": "forward"}, "vllm", "latent attention"),
        ({"cp": "allgather"}, "vllm", "direction=forward is what it runs"),
        ({"cp": "ring", "kernel": "triton_band"}, "te", "of these kernels it has flash_attn2, flash_attn3"),
    ],
)  # fmt: skip
def test_a_refusal_says_why(axes: dict[str, str], name: str, why: str) -> None:
    with pytest.raises(Cannot, match=why):
        exported(made(**{**COMMON, **axes}), name)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["workload=block"], "workload=block is not attention alone"),
        (["mesh.dp=2"], r"mesh\(dp=2\) is more than one context-parallel group"),
    ],
)
def test_only_attention_of_one_group_is_exported(words: list[str], why: str) -> None:
    (planned,) = look(["cp=ulysses", "scale=1x4", "kernel=flash_attn3", *words]).cells
    with pytest.raises(Cannot, match=why):
        exported(planned.cell, "te")


def test_a_refusal_says_what_would_be_taken() -> None:
    with pytest.raises(Cannot, match=r"with the rest as it is it can run cp=allgather, ring, ulysses, usp$"):
        exported(made(**COMMON, cp="tokenring"), "megatron")
    with pytest.raises(Cannot, match=r"it can run cp=ulysses$"):
        exported(made(**COMMON, cp="ring"), "deepspeed")
    with pytest.raises(Cannot, match=r"has flash_attn2, flash_attn3, flash_attn4, flex, [a-z_, ]* only$"):
        exported(made(**{**COMMON, "kernel": "xformers"}, cp="ulysses"), "deepspeed")


def test_ulysses_repeats_key_heads_where_the_framework_does() -> None:
    few = {"cp": "ulysses", "heads": "64x4x128", "scale": "1x8", "kernel": "flash_attn2"}
    assert exported(made(**{**COMMON, **few}), "deepspeed").settings["config"]["sequence_parallel_size"] == 8
    assert isinstance(exported(made(**{**COMMON, **few}), "verl"), Export)


def test_verl_takes_the_engine_that_has_the_kernel() -> None:
    axes = {**COMMON, "scale": "2x4", "cp": "ulysses"}
    for kernel, engine in (("flash_attn2", "dp"), ("te_fused", "megatron"), ("flash_attn4", "megatron")):
        assert exported(made(**{**axes, "kernel": kernel}), "verl").settings["model_engine"] == engine
    settings = exported(made(**{**axes, "cp": "te_a2a"}), "verl").settings
    assert settings["+actor_rollout_ref.actor.megatron.override_transformer_config.cp_comm_type"] == "a2a"
    assert settings["actor_rollout_ref.actor.megatron.override_transformer_config.attention_backend"] == "auto"


def test_what_has_no_name_there_is_said() -> None:
    axes = {**COMMON, "cp": "ulysses", "cp__stages": 2, "reduce_dtype": "input", "direction": "forward"}
    said = "\n".join(exported(made(**axes), "megatron").left_out)
    assert all(word in said for word in ("cp.stages=2", "reduce_dtype=input", "direction=forward", "measure, seed"))
    assert "cp.ulysses_degree" not in "\n".join(exported(made(**{**COMMON, "cp": "usp", "cp__ulysses_degree": 4}), "te").left_out)


def test_a_peer_is_measured_as_it_is_named() -> None:
    assert any("cp=te_a2a_p2p measures it" in note for note in exported(made(**COMMON, cp="usp"), "te").notes)
    for peer, name in (("te_p2p", "te"), ("te_allgather", "megatron"), ("te_a2a", "te"), ("te_a2a_p2p", "megatron")):
        notes = exported(made(**COMMON, cp=peer), name).notes
        assert not any("not that which was measured" in note for note in notes)
        assert any("chooses the kernel itself" in note for note in notes)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_text_is_what_the_settings_say(name: str) -> None:
    cp = "allgather" if name in ("torchtitan", "vllm") else "ulysses"
    found = exported(suited(name, cp=cp), name)
    if name in ("te", "deepspeed"):
        assert _calls(found.text) >= _leaves(found.settings)
    elif name == "verl":
        words = shlex.split(found.text.replace("\\\n", " "))
        assert len([word for word in words if "=" in word]) == len(found.settings)
    else:
        words = [w for w in shlex.split(found.text.replace("\\\n", " ")) if w not in ("vllm", "serve", "<model>")]
        given = dict(word.split("=", 1) for word in words if not word.startswith("--") and "=" in word)
        assert given == found.environment
        assert [word for word in words if word not in {f"{k}={v}" for k, v in given.items()}] == argv(found.settings)


def _calls(text: str) -> set[tuple[str, str]]:
    """Keywords of every call, and items of every dictionary, in a program."""
    tree = ast.parse(text)
    calls = [(k.arg, k.value) for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords if k.arg]
    items = [
        (key.value, value) for node in ast.walk(tree) if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant)
    ]  # fmt: skip
    return {(str(name), repr(ast.literal_eval(value))) for name, value in [*calls, *items] if not isinstance(value, ast.Name)}


def _leaves(settings: dict[str, Any]) -> set[tuple[str, str]]:
    return {(name, repr(value)) for part in settings.values() for name, value in part.items()}


# -- the command ---------------------------------------------------------------------------------------------------------


def test_a_stored_cell_is_exported_by_the_beginning_of_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = made_sweep(tmp_path / "results", "one", ["cp=ring", "mask=full", "seqlen=48k", "scale=1x6", "kernel=flash_attn2"])
    (cell_id,) = sweep.entries()
    assert main([cell_id[:5], "--for", "te", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["cell"], said["framework"], said["settings"]["set_context_parallel_group"]["cp_comm_type"]) == (
        cell_id,
        "te",
        "p2p",
    )
    assert said["settings"]["DotProductAttention"]["attn_mask_type"] == "no_mask"
    assert main([f"one/{cell_id}", "--for", "te"]) == 0
    assert f"# cell {cell_id}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cp=ring", "--for", "nemo"], "error: --for nemo is none of deepspeed, megatron, te, torchtitan, verl, vllm"),
        (["cp=tokenring", "scale=1x4", "--for", "te"], "error: te cannot run cp=tokenring "),
        (["cp=ring,usp", "scale=1x4", "--for", "te"], "these overrides make 2 cells, and one is exported"),
        (["cp=ulysses", "scale=1x7", "--for", "te"], "error: this cell cannot run: cp ulysses: "),
        (["0123456789ab", "--for", "te"], "error: no cell '0123456789ab' below "),
        (["abc", "def", "--for", "te"], "error: one cell is exported, not 2: abc def"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


@pytest.mark.slow
def test_it_loads_neither_torch_nor_mlflow() -> None:
    words = ["cp=usp", "scale=2x8", "heads=16x16x64", "--for", "megatron"]
    loaded = "sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    code = f"import sys; from lcbench.commands.export import main; main({words}); {loaded}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
