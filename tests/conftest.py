"""One thread, one seed and a quiet Hypothesis for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenisers are learnt anew, and streams end at once."""
    monkeypatch.setenv("NMFLOW_CACHE", str(tmp_path / "cache"))
    # `datasets` waits 5 s for threads of Arrow's whenever a stream is left before its end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
