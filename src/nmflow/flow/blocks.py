"""`with` blocks in which a network shows other weights than those of its step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from nmflow.errors import FlowError, StateError
from nmflow.flow.stepper import Stepper

FINAL_MASKS, DENSE = "final_masks()", "dense()"


class Blocks:
    """Which block a flow is in: none, `final_masks()`, as often as it is nested, or `dense()`."""

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self.steppers = steppers
        self.name, self.depth = "", 0

    def check_none(self, what: str) -> None:
        """Raise a `FlowError` inside a block."""
        if self.name:
            raise FlowError(f"{what} was called inside {self.name}: call it after the with block")


class FinalMasks(contextlib.ContextDecorator):
    """Shows the final N:M weights; see `Flow.final_masks`."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        blocks = self._blocks
        if blocks.name != FINAL_MASKS:
            blocks.check_none(FINAL_MASKS)
            for stepper in blocks.steppers:
                stepper.check_untouched()
            blocks.name = FINAL_MASKS
            for stepper in blocks.steppers:
                stepper.harden(FINAL_MASKS)
        blocks.depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        blocks = self._blocks
        blocks.depth -= 1
        if blocks.depth:
            return
        blocks.name = ""
        names = [name for stepper in blocks.steppers for name in stepper.soften()]
        # What raised inside comes first: the next step tells of the write.
        if names and kind is None:
            raise StateError(
                f"{', '.join(map(repr, names[:3]))} was written inside {FINAL_MASKS}, so that it "
                "shows neither W nor what training goes on from: call flow.sync() to take what "
                "was written as dense weights, or load the optimizer's state with it"
            )


class Dense(contextlib.ContextDecorator):
    """Shows the dense weights, and takes them back; see `Flow.dense`."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        blocks = self._blocks
        blocks.check_none(DENSE)
        for stepper in blocks.steppers:
            stepper.check_untouched()
        blocks.name = DENSE
        for stepper in blocks.steppers:
            stepper.open(DENSE)

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        blocks = self._blocks
        blocks.name = ""
        taken = False
        try:
            if kind is None:
                for stepper in blocks.steppers:
                    stepper.check_edited()
                taken = True
        finally:
            for stepper in blocks.steppers:
                stepper.close() if taken else stepper.abandon()
