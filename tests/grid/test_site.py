"""Site files: every key has its type, and what cannot go together is said before anything is submitted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lcbench.commands.sweep import main
from lcbench.grid.command_line import look
from lcbench.grid.site import check_fit, checked, lost_without_requeue, sbatch_flags, site_of_caller
from lcbench.problem import Scale

SLURM: dict[str, Any] = {"launcher": "slurm", "gpus": "gpu:{gpus_per_node}", "cpus_per_task": 16}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        # keys
        ({"acount": "x"}, ["no key 'acount'", "did you mean account?"]),
        ({"max_minute": 3}, ["did you mean max_minutes?"]),
        ({"setups": []}, ["did you mean setup?"]),
        ({"exclude": "n1"}, ["'exclude'", "+site.sbatch.exclude="]),
        ({"mem_per_cpu": "4G"}, ["below sbatch", "mem-per-cpu"]),
        ({"gres": "gpu:8"}, ["write site.gpus"]),
        ({"time": 30}, ["write site.max_minutes"]),
        ({"ntasks_per_node": 8}, ["a worker per GPU"]),
        ({"container": {"image": "x", "workdir": "/"}}, ["site.container has no key 'workdir'", "it has image"]),
        ({"container": {"mounts": ["/a:/a"]}}, ["site.container.image is missing"]),
        # types
        ({"gpus": 4}, ["site.gpus=4 is a number", "'gpu:{gpus_per_node}'"]),
        ({"gpus": "4"}, ["site.gpus=4"]),
        ({"gpus": "gpu:{gpus}"}, ["{gpus_per_node}"]),
        ({"gpus": "gpu:{gpus_per_node.real}"}, ["{gpus_per_node}"]),
        ({"gpus": "gpu:{gpus_per_node!r:>{w}}"}, ["{gpus_per_node}"]),
        ({"gpus": "gpu:}"}, ["site.gpus=gpu:}"]),
        ({"account": 123}, ["site.account=123 is no text", "'123'"]),
        ({"partition": True}, ["site.partition=true", "in quotes"]),
        ({"partition": ["a", "b"]}, ["site.partition", "a list"]),
        ({"qos": "a\nb"}, ["site.qos"]),
        ({"setup": {"module": "cuda"}}, ["site.setup", "a mapping"]),
        ({"setup": ["module load a", {"echo x": "y"}]}, ["site.setup", "in quotes"]),
        ({"srun_args": ["--mpi pmix"]}, ["'--mpi pmix'", "one word"]),
        ({"srun_args": ["--output=x"]}, ["'--output=x'", "lcbench sets"]),
        ({"srun_args": ["-n4"]}, ["'-n4'", "lcbench sets"]),
        ({"env": {"A": True}}, ["site.env holds A: true", "'1'"]),
        ({"env": {"A-B": 1}}, ["no name of a variable"]),
        ({"env": {"TOKEN": "s3cret", "SBATCH_QOS": "x"}}, ["site.env holds SBATCH_QOS"]),
        ({"env": ["A=1"]}, ["site.env", "a list"]),
        ({"sbatch": ["exclusive"]}, ["site.sbatch", "a list"]),
        ({"sbatch": "--mem=0"}, ["site.sbatch", "a text"]),
        ({"container": "x.sqsh"}, ["container: {image: x.sqsh}"]),
        ({"container": {"image": "x", "mount_home": "no"}}, ["site.container.mount_home=no is neither true nor false"]),
        ({"check": "ignore"}, ["site.check=ignore is not one of stop, warn"]),
        ({"publish": False}, ["site.publish=false is not one of nodes, login"]),
        ({"collector": "cpu"}, ["site.collector=cpu", "{partition: cpu}"]),
        ({"collector": {"partition": "cpu", "array": "0-3"}}, ["site.collector holds array"]),
        ({"max_minutes": 1}, ["site.max_minutes=1", "warned"]),
        ({"max_minutes": "1:30"}, ["site.max_minutes=1:30 is no whole number"]),
        ({"max_array": 0}, ["site.max_array=0"]),
        ({"cpus_per_task": 1.5}, ["site.cpus_per_task=1.5"]),
        ({"tracking_uri": 5000}, ["site.tracking_uri=5000"]),
        ({"launcher": "sge"}, ["site.launcher=sge is not one of dry, local, simulate, slurm"]),
        ({"launcher": "local"}, ["means nothing with launcher: local"]),
        # sbatch
        ({"sbatch": {"job-name": "x"}}, ["holds job-name", "comment"]),
        ({"sbatch": {"output": "/x/%j"}}, ["holds output"]),
        ({"sbatch": {"signal": "USR1@60"}}, ["holds signal"]),
        ({"sbatch": {"ntasks": 4}}, ["holds ntasks"]),
        ({"sbatch": {"partition": "x"}}, ["write site.partition"]),
        ({"sbatch": {"time": "1:00:00"}}, ["write site.max_minutes"]),
        ({"sbatch": {"clusters": "b"}}, ["another cluster"]),
        ({"sbatch": {"wait": True}}, ["write wait=true"]),
        ({"sbatch": {"parsable": True}}, ["holds parsable"]),
        ({"sbatch": {"outp": "x"}}, ["holds outp"]),  # sbatch takes abbreviations
        ({"sbatch": {"N": 4}}, ["long name"]),
        ({"sbatch": {"--mem": 0}}, ["without dashes"]),
        ({"sbatch": {"constraint": ["a", "b"]}}, ["constraint", "'a,b'"]),
        ({"sbatch": {"begin": 960}}, ["16:00", "in quotes"]),
        ({"sbatch": {"requeue": "false"}}, ["requeue", "true or false"]),
        ({"sbatch": {"mem": ""}}, ["holds mem"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_site_is_one_line(more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^site") as caught:
        checked({**SLURM, **more})
    said = str(caught.value)
    assert "\n" not in said
    assert "s3cret" not in said
    for word in words:
        assert word in said


def test_values_become_what_jobs_are_made_of() -> None:
    site = checked(
        {
            **SLURM, "setup": "module load cuda", "srun_args": "--mpi=pmix --label", "env": {"A": 1, "B": None, "C": "x y"},
            "sbatch": {"mem": 0, "exclusive": True, "nodelist": None, "overcommit": False, "mail_type": "END"},
            "collector": {"partition": "cpu", "time": 10}, "container": {"image": "x"},
        }
    )  # fmt: skip
    assert site["setup"] == ["module load cuda"]
    assert site["srun_args"] == ["--mpi=pmix", "--label"]
    assert site["env"] == {"A": "1", "C": "x y"}
    assert site["sbatch"] == {"mem": "0", "exclusive": True, "mail-type": "END"}
    assert site["collector"] == {"partition": "cpu", "time": "10"}
    assert set(site) == {*SLURM, "setup", "srun_args", "env", "sbatch", "collector", "container"}  # what was set, no defaults


def test_booleans_of_sbatch_options_mean_what_they_say() -> None:
    assert sbatch_flags({"requeue": False}) == {"no-requeue": True}
    assert sbatch_flags({"requeue": None, "no_requeue": True}) == {"no-requeue": True}
    assert sbatch_flags({"requeue": True, "exclusive": False, "no-kill": True, "nice": 0}) == {
        "requeue": True, "no-kill": True, "nice": "0",
    }  # fmt: skip
    assert lost_without_requeue({"sbatch": {"hold": True}}) == ""
    assert "collector" in lost_without_requeue({"sbatch": {"requeue": False}})
    assert "lcbench.collect" in lost_without_requeue({"sbatch": {"requeue": False}, "collector": False})


@pytest.mark.parametrize(
    ("more", "scale", "minutes", "folder", "words"),
    [
        ({}, "3x16", None, "/r", None),
        ({}, "1x17", None, "/r", ["cpus_per_task=16", "scale=1x17"]),
        ({"cpus_per_task": None}, "1x2", None, "/r", ["cpus_per_task=null"]),
        ({"gpus": "gpu:h100:4"}, "2x4", None, "/r", None),
        ({"gpus": "gpu:h100:4"}, "2x8", None, "/r", ["site.gpus=gpu:h100:4", "scale=2x8 needs 8"]),
        ({"gpus": "gpu"}, "1x2", None, "/r", ["gives a node 1"]),
        ({"gpus": "gpu:a:2,gpu:b:2,tmp:100"}, "1x4", None, "/r", None),
        ({"gpus": "shard:3"}, "1x8", None, "/r", None),
        ({"gpus": None, "sbatch": {"gpus-per-node": "h100:4"}}, "1x8", None, "/r", ["site.sbatch.gpus-per-node"]),
        ({"sbatch": {"gres": "gpu:8"}}, "1x8", None, "/r", ["one of them"]),
        ({}, "1x1", 1, "/r", ["pack.max_minutes=1"]),
        ({}, "1x1", 2, "/r", None),
        ({}, "1x1", None, "/r/50%A/s", ["'50%A'"]),
        ({}, "1x1", None, "/r/back\\slash", ["pattern"]),
        ({}, "1x1", None, "/r/it's a \"res\" #ult, ü", None),
        ({"launcher": "local"}, "9x99", None, "/r/%j", None),
    ],
)  # fmt: skip
def test_what_cannot_go_together(
    more: dict[str, Any], scale: str, minutes: int | None, folder: str, words: list[str] | None
) -> None:
    scales = [Scale(*map(int, scale.split("x")))]
    if words is None:
        check_fit({**SLURM, **more}, scales, minutes, Path(folder))
        return
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        check_fit({**SLURM, **more}, scales, minutes, Path(folder))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.slow
def test_the_command_line_and_site_files_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checks wherever a value comes from; a file may extend another one."""
    (tmp_path / "site").mkdir()
    text = "defaults: [devcluster, _self_]\nname: mine\npartition: small\nsbatch: {mem: 0}\n"
    (tmp_path / "site" / "mine.yaml").write_text(text)
    (tmp_path / "site" / "typo.yaml").write_text("defaults: [devcluster]\nsbach: {mem: 0}\n")
    where = ["--config-dir", str(tmp_path), "scale=1x1", "seqlen=128"]
    plan = look([*where, "site=mine", "+site.sbatch.exclude=lc01"])
    assert (plan.site["partition"], plan.site["account"], plan.site["max_array"]) == ("small", "lcbench", 1000)
    assert plan.site["sbatch"] == {"mem": "0", "exclude": "lc01"}
    for overrides, words in (
        (["site=typo"], "did you mean sbatch?"),
        (["site=mine", "site.partion=x"], "did you mean partition?"),
        (["site=mine", "+site.sbatch.array=1"], "site.sbatch holds array"),
        (["site=mine", "results=/tmp/%u"], "'%u'"),
        (["site=mine", "~site.launcher"], "site.launcher is missing"),
        (["~site"], "~site takes away what every sweep needs"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*where, *overrides])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert words in said


def test_the_caller_s_own_site_comes_from_conf_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LCBENCH_DEVCLUSTER_DIR", "/here")
    assert site_of_caller("devcluster")["env"]["SLURM_CONF"] == "/here/slurm.conf"
    monkeypatch.delenv("LCBENCH_SITE", raising=False)
    assert site_of_caller("../../tmp/evil") == {}
    monkeypatch.setenv("LCBENCH_SITE", "plain")
    assert site_of_caller("somewhere")["name"] == "plain"
