"""Devices are known by their whole names, MIG slices by their share; measured peaks keep the best of all tries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf

from lcbench.grid.devices import known_devices
from lcbench.grid.paths import CONF
from lcbench.measure import peak
from lcbench.measure.peak import configured_limit, configured_peak, entry_of, measured_limit, measured_peak
from lcbench.problem import DTYPES
from lcbench.testing import gpu_rows

CPU = torch.device("cpu")
DEVICES = known_devices()


def name_of(device: str) -> str | None:
    entry = entry_of(DEVICES, device)
    return str(entry["name"]) if entry else None


@pytest.mark.parametrize(
    ("device", "name", "half", "gbytes", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100", 312, 2039, 80),
        ("A100-SXM4-80GB", "a100", 312, 2039, 80),  # as drivers before 470 name it
        ("NVIDIA A100-SXM4-40GB", "a100_40gb", 312, 1555, 40),
        ("NVIDIA A100-PCIE-40GB", "a100_pcie_40gb", 312, 1555, 40),
        ("NVIDIA A100 80GB PCIe", "a100_pcie", 312, 1935, 80),
        ("NVIDIA H100 80GB HBM3", "h100", 989, 3350, 80),
        ("NVIDIA H100 PCIe", "h100_pcie", 756, 2039, 80),
        ("NVIDIA H100 NVL", "h100_nvl", 835, 3938, 94),
        ("NVIDIA H200", "h200", 989, 4800, 141),
        ("NVIDIA H200 NVL", "h200_nvl", 835, 4800, 141),
        ("NVIDIA GH200 480GB", "gh200", 989, 4000, 96),
        ("NVIDIA GH200 144G HBM3e", "gh200_144gb", 989, 4900, 144),
        ("NVIDIA B200", "b200", 2250, 8000, 180),
        ("NVIDIA GB200", "gb200", 2500, 8000, 186),
    ],
)
def test_a_device_has_the_peaks_of_its_own_data_sheet(device: str, name: str, half: float, gbytes: float, memory: int) -> None:
    entry = entry_of(DEVICES, device)
    assert entry is not None
    assert entry["name"] == name
    assert configured_peak(DEVICES, device, "bfloat16") == configured_peak(DEVICES, device, "float16") == half
    assert (entry["memory_gbytes_per_s"], entry["memory_bytes"]) == (gbytes, memory * 10**9)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA RTX A1000", "NVIDIA H100", "NVIDIA H1000", "NVIDIA H20", "NVIDIA A100-SXM-64GB", "NVIDIA GeForce RTX 4090",
        "AMD EPYC", "NVIDIA H100L-1-12C MIG 1g.12gb", "NVIDIA H100 80GB HBM3 MIG 1c.3g.40gb", "NVIDIA B200 MIG 1g.23gb",
        "NVIDIA H100 80GB HBM3 MIG 5g.50gb", "NVIDIA DGX Display", "", "h100",
    ],
)  # fmt: skip
def test_what_nobody_wrote_down_has_no_configured_peak(device: str) -> None:
    assert entry_of(DEVICES, device) is None
    assert configured_peak(DEVICES, device, "bfloat16") is configured_limit(DEVICES, device, "bfloat16") is None


@pytest.mark.parametrize(
    ("device", "name", "sms", "of", "eighths"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-1g.10gb", 16, 132, 1),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me", "h100-1g.10gb", 16, 132, 1),
        ("NVIDIA H100 80GB HBM3 MIG 1g.20gb", "h100-1g.20gb", 26, 132, 2),  # more SMs than a seventh
        ("NVIDIA H100 80GB HBM3 MIG 2g.20gb", "h100-2g.20gb", 32, 132, 2),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "h100-3g.40gb", 60, 132, 4),
        ("NVIDIA H100 80GB HBM3 MIG 4g.40gb", "h100-4g.40gb", 64, 132, 4),
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", "h100-7g.80gb", 132, 132, 8),
        ("NVIDIA H100 PCIe MIG 3g.40gb", "h100_pcie-3g.40gb", 46, 114, 4),
        ("NVIDIA H100 NVL MIG 1g.12gb", "h100_nvl-1g.12gb", 16, 132, 1),
        ("NVIDIA H100 NVL MIG 3g.47gb", "h100_nvl-3g.47gb", 60, 132, 4),
        ("NVIDIA H200 MIG 1g.18gb", "h200-1g.18gb", 16, 132, 1),
        ("NVIDIA H200 MIG 2g.35gb", "h200-2g.35gb", 32, 132, 2),
        ("NVIDIA H200 MIG 4g.71gb", "h200-4g.71gb", 64, 132, 4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100_40gb-1g.5gb", 14, 108, 1),
        ("NVIDIA A100-SXM4-40GB MIG 1g.10gb", "a100_40gb-1g.10gb", 14, 108, 2),
        ("A100-SXM4-40GB MIG 3g.20gb", "a100_40gb-3g.20gb", 42, 108, 4),
        ("NVIDIA A100 80GB PCIe MIG 7g.80gb", "a100_pcie-7g.80gb", 98, 108, 8),  # not the whole GPU
        ("NVIDIA GH200 480GB MIG 3g.48gb", "gh200-3g.48gb", 60, 132, 4),
    ],
)
def test_a_slice_has_its_share(device: str, name: str, sms: int, of: int, eighths: int) -> None:
    entry, whole = entry_of(DEVICES, device), entry_of(DEVICES, device.partition(" MIG ")[0])
    assert entry is not None
    assert whole is not None
    assert entry["name"] == name
    assert entry["peak_tflops"] == pytest.approx({dtype: peak * sms / of for dtype, peak in whole["peak_tflops"].items()})
    for key in ("memory_bytes", "memory_gbytes_per_s", "cache_bytes"):
        assert entry[key] == pytest.approx(whole[key] * eighths / 8)
    assert whole["name"] == name.partition("-")[0]  # the entry itself is left as it is


def test_every_entry_is_whole_and_no_name_is_claimed_twice() -> None:
    for entry, path in zip(DEVICES, sorted((CONF / "device").glob("*.yaml")), strict=True):
        assert entry["name"] == path.stem
        assert entry["names"]
        assert set(entry["peak_tflops"]) == {*DTYPES, "tf32"}
        assert entry["peak_tflops"]["bfloat16"] >= entry["peak_tflops"]["tf32"] >= entry["peak_tflops"]["float32"]
        for key in ("memory_bytes", "memory_gbytes_per_s", "cache_bytes", "link_gbytes_per_s", "sms"):
            assert entry[key] > 0
        assert all(name_of(name) == entry["name"] for name in entry["names"])
        assert gpu_rows.flat_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))  # as a machine without Hydra reads it
        for profile, sms in entry["mig_sms"].items():
            assert name_of(f"{entry['names'][0]} MIG {profile}") == f"{entry['name']}-{profile}"
            assert sms <= entry["sms"]
    every = [name for entry in DEVICES for name in entry["names"]]
    assert len(every) == len(set(every))


def test_float32_may_run_on_tensor_cores() -> None:
    """Memory-efficient attention in float32 is three products in TF32, which exceed what the float32 units can do."""
    assert configured_peak(DEVICES, "NVIDIA A100-SXM4-80GB", "float32") == 19.5
    assert configured_limit(DEVICES, "NVIDIA A100-SXM4-80GB", "float32") == 156
    assert configured_limit(DEVICES, "NVIDIA A100-SXM4-80GB", "bfloat16") == 312
    assert configured_limit(DEVICES, "NVIDIA A100-SXM4-80GB", "float64") == 19.5


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_best", {})


def rates(monkeypatch: pytest.MonkeyPatch, found: dict[str, list[float]]) -> list[str]:
    """Products that reach these rates, one after the other; which were measured."""
    asked: list[str] = []
    values: dict[str, Iterator[float]] = {dtype: itertools.chain(all_of) for dtype, all_of in found.items()}

    def product(dtype: str, device: torch.device) -> float:
        asked.append(dtype)
        return next(values[dtype])

    monkeypatch.setattr(peak, "_product_tflops", product)
    return asked


@pytest.mark.usefixtures("forgotten")
def test_a_measured_peak_is_the_best_of_all_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rates(monkeypatch, {"float64": [0.3, 0.5, 0.4]})
    assert measured_peak(torch.float64, CPU) == measured_peak(torch.float64, CPU) == 0.3  # once
    assert measured_limit(torch.float64, CPU, again=True) == measured_peak(torch.float64, CPU) == 0.5
    assert measured_limit(torch.float64, CPU, again=True) == 0.5
    assert asked == ["float64"] * 3


@pytest.mark.usefixtures("forgotten")
def test_a_slow_product_of_halves_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rates(monkeypatch, {"bfloat16": [0.003, 0.003], "float16": [9.0], "float32": [0.09, 0.1], "tf32": []})
    assert measured_peak(torch.bfloat16, CPU) == 0.003
    assert measured_limit(torch.bfloat16, CPU) == 0.09
    assert measured_limit(torch.bfloat16, CPU, again=True) == 0.1
    assert measured_limit(torch.float16, CPU) == 9.0
    assert measured_limit(torch.float32, CPU) == 0.1
    assert asked == ["bfloat16", "float32", "bfloat16", "float32", "float16"]


@pytest.mark.usefixtures("forgotten")
def test_on_cuda_a_product_in_float32_may_use_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[bool] = []

    def product(dtype: str, device: torch.device) -> float:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return 50.0 if allowed[-1] else 19.0

    monkeypatch.setattr(peak, "_product_tflops", product)
    before = torch.backends.cuda.matmul.allow_tf32
    assert measured_limit(torch.float32, torch.device("cuda", 0)) == 50.0
    assert measured_peak(torch.float32, torch.device("cuda", 0)) == 19.0
    assert allowed == [False, True]
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_really_measured(dtype: torch.dtype) -> None:
    found = measured_limit(dtype, CPU)
    assert 1e-3 < found < 1e3
    assert measured_limit(dtype, CPU, again=True) >= found


def test_a_product_on_cpu_is_one_threads_times_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for one another are slow on a busy machine, and then a sound kernel would seem to exceed them."""
    threads: list[int] = []

    def seconds(side: int, dtype: str, device: torch.device) -> Iterator[float]:
        threads.append(torch.get_num_threads())
        yield 2 * side**3 / 1e12

    monkeypatch.setattr(peak, "_product_seconds", seconds)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert peak._product_tflops("float32", CPU) == pytest.approx(count)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}


def test_sides_whose_product_takes_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def seconds(side: int, dtype: str, device: torch.device) -> Iterator[float]:
        tried.append(side)
        yield from (2 * side**3 / 1e9, 4 * side**3 / 1e9)  # 1 GFLOP/s at best

    monkeypatch.setattr(peak, "_product_seconds", seconds)
    assert peak._product_tflops("float16", CPU) == pytest.approx(1e-3 * torch.get_num_threads())
    assert tried == [192]  # 384 would take 0.11 s
