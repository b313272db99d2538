"""Numbers that a caller gives: what counts as one, and one wording for those that do not fit."""

from __future__ import annotations

import math
from typing import TypeGuard

from nmflow.errors import NMFlowError

Error = type[NMFlowError]


def is_whole(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is an int of at least `least`; True and False are no numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite int or float; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -math.inf < value < math.inf


def check_whole(name: str, value: object, error: Error, least: int = 0, of: str = "") -> None:
    """Raise `error` unless a value is a whole number of at least `least`.

    Args:
        name: the parameter.
        value: what the caller gave.
        error: the class of the error.
        least: the smallest number that fits.
        of: what is counted, such as `" of steps"`.
    """
    if not is_whole(value, least):
        raise error(f"{name} is {value!r}: give a whole number{of}, at least {least}")


def check_positive(name: str, value: object, error: Error, unit: str = "") -> None:
    """Raise `error` unless a value is finite and above 0; `unit` ends the sentence."""
    if not (is_finite(value) and value > 0):
        raise error(f"{name} is {value!r}: give a finite number above 0{unit}")


def check_not_negative(name: str, value: object, error: Error) -> None:
    """Raise `error` unless a value is finite and 0 or more."""
    if not (is_finite(value) and value >= 0):
        raise error(f"{name} is {value!r}: give a finite number that is 0 or more")
