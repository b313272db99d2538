"""Thousands of mutated files: each is refused by an error of nmflow, or packed is dense.

The cases run in a process of their own, under a limit of memory and a limit of time for each; see
`mutate`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUTATE = Path(__file__).parents[1] / "support" / "mutate.py"


def fuzz(first: int, count: int) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(MUTATE), str(first), str(count)],
        capture_output=True, text=True, timeout=60 + 4 * count,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert not found["broken"], "\n\n".join(found["broken"][:5])
    said = found["said"]
    assert sum(said.values()) == count
    return said


def test_some_mutated_files() -> None:
    said = fuzz(0, 80)
    # A fuzz that never gets through tests nothing, and neither does one that always does.
    assert said["packed_case loaded"] > 5
    assert said["packed_case refused"] > 15
    assert said["packed_case state"] > 2
    assert said["audit_case audited"] > 2
    assert said["audit_case refused"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 16_000, 1000))
def test_thousands_of_mutated_files(first: int) -> None:
    fuzz(first, 1000)
