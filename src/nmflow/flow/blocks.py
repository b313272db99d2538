"""`with` blocks in which a network shows other weights than those of its step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from nmflow.errors import FlowError, StateError
from nmflow.flow.edits import DENSE, FINAL_MASKS
from nmflow.flow.stepper import Stepper


class Blocks:
    """Which block a flow is in: none, `final_masks()`, as often as it is nested, or `dense()`."""

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self.steppers = steppers
        self.name, self.depth = "", 0

    def check_none(self, what: str) -> None:
        """Raise a `FlowError` inside a block."""
        if self.name:
            raise FlowError(
                f"{what} was called inside flow.{self.name}: call it after the with block"
            )

    def open(self, name: str) -> None:
        """Enter a block: nothing steps in it, and nobody has written a weight before it."""
        self.check_none(name)
        for stepper in self.steppers:
            stepper.edits.check(stepper.k)
        for stepper in self.steppers:
            stepper.block = name
        self.name = name

    def close(self) -> None:
        """Leave the block."""
        self.name = ""
        for stepper in self.steppers:
            stepper.block = ""


class FinalMasks(contextlib.ContextDecorator, contextlib.AbstractContextManager):
    """Shows the final N:M weights; see `Flow.final_masks`."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @torch.no_grad()
    def __enter__(self) -> None:
        blocks = self._blocks
        if blocks.name != FINAL_MASKS:
            blocks.open(FINAL_MASKS)
            for stepper in blocks.steppers:
                stepper.edits.harden(stepper.k)
        blocks.depth += 1

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        blocks = self._blocks
        blocks.depth -= 1
        if blocks.depth:
            return
        blocks.close()
        found = [stepper.edits.soften(stepper.k) for stepper in blocks.steppers]
        if kind is not None:  # an exception from inside comes first; the next step reports a write
            return
        names, odd = ([x for some in both for x in some] for both in zip(*found, strict=True))
        if odd:
            raise odd[0]
        if names:
            raise StateError(
                f"{', '.join(map(repr, names[:3]))} was written inside flow.{FINAL_MASKS}, but "
                "training continues from the dense weights in the optimizer's state: call "
                "flow.sync() now to keep what was written, or load the optimizer's state with it"
            )


class Dense(contextlib.ContextDecorator, contextlib.AbstractContextManager):
    """Shows the dense weights, and adopts them at the end; see `Flow.dense`."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    @torch.no_grad()
    def __enter__(self) -> None:
        blocks = self._blocks
        blocks.open(DENSE)
        for stepper in blocks.steppers:
            stepper.edits.open()

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        blocks = self._blocks
        blocks.close()
        taken = False
        try:
            if kind is None:
                for stepper in blocks.steppers:
                    stepper.edits.check_edited(stepper.k)
                taken = True
        finally:
            for stepper in blocks.steppers:
                (stepper.edits.close if taken else stepper.edits.abandon)(stepper.k)
