"""Ctrl-C and SIGTERM: a run in training saves a checkpoint first; a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the work; not an `Exception`, so that nothing takes it for a failure.

    Args:
        signum: the signal.
        where: how far the work was.
    """

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(signum, where)
        self.signum, self.where = signum, where

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 or 143."""
        return 128 + self.signum

    def __str__(self) -> str:
        where = f" {self.where}" if self.where else ""
        name = signal.Signals(self.signum).name
        return f"stopped by {name}{where}: run the same command again to continue"


class _Asked:
    """The signal that asked this process to stop, and whether its work may go on to a save."""

    process = 0
    signum: int | None = None
    held = 0
    say: Callable[[], None] | None = None


_asked = _Asked()


def asked() -> int | None:
    """The signal that asks this process to stop, if one does."""
    return _asked.signum


@contextlib.contextmanager
def watched(say: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn the signals into `Stopped`: at once, or where the work is `held`, when it has saved.

    Outside the main thread, which alone may, nothing is changed.

    Args:
        say: called in the signal's handler, where the work goes on to its next save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _asked.process, _asked.signum, _asked.say = os.getpid(), None, say
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.signum = _asked.say = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, the first signal is only noted, for the work to stop where it can be gone on from."""
    _asked.held += 1
    try:
        yield
    finally:
        _asked.held -= 1


def check(where: str = "") -> None:
    """Raise `Stopped` if a signal asked to stop."""
    if _asked.signum is not None:
        raise Stopped(_asked.signum, where)


def say() -> None:
    """Tell whoever watches that the work goes on to its next save."""
    if _asked.say is not None:
        _asked.say()


def _handle(signum: int, frame: Any) -> None:
    if os.getpid() != _asked.process:
        # A fork that loads data: Ctrl-C reaches it too, while batches are still wanted of it.
        if signum != signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    again, _asked.signum = _asked.signum is not None, signum
    if again or not _asked.held:
        raise Stopped(signum)
    say()
