"""Ctrl-C and SIGTERM: a run first saves a checkpoint; a second signal stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal ended the work. It is not an `Exception`, so that nobody handles it as a failure.

    Args:
        signum: the signal.
        where: how far the work got.
    """

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(signum, where)
        self.signum, self.where = signum, where

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects after the signal: 130 or 143."""
        return 128 + self.signum

    def __str__(self) -> str:
        where = f" {self.where}" if self.where else ""
        name = signal.Signals(self.signum).name
        return f"stopped by {name}{where}: run the same command again to continue"


class _Asked:
    """The signal that asked this process to stop, and whether work may continue to a save."""

    process = 0
    signum: int | None = None
    held = 0
    say: Callable[[], None] | None = None


_asked = _Asked()


def asked() -> int | None:
    """The signal that asked this process to stop, or None."""
    return _asked.signum


@contextlib.contextmanager
def watched(say: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn the signals into `Stopped`: at once, or inside `held` after a save.

    Only the main thread can do this; in others, nothing changes.

    Args:
        say: called in the signal handler if work continues to its next save.
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
    """Inside, the first signal is only noted, so that work can stop where it can resume."""
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
    """Report that work continues to its next save."""
    if _asked.say is not None:
        _asked.say()


def _handle(signum: int, frame: Any) -> None:
    if os.getpid() != _asked.process:
        # A forked data loader gets Ctrl-C too, while its batches are still needed.
        if signum != signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    again, _asked.signum = _asked.signum is not None, signum
    if again or not _asked.held:
        raise Stopped(signum)
    say()
