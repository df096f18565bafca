"""What is made once for all tests of reports, since it takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pandas as pd
import pytest
from filelock import FileLock

from lcbench.report.frame import reported
from lcbench.runs.store import Sweep
from tests.browser import one_chromium
from tests.report.made import big_sweep


@pytest.fixture(scope="module", autouse=True)
def _one_chromium() -> Iterator[None]:
    """To start Chromium takes longer than most of what tests look at in it."""
    with one_chromium():
        yield


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """512 cells: 483 good, 13 failed, 16 skipped. Nothing may be written into it: all processes of a run of tests have the same."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "big"
    with FileLock(f"{root}.lock"):
        whole = Sweep(root, "big")
        if not whole.exists():
            made = big_sweep(base / "made")
            made.root.rename(root)
    return whole


@pytest.fixture(scope="session")
def big_frame(big: Sweep) -> pd.DataFrame:
    """Its ``reported``; not to be changed in place."""
    return reported(big)
