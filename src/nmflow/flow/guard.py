"""A guard: a method of one optimizer, watched from outside, where hooks do not reach.

torch skips hooks of `torch.optim.Optimizer` when a method raises, and so do classes that override
the method without them. A guard is on the instance, as a scheduler's own wrapper is.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

Begin = Callable[[tuple, dict], None]
Done = Callable[[Any], Any]
Fail = Callable[[], None]


class Guard:
    """One method of one optimizer, until `remove`.

    Args:
        optimizer: the optimizer.
        name: the method's name.
        begin: called before it, with its arguments.
        done: called after it with its result; what this returns is the result for the caller.
        fail: called when it, or `done`, raises, before the exception goes on.
    """

    def __init__(
        self, optimizer: Optimizer, name: str, begin: Begin, done: Done, fail: Fail
    ) -> None:
        self._optimizer, self._name = optimizer, name
        self._live = True
        self._own = vars(optimizer).get(name)  # a scheduler's wrapper, or another guard
        # A compiler that traces the call skips our code, and traces the rest.
        around: Any = torch.compiler.disable
        begin, done, fail = around(begin), around(done), around(fail)

        @functools.wraps(self._own or getattr(type(optimizer), name))
        def guarded(this: Optimizer, *args: Any, **kwargs: Any) -> Any:
            # A copy of the optimizer may have this function too; the guard does not watch copies.
            mine = this is optimizer
            method = self._own if mine and self._own else getattr(type(this), name).__get__(this)
            if not mine or not self._live:
                return method(*args, **kwargs)
            begin(args, kwargs)
            try:
                return done(method(*args, **kwargs))
            except BaseException:
                fail()
                raise

        # A scheduler that comes later looks for a bound method.
        self._bound = types.MethodType(around(guarded, recursive=False), optimizer)
        setattr(optimizer, name, self._bound)

    def remove(self) -> None:
        """End it; if somebody has wrapped it since, it only passes calls on."""
        self._live = False
        if vars(self._optimizer).get(self._name) is not self._bound:
            return
        if self._own is None:
            delattr(self._optimizer, self._name)
        else:
            setattr(self._optimizer, self._name, self._own)


def overrides(optimizer: Optimizer, name: str) -> bool:
    """Whether an optimizer's class has its own version of a method of `Optimizer`."""
    return getattr(type(optimizer), name) is not getattr(Optimizer, name)
