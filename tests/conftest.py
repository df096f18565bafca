from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Our Triton kernels run on a CPU by Triton's interpreter; it decides when a kernel is defined.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Machines that run the tests are busy with other ranks; how long an example takes says nothing.
settings.register_profile("lcbench", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("lcbench")
