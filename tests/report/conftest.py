"""What is made once for all tests of reports, since it takes seconds."""

from __future__ import annotations

import pandas as pd
import pytest

from lcbench.report.frame import reported
from lcbench.runs.store import Sweep
from tests.report.made import big_sweep


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """512 cells: 483 good, 13 failed, 16 skipped. Nothing may be written into it."""
    return big_sweep(tmp_path_factory.mktemp("big"))


@pytest.fixture(scope="session")
def big_frame(big: Sweep) -> pd.DataFrame:
    """Its ``reported``; not to be changed in place."""
    return reported(big)
