"""What is typed is what is meant, or it is refused in one line: names, interpolations, lengths, Hydra's own options, files."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcbench.commands import lengths
from lcbench.commands import sweep as command
from lcbench.grid import compose
from lcbench.grid.axes import with_first_names
from lcbench.grid.cell import Cell
from lcbench.grid.command_line import loader_of, look
from lcbench.grid.expand import Plan
from lcbench.grid.run_options import check_name
from lcbench.masks.text import read_text
from lcbench.runs.budget import Cost


def refused(*words: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        look(words)
    return str(caught.value)


def option(name: str, *words: str) -> Any:
    return look(words).options[name]


@pytest.mark.parametrize(
    "name", ["1.10", "2024_01", "1e3", "true", "0x1f", "007", "NULL", "nan", "Prüfstand", "o'brien", "a=b", "x" * 200, "日本"]
)
def test_a_name_is_taken_as_it_was_typed(name: str) -> None:
    assert option("sweep", f"sweep={name}") == name
    assert option("results", f"results=/r/{name} [a]") == f"/r/{name} [a]"


@pytest.mark.slow
def test_names_that_cannot_be_a_folder_or_a_word_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        "a%j",
        "a|b",
        "c,d",
        "a/b",
        "a\\b",
        "-x",
        ".x",
        "last",
        "ALL",
        " ",
        "",
        "a b",
        "a\tb",
        "a\nb",
        "\x1b",
        "\udcff",
        "é" * 101,
    ]:
        with pytest.raises(ValueError, match="sweep="):
            check_name(name)
    assert "','" in refused('sweep="c,d"')
    assert option("sweep", "sweep=null") is None
    monkeypatch.setenv("LCBENCH_X", "1.10")
    assert option("sweep", "sweep=${oc.env:LCBENCH_X}") == "1.10"
    assert option("sweep", "sweep=e_${now:%Y}") == f"e_{time.strftime('%Y')}"
    OmegaConf.register_new_resolver("hydra", compose._hydra, replace=True)  # a Hydra that ran in this process has its own
    assert "${now:" in refused("sweep=${hydra:job.name}")
    assert "NOPE_NOPE" in refused("results=${oc.env:NOPE_NOPE}")


@pytest.mark.parametrize(
    ("words", "axis"),
    [
        (["mask=sliding_window", "mask.left=${seqlen}"], "seqlen"),
        (["mask=sliding_window", "mask.left=${oc.select:seqlen,4}"], "seqlen"),
        (["mask=dilated_window", "mask.left=${..seqlen}", "seqlen=1k,2k"], "seqlen"),
        (["cp=ulysses", "cp.stages=${mask.left}", "mask=sliding_window"], "mask"),
        (["seed=${seqlen},1"], "seqlen"),
        (["sweep=x${scale}"], "scale"),
        (["site.partition=p${seed}", "site=plain"], "seed"),
        (["lengths=fixed", "lengths.length=${heads}"], "heads"),
        (["seed=${retry.oom}"], "retry"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_an_axis_that_looks_at_another_is_refused(words: list[str], axis: str) -> None:
    message = refused(*words)
    assert f"refers to {axis} " in message
    assert words[0].partition("=")[0].split(".")[0] in message


@pytest.mark.slow
def test_an_axis_may_look_at_itself_and_at_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LCBENCH_X", "2")
    (cell,) = look(["mask=global_sliding_window", "mask.right=${.left}", "mask.global_tokens=${mask.left}", "mask.left=512"]).cells
    assert [cell.cell.config["mask"][key] for key in ("left", "right", "global_tokens")] == [512] * 3
    plan = look(
        [
            "cp=usp",
            "cp.ulysses_degree=${oc.env:LCBENCH_X}",
            "scale=1x4",
            "seqlen=${oc.env:LCBENCH_X},3",
            "measure.warmup=${oc.env:LCBENCH_X}",
        ]
    )
    assert [p.cell.config["seqlen"] for p in plan.cells] == [2, 3]
    assert {(p.cell.config["cp"]["ulysses_degree"], p.cell.config["measure"]["warmup"]) for p in plan.cells} == {(2, 2)}
    # The same in files: an experiment's, and an axis value's of the user's own.
    for group, text in (
        ("experiment", "# @package _global_\nseed: ${seqlen}\n"),
        ("lengths", "_target_: lcbench.masks.lengths.Fixed\nname: f\nlength: ${seqlen}\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / "f.yaml").write_text(text)
    assert "seed refers to seqlen" in refused(f"--config-dir={tmp_path}", "+experiment=f")
    assert "lengths refers to seqlen" in refused(f"--config-dir={tmp_path}", "lengths=f", "mask=document")


def test_a_length_is_said_in_one_way() -> None:
    assert "two ways to say one length" in refused("seqlen=256,512", "seqlen_per_rank=128")
    assert "two ways to say one length" in refused("seqlen=256", "seqlen_per_rank=128,null")
    base = ["+experiment=scaling", "cp=ring", "mask=causal", "scale=1x8"]

    def seqlens(*words: str) -> list[int]:
        return [p.cell.config["seqlen"] for p in look([*base, *words]).cells]

    assert seqlens() == [65536]
    assert seqlens("seqlen=1k,2k") == [1024, 2048]
    assert seqlens("seqlen_per_rank=16") == [128]
    assert seqlens("seqlen_per_rank=null", "seqlen=768k") == [768 << 10]
    assert [p.cell.config["seqlen"] for p in look(["+experiment=smoke", "cp=ring", "mask=full", "seqlen_per_rank=16"]).cells] == [
        32
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config-name=mine"], ["--config-name", "--config-dir", "+experiment"]),
        (["-cn", "mine"], ["--config-name", "+experiment"]),
        (["-cp=/tmp"], ["--config-path", "--config-dir"]),
        (["--mult"], ["'--mult' is no flag"]),
        (["-x", "cp=ring"], ["'-x' is no flag"]),
        (["--run"], ["--run does nothing"]),
        (["--resolve"], ["--resolve goes with --cfg"]),
        (["--config-dir=/nowhere-at-all"], ["/nowhere-at-all is no folder"]),
        (["hydra.mode=RUN"], ["hydra.mode=RUN", "-m"]),
        (["hydra.run.dir=x"], ["results=<folder>"]),
        (["hydra.launcher.timeout_min=30"], ["site.max_minutes"]),
        (["+hydra.launcher.partition=x"], ["site.partition"]),
        (["hydra/launcher=submitit_slurm"], ["hydra/launcher=submitit_slurm", "dry, local, simulate, slurm"]),
        (["hydra/sweeper=basic"], ["sweeper of its own"]),
        (["hydra.job.name=x"], ["sweep=<name>"]),
        (["~measure.timeline"], ["~measure.timeline", "measure.timeline=<value>"]),
        (["~hang.min_s"], ["~hang.min_s"]),
        (["~seqlen"], ["~seqlen"]),
        (["cp.layout=a=b"], ["cp.layout=a=b", "'=' at character 12", "'cp.layout=\"a=b\"'"]),
        (["mask.per=ü"], ["'ü' at character 10"]),
        (["mask.per=[a"], ["mask.per=[a", "quoted"]),
        (["+mask.left=1k"], ["mask=causal has no option 'left'"]),
        (["+kernel.block_q=2"], ["kernel=sdpa_flash has no option 'block_q'"]),
        (["mask=document", "++lengths.sigma=2"], ["lengths=web_text has no option 'sigma'", "edges"]),
        (["++cp.name=64"], ["++cp.name=64", "<folder>/cp/<name>.yaml"]),
        (["mask._target_=os.system"], ["mask._target_=os.system"]),
        (["kernel=flex", "kernel._partial_=true"], ["_partial_"]),
        (["mask=range(1,2,0.3),x"], ["mask=range(1,2,0.3),x"]),
        (["seqlen=glob(block*)"], ["seqlen=glob(block*)", "list its values"]),
        (["seed=range(0,1e12)"], ["seed=range(0,1e12)", "100000"]),
        (["seed=range(0,4,0)"], ["steps other than 0"]),
        (["seed=range(1000)", "seqlen=range(1,1000)"], ["999000 cells", "100000"]),
        (["measure=null"], ["measure=null"]),
        (["measure=1"], ["measure=1"]),
        (["results={}"], ["results={}"]),
        (["tracking_uri=[a]"], ["tracking_uri="]),
        (["seqlen_per_rank=99999999999999999999999"], ["seqlen_per_rank", "1024m"]),
        (["scale=99999999x99999999"], ["scale=99999999x99999999", "65536"]),
        (["heads=99999999x1x1"], ["heads=99999999x1x1"]),
        (["seed=99999999999999999999"], ["seed"]),
        (["measure.budget_s=inf"], ["measure.budget_s=inf"]),
        (["measure.precision=1e300"], ["measure.precision"]),
        (["hang.max_s=-inf"], ["hang.max_s=-inf"]),
        (["mask=block_random", "mask.density=inf"], ["mask.density=inf"]),
        (["mask=document", "lengths=log_normal", "lengths.sigma=x"], ["lengths.sigma=x", "a number"]),
        (["cp=ulysses", "cp.stages=true"], ["cp.stages=True", "a whole number"]),
        (["budget.hours=-1"], ["budget.hours=-1"]),
        (["budget.days=1"], ["budget has no option 'days'", "gpu_hours"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)  # fmt: skip
def test_what_means_nothing_is_one_line(words: list[str], said: list[str]) -> None:
    message = refused(*words)
    assert "\n" not in message
    for word in said:
        assert word in message, message


def test_numbers_are_read_however_they_are_written() -> None:
    plain = look(["seqlen=1000", "measure.budget_s=1000", "mask=block_random", "mask.density=0.2", "measure.warmup=2"])
    other = look(["seqlen=1e3", "measure.budget_s='1e3'", "mask=block_random", "mask.density=0.20", "measure.warmup='2'"])
    assert plain.cells == other.cells


def test_a_user_s_own_file_may_say_what_a_value_is(tmp_path: Path) -> None:
    (tmp_path / "mask").mkdir()
    (tmp_path / "mask" / "1e3.yaml").write_text("name: mine\n_target_: lcbench.masks.causal.causal\n")
    (tmp_path / "mask" / "bad.yaml").write_text("name: bad\n_target_: lcbench.masks.nope.nope\n")
    (tmp_path / "mask" / "odd.yaml").write_text("name: odd\n_target_: lcbench.masks.causal.causal\nleft: 1\n")
    (planned,) = look(["--config-dir", str(tmp_path), "mask=1e3"]).cells
    assert planned.cell.config["mask"]["name"] == "mine"
    assert "lcbench.masks.nope.nope" in refused("-cd", str(tmp_path), "mask=bad")
    assert "has no option 'left'" in refused("-cd", str(tmp_path), "mask=odd")
    (tmp_path / "config.yaml").write_text("seqlen: 1\n")
    with pytest.raises(ValueError, match=r"\+experiment=<name>"):
        loader_of(str(tmp_path))


def test_plans_of_one_process_do_not_touch_each_other() -> None:
    before = look(["cp=usp"])
    with pytest.raises(ValueError, match="nope"):
        look(["cp=usp", "cp.layout=nope", "pack.max_cells=nope"])
    look(["cp=usp", "cp.ulysses_degree=1", "pack.max_cells=7", "site.max_minutes=7"])
    assert look(["cp=usp"]) == before


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    text = json.dumps({"seqlen": 8, "bands": [[0, 8, 0, 8, None, 0]]})
    plans = []
    for folder, content in (
        ("a", text.encode()),
        ("b=c [d]", b"\xef\xbb\xbf" + text.encode().replace(b",", b",\r\n")),
        ("e", text.encode()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.json").write_bytes(content)
        plans.append(look(["mask=band_file", f"mask.file={tmp_path}/{folder}/m.json", "seqlen=8"]).cells[0])
    first, marked, moved = (p.cell for p in plans)
    assert all(p.skip is None for p in plans)
    assert (first.id, first, hash(first)) == (moved.id, moved, hash(moved))
    assert first.id != marked.id
    assert moved.config["mask"]["file"] == f"{tmp_path}/e/m.json"  # whoever measures needs it
    assert Cell.from_config(moved.config) == first
    # Cells of before keep their ids, and their digest has one name in reports.
    old = {**first.config, "mask": {"name": "band_file", "file": "/x/m.json", "file_sha256": "0123456789abcdef"}}
    text_before = json.dumps(with_first_names(old), sort_keys=True, separators=(",", ":"))
    assert Cell.from_config(old).id == hashlib.sha256(text_before.encode()).hexdigest()[:12]
    assert Cell.from_config(old).flat["mask.content_sha256"] == "0123456789abcdef"
    (tmp_path / "u16.json").write_text(text, encoding="utf-16")
    assert "UTF-8" in refused("mask=band_file", f"mask.file={tmp_path}/u16.json", "seqlen=8")


@pytest.mark.parametrize("name", ["results", "fit"])
def test_a_name_that_no_file_can_have_is_refused(name: str) -> None:
    assert "is 300 bytes long, and a name has at most 255" in refused(f"{name}=a/{'x' * 300}/b", "seqlen=1k")
    assert "is 256 bytes long" in refused(f"{name}={'ü' * 128}", "seqlen=1k")
    look([f"results={'x' * 255}/{'y' * 255}", "seqlen=1k"])


def test_what_was_a_selector_of_apb_is_its_compressor_under_the_same_id() -> None:
    selector = {"name": "random", "_target_": "lcbench.cp.selectors.random.Random", "seed": 3}
    words = ["cp=apb", "cp.anchor=1k", "cp.passing=512", "seqlen=16k", "scale=1x4", "heads=8x4x64", "direction=forward"]
    cell = look([*words, "compressor=random", "compressor.seed=3"]).cells[0].cell
    strategy = {key: value for key, value in cell.config["cp"].items() if key != "compressor"}
    assert Cell.from_config({**cell.config, "cp": {**strategy, "selector": selector}}) == cell
    assert cell.id == "165dd224f076"  # as the version before gave it
    assert refused(*words, "cp.selector=random") == "cp.selector is called cp.compressor now; write cp.compressor"


def test_lengths_are_read_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(b"\xef\xbb\xbf1024\r\n64k\r\n\r\n1_000\r\n")
    assert lengths.read(path) == [1024, 65536, 1000]
    path.write_text("12\n", encoding="utf-16")
    with pytest.raises(ValueError, match="UTF-8"):
        read_text(path)
    for name in ("1e3", "true", "null", "a.b"):
        with pytest.raises(SystemExit):
            lengths.main([str(path), "--name", name, "--conf", str(tmp_path)])


@pytest.mark.slow
def test_the_site_gives_the_scale_and_the_budget() -> None:
    scales = {site: {p.cell.config["scale"] for p in look(["cp=ring", f"site={site}"]).cells} for site in ("plain", "container")}
    assert scales == {"plain": {"2x8"}, "container": {"2x8"}}
    assert {p.cell.config["scale"] for p in look(["site=plain", "site.scale=4x8"]).cells} == {"4x8"}
    assert "scale is not set" in refused("site=plain", "~site.scale")
    assert option("budget", "site=local") == {"hours": 4.0, "gpu_hours": None}
    assert option("budget", "site=plain", "budget.hours=2") == {"hours": 2.0, "gpu_hours": 2000.0}
    assert option("budget", "site=plain", "~site.budget") == {"hours": None, "gpu_hours": None}


@pytest.mark.slow
def test_the_command_as_its_user_writes_it_is_planned_on_many_gpus_and_refused_on_a_laptop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lcbench.commands.launchers import launcher_named

    def launch(name: str, *words: str) -> tuple[int, str, str]:
        plan: Plan = look(["-m", "cp=ring,ulysses,usp", "seqlen=64k,256k,1m", f"results={tmp_path}/r", *words])
        code = launcher_named(name).launch_plan(plan)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    code, out, err = launch("dry", "site=plain")
    assert (code, err) == (0, "")
    for words in ("9 cells", "#SBATCH --nodes=2", "estimated: about ", "(time limits); ", "the longest cell", "from: simulation"):
        assert words in out
    for name in ("local", "dry"):
        code, out, err = launch(name, "site=local", "site.device=cpu", "scale=1x2", "output=quiet")
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "more than budget.hours=4 allows" in err
        assert ("to run" in out) == (name == "dry")
    code, out, err = launch("local", "site=local", "site.device=cpu", "scale=1x2", "budget.hours=null")
    assert code == 2
    assert "9 of 9 cells are expected to take longer than hang.max_s=7200" in err
    code, out, err = launch("dry", "site=plain", "scale=1x1", "seqlen=1k")
    assert code == 0
    assert out.count("on one rank") == 3
    code, out, err = launch("dry", "site=plain", "budget.gpu_hours=0.001")
    assert code == 2
    assert re.search(r"more than budget.gpu_hours=0.001 allows \(about [\d.]+ GPU-hours, at most [\d.]+ \(time limits\)\)", err)
    assert not list(tmp_path.iterdir())
    assert str(Cost.of([], here=True)) == "estimated: nothing to run"


@pytest.mark.slow
def test_hydra_shows_what_it_is_asked_or_says_why_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["lcbench.sweep"])
        command.main(list(words))
        return capsys.readouterr().out

    config = OmegaConf.create(shown("-m", "--cfg", "job", "sweep=1.10", "mask=sliding_window", "site=plain", "--resolve"))
    assert (config.sweep, config.mask.name, config.scale) == ("1.10", "sliding_window", "2x8")
    assert OmegaConf.create(shown("--cfg=job", "-p", "pack")).max_minutes == 120
    assert "seqlen=64k,256k,1m" in shown("--help")
    for words in (
        ["--cfg", "job", "cp=ring,usp"],
        ["--cfg", "job", "-p", "nope"],
        ["--info", "nope"],
        ["--cfg", "x"],
        ["--cfg", "job", "cp=rign"],
    ):
        with pytest.raises(SystemExit) as ended:
            shown(*words)
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
