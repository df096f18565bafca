"""Plans: the same cells as Hydra composes one by one, without composing each; bad input in one line."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from lcbench.grid import expand, values
from lcbench.grid.axes import GROUPS
from lcbench.grid.build import build_mask
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import look
from lcbench.grid.compose import compose, compose_axis
from lcbench.grid.paths import CONF
from lcbench.measure.blocks import BLOCKS, blocks_of
from tests.commands import lcbench


@pytest.fixture
def loader() -> Iterator[Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


FORMS = [
    ["cp=ring,ulysses,usp", "seqlen=64k,256k,1m"],
    ["cp=choice(ring,usp)", "seed=range(0,4)", "scale=2x8,1x4"],
    ["kernel=glob(sdpa*)", "mask=glob(*document)", "lengths=uniform,fixed"],
    ["mask=sliding_window", "mask.left=512,1k", "++mask.right=0", "dtype=bf16,float32"],
    ["mask=causal_document", "lengths=explicit", "lengths.values=[100,28],[64,64]", "mask.samples=1,2", "seqlen=128"],
    ["seqlen=null", "seqlen_per_rank=1k,2k", "scale=1x2,2x2"],
    ["++measure.budget_s=1.5,2", "cp=usp", "cp.ulysses_degree=1,2,auto", "scale=1x2"],
    ["heads=8x8x64,8x2x64", "direction=forward,forward_backward"],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", FORMS, ids=" ".join)
def test_cells_equal_hydras_own_composition(overrides: list[str], loader: Any) -> None:
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    batches = list(itertools.chain(*BasicSweeper.split_arguments(parsed, None)))
    cells = [p.cell for p in expand.expand(overrides, loader).cells]
    composed = {Cell.from_config(expand.cell_config(compose(list(batch), loader))): batch for batch in batches}
    assert [batch for cell, batch in composed.items() if cell not in cells] == []
    assert len(cells) == len(composed)


@pytest.mark.slow
def test_the_value_of_an_axis_is_that_of_the_whole_config(loader: Any) -> None:
    draw = random.Random(0)
    experiments = [None, *loader.get_group_options("experiment")]
    asked = [(group, value) for group in GROUPS for value in loader.get_group_options(group)]
    for group, value in draw.sample(asked, 30):
        lines = [f"site={draw.choice(['local', 'plain', 'devcluster'])}", f"{group}={value}"]
        if experiment := draw.choice(experiments):
            lines.insert(0, f"+experiment={experiment}")
        whole = compose(lines, loader)
        assert compose_axis(group, lines, loader) == (whole[group], whole["hydra"]["choices"].get(group)), lines


@pytest.mark.slow
def test_each_axis_value_is_composed_once(loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(ask: Callable[..., Any], *asked: Any) -> Any:
        nonlocal count
        count += 1
        return ask(*asked)

    for ask in (compose, compose_axis):
        monkeypatch.setattr(expand, ask.__name__, partial(counted, ask))
    lengths = ",".join(f"{n}k" for n in range(1, 101))
    plan = expand.expand([f"seqlen={lengths}", "seed=range(0,10)", "cp=ring,usp,ulysses", "scale=1x2,1x4,2x8"], loader)
    assert len(plan.cells) == 100 * 10 * 3 * 3
    assert count <= 1 + 1 + 1 + 3 + 1  # base, then one of each plain key, and each strategy


def test_impossible_cells_are_kept_with_their_reason() -> None:
    plan = look(["cp=ulysses,ring", "scale=12x8", "heads=64x8x128"])
    reasons = {p.cell.config["cp"]["name"]: p.skip for p in plan.cells}
    assert reasons == {"ulysses": "cp ulysses: cannot split 64 query heads evenly over 96 ranks", "ring": None}


def test_lengths_belong_to_masks_with_documents_only() -> None:
    plan = look(["mask=causal,document", "lengths=uniform,fixed,web_text"])
    masks = [p.cell.config["mask"] for p in plan.cells]
    assert [m.get("lengths", {}).get("name") for m in masks if m["name"] == "document"] == ["uniform", "fixed", "web_text"]
    assert [m for m in masks if m["name"] == "causal"] == [{"name": "causal", "_target_": "lcbench.masks.causal.causal"}]
    assert "causal_document(web_text)" in look(["mask=causal_document"]).cells[0].cell.label


@pytest.mark.parametrize(
    ("overrides", "ids"),
    [  # as they were before there were blocks
        (["cp=ring", "seqlen=64k", "scale=2x8"], ["4f5f55899b22"]),
        (["cp=none", "mask=sliding_window", "mask.left=1k", "seqlen=8k", "scale=1x1"], ["66be97fa1a8d"]),
        (["measure.budget_s=3", "measure.warmup=0", "scale=1x1"], ["8a5183a84ecf"]),
        (["+experiment=smoke"], ["2e99d8d59224", "9cf518286448"]),
    ],
)
def test_blocks_at_their_default_change_no_cells_id(overrides: list[str], ids: list[str]) -> None:
    cells = [p.cell for p in look(overrides).cells]
    assert [cells[0].id, cells[-1].id][-len(ids) :] == ids
    assert {p.cell for p in look([*overrides, f"measure.blocks={BLOCKS}"]).cells} == set(cells)
    (other, *_) = look([*overrides, "measure.blocks=1"]).cells
    assert other.cell.config["measure"] == {**cells[0].config["measure"], "blocks": 1}
    assert blocks_of(cells[0].config["measure"]) == BLOCKS == values.BLOCKS
    assert blocks_of(other.cell.config["measure"]) == 1


def test_an_alias_makes_the_same_cell() -> None:
    (one,), (two,) = look(["mask=sliding_window_causal"]).cells, look(["mask=sliding_window"]).cells
    assert one.cell.id == two.cell.id


def test_a_mask_that_does_not_fit_is_skipped_with_its_reason() -> None:
    plan = look(["mask=document", "lengths=explicit", "lengths.values=[1k,1k]", "seqlen=2k,4k"])
    assert [p.skip for p in plan.cells] == [None, "mask document: lengths.values add up to 2048 tokens, seqlen is 4096"]
    (planned,) = look(["mask=star_attention", "seqlen=64"]).cells
    assert planned.skip == "mask star_attention: query=128 is longer than seqlen=64"


def test_a_file_is_part_of_the_cell_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    path.write_text('{"seqlen": 8, "bands": [[0, 8, 0, 8, null, 0]]}')
    (planned,) = look(["mask=band_file", f"mask.file={path}", "seqlen=8"]).cells
    config = planned.cell.config["mask"]
    assert build_mask(config, 8, planned.cell.heads, 0).pairs(1) == 36
    path.write_text('{"seqlen": 8, "bands": []}')
    with pytest.raises(ValueError, match="has changed since this cell was planned"):
        build_mask(config, 8, planned.cell.heads, 0)


@pytest.mark.slow
def test_experiment_sweeps_and_the_command_line_overrides_an_axis() -> None:
    smoke = look(["+experiment=smoke"])
    assert len(smoke.cells) > 4
    assert {p.cell.config["cp"]["name"] for p in look(["+experiment=smoke", "cp=ring"]).cells} == {"ring"}
    both = {p.cell for p in look(["+experiment=smoke,strategies"]).cells}
    assert both == {p.cell for name in ("smoke", "strategies") for p in look([f"+experiment={name}"]).cells}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cp=rign"], ["cp=rign", "loongtrain, none, pcp, ring, ", "did you mean ring?"]),
        (["seqlen=64q"], ["seqlen=64q", "64k"]),
        (["scale=0x8"], ["scale=0x8", "2x8"]),
        (["mask=sliding_window", "mask.left=null"], ["mask=sliding_window", "mask.left"]),
        (["mask=sliding_window", "~mask.left"], ["mask=sliding_window", "mask.left"]),
        (["mask=causal,sliding_window", "mask.left=512"], ["mask=causal", "no option 'left'"]),
        (["mask=sliding_window", "mask.left=-1"], ["mask.left=-1", "token count"]),
        (["mask=document", "lengths=webtext"], ["lengths=webtext", "web_text", "did you mean web_text?"]),
        (["mask=document", "lengths=uniform", "lengths.low=9k"], ["lengths.low=9216 is above lengths.high=8192"]),
        (["mask=document", "lengths=explicit"], ["lengths=explicit needs lengths.values", "for example lengths.values=[4k,4k]"]),
        (["mask=document", "mask.samples=0"], ["mask.samples=0", "at least 1"]),
        (["measure.blocks=0"], ["measure.blocks=0", "at least 1"]),
        (["mask=causal", "+mask.samples=2"], ["mask=causal", "draws nothing"]),
        (["mask=block_random", "mask.density=1.5"], ["mask.density=1.5", "0.2"]),
        (["mask=block_random", "mask.per=head"], ["mask.per=head", "all_heads, kv_head, q_head"]),
        (["mask=band_file"], ["mask=band_file needs mask.file"]),
        (["mask=band_file", "mask.file=nowhere.json"], ["mask.file=nowhere.json is no file"]),
        (["mask=dual_scope", "mask.every=256"], ["mask.global_size=256", "mask.every=256"]),
        (["sequence=64k"], ["unknown axis 'sequence'", "seqlen"]),
        (["+foo=1"], ["unknown axis 'foo'"]),
        (["dtype=fp8"], ["dtype=fp8", "bfloat16"]),
        (["heads=7x2x64"], ["heads=7x2x64"]),
        (["cp=usp", "cp.ulysses_degree=x"], ["cp.ulysses_degree=x"]),
        (["measure.warmup=-1"], ["measure.warmup=-1"]),
        (["sweep=a/b"], ["sweep='a/b'"]),
        (["force=1,2"], ["force is not an axis"]),
        (["mask@other=full"], ["mask@other=full", "write mask=..."]),
        (["ring"], ["'ring' is no override"]),
        (["pack=1"], ["pack=1 means nothing", "pack.max_cells=1"]),
        (["pack.max_jobs=0"], ["pack.max_jobs=0", "at least 1"]),
        (["retry.oops=1"], ["retry has no option 'oops'", "node-fail"]),
        (["hang.min_s=99999"], ["hang.min_s=99999", "hang.max_s=7200"]),
        (["site.device=h300"], ["site.device=h300", "null, cpu, a100"]),
        (["site.check=off"], ["site.check=off", "stop, warn"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_input_is_one_clear_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        look(arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_input_ends_the_command_with_code_2_and_submits_nothing(tmp_path: Path) -> None:
    done = run_sweep("cp=rign", f"results={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: cp=rign is not one of")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_users_command_is_accepted_as_written(tmp_path: Path) -> None:
    done = run_sweep(
        "-m",
        "cp=ring,ulysses,usp",
        "seqlen=64k,256k,1m",
        "hydra/launcher=dry",
        "site=plain",
        f"results={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    assert "9 cells" in done.stdout
    assert "#SBATCH --nodes=2" in done.stdout
    assert "nothing was submitted" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_grid_with_options_needs_no_multirun_flag(tmp_path: Path) -> None:
    options = ["mask=causal_document,block_random", "mask.samples=2", "seqlen=1k", "hydra/launcher=dry", f"results={tmp_path}"]
    for flag in ([], ["-m"]):
        done = run_sweep(*flag, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 cells" in done.stdout


@pytest.mark.slow
def test_planning_loads_neither_torch_nor_mlflow_nor_submitit() -> None:
    code = (
        "import sys; from lcbench.grid.command_line import look; look(['cp=ring,usp', 'mask=glob(*,exclude=*_file)', 'scale=2x8']);"
        "look(['+experiment=model_step', 'scale=2x8', 'site=plain']);"
        "print([m for m in ('torch', 'mlflow', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run_sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return lcbench("sweep", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "cells", "skipped"),
    [
        ("longca_dense", 1512, 0),
        ("longca_sparse", 360, 189),
        ("longca_cp", 100, 4),
        ("scaling", 90, 2),
        ("choose scale=1x1", 100, 0),
        ("model_step model=llama3_8b scale=4x8 site=plain", 27, 0),
        ("model_step model=tiny_mha,tiny scale=1x8 site=plain", 54, 18),
        ("mixed_lengths scale=4x8 site=plain", 42, 0),
        ("mixed_lengths_cpu", 12, 0),
        ("sparse_selection scale=2x8 site=plain", 192, 0),
        ("sparse_selection scale=1x1 cp=none site=plain", 48, 0),
        ("sparse_selection_cpu", 16, 0),
        ("linear_scaling site=plain", 72, 0),
        ("linear_scaling_cpu", 32, 0),
        ("smoke", 18, 0),
    ],
)
def test_presets_are_the_grids_that_they_say(preset: str, cells: int, skipped: int) -> None:
    planned = look(f"+experiment={preset}".split()).cells
    assert len(planned) == cells
    assert sum(p.skip is not None for p in planned) == skipped
