"""What sbatch is given: one array per scale, a dependency where jobs in flight are limited, containers, a node that fell out."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.lcbench.slurm import arrays, called_for, job_name, sbatch_text, sweep_key

from lcbench.grid.command_line import look
from lcbench.runs.launch import default_name
from lcbench.runs.pack import Pack, Settings
from lcbench.runs.store import Sweep
from tests.runs.test_pack import cell

LIMITS: dict[str, Any] = {"max_cells": None, "max_minutes": None, "max_jobs": None}
SITE: dict[str, Any] = {"partition": "p", "account": "a", "qos": None, "cpus_per_task": 4, "gpus": "gpu:x:{gpus_per_node}"}


def pack(root: Path, number: int, scale: str = "2x8", site: dict[str, Any] | None = None, **limits: Any) -> Pack:
    settings = Settings({**SITE, **(site or {})}, [], None, LIMITS | limits, {}, {})
    one = cell(seed=number, scale=scale)
    return Pack(f"p{number}", "s", str(root), "slurm", scale, (one.id,), {one.id: one.config}, {one.id: 9.0}, 10 + number, settings)


def test_packs_of_a_scale_are_one_array_with_the_longest_limit(tmp_path: Path) -> None:
    packs = [pack(tmp_path, 0), pack(tmp_path, 1, "4x8"), pack(tmp_path, 2), pack(tmp_path, 3)]
    found = list(arrays(packs))
    assert [[p.id for p in array] for array in found] == [["p0", "p2", "p3"], ["p1"]]
    text = sbatch_text(found[0])
    for line in (
        "--array=0-2%3",
        "--nodes=2",
        "--gres=gpu:x:8",
        "--time=13",
        "--ntasks-per-node=1",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "--kill-on-bad-exit=1 --cpus-per-task=4" in text
    assert "--array" not in sbatch_text(found[1])


def test_arrays_are_cut_where_slurm_takes_no_longer_ones(tmp_path: Path) -> None:
    packs = [pack(tmp_path, i, site={"max_array": 3}) for i in range(8)]
    assert [len(array) for array in arrays(packs)] == [3, 3, 2]


def test_jobs_in_flight_are_limited(tmp_path: Path) -> None:
    text = sbatch_text([pack(tmp_path, i, max_jobs=2) for i in range(5)])
    assert "#SBATCH --array=0-4%2\n" in text


def test_set_up_lines_stop_the_job_where_they_fail_and_a_container_reaches_srun(tmp_path: Path) -> None:
    container = {"image": "nvcr.io#nvidia/pytorch:26.08-py3", "mounts": ["/data:/data"], "python": "python", "mount_home": False}
    text = sbatch_text([pack(tmp_path, 0, site={"setup": ["module load cuda"], "container": container, "env": {"A": "b c"}})])
    assert "export A='b c'" in text
    assert text.index("set -eE") < text.index("module load cuda") < text.index("trap - ERR")
    (srun,) = (line for line in text.splitlines() if line.startswith("srun "))
    assert "'--container-image=nvcr.io#nvidia/pytorch:26.08-py3'" in srun
    assert ",/data:/data" in srun
    assert "--no-container-mount-home" in srun
    assert " python -u -m submitit.core._submit " in srun


def test_a_node_that_fell_out_is_left_out_beside_those_that_the_site_names(tmp_path: Path) -> None:
    bad = pack(tmp_path, 0)
    bad.write()
    bad.end_unhealthy({"n07": "7 of 8 GPUs"})
    text = sbatch_text([pack(tmp_path, 1, site={"sbatch": {"exclude": "n01"}})])
    assert "#SBATCH --exclude=n01,n07\n" in text


@pytest.mark.parametrize("name", ["c,d", "a|b", "x'y", "10 %", "ü*?"])
def test_a_job_s_name_is_nothing_that_was_typed(tmp_path: Path, name: str) -> None:
    sweep = Sweep(tmp_path, name)
    made = job_name(sweep)
    assert re.fullmatch(r"lcbench-[0-9a-f]{8}-\d{6}-\d{6}-[0-9a-f]{6}", made)
    assert made != job_name(sweep)
    assert sweep_key(Sweep(tmp_path / "other", name)) != sweep_key(sweep)
    text = sbatch_text([replace(pack(tmp_path, 0), sweep=name)])
    (comment,) = (line for line in text.splitlines() if "--comment" in line)
    assert re.fullmatch(r"#SBATCH --comment='lcbench sweep [\w.-]+'", comment, re.ASCII)


def test_options_of_sbatch_reach_it_as_they_are_meant(tmp_path: Path) -> None:
    sbatch = {"requeue": False, "exclusive": True, "overcommit": False, "mem": 0, "mail_type": None, "comment": "mine"}
    lines = sbatch_text([pack(tmp_path, 0, site={"sbatch": sbatch})]).splitlines()
    for line in ("--no-requeue", "--exclusive", "--mem=0", "--comment=mine"):
        assert lines.count(f"#SBATCH {line}") == 1
    assert not [line for line in lines if "--requeue" in line or "overcommit" in line or "mail" in line]


def test_sbatch_runs_in_an_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_SORT", "SBATCH_PARTITION", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "odd")
    monkeypatch.setenv("SLURM_CONF", "mine.conf")
    before = dict(os.environ)
    with called_for({"env": {"PATH": "/evil", "A": "b"}}):
        assert {**os.environ} == {k: v for k, v in before.items() if v != "odd"}
    with called_for({"env": {"SLURM_CONF": "site.conf"}}):
        assert os.environ["SLURM_CONF"] == "site.conf"
    assert dict(os.environ) == before


def test_two_people_who_type_the_same_have_two_sweeps() -> None:
    plan = look(["seqlen=1k"])
    assert len({default_name(plan) for _ in range(3)}) > 1


@pytest.mark.parametrize("site", ["plain", "container", "devcluster"])
def test_example_sites_compose(site: str) -> None:
    plan = look([f"site={site}", "scale=2x8"])
    assert plan.site["launcher"] == "slurm"
    assert set(plan.site) == set(look(["site=plain"]).site)  # each shows every key
