"""The GPU check on a CPU: what it runs, records and survives; and that it reads conf/ as Hydra does."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lcbench.grid.values import axis_values
from lcbench.kernels.base import Kernel, Platform, Prepared
from lcbench.kernels.sdpa_flash import SDPAFlash
from lcbench.masks.mask import Mask
from lcbench.problem import Heads
from lcbench.testing import gpu_check, gpu_rows
from lcbench.testing.faulty import Blind
from lcbench.testing.masks import names, softmax_kernels
from lcbench.testing.spawn import PRELOAD

PLAN = gpu_rows.Plan(
    torch.device("cpu"), "float32", 96, (Heads(4, 2, 16),), Heads(4, 2, 16), (("causal", "256"), ("block_random", "256")),
    settings=gpu_rows.SETTINGS | {"min_iterations": 2, "max_iterations": 3, "budget_s": 0.1},
)  # fmt: skip


@dataclass(frozen=True)
class Broken(SDPAFlash):
    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        raise RuntimeError("no kernel image")


def test_every_kernel_and_mask_of_conf_is_read_as_hydra_reads_it() -> None:
    assert set(gpu_rows.kernels()) == set(softmax_kernels()) - {"reference"}
    assert set(axis_values(gpu_rows.CONF, "mask")) == set(names()) - {"band_file", "block_file"}  # type: ignore[attr-defined]
    for group in ("kernel", "mask"):
        for name in names(group):
            path = gpu_rows.CONF / group / f"{name}.yaml"  # type: ignore[attr-defined]
            assert gpu_rows.flat_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))


@dataclass(frozen=True)
class Dying(SDPAFlash):
    """Ends its process in the middle of what will be timed, as a segmentation fault does, and never returns from a full mask."""

    def prepare(self, mask: Mask, heads: Heads, dtype: torch.dtype, device: torch.device) -> Prepared:
        if mask.pairs(1) == 96 * 96:
            time.sleep(1000)
        if mask.pairs(1) == 256 * 257 // 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().prepare(mask, heads, dtype, device)


def run(cast: dict[str, Kernel], out: Path, seconds: float = 2000.0, hang_s: float = 60.0) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    report = gpu_check.Report(PLAN, out, said.append)
    forked = multiprocessing.get_context("forkserver")  # which only a GPU forbids; ten processes that import torch take long
    forked.set_forkserver_preload(PRELOAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "get_context", lambda method: forked)
        gpu_check.check(PLAN, cast, report, seconds=seconds, hang_s=hang_s)
    assert json.loads((out / "gpu-check.json").read_text()) == report.found
    assert (out / "gpu-check.md").read_text() == gpu_check.markdown(report.found)
    return report.found, said


@pytest.mark.slow
def test_it_checks_and_times_what_runs_and_names_the_rest(tmp_path: Path) -> None:
    """Sound kernels, one that is not here, a wrong one, one that breaks, one that dies and hangs: none costs another a row."""
    cast = gpu_rows.kernels(["sdpa_flash", "flex_sparse", "flash_attn2"]) | {"blind": Blind(), "broken": Broken(), "dying": Dying()}
    found, said = run(cast, tmp_path, hang_s=60.0)
    assert "runs on CUDA devices only" in found["absent"]["flash_attn2"]
    checked = {(row["kernel"], row["mask"]): row for row in found["checks"]}
    status = {key: row["status"] for key, row in checked.items()}
    assert status["sdpa_flash", "holes"] == status["flex_sparse", "block_random"] == "ok"
    assert status["flex_sparse", "causal"] == "unsupported"
    assert {s for (kernel, _), s in status.items() if kernel in ("sdpa_flash", "flex_sparse")} == {"ok", "unsupported"}
    assert (status["blind", "causal"], status["blind", "full"]) == ("wrong", "ok")
    assert "no kernel image" in checked["broken", "full"]["reason"]
    assert "no kernel image" in checked["broken", "full"]["traceback"]
    assert "hang: nothing for 60 s" in checked["dying", "full"]["reason"]
    assert status["dying", "holes"] == "ok"
    first = {(row["kernel"], row["mask"]): row["status"] for row in found["first_passes"]}
    assert {row["kernel"] for row in found["first_passes"] if "code -11" in row.get("reason", "")} == {"dying"}
    assert (first["sdpa_flash", "causal"], first["broken", "causal"], first["dying", "causal"]) == ("ok", "failed", "failed")
    timed = {(row["kernel"], row["mask"]): row for row in found["timings"]}
    assert "as bands" in timed["sdpa_flash", "block_random"]["reason"]
    assert all(row["metrics"]["check/of_bound"] <= 1 for row in found["timings"] if row["status"] == "ok")
    # All kernels' first rows come before any second one.
    order = [PLAN.timed.index((row["mask"], str(row["seqlen"]))) for row in found["timings"] if row["status"] == "ok"]
    assert order == sorted(order)
    assert timed["sdpa_flash", "causal"]["tflops"]["backward"] > 0
    assert timed["flex_sparse", "causal"]["status"] == "unsupported"
    assert [timed[name, "causal"]["status"] for name in ("blind", "broken", "dying")] == ["wrong", "failed", "failed"]
    assert timed["flex_sparse", "block_random"]["status"] == "ok"
    assert gpu_check.failed(found)
    assert found["measured_peak_tflops"] > 0
    assert "| sdpa_flash | causal | 256 |" in gpu_check.markdown(found)
    assert any("sdpa_flash" in line for line in said)


@pytest.mark.slow
def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    found, _ = run(gpu_rows.kernels(["sdpa_flash"]), tmp_path, seconds=0.0)
    assert {row["status"] for row in found["checks"] + found["timings"]} == {"not reached"}
    assert not gpu_check.failed(found)


def test_a_row_is_expected_to_take_what_the_host_needs_and_what_grows() -> None:
    pace = gpu_check.Pace()
    assert pace.expected(1e6) == 0.0  # of a first row nothing is known
    pace.learn(64.0, 4.0)
    assert pace.expected(256.0) == 16.0  # all of it may grow
    assert pace.expected(1.0) == pace.expected(64.0) == 4.0  # none of it may
    pace.learn(1.0, 1.2)
    pace.learn(64.0, 3.0)  # another mask, of less work
    assert pace.expected(256.0) == pytest.approx(1.2 + 2.8 * 4)
    assert pace.expected(16.0) == pytest.approx(1.2 + 2.8 / 4)
    assert pace.expected(1.0) == pytest.approx(1.2, rel=0.05)
    for size in (1.0, 4.0, 64.0, 100.0, 1e4):
        assert pace.expected(size) <= pace.expected(2 * size)


def test_a_device_is_known_by_its_entry_or_its_name() -> None:
    assert gpu_check.folder("NVIDIA H200").name == "h200"
    assert gpu_check.folder("NVIDIA GeForce RTX 4090").name == "nvidia-geforce-rtx-4090"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "torch sees none" in capsys.readouterr().err
    assert gpu_check.main(["flesh"]) == 2
    assert "flesh is not one of" in capsys.readouterr().err


def test_the_platform_of_a_cpu_has_memory() -> None:
    assert Platform.of(torch.device("cpu")).memory_bytes > 1 << 30


@pytest.mark.slow
def test_it_needs_neither_hydra_nor_mlflow() -> None:
    program = "import sys, lcbench.testing.gpu_check; print(sorted({'hydra', 'omegaconf', 'mlflow', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
