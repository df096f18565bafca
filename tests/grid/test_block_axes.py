"""Axes that belong to some workloads only, or fold into one: model, layers, recompute; and the mesh, which all cells may have."""

from __future__ import annotations

import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcbench.grid import build, values
from lcbench.grid.axes import AXES, GROUPS
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.expand import Planned
from lcbench.grid.paths import CONF
from lcbench.grid.values import MESH, parse_mesh
from lcbench.problem import Mesh
from lcbench.report.frame import reported
from lcbench.report.table import Names
from tests.commands import lcbench
from tests.report.made import made_sweep

# A workload of one's own with all that a block has, so that planning it costs no torch.
MODULE = """
from dataclasses import dataclass
from typing import ClassVar

from lcbench.workloads.base import Workload
from lcbench.workloads.models import Model


@dataclass(frozen=True)
class Steps(Workload):
    takes: ClassVar = ("recompute",)

    model: Model
    layers: int | None = None

    def __post_init__(self):
        if self.layers is not None and self.layers > self.model.layers:
            raise ValueError(f"workload.layers={self.layers} is more than the {self.model.layers} that the model has")

    def unsupported(self, problem, mask, kernel, strategy, recompute):
        told = [type(each).__name__ for each in (mask, kernel, strategy, recompute)]
        if getattr(recompute, "share", None) == 0.5:
            return f"no half of {problem.heads} by {' '.join(told)}"

    def start(self, work, draw, gang):
        raise NotImplementedError


@dataclass(frozen=True)
class Bare(Workload):
    def start(self, work, draw, gang):
        raise NotImplementedError


@dataclass(frozen=True)
class Some:
    share: float | None = None

    def __post_init__(self):
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"recompute.share={self.share} is not from 0 to 1")

    def forward(self, stack, x):
        return x


@dataclass(frozen=True)
class All:
    def forward(self, stack, x):
        return x
"""
FILES = {
    "workload/steps.yaml": "_target_: own_steps.Steps\nname: steps\nlayers: 2\n",
    "workload/bare.yaml": "_target_: own_steps.Bare\nname: bare\n",
    "recompute/some.yaml": "_target_: own_steps.Some\nname: some\nshare: null\n",
    "recompute/all.yaml": "_target_: own_steps.All\nname: all\n",
    "experiment/deep.yaml": (
        "# @package _global_\nlayers: 4\nhydra: {sweeper: {params: {workload: steps, recompute: 'some,all'}}}\n"
    ),
}  # fmt: skip
STEPS = ["workload=steps", "model=tiny", "recompute=all"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that a command needs besides."""
    (tmp_path / "own_steps.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_steps", raising=False)
    for name, text in FILES.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    return ["site=plain", "--config-dir", str(tmp_path / "conf")]


def planned(own: list[str], *words: str) -> list[Planned]:
    return list(look([*words, *own]).cells)


def cells(own: list[str], *words: str) -> list[Cell]:
    return [p.cell for p in planned(own, *words)]


def refused(own: list[str], *words: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        look([*words, *own])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- a cell of a workload that takes all of them ---------------------------------------------------------------------------


def test_a_model_and_its_layers_are_options_of_the_workload_and_its_heads_the_cells(own: list[str]) -> None:
    (cell,) = cells(own, "workload=steps", "model=qwen3_8b", "recompute=some", "recompute.share=0.25")
    workload = cell.config["workload"]
    assert (workload["name"], workload["layers"], workload["model"]["name"]) == ("steps", 2, "qwen3_8b")
    assert (workload["model"]["layers"], workload["model"]["qk_norm"]) == (36, True)
    assert cell.config["recompute"] == {"name": "some", "_target_": "own_steps.Some", "share": 0.25}
    assert "model" not in cell.config
    assert "layers" not in cell.config
    assert cell.config["heads"] == "32x8x128"
    assert cell.label == "ring sdpa_flash causal 64k 2x8 workload=steps(qwen3_8b, layers=2) recompute=some"
    flat = cell.flat
    assert (flat["workload"], flat["workload.model"], flat["workload.model.ffn"]) == ("steps", "qwen3_8b", 12288)
    assert (flat["recompute"], flat["recompute.share"], flat["mesh.tp"]) == ("some", 0.25, 1)
    made: Any = build.build_workload(workload)
    assert str(made.model.heads()) == "32x8x128"
    assert build.build_recompute(cell.config).share == 0.25


def test_cells_of_other_workloads_say_nothing_of_them(own: list[str]) -> None:
    (before,) = cells(own)
    found = cells(own, "workload=attention,steps", *STEPS[1:])
    assert (found[0], found[0].id) == (before, "4f5f55899b22")
    assert not {"workload", "recompute", "mesh"} & found[0].config.keys()
    assert build.build_recompute(found[0].config) is None
    (bare,) = cells(own, "workload=bare")
    assert bare.config["workload"] == {"name": "bare", "_target_": "own_steps.Bare"}
    assert bare.config["heads"] == "32x8x128"


def test_a_product_has_them_once_per_workload_that_takes_them(own: list[str]) -> None:
    found = cells(own, "workload=attention,steps", "recompute=all,some", "model=tiny,tiny_mha", "layers=1,2")
    told = [(c.word("workload"), c.word("recompute"), str(c.heads)) for c in found]
    models = {"tiny": "4x2x16", "tiny_mha": "4x4x16"}
    product = itertools.product(("all", "some"), models, (1, 2))
    steps = {(f"steps({model}, layers={n})", recompute, models[model]) for recompute, model, n in product}
    assert len(found) == 1 + len(steps)
    assert set(told) == {("attention", "none", "32x8x128")} | steps


@pytest.mark.slow
def test_layers_are_said_in_one_way(own: list[str]) -> None:
    (one,), (other,) = cells(own, *STEPS, "layers=3"), cells(own, *STEPS, "workload.layers=3")
    assert one == other
    assert one.config["workload"]["layers"] == 3
    (every,) = cells(own, *STEPS, "layers=all")
    assert every.config["workload"]["layers"] is None
    assert every.label.endswith("workload=steps(tiny) recompute=all")
    assert cells(own, *STEPS, "workload.layers=null") == [every]
    assert [c.config["workload"]["layers"] for c in cells(own, *STEPS, "layers=1,all,null")] == [1, None, 2]
    assert refused(own, *STEPS, "layers=3", "workload.layers=2").startswith("layers=3 and workload.layers=2 are two ways")
    # A command line takes the place of an experiment, in whichever way.
    for words, count in ((["layers=1"], 1), (["workload.layers=3"], 3), ([], 4)):
        found = cells(own, "+experiment=deep", "model=tiny", *words)
        assert {c.config["workload"]["layers"] for c in found} == {count}


@pytest.mark.slow
def test_a_model_has_heads_and_no_other_are_taken_beside_it(own: list[str]) -> None:
    assert cells(own, *STEPS, "heads=4x2x16") == cells(own, *STEPS)
    said = refused(own, *STEPS, "heads=8x2x64")
    assert said == "heads=8x2x64 contradicts model=tiny, which has 4x2x16; leave heads out, or write another model"
    assert "contradicts model=tiny" in refused(own, "workload=attention,steps", *STEPS[1:], "heads=8x2x64,4x2x16")
    assert "contradicts model=tiny_mha" in refused(own, *STEPS, "model=tiny_mha,tiny", "heads=4x2x16")
    # Those of an experiment give way.
    assert {str(c.heads) for c in cells(own, "+experiment=smoke", "workload=steps,attention", *STEPS[1:])} == {"4x2x16", "8x4x32"}
    assert {str(c.heads) for c in cells(own, *STEPS, "model=tiny_mha,tiny")} == {"4x4x16", "4x2x16"}
    assert {str(c.heads) for c in cells(own, *STEPS, "model.heads_q=8", "model.head_dim=32")} == {"8x2x32"}


def test_a_workload_says_what_it_cannot_run(own: list[str]) -> None:
    found = planned(own, *STEPS[:2], "recompute=some", "recompute.share=0.5,0.25", "scale=1x2")
    assert [p.skip for p in found] == ["workload steps: no half of 4x2x16 by BandMask SDPAFlash Ring Some", None]
    # Of what the kernel or the strategy refuses it is not asked.
    (other,) = planned(own, *STEPS[:2], "recompute=some", "recompute.share=0.5", "cp=ulysses", "scale=1x8")
    assert other.skip == "cp ulysses: cannot split 4 query heads evenly over 8 ranks"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recompute=all"], "recompute=all means nothing here: workload=attention has no recompute"),
        (["recompute=none,all"], "recompute=none,all means nothing here: workload=attention has no recompute"),
        (["recompute=some", "workload=bare,attention"], "recompute=some means nothing here: workload=bare,attention has no "),
        (["recompute.share=0.1", "recompute=some"], "recompute.share=0.1 means nothing here: workload=attention has no recompute"),
        (["model=tiny"], "model=tiny means nothing here: workload=attention has no model"),
        (["model.ffn=8"], "model.ffn=8 means nothing here: workload=attention has no model"),
        (["layers=2"], "layers=2 means nothing here: workload=attention has no layers"),
        (["lengths=uniform"], "lengths=uniform means nothing here: mask=causal has no lengths"),
        ([*STEPS, "layers=0"], "layers=0 is no whole number of at least 1, or all"),
        ([*STEPS, "layers=1.5"], "layers=1.5 is no whole number of at least 1, or all"),
        ([*STEPS, "layers=few"], "layers=few is no whole number of at least 1, or all"),
        ([*STEPS, "layers=9"], "workload.layers=9 is more than the 4 that the model has"),
        ([*STEPS, "layers=[1]"], "layers=[1] is no whole number of at least 1, or all"),
        ([*STEPS, "recompute=som"], "recompute=som is not one of "),
        ([*STEPS[:2], "recompute=some", "recompute.share=2"], "recompute.share=2.0 is not from 0 to 1"),
        ([*STEPS[:2], "recompute=some", "recompute.share=x"], "recompute.share=x is not one of a number, null"),
        ([*STEPS, "recompute.share=0.5"], "recompute=all has no option 'share'"),
        ([*STEPS[:1], "model=llama"], "model=llama is not one of llama2_7b, llama3_70b, llama3_8b, "),
        ([*STEPS, "model.heads_kv=3"], "model.heads_q=4 is no multiple of model.heads_kv=3"),
        ([*STEPS, "model.head_dim=15"], "model.head_dim=15 is odd"),
        ([*STEPS, "model.layers=0"], "model.layers=0 is not at least 1"),
        ([*STEPS, "model.hidden=wide"], "model.hidden=wide is not one of a whole number"),
        ([*STEPS, "model.width=3"], "model=tiny has no option 'width'"),
        ([*STEPS, "workload.model=tiny"], "workload=steps has no option 'model'"),
        (["workload=block", "model=tiny", "workload.loss_chunk=0"], "workload.loss_chunk=0 is no whole number of at least 1"),
        (["workload=batch_step", "model=tiny", "workload.loss_chunk=-4"], "workload.loss_chunk=-4 is no whole"),
        (["workload=block", "model=tiny", "workload.optimizer=sgd"], "workload.optimizer=sgd is none of none, adamw"),
        (["mesh.tp=0"], "mesh.tp=0 is no whole number of at least 1"),
        (["mesh.dp=two"], "mesh.dp=two is no whole number of at least 1"),
        (["mesh.order=cp-tp"], "mesh.order=cp-tp is no order of tp, cp and dp"),
        (["mesh.order=tp-cp-dp-pp"], "mesh.order=tp-cp-dp-pp is no order of tp, cp and dp"),
        (["mesh.order=null"], "mesh.order=null is no order of tp, cp and dp"),
        (["mesh=2"], "mesh=2 means nothing; it has options"),
        (["mesh.pp=2"], "mesh has no option 'pp'"),
        (["~mesh.tp"], "mesh.tp=<value>"),
        (["mesh.tp=3"], "mesh.tp=3 does not divide the 32 query heads"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], said: str, own: list[str]) -> None:
    assert said in refused(own, *words)


def test_it_ends_the_command_with_code_2(tmp_path: Path) -> None:
    words = ["model=tiny", "hydra/launcher=dry", "site=plain", f"results={tmp_path}/r"]
    done = lcbench("sweep", *words)
    assert done.returncode == 2
    assert done.stderr == "error: model=tiny means nothing here: workload=attention has no model\n"
    assert not list(tmp_path.iterdir())


def test_what_every_cell_says_may_be_said(own: list[str]) -> None:
    assert cells(own, "recompute=none", "layers=null", "mesh.tp=1") == cells(own)


@pytest.mark.slow
def test_experiments_together_use_what_one_of_them_does(own: list[str]) -> None:
    both = cells(own, "+experiment=deep,smoke", "model=tiny", "cp=ring", "seqlen=1k", "mask=causal")
    assert {c.word("workload") for c in both} == {"steps(tiny, layers=4)", "attention"}
    assert "means nothing here" in refused(own, "+experiment=smoke,strategies", "model=tiny")


# -- lcbench's own ----------------------------------------------------------------------------------------------------------


def test_a_block_takes_every_recompute_there_is() -> None:
    names = values.axis_values(CONF, "recompute")
    found = [
        p.cell for p in look(["workload=block", "model=glob(*)", f"recompute={','.join(names)}", "site=plain", "scale=1x2"]).cells
    ]
    models = values.axis_values(CONF, "model")
    assert [(c.config["workload"]["model"]["name"], c.word("recompute")) for c in found] == [*itertools.product(models, names)]
    assert [c for c in found if "recompute" not in c.config] == [c for c in found if c.word("recompute") == "none"]
    for cell in found:
        made: Any = build.build_recompute(cell.config)
        assert AXES["recompute"].missing(type(made)) is None
        assert build.build_workload(cell.config["workload"]).model.heads() == cell.heads  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", [path for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))],
    ids=lambda path: f"{path.parent.name}={path.stem}",
)  # fmt: skip
def test_a_file_has_every_option_of_its_value(path: Path) -> None:
    """So that an override may set it, and ``--cfg job`` shows it."""
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    group = path.parent.name
    folded = [axis.name for axis in AXES.values() if axis.folds_into == group and axis.home]
    takes = inspect.signature(build.get_object(config["_target_"], group)).parameters
    assert {name for name in takes if name not in (*AXES[group].given, *folded)} <= config.keys()


# -- the mesh ---------------------------------------------------------------------------------------------------------------


def test_a_mesh_is_said_where_it_is_more_than_one_group(own: list[str]) -> None:
    (alone,), (both,) = cells(own), cells(own, "mesh.tp=2", "mesh.dp=2")
    assert cells(own, "mesh.tp=1", "mesh.dp=1", "mesh.order=dp-cp-tp") == [alone]
    assert "mesh" not in alone.config
    assert both.config["mesh"] == {"tp": 2, "dp": 2, "order": "tp-cp-dp"}
    assert both.label == "ring sdpa_flash causal 64k 2x8 mesh(tp=2, dp=2)"
    assert (both.word("mesh"), alone.word("mesh")) == ("tp=2, dp=2", "tp=1, dp=1, order=tp-cp-dp")
    (moved,) = cells(own, "mesh.dp=2", "mesh.order=dp-cp-tp")
    assert moved.label.endswith(" mesh(dp=2, order=tp-dp-cp)")


def test_the_same_groups_are_the_same_cell() -> None:
    """What has one rank has no place: orders are alike exactly if the groups are."""
    scale = look(["site=plain", "scale=2x8"]).cells[0].cell.scale
    orders = ["-".join(order) for order in itertools.permutations(Mesh.DIMENSIONS)]
    for tp, dp in itertools.product((1, 2, 4), (1, 2)):
        groups: dict[str, Any] = {}
        for order in orders:
            read = parse_mesh({"tp": tp, "dp": dp, "order": order})
            found = Mesh(tp, dp, order).groups(scale).tolist()
            assert Mesh(**read).groups(scale).tolist() == found
            assert groups.setdefault(read["order"], found) == found
        assert len({str(found) for found in groups.values()}) == len(groups)
    assert parse_mesh(MESH) == MESH


# -- what reports make of them --------------------------------------------------------------------------------------------


def test_a_choice_tells_the_recompute_and_a_setting_the_rest_of_the_workload(own: list[str], tmp_path: Path) -> None:
    grid = ["workload=steps", "recompute=some,all", "model=tiny,tiny_mha", "mesh.dp=1,2", "seqlen=1k", "scale=1x8", *own]
    frame = reported(made_sweep(tmp_path / "r", "s", grid))
    assert set(frame["choice"]) == {"ring + recompute=some", "ring + recompute=all"}
    assert frame["problem"].nunique() == 4
    meshes = {1: "tp=1, dp=1, order=tp-cp-dp", 2: "dp=2"}
    models = {"tiny": "4x2x16", "tiny_mha": "4x4x16"}
    settings = {
        f"workload steps({model}), mesh {mesh}, heads {heads}" for model, heads in models.items() for mesh in meshes.values()
    }
    assert set(frame["setting"]) == settings


@pytest.mark.slow
def test_options_of_what_is_folded_in_tell_problems_apart(own: list[str], tmp_path: Path) -> None:
    grid = [*STEPS[:1], "model=tiny,tiny_mha", "model.ffn=80,160", "recompute=all", "seqlen=1k", "scale=1x8", *own]
    frame = reported(made_sweep(tmp_path / "r", "s", grid))
    told = {f"steps({model}, model.ffn={ffn})" for model in ("tiny", "tiny_mha") for ffn in (80, 160)}
    assert set(frame["what_workload"]) == told
    assert frame["setting"].nunique() == frame["problem"].nunique() == 4
    grid = ["mask=document", "lengths=uniform", "lengths.high=256,512", "seqlen=1k", "scale=1x8"]
    frame = reported(made_sweep(tmp_path / "r", "t", grid))
    assert set(frame["what_mask"]) == {f"document(uniform, lengths.high={high})" for high in (256, 512)}


def test_rows_of_a_table_say_what_differs_and_its_title_the_rest(own: list[str]) -> None:
    found = cells(own, "workload=steps,attention", "recompute=all,some", "model=tiny", "seqlen=1k", "scale=1x8")
    assert set(Names.of(found).what.values()) == {
        "workload=steps(tiny, layers=2) recompute=all", "workload=steps(tiny, layers=2) recompute=some",
        "workload=attention recompute=none",
    }  # fmt: skip
    steps = Names.of([c for c in found if "workload" in c.config])
    assert set(steps.what.values()) == {"recompute=all", "recompute=some"}
    assert steps.same == (
        "cp ring, kernel sdpa_flash, mask causal, seqlen 1k, scale 1x8, workload steps(tiny, layers=2), heads 4x2x16"
    )


def test_a_choice_tells_the_options_that_its_choices_differ_in(own: list[str], tmp_path: Path) -> None:
    grid = ["workload=steps", "recompute=some", "recompute.share=0.25,0.75", "model=tiny", "seqlen=1k", "scale=1x8", *own]
    frame = reported(made_sweep(tmp_path / "r", "s", grid))
    assert set(frame["choice"]) == {f"ring + recompute=some(share={share})" for share in (0.25, 0.75)}
    assert frame["problem"].nunique() == 1


def test_reports_of_attention_say_nothing_of_them(tmp_path: Path) -> None:
    frame = reported(made_sweep(tmp_path, "s", ["cp=ring,ulysses", "seqlen=64k", "scale=1x8"]))
    assert set(frame["choice"]) == {"ring", "ulysses"}
    assert set(frame["setting"]) == {"heads 32x8x128"}
