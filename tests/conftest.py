from __future__ import annotations

from hypothesis import HealthCheck, settings

# Machines that run the tests are busy with other ranks; how long an example takes says nothing.
settings.register_profile("lcbench", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("lcbench")
