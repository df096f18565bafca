from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """Measuring a cell collects garbage several times, which need not visit again what the tests before have imported."""
    gc.collect()
    gc.freeze()
