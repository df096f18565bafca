from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: threads of all on all cores would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Our Triton kernels run on a CPU by Triton's interpreter; it decides when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Several tests measure at once here, and look at no time.
os.environ.setdefault("LCBENCH_SHARE_MACHINE", "1")
# Machines that run the tests are busy with other ranks; how long an example takes says nothing.
settings.register_profile("lcbench", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("lcbench")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real MLflow server."""
    from tests.slurm.stage import Server

    made = Server(tmp_path_factory.mktemp("mlflow"))
    made.start()
    yield made
    made.kill()
