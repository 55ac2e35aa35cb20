"""Settings that must be in place before the library is imported, and the hypothesis profiles."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

if not torch.cuda.is_available():
    import emulated  # imports kdkernels
    import interpreted

    emulated.install()
    interpreted.install()

QUIET = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
settings.register_profile("ci", derandomize=True, max_examples=12, database=None, **QUIET)
settings.register_profile("long", max_examples=500, **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup():
    """The same random numbers in whatever order the tests run."""
    torch.manual_seed(0)
