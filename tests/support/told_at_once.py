"""A plugin of pytest for runs that may be cut off: `-p told_at_once`.

With `--every N` one test in N is run. Failures are written to the file that TOLD_AT_ONCE names as
they come. A process whose GPU a test left in an error, which no later call recovers from, ends
itself, and pytest-xdist starts another.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take `--every`."""
    parser.addoption("--every", type=int, default=1, help="run one test in so many")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the others out; each process has the same order."""
    items[:] = items[:: config.getoption("--every")]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a failure down, in the process that hears of all of them."""
    path = os.environ.get("TOLD_AT_ONCE")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a") as file:
            file.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a process that can test no more."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)
