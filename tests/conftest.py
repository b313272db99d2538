"""One thread, one seed and a quiet Hypothesis for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "nmflow", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nmflow")


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    """Tiny models are slower on many threads, and bit-equality needs one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
