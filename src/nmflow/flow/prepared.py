"""What a step that raised has already done, so that its repetition does not do it again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class Prepared:
    """The gradients that a rule has changed and the weights that were drawn, since the last step.

    A step that raises leaves both changed. Its repetition may find the same gradients, which the
    rule must not change again, or new ones. W must not be drawn again in either case.
    """

    def __init__(self) -> None:
        self._changed: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._drawn: set[str] = set()
        self.observed = False

    def clear(self) -> None:
        """Forget everything: a step was done, or a state was loaded."""
        self._changed.clear()
        self._drawn.clear()
        self.observed = False

    @property
    def is_clear(self) -> bool:
        """Whether no step has raised since the last one was done."""
        return not (self._changed or self._drawn or self.observed)

    @property
    def any_changed(self) -> bool:
        """Whether the rule has changed a gradient."""
        return bool(self._changed)

    @property
    def any_drawn(self) -> bool:
        """Whether a weight was drawn."""
        return bool(self._drawn)

    def changed(self, label: str, grad: Tensor) -> bool:
        """Whether the rule has changed this gradient for a target, and nobody wrote it since."""
        known, version = self._changed.get(label, (None, 0))
        return known is not None and known() is grad and grad._version == version

    def change(self, label: str, grad: Tensor) -> None:
        """Remember that the rule has changed the gradient for a target."""
        self._changed[label] = (weakref.ref(grad), grad._version)

    def drawn(self, label: str) -> bool:
        """Whether the weights of a target were drawn."""
        return label in self._drawn

    def draw(self, label: str) -> None:
        """Remember that the weights of a target were drawn."""
        self._drawn.add(label)

    def draw_all(self, labels: Iterable[str]) -> None:
        """Remember that the weights of many targets were drawn."""
        self._drawn.update(labels)
