"""What an observer of a flow sees before each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nmflow.recipes.schedules import Stage
from nmflow.select.target import Target


class View(NamedTuple):
    """One target, before an optimizer step.

    Attributes:
        target: the target.
        weight: its dense weights W, this rank's rows of the target.
        grad: the gradient g = ∂L/∂W̃, unscaled and before the recipe's rule; None if there is none.
        mask: the kept weights under the current pattern; under the final one in the dense phase.
        stage: its stage.
        shown: the sparse weights W̃, as the forward pass saw them.
    """

    target: Target
    weight: Tensor
    grad: Tensor | None
    mask: Tensor
    stage: Stage
    shown: Tensor


Observer = Callable[[int, list[View]], None]


@dataclass(frozen=True, eq=False)
class Observation:
    """A running observation of a flow."""

    observer: Observer
    every: int
    _all: list[Observation]

    def remove(self) -> None:
        """End it; a second call does nothing."""
        if self in self._all:
            self._all.remove(self)
