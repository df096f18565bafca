"""Numbers for people: three digits, units by size, no exponents where nobody needs one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcbench.report.amounts import BYTES, SECONDS, digits, duration, more, percent, rate, size, times, unit_for


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.34e3, "3340"), (4542.7, "4540"), (0.0484, "0.0484"), (0.001, "0.00100"), (9.999, "10.0"), (0.99949, "0.999"),
     (999.6, "1000"), (999_600.0, "1.00M"), (8.88e6, "8.88M"), (-4.5678e10, "-45.7G"), (1e14, "100T"), (1e15, "1.00e+15"),
     (123456, "123000"), (1e6, "1.00M"), (9.99e-4, "9.99e-04"), (0, "0"), (-12.345, "-12.3"), (float("nan"), ""),
     (None, ""), (math.inf, "inf")],
)  # fmt: skip
def test_three_digits(value: float | None, text: str) -> None:
    assert digits(value) == text


@given(st.floats(1e-3, 9.99e5))
def test_digits_are_the_number_to_half_a_percent_and_have_no_exponent(value: float) -> None:
    assert "e" not in digits(value)
    assert float(digits(value)) == pytest.approx(value, rel=0.00501)
    assert digits(-value) == f"-{digits(value)}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.34, "3.34 s"), (0.0334, "33.4 ms"), (0.00099999, "1.00 ms"), (45e-6, "45.0 µs"), (5e-9, "5.00 ns"), (7200, "7200 s"),
     (0, "0 ns"), (None, "")],
)  # fmt: skip
def test_times(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(4542.7 * 2**20, "4.44 GiB"), (1.43e3 * 2**20, "1.40 GiB"), (512, "512 B"), (2**40, "1.00 TiB"),
     (1023 * 2**20, "1020 MiB"), (float("nan"), "")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("tflops", "text"),
    [(612.3, "612 TFLOP/s"), (0.0484, "48.4 GFLOP/s"), (2e-5, "20.0 MFLOP/s"), (1237, "1240 TFLOP/s"), (None, "")],
)
def test_rates(tflops: float | None, text: str) -> None:
    assert rate(tflops) == text


@pytest.mark.parametrize(
    ("ratio", "as_times", "as_more"),
    [(1.031, "1.03x", "+3.1 %"), (4.4, "4.40x", "4.40x"), (37.34, "37.3x", "37.3x"), (1.0, "1.00x", "+0.0 %"),
     (0.912, "0.91x", "-8.8 %"), (9.996, "10.0x", "10.0x"), (None, "", "")],
)  # fmt: skip
def test_ratios(ratio: float | None, as_times: str, as_more: str) -> None:
    assert times(ratio) == as_times
    assert more(ratio) == as_more


def test_a_share() -> None:
    assert percent(0.6247) == "62.5 %"
    assert percent(0.6247, 0) == "62 %"
    assert percent(float("nan")) == percent(None) == ""


def test_a_column_has_one_unit() -> None:
    unit = unit_for(3.34, SECONDS)
    assert [unit.of(value, named=False) for value in (3.34, 0.0334, None)] == ["3.34", "0.0334", ""]
    assert unit_for(None, BYTES).name == "B"
