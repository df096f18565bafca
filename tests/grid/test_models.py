"""Models of conf/model are those that were published, and sizes that make no model are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcbench.grid.build import build, check_options
from lcbench.grid.paths import CONF
from lcbench.workloads.models import Model

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
# Weights in the published checkpoints, embedding and head each.
PUBLISHED = {"llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "qwen3_8b": 8_190_735_360}
SIZES = Model(layers=2, hidden=6, heads_q=4, heads_kv=2, head_dim=8, ffn=10, vocab=11, rope_theta=100.0)


def model_of(name: str) -> Model:
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert config["name"] == name
    made = build(check_options("model", config))
    assert isinstance(made, Model)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_as_many_weights_as_its_checkpoint(name: str) -> None:
    model = model_of(name)
    weights = model.layers * model.layer_parameters() + model.head_parameters() + model.vocab * model.hidden
    assert weights == PUBLISHED.get(name, weights)
    assert (name in PUBLISHED) != name.startswith("tiny"), "a model of somebody's is held to its published size"


def test_there_are_models_of_both_kinds_and_some_for_cpus() -> None:
    found = {name: model_of(name) for name in NAMES}
    for some in (PUBLISHED, [name for name in NAMES if name.startswith("tiny")]):
        assert {found[name].heads_q == found[name].heads_kv for name in some} == {True, False}
    assert str(found["llama3_70b"].heads()) == "64x8x128"
    assert found["qwen3_8b"].qk_norm
    assert not found["llama3_8b"].qk_norm


def test_weights_are_those_of_the_layers_matrices() -> None:
    # q: 6 x 32, k and v: 6 x 16 each, o: 32 x 6, gate and up: 6 x 10 each, down: 10 x 6, two norms of 6.
    assert SIZES.layer_parameters() == 6 * 32 + 2 * 6 * 16 + 32 * 6 + 3 * 6 * 10 + 2 * 6
    assert replace(SIZES, qk_norm=True).layer_parameters() == SIZES.layer_parameters() + 2 * 8
    assert SIZES.head_parameters() == 11 * 6 + 6


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"heads_kv": 3}, "model.heads_q=4 is no multiple of model.heads_kv=3"),
        ({"heads_q": 2, "heads_kv": 4}, "model.heads_q=2 is no multiple of model.heads_kv=4"),
        ({"head_dim": 7}, "model.head_dim=7 is odd"),
        *(({name: 0}, f"model.{name}=0 is not at least 1") for name in ("layers", "hidden", "heads_q", "heads_kv", "ffn", "vocab")),
        ({"head_dim": -2}, "model.head_dim=-2 is not at least 1"),
        ({"rope_theta": 0.0}, "model.rope_theta=0.0 is not above 0"),
        ({"rope_theta": float("inf")}, "model.rope_theta=inf is not above 0"),
        ({"norm_eps": -1e-6}, "model.norm_eps=-1e-06 is not above 0"),
    ],
)  # fmt: skip
def test_sizes_that_make_no_model_are_one_line(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        replace(SIZES, **sizes)
    assert "\n" not in str(error.value)
