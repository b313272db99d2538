"""Numbers that a caller gives: the same values are refused everywhere, in the same words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nmflow
from nmflow.distill import Distiller
from nmflow.errors import NMFlowError

WHOLE: dict[str, tuple[int, Callable[[Any], object]]] = {
    "total_steps": (1, lambda v: _attach(total_steps=v)),
    "mask_interval": (1, lambda v: _attach(mask_interval=v)),
    "every": (1, lambda v: _attach().observe(lambda k, views: None, every=v)),
    "stairs": (0, lambda v: nmflow.MDGF("linear", stairs=v)),
    "shards": (1, lambda v: nmflow.memory(nn.Linear(4, 4), "1:4", include="*", shards=v)),
}
ABOVE: dict[str, Callable[[Any], object]] = {
    "scale": lambda v: nmflow.MDGF("linear", scale=v),
    "lr_scale": lambda v: nmflow.STE(lr_scale=v),
    "beta": lambda v: nmflow.MDGF("linear", beta=v),
    "tau": lambda v: nmflow.MaxQ(tau=v),
    "temperature": lambda v: Distiller(nn.Linear(4, 4), temperature=v),
}
FROM_0: dict[str, Callable[[Any], object]] = {
    "lam": lambda v: nmflow.SRSTE(lam=v),
    "pull": lambda v: nmflow.Settling(pull=v),
    "task": lambda v: Distiller(nn.Linear(4, 4), task=v),
    "hidden": lambda v: Distiller(nn.Linear(4, 4), hidden=v),
}
NO_NUMBERS = (True, "3", None, math.nan, math.inf, -math.inf, [1], 1j, torch.tensor(1))


def _attach(**how: Any) -> nmflow.Flow:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return nmflow.attach(model, optimizer, "ste", "1:4", include="*", **{"total_steps": 9, **how})


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name: str) -> None:
    least, use = WHOLE[name]
    use(least)
    use(least + 3)
    for wrong in (*NO_NUMBERS, least - 1, -7, 1.0, 2.5):
        with pytest.raises(NMFlowError, match=rf"^{name} is .*: give a whole number.*at least"):
            use(wrong)


@pytest.mark.parametrize("name", ABOVE)
def test_numbers_above_0(name: str) -> None:
    for right in (1, 0.5, 1e-9, np.float64(2)):
        ABOVE[name](right)
    wrong = [v for v in NO_NUMBERS if v is not None or name != "beta"]  # None solves β
    for value in (*wrong, 0, 0.0, -1, -1e-9):
        with pytest.raises(NMFlowError, match=rf"^{name} is .*: give a finite number above 0"):
            ABOVE[name](value)


@pytest.mark.parametrize("name", FROM_0)
def test_numbers_from_0(name: str) -> None:
    for right in (0, 0.0, 1, 0.5, np.float64(2)):
        FROM_0[name](right)
    for wrong in (*NO_NUMBERS, -1, -1e-9):
        with pytest.raises(NMFlowError, match=rf"^{name} is .*: give a finite number that is 0 or"):
            FROM_0[name](wrong)
