"""The GPU check on a CPU: what it runs, records and survives; and that it reads conf/ as Hydra does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lcbench.grid.values import axis_values
from lcbench.kernels.base import Platform, Prepared
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.testing import gpu_check
from lcbench.testing.faulty import Blind
from lcbench.testing.masks import names

PLAN = gpu_check.Plan(
    torch.device("cpu"), "float32", 96, (Heads(4, 2, 16),), Heads(4, 2, 16), (("causal", "256"), ("block_random", "256")),
    settings=gpu_check.SETTINGS | {"min_iterations": 2, "max_iterations": 3, "budget_s": 0.1},
)  # fmt: skip


@dataclass(frozen=True)
class Broken(SDPAFlash):
    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        raise RuntimeError("no kernel image")


def test_every_kernel_and_mask_of_conf_is_read_as_hydra_reads_it() -> None:
    assert set(gpu_check.kernels()) == set(names("kernel")) - {"reference"}
    assert set(axis_values(gpu_check.CONF, "mask")) == set(names()) - {"band_file", "block_file"}
    for group in ("kernel", "mask"):
        for name in names(group):
            path = gpu_check.CONF / group / f"{name}.yaml"
            assert gpu_check.flat_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))


def test_it_checks_and_times_what_runs_and_names_the_rest(tmp_path: Path) -> None:
    said: list[str] = []
    found = gpu_check.report(PLAN, ["sdpa_flash", "flex_sparse", "flash_attn2"], said.append)
    assert "runs on CUDA devices only" in found["absent"]["flash_attn2"]
    status = {(row["kernel"], row["mask"]): row["status"] for row in found["checks"]}
    assert status["sdpa_flash", "holes"] == status["flex_sparse", "block_random"] == "ok"
    assert status["flex_sparse", "causal"] == "unsupported"
    assert "wrong" not in status.values()
    assert "failed" not in status.values()
    timed = {(row["kernel"], row["mask"]): row for row in found["timings"]}
    assert timed["sdpa_flash", "causal"]["tflops"]["backward"] > 0
    assert timed["flex_sparse", "causal"]["status"] == "unsupported"
    assert not gpu_check.failed(found)
    assert json.loads(json.dumps(found))["measured_peak_tflops"] > 0
    assert "| sdpa_flash | causal | 256 |" in gpu_check.markdown(found)
    assert any("sdpa_flash" in line for line in said)


def test_a_wrong_kernel_and_a_broken_one_are_recorded_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = {"blind": Blind(), "broken": Broken(), "right": SDPAFlash()}
    monkeypatch.setattr(gpu_check, "kernels", lambda wanted=None: cast)
    found = gpu_check.report(PLAN, None, lambda _: None)
    checked = {(row["kernel"], row["mask"]): row for row in found["checks"]}
    assert checked["blind", "causal"]["status"] == "wrong"
    assert checked["blind", "full"]["status"] == "ok"
    assert "no kernel image" in checked["broken", "full"]["reason"]
    assert checked["right", "causal"]["status"] == "ok"
    timed = {(row["kernel"], row["mask"]): row["status"] for row in found["timings"]}
    assert timed["blind", "causal"] == "wrong"
    assert timed["broken", "causal"] == "failed"
    assert timed["right", "causal"] == "ok"
    assert gpu_check.failed(found)


def test_what_there_is_no_time_for_is_said() -> None:
    plan = gpu_check.Plan(**{**vars(PLAN), "check_s": 0.0, "time_s": 0.0})
    found = gpu_check.report(plan, ["sdpa_flash"], lambda _: None)
    assert {row["status"] for row in found["checks"] + found["timings"]} == {"not reached"}


def test_a_device_is_known_by_its_entry_or_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, wanted in (("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090")):
        monkeypatch.setattr(gpu_check, "device_name", lambda _, device=device: device)
        assert gpu_check.folder(torch.device("cuda")).name == wanted


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "torch sees none" in capsys.readouterr().err
    assert gpu_check.main(["flesh"]) == 2
    assert "flesh is not one of" in capsys.readouterr().err


def test_the_platform_of_a_cpu_has_memory() -> None:
    assert Platform.of(torch.device("cpu")).memory_bytes > 1 << 30


def test_it_needs_neither_hydra_nor_mlflow() -> None:
    program = "import sys, lcbench.testing.gpu_check; print(sorted({'hydra', 'omegaconf', 'mlflow', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
