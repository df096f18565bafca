"""Values of axes that a user keeps outside of the checkout: ``--config-dir`` and a module on PYTHONPATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lcbench.commands.kernels import main as kernels
from lcbench.grid.command_line import look
from lcbench.grid.own import line_in
from lcbench.report.ending import BAD_INPUT
from lcbench.results import load
from tests.commands import lcbench

MODULE = """
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lcbench.cp.ring import Ring
from lcbench.kernels.naive import Naive
from lcbench.masks.band import Band, BandMask, DoesNotFit
from lcbench.masks.block import BlockMap


def own_mask(seqlen: int, *, reach: int = 64) -> BandMask:
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen, -reach, 0)])


@dataclass(frozen=True)
class OwnKernel(Naive):
    pass


@dataclass(frozen=True)
class OwnStrategy(Ring):
    order: Literal["up", "down"] = "up"


@dataclass(frozen=True)
class Alone:
    def sample(self, seqlen, random):
        return [seqlen]


@dataclass(frozen=True)
class Holds(Ring):
    lengths: object = None


class NoKernel:
    def unavailable(self, problem, platform):
        return None


class NoStrategy:
    def schedule(self, problem, mask):
        return None


class NoWorkload:
    def unsupported(self):
        return None


def no_mask(tokens):
    return None


def index(seqlen):
    return [][seqlen]


def shapes(seqlen):
    return np.zeros(3) + np.zeros(4)


def forgotten(seqlen):
    BandMask.of(seqlen, seqlen, [])


def short(seqlen):
    return BandMask.of(8, 8, [])


def shared(seqlen):
    return BandMask.of(seqlen, seqlen, [Band(0, seqlen, 0, seqlen), Band(0, 4, 0, 4)])


def unlike(seqlen):
    return BandMask(seqlen, seqlen, np.zeros((1, 6)))


def undrawn(seqlen):
    return BlockMap(np.array([0, seqlen]), np.array([0, seqlen]), 1, lambda number: {}[number])


def misdrawn(seqlen):
    return BlockMap(np.array([0, seqlen]), np.array([0, seqlen]), 1, lambda number: np.ones((2, 2), dtype=bool))


def too_short(seqlen):
    raise DoesNotFit("wants more tokens")


@dataclass(frozen=True)
class Letters:
    def sample(self, seqlen, random):
        return ["a"]


@dataclass(frozen=True)
class Divides(OwnKernel):
    def unsupported(self, problem, mask):
        return 1 // 0


@dataclass(frozen=True)
class Unavailable(OwnKernel):
    def unavailable(self, problem, platform):
        return {}["platform"]


@dataclass(frozen=True)
class Unsure(OwnKernel):
    def missing(self):
        return True


@dataclass(frozen=True)
class Unready(OwnKernel):
    def prepare(self, mask, heads, dtype, device):
        return {}["ready"]


@dataclass(frozen=True)
class SaysTrue(Ring):
    def unsupported(self, problem, mask):
        return True


@dataclass(frozen=True)
class Broken(Ring):
    def __post_init__(self):
        {}["layout"]


@dataclass(frozen=True)
class NoSchedule(Ring):
    def schedule(self, problem, mask):
        pass


@dataclass(frozen=True)
class Misspelt(Ring):
    def schedule(self, problem, mask):
        return self.shedule


@dataclass(frozen=True)
class Twice(Ring):
    def schedule(self, problem, mask):
        right = super().schedule(problem, mask)
        return replace(right, steps=(*right.steps, right.steps[0]))


@dataclass(frozen=True)
class TwiceAtFour(Twice):
    def schedule(self, problem, mask):
        return (Twice if problem.scale.world_size == 4 else Ring).schedule(self, problem, mask)
"""
WORKLOAD = """
from dataclasses import dataclass, replace

from lcbench.workloads.attention import Attention, AttentionSession
from lcbench.workloads.base import Workload


@dataclass(frozen=True)
class Twice(Attention):
    times: int = 2

    def start(self, work, draw, gang):
        return Repeated(self.times, work, draw, gang)


class NoDataclass(Workload):
    def start(self, work, draw, gang):
        return AttentionSession(work, draw, gang)


class Repeated(AttentionSession):
    def __init__(self, times, work, draw, gang):
        self.times = times
        super().__init__(work, draw, gang)

    def phases(self):
        once = super().phases()["forward"]
        return {"forward": lambda passed: [once(passed) for _ in range(self.times)][-1]}

    def costs(self):
        return {phase: replace(cost, flops=self.times * cost.flops) for phase, cost in super().costs().items()}
"""
FILES = {
    "mask/own.yaml": "_target_: own_values.own_mask\nname: own\nreach: 32\n",
    "kernel/own.yaml": "_target_: own_values.OwnKernel\nname: own\n",
    "cp/own.yaml": "_target_: own_values.OwnStrategy\nname: own\norder: up\n",
    "workload/own.yaml": "_target_: own_workload.Twice\nname: own\ntimes: 2\n",
}
OWN = ["mask=own", "kernel=own", "cp=own", "scale=1x2", "seqlen=256", "heads=4x2x32", "dtype=float32"]


def write(folder: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    return ["--config-dir", str(folder / "conf")]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_values.py").write_text(MODULE)
    (tmp_path / "own_workload.py").write_text(WORKLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("own_values", "own_workload", "unloadable"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def test_a_plan_of_ones_own_values(own: Path) -> None:
    flags = write(own, FILES)
    (planned,) = look([*OWN, "site=plain", *flags]).cells
    assert planned.skip is None
    assert planned.cell.label == "own own own 256 1x2"
    assert planned.cell.config["cp"]["order"] == "up"  # of a strategy of one's own, whatever ours is called now
    (other,) = look([*OWN, "mask.reach=1k", "cp.order=down", "site=plain", *flags]).cells
    assert (other.cell.config["mask"]["reach"], other.cell.config["cp"]["order"]) == (1024, "down")


@pytest.mark.slow
def test_a_cell_of_ones_own_values_runs(own: Path) -> None:
    flags = write(own, FILES)
    asked = [
        *OWN, "workload=own,attention", "direction=forward", "measure.budget_s=0.1", "measure.max_iterations=3",
        "measure.min_iterations=1", "measure.blocks=1", *flags, "site=local", "site.device=cpu", "sweep=own",
        f"results={own}/results", "tracking_uri=none", "output=quiet",
    ]  # fmt: skip
    done = lcbench("sweep", *asked, env={**os.environ, "PYTHONPATH": str(own)})
    assert done.returncode == 0, done.stderr
    twice, once = load(str(own / "results"), "own").to_dict("records")
    for row in (twice, once):
        assert (row["status"], row["kernel"], row["cp"], row["mask"]) == ("ok", "own", "own", "own")
    assert (twice["workload"], twice["workload.times"], once["workload"]) == ("own", 2, "attention")
    # The rate counts the work of a phase as its workload does.
    work = [row["compute/tflops_per_gpu"] * row["time/total/median_s"] for row in (twice, once)]
    assert work[0] == pytest.approx(2 * work[1])
    assert twice["comm/forward/bytes"] == once["comm/forward/bytes"]  # of one pass


def test_a_value_may_be_an_option_of_another(own: Path) -> None:
    """A nested ``_target_`` is checked and built as any other."""
    from lcbench.grid import build

    nested = "lengths: {_target_: own_values.Alone, name: alone}"
    flags = write(own, {"cp/own.yaml": f"_target_: own_values.Holds\nname: own\n{nested}\n"})
    (planned,) = look(["cp=own", "site=plain", *flags]).cells
    config = planned.cell.config["cp"]
    assert config["lengths"] == {"_target_": "own_values.Alone", "name": "alone"}
    assert type(build.build_strategy(config).lengths).__name__ == "Alone"  # type: ignore[attr-defined]
    assert build.check_targets(planned.cell.config) == {"own_values.Holds", "own_values.Alone"}
    flags = write(own, {"cp/other.yaml": f"_target_: own_values.Holds\nname: other\n{nested[:-1]}, left: 3}}\n"})
    with pytest.raises(ValueError, match=r"cp/other.yaml: cp.lengths=alone has no option 'left'"):
        look(["cp=other", "site=plain", *flags])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("cp/bad.yaml", "name: bad\n", "no _target_"),
        ("cp/bad.yaml", "_target_: own_values.OwnStrategy\n", "no name"),
        ("cp/bad.yaml", "_target_: own_values.Ours\nname: bad\n", "own_values.Ours cannot be imported: own_values has no Ours"),
        ("cp/bad.yaml", "_target_: own_valves.OwnStrategy\nname: bad\n", "No module named 'own_valves'"),
        ("mask/bad.yaml", "_target_: 7\nname: bad\n", "no _target_"),
        ("cp/bad.yaml", "_target_: own_values.OwnStrategy\nname: bad\nodrer: up\n", "no option 'odrer'"),
        ("cp/bad.yaml", "_target_: own_values.OwnStrategy\nname: bad\norder: left\n", "cp.order=left is not one of down, up"),
        ("mask/bad.yaml", "_target_: own_values.own_mask\nname: bad\nraech: 3\n", "did you mean reach?"),
        ("kernel/bad.yaml", "_target_: own_values.NoKernel\nname: bad\n", "has no method prepare"),
        ("cp/bad.yaml", "_target_: own_values.NoStrategy\nname: bad\n", "has no method unsupported"),
        ("workload/bad.yaml", "_target_: own_values.NoWorkload\nname: bad\n", "has no method"),
        ("mask/bad.yaml", "_target_: own_values.no_mask\nname: bad\n", "no function whose first argument is seqlen"),
        ("mask/bad.yaml", "_target_: own_values.OwnKernel\nname: bad\n", "no function whose first argument is seqlen"),
        ("kernel/bad.yaml", "_target_: own_values.own_mask\nname: bad\n", "is no class"),
        ("mask/bad.yaml", "_target_: os.system\nname: bad\n", "no function whose first argument is seqlen"),
    ],
)
def test_what_is_wrong_in_a_file_names_it(name: str, text: str, said: str, own: Path) -> None:
    flags = write(own, {name: text})
    group = name.partition("/")[0]
    with pytest.raises(ValueError, match=f"{group}/bad.yaml: ") as error:
        look([f"{group}=bad", "site=plain", *flags])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_one_line_and_exit_code_2(own: Path) -> None:
    flags = write(own, {"kernel/bad.yaml": "_target_: own_values.NoKernel\nname: bad\n"})
    words = ["kernel=bad", "hydra/launcher=dry", f"results={own}/results", *flags]
    done = lcbench("sweep", *words, env={**os.environ, "PYTHONPATH": str(own)})
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{own}/conf/kernel/bad.yaml" in done.stderr


def line_of(text: str, module: str = MODULE) -> int:
    """The line of the module that holds a text."""
    return next(number for number, line in enumerate(module.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("group", "name", "line", "said"),
    [
        ("mask", "index", "[][seqlen]", "IndexError: list index out of range"),
        ("mask", "shapes", "np.zeros(4)", "operands could not be broadcast"),
        ("mask", "forgotten", "", "gives None, and a mask's function gives a BandMask or a BlockMap"),
        ("mask", "short", "", "gives a mask of 8 x 8 tokens at seqlen=256"),
        ("mask", "shared", "", "bands must be disjoint, but"),
        ("mask", "unlike", "", "gives bands of shape (1, 6) and type float64"),
        ("mask", "undrawn", "{}[number]", "KeyError: 0"),
        ("mask", "misdrawn", "", "gives a ndarray of shape (2, 2) and type bool, not a bool array of 1 x 1 blocks"),
        ("kernel", "Divides", "1 // 0", "ZeroDivisionError"),
        ("cp", "SaysTrue", "", "unsupported() gives True; it gives None, or the reason as a text"),
        ("cp", "Broken", '{}["layout"]', "KeyError: 'layout'"),
        ("cp", "NoSchedule", "", "schedule() gives None, not a Schedule"),
        ("cp", "Misspelt", "self.shedule", "AttributeError: 'Misspelt' object has no attribute 'shedule'"),
        ("cp", "Twice", "", "step 2: keys of shard 0, heads 0, come a second time (rank 0 to 1)"),
    ],
)
def test_what_code_of_ones_own_does_wrong_is_one_line_with_its_file(group: str, name: str, line: str, said: str, own: Path) -> None:
    flags = write(own, {f"{group}/bad.yaml": f"_target_: own_values.{name}\nname: bad\n"})
    with pytest.raises(ValueError, match=f"{group}=bad ") as error:
        look(["seqlen=256", "scale=1x2", f"{group}=bad", "site=plain", *flags])
    assert f"({own}/own_values.py{f':{line_of(line)}' if line else ''})" in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("Unavailable", '{}["platform"]', "KeyError: 'platform'"),
        ("Unsure", "", "missing() gives True; it gives None, or the reason as a text"),
    ],
)
def test_what_a_kernel_of_ones_own_says_of_a_machine_is_one_line_with_its_file(
    name: str, line: str, said: str, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = write(own, {"kernel/bad.yaml": f"_target_: own_values.{name}\nname: bad\n"})
    with pytest.raises(SystemExit) as left:
        kernels(["kernel=bad", "mask=causal", *flags])
    assert left.value.code == BAD_INPUT
    where = f"{own}/own_values.py{f':{line_of(line)}' if line else ''}"
    assert capsys.readouterr().err == f"error: kernel=bad ({where}): {said}\n"


def test_a_class_that_takes_anything_has_no_option_of_that_name(own: Path) -> None:
    """As one of a protocol, whose author forgot @dataclass."""
    flags = write(own, {"workload/bare.yaml": "_target_: own_workload.NoDataclass\nname: bare\n"})
    (planned,) = look(["workload=bare", "seqlen=256", "scale=1x2", "cp=ring", "site=plain", *flags]).cells
    assert planned.skip is None


def test_the_line_of_ones_own_code_in_which_a_cell_failed(own: Path) -> None:
    write(own, {})
    import own_values  # type: ignore[import-not-found]

    config = {"kernel": {"_target_": "own_values.Unready", "name": "bad"}, "seqlen": 256}
    with pytest.raises(KeyError) as error:
        own_values.Unready().prepare(None, None, None, None)
    line = line_of('["ready"]')
    assert line_in(error.value, config) == f"{own}/own_values.py:{line}"
    assert line_in(error.value, {"kernel": {"_target_": "lcbench.kernels.naive.Naive", "name": "naive"}}) is None


def test_lengths_of_ones_own_that_are_none_name_their_file(own: Path) -> None:
    flags = write(own, {"lengths/bad.yaml": "_target_: own_values.Letters\nname: bad\n"})
    with pytest.raises(ValueError, match=rf"mask=document \({own}/own_values.py\): "):
        look(["mask=document", "lengths=bad", "site=plain", *flags])


def test_a_mask_that_does_not_fit_is_skipped_still(own: Path) -> None:
    flags = write(own, {"mask/own.yaml": "_target_: own_values.too_short\nname: own\n"})
    assert [planned.skip for planned in look(["mask=own", "site=plain", *flags]).cells] == ["mask own: wants more tokens"]


def test_every_scale_of_a_strategy_of_ones_own_is_proven(own: Path) -> None:
    flags = write(own, {"cp/own.yaml": "_target_: own_values.TwiceAtFour\nname: own\n"})
    words = ["cp=own", "mask=full,causal", "dtype=float32,bfloat16", "seqlen=256", "site=plain", *flags]
    assert len(look([*words, "scale=1x2,1x3"]).cells) == 8
    with pytest.raises(ValueError, match=r"cp=own \(.*\): step 4: "):
        look([*words, "scale=1x2,2x2"])


@pytest.mark.parametrize("group", ["kernel", "cp", "mask", "lengths", "workload"])
@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import numpy\nx = y\n", 2, "NameError: name 'y' is not defined"),
        ("def f(:\n", 1, "SyntaxError"),
        ("import sys\n\nsys.exit(3)\n", 3, "SystemExit: 3"),
        ("import nowhere\n", 1, "No module named 'nowhere'"),
        ("import numpy\nnumpy.zeros('a')\n", 2, "TypeError"),
    ],
)
def test_a_module_that_does_not_load_is_one_line_with_its_file(group: str, text: str, line: int, said: str, own: Path) -> None:
    (own / "unloadable.py").write_text(text)
    flags = write(own, {f"{group}/bad.yaml": "_target_: unloadable.Bad\nname: bad\n"})
    with pytest.raises(ValueError, match=rf"{group}/bad.yaml: {group}=bad: .*{own}/unloadable.py:{line}: ") as error:
        look(
            [f"{group}=bad", "mask=document", "site=plain", *flags]
            if group == "lengths"
            else [f"{group}=bad", "site=plain", *flags]
        )
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_schedule_submits_nothing(own: Path) -> None:
    flags = write(own, {"cp/own.yaml": "_target_: own_values.Twice\nname: own\n"})
    words = [*OWN[2:], "site=local", "site.device=cpu", f"results={own}/results", *flags]
    done = lcbench("sweep", *words, env={**os.environ, "PYTHONPATH": str(own)})
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cp=own ({own}/own_values.py): step 2: keys of shard 0")
    assert not (own / "results").exists()


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcbench.cp.ring import Ring

    monkeypatch.setattr(Ring, "unsupported", lambda *_: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        look(["cp=ring", "site=plain", "seqlen=512", "scale=1x2"])
