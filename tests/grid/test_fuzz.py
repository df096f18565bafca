"""Any list of words behind the command gives a plan, or one line and exit code 2: no traceback, no other code, nothing silent."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lcbench.commands import sweep as command
from lcbench.commands.launchers import launcher_named
from lcbench.grid import expand
from lcbench.grid.axes import AXES, GROUPS, RESERVED
from lcbench.grid.compose import compose
from lcbench.grid.overrides import RUN_OPTIONS
from lcbench.grid.paths import CONF
from lcbench.grid.site import ClusterSite
from lcbench.report.ending import bad_input

SEED, LISTS = 17, 1000
KINDS = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in (*GROUPS, "site", "experiment")}
OPTIONS = [
    "mask.left", "mask.right", "mask.sink", "mask.block_size", "mask.density", "mask.sizes", "mask.per", "mask.samples",
    "mask.file", "mask.prefix", "mask.lengths", "mask.seed", "mask.name", "mask._target_", "mask._partial_", "lengths.low",
    "lengths.high", "lengths.values", "lengths.sigma", "lengths.name", "lengths.by", "lengths.edges", "cp.layout",
    "cp.ulysses_degree", "cp.stages",
    "cp.groups", "cp.documents", "cp.name", "cp._target_", "cp.heads_per_step", "cp.uneven_heads", "kernel.block_q", "kernel.name",
    "kernel._target_", "measure.warmup", "measure.blocks", "measure.budget_s", "measure.max_iterations", "measure.precision",
    "measure.timeline", "measure.nope", "mesh.tp", "mesh.dp", "mesh.order", "mesh.nope", "model.ffn", "model.head_dim",
    "model.qk_norm", "model.name", "workload.layers", "workload.model", "workload.loss_chunk", "recompute.fraction",
    "recompute._target_", "pack.max_cells", "pack.nope", "hang.min_s", "hang.max_s", "hang.factor",
    "retry.oom", "retry.nope", "budget.hours", "budget.gpu_hours", "budget.nope",
    "hydra.mode", "hydra.run.dir", "hydra.sweep.dir", "hydra.job.name", "hydra.launcher.timeout_min", "hydra/launcher",
    "hydra/sweeper", "hydra.sweeper.params.cp", "hydra.verbose", "hydra/job_logging", "hydra.callbacks.x",
    *(f"site.{key}" for key in ClusterSite.model_fields), "site.nope", "site.env.NCCL_DEBUG", "site.sbatch.mem",
    "site.sbatch.no-kill", "site.sbatch.array", "site.container.image", "site.container.mounts", "site.budget.hours",
    "site.collector.partition",
]  # fmt: skip
GOOD = {
    "seqlen": ["1k", "256", "2k,4k", "1e3", "1_000", "range(64,256,64)"], "seqlen_per_rank": ["64", "null", "64,128"],
    "scale": ["1x1", "1x2", "2x2,1x4"], "heads": ["8x4x32", "4x4x16,8x2x16"], "dtype": ["float32", "bf16,fp16"],
    "direction": ["forward", "forward,forward_backward"], "reduce_dtype": ["float32", "input"], "seed": ["0", "1,2", "range(3)"],
    "sweep": ["a", "1.10", "2024_01", "Prüf", "null", "exp_${now:%Y}", "'quoted'"], "wait": ["true", "false"],
    "output": ["quiet", "json", "table"], "force": ["true"], "results": ["${oc.env:PWD}/nowhere", "nowhere/x=y [z]"],
    "tracking_uri": ["null", "sqlite:///x.db", "1.10"], "layers": ["1", "all", "null", "1,2"],
    "mesh.tp": ["1", "2"], "mesh.dp": ["1,2"],
}  # fmt: skip
STRANGE = [
    "", "null", "true", "-1", "0", "1e400", "-inf", "nan", "inf", "99999999999999999999999999", "1e18", "-0.5", "1.5", "0x1f",
    "64q", "{}", "{a:1}", "{a:{b:[1,2]}}", "[]", "[1,[2,[3,{x:y}]]]", "[[[[[[]]]]]]", "[a", "a]", "{", "}", "(", ")", "a=b",
    "=", "a,b,", ",", ",,", "'", '"', "'a", '"a"b', "\"c,d\"", "\\", "a\\,b", "ü", "日本", "\u202e", "a b", "a\tb", "a\nb",
    "\x00", "\x1b[31m", "\udcff", "%j", "a|b", "~", "~/x", "$", "${", "${}", "${seqlen}", "${.x}", "${..seqlen}",
    "${mask.left}", "${oc.env:NOPE_NOPE}", "${oc.env:PATH}", "${oc.env:NOPE_NOPE,3}", "${now:%H}", "${hydra:job.name}",
    "${oc.select:seqlen,4}", "${oc.select:nope}", "${site}", "${site.name}", "${nope:1}", "${oc.decode:1}", "${repository:}",
    "${sweep}", "x${seqlen}y", "range(1,2,0.3),x", "range(0,9,0)", "range(0,1e12)", "range(5)", "range(a,b)", "choice(1,2)",
    "choice()", "glob(*)", "glob(block*)", "interval(0,1)", "sort(3,1)", "shuffle(1,2)", "tag(x,1)", "str(1)", "int(a)",
    "float(x),1", "bool(2)", "extend_list(1)", "json_str({a:1})", "nope(1)", "os.system", "a" * 300, "9" * 5000, "[" * 200,
    "last", ".", "..", "-", "--", "a/b", "1,2,3,3", "none,null", "lcbench.masks.causal.causal", "1x", "x2", "x", "1e6",
    "1x1x1", "99999999x99999999", "7x3x1", "0x0x0", "?", "???", "*", "@", "a@b", "+", "64k", "1g", "\uff11\uff12", "1k;2k",
    "true,false", "{partition:cpu}", "{no-kill:true}", "[--mem=0,-J x]", "gpu:h100:8", "module load x",
]  # fmt: skip
USUAL = [
    "1", "2", "4", "16", "64", "128", "1k", "8,16", "0.5", "1,2", "auto", "false", "[64,64]", "[1k,24]", "zigzag", "uniform",
    "'4'", "4.0",
]  # fmt: skip
WORDS = [
    "-m", "--multirun", "--cfg", "--cfg=job", "-x", "--resolve", "-cn", "--config-name=x", "-cp", "--config-path=/tmp",
    "--config-dir", "--config-dir=/nowhere", "-cd", "--run", "-r", "--mult", "--pack", "--package", "--experimental-rerun=x",
    "--config-d=x", "-", "--", "---", "ring", "=", "==", "=1", "~", "~~", "+", "++", "a", "@x=1", "mask@x=full", "mask/foo=1",
    "mask:x=1", ".a=1", "a.=1", "seqlen", "sequence=1", "+foo=1", "++foo.bar=1", "ü=1", " =1", "seqlen =1k", " seqlen=1k",
    "mask..left=1", "mask.left.x=1", "+mask@mask.lengths=full", "~mask=causal", "~+mask", "+~mask=1", "+++mask=1", "hydra=1",
    "~hydra", "+hydra.x=1", "hydra.=1", "-5", "-1=2",
]  # fmt: skip


def drawn(random: random.Random) -> list[str]:
    """A list of words: well meant but for one, of one axis value with its own options, or anything."""
    fate = random.random()
    if fate < 0.3:
        return [*(_good(random) for _ in range(random.choice((0, 1, 2)))), _strange(random)]
    if fate < 0.65:
        group = random.choice(GROUPS)
        value = random.choice(KINDS[group])
        keys = OmegaConf.load(CONF / group / f"{value}.yaml")
        options = [str(key) for key in keys if key not in RESERVED] or ["nope"]
        marks = random.choice(("", "", "+", "++", "~"))
        told = f"{random.choice(options)}={random.choice((*STRANGE, *USUAL))}"
        owner = {"lengths": ["mask=document"], "model": ["workload=block"], "recompute": ["workload=block"]}.get(group, [])
        return [*owner, f"{group}={value}", f"{marks}{group}.{told}", *(_good(random) for _ in range(random.choice((0, 0, 1))))]
    if fate < 0.8:
        return [_good(random) for _ in range(random.choice((1, 2, 3)))]
    return [random.choice((_good, _strange, _strange, _word))(random) for _ in range(random.choice((1, 2, 3, 5)))]


def _good(random: random.Random) -> str:
    key = random.choice((*KINDS, *GOOD))
    return f"{'+' if key == 'experiment' else ''}{key}={random.choice(KINDS[key] if key in KINDS else GOOD[key])}"


def _strange(random: random.Random) -> str:
    marks = random.choice(("", "", "", "+", "++", "~"))
    key = random.choice(OPTIONS if random.random() < 0.6 else [*AXES, *RUN_OPTIONS])
    values = [random.choice((*STRANGE, *USUAL)) for _ in range(random.choice((1, 1, 1, 1, 2)))]
    return f"{marks}{key}={','.join(values)}"


def _word(random: random.Random) -> str:
    return random.choice(WORDS)


def outcome(words: list[str], capsys: Any) -> tuple[Any, str | None]:
    """The exit code of the command with these words, and what is wrong with what it does; None if nothing is."""
    try:
        code: Any = command.main(words) or 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    said = capsys.readouterr()
    lines = said.err.splitlines()
    if code == 0 and not lines and "nothing was submitted" in said.out:
        return code, None
    if code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > len("error: "):
        return code, None
    return code, f"exit code {code}, {len(lines)} lines: {said.err[:2000]}{said.out[-300:] if not said.err else ''}"


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a list cheap: what was composed is composed once, and a plan reaches the launcher without Hydra's application."""
    composed: dict[tuple[str, ...], Any] = {}

    def once(lines: list[str], loader: Any) -> Any:
        key = tuple(lines)
        if key not in composed:
            try:
                composed[key] = compose(lines, loader)
            except ValueError as error:
                composed[key] = error
        if isinstance(composed[key], ValueError):
            raise composed[key]
        return {k: dict(v) if isinstance(v, dict) else v for k, v in composed[key].items()}

    def enter(arguments: list[str]) -> None:
        if "hydra/launcher=dry" in arguments:
            plan = expand.remembered()
            assert plan is not None
            with bad_input():  # as the sweeper does
                sys.exit(launcher_named("dry").launch_plan(plan))

    monkeypatch.setattr(expand, "compose", once)
    monkeypatch.setattr(command, "_enter", enter)
    monkeypatch.setattr("lcbench.planners.telling.EVERY_S", math.inf)  # how long planning takes is nobody's mistake
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LCBENCH_SITE", "plain")  # of GPUs, so that a plan of the defaults is within its budget


@pytest.mark.slow
def test_any_list_of_words_is_a_plan_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(monkeypatch, tmp_path)
    draw, plans = random.Random(SEED), 0
    for _ in range(LISTS):
        words = [*drawn(draw), "hydra/launcher=dry"]
        code, wrong = outcome(words, capsys)
        plans += code == 0
        assert wrong is None, f"seed {SEED}: python -m lcbench.sweep {words!r}: {wrong}"
    assert plans > LISTS / 20
    assert not list(tmp_path.iterdir())
