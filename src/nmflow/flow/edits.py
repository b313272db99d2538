"""Between two steps: writes by others, the final masks, and the dense weights to be edited."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.errors import StateError, WeightError
from nmflow.flow import writes
from nmflow.flow.flags import Flags
from nmflow.flow.marks import fingerprints
from nmflow.flow.sharding import bare, local
from nmflow.flow.slots import Slot
from nmflow.flow.weights import Weights
from nmflow.recipes.schedules import Stage

FINAL_MASKS, DENSE = "final_masks()", "dense()"
"""The `with` blocks of a flow, by name."""


class Edits:
    """What may be done to the weights of one optimizer while it does not step.

    Nothing here counts: every method is told k.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights, self._flags = weights, Flags()
        self._late: tuple[list[tuple[str, int]], Tensor] | None = None

    # -- writes by others ----------------------------------------------------------------------

    def check(self, k: int, wait: bool = True) -> None:
        """Raise if a parameter was replaced, or written by somebody else, since step `k`.

        Args:
            k: the optimizer steps done.
            wait: whether to wait for a device. Without it, a write there that changes neither
                torch's version nor the address (`p.data.copy_(x)`) is told at the next check.

        Raises:
            FlowError: the model does not have the parameter any more.
            StateError: it was written.
        """
        for slot in self._weights.slots:
            slot.home.check(slot.param)
        self._read_late(k)
        late: list[Slot] = []
        for slot in self._weights.pruned:
            if not slot.moved():
                if not wait and waits(slot.param):
                    late.append(slot)
                    continue
                if bool(slot.same()):
                    continue
            if self._written(slot, k) is not None:
                raise _was_written(slot, k)
        if late:
            # In few launches, which cost more here than what they compute.
            now = fingerprints([bare(slot.param) for slot in late])
            same = torch.cat([slot.prints for slot in late]) == torch.cat(now)
            self._late = [(s.name, len(x)) for s, x in zip(late, now, strict=True)], same
            self._flags.send([same.all()])

    def untouched(self) -> bool:
        """Whether nobody has written a parameter since it was seen; no device is waited for."""
        return not any(
            slot.moved() or not (waits(slot.param) or bool(slot.same()))
            for slot in self._weights.pruned
        )

    def shown(self, k: int) -> bool:
        """Whether the parameters hold W̃ of step `k`, whoever wrote them."""
        weights = self._weights
        stages, held = weights.stages(k), weights.has_masks(k)
        return all(
            torch.equal(local(slot.param), writes.shown(slot, stages, held))
            for slot in weights.pruned
        )

    def check_finite(self, k: int) -> None:
        """Raise a `WeightError` if a dense weight is not finite."""
        self._weights.check_finite(k)

    def check_writes(self, k: int) -> None:
        """Raise unless what somebody wrote can be W.

        Raises:
            FlowError: the model does not have a parameter any more.
            StateError: a parameter has another shape.
            WeightError: a NaN or an infinity was written.
        """
        for slot in self._weights.slots:
            slot.home.check(slot.param)
        for slot in self._weights.pruned:
            if self._written(slot, k) is not None:
                _check_finite(slot, k)

    def sync(self, k: int) -> None:
        """Take the places that somebody wrote as W, where they can be."""
        weights = self._weights
        stages, held = weights.stages(k), weights.has_masks(k)
        for slot in weights.pruned:
            places = self._written(slot, k)
            if places is not None:
                writes.take(slot, places)
                if held:
                    writes.retake(slot, stages, places)
                slot.write(stages, held, hold=False)

    def forget(self) -> None:
        """Forget the last check on a device: a state was loaded over what it was about."""
        self._late = None
        self._flags.read()

    def _written(self, slot: Slot, k: int) -> Tensor | None:
        return writes.written(slot, self._weights.stages(k), self._weights.has_masks(k))

    def _read_late(self, k: int) -> None:
        late, self._late = self._late, None
        if late is None or self._flags.read():
            return
        sizes, same = late
        parts = same.split([size for _, size in sizes])
        name = next(n for (n, _), p in zip(sizes, parts, strict=True) if not bool(p.all()))
        raise StateError(
            f"'{name}' was written before step {k} where torch does not count it, as by `.data`, "
            "and the step went on from the dense weights in the optimizer's state: write inside "
            "`with flow.dense():`, or call flow.sync() after the write"
        )

    # -- the final masks -----------------------------------------------------------------------

    def harden(self, k: int) -> None:
        """Write the final N:M weights into the parameters."""
        final, held = self._final(k)
        for slot in self._weights.pruned:
            slot.write(final, held, hold=False)

    def check_final(self, k: int) -> None:
        """Raise a `StateError` if somebody wrote a parameter that shows its final weights."""
        final, held = self._final(k)
        for slot in self._weights.pruned:
            if writes.written(slot, final, held) is not None:
                raise _was_written(slot, k)

    def soften(self, k: int) -> list[str]:
        """Write W̃ of step `k` into the parameters again.

        Returns:
            The names of the parameters that somebody wrote meanwhile. They keep what was written,
            with W̃ around it, so that `sync` takes it.
        """
        weights = self._weights
        final, held = self._final(k)
        stages, has = weights.stages(k), weights.has_masks(k)
        found = []
        for slot in weights.pruned:
            places = writes.written(slot, final, held)
            if places is None:
                slot.write(stages, has, hold=False)
            else:
                writes.put_back(slot, stages, has, places)
                if writes.written(slot, stages, has) is not None:
                    found.append(slot.name)
        return found

    def _final(self, k: int) -> tuple[dict[str, Stage], bool]:
        weights = self._weights
        final = {t.label: weights.run.final(t) for t in weights.targets}
        now = weights.stages(k)
        # A held mask is of the current pattern; where that is the final one already, it stays.
        return final, weights.has_masks(k) and all(now[t].pattern == final[t].pattern for t in now)

    # -- the dense weights ---------------------------------------------------------------------

    def open(self) -> None:
        """Write W into the parameters."""
        for slot in self._weights.pruned:
            slot.rest()

    def check_edited(self, k: int) -> None:
        """Raise unless what the parameters hold can be W; the errors of `check_writes`."""
        for slot in self._weights.slots:
            slot.home.check(slot.param)
        for slot in self._weights.pruned:
            writes.check_kind(slot)
            _check_finite(slot, k)

    def close(self, k: int) -> None:
        """Take all that the parameters hold as W, and write W̃ of step `k` from it.

        Masks that are held stay, unless they are due at this step or the weight was loaded whole.
        """
        weights = self._weights
        stages, hold = weights.stages(k), weights.run.holds(k)
        reuse = weights.run.reuses(weights.targets, k)
        for slot in weights.pruned:
            loaded = slot.loaded
            writes.take(slot, None)
            slot.write(stages, reuse and not loaded, hold)

    def abandon(self, k: int) -> None:
        """Write W̃ of step `k` from the W that there was, whatever the parameters hold."""
        for slot in self._weights.pruned:
            writes.mend_kind(slot)
        self._weights.write(k)


def waits(tensor: Tensor) -> bool:
    """Whether reading a value of the tensor would wait for a device."""
    return tensor.device.type != "cpu"


def _check_finite(slot: Slot, k: int) -> None:
    if not bool(torch.isfinite(local(slot.param)).all()):
        raise WeightError(
            f"'{slot.name}' was given a NaN or an infinity after step {k}, so it has no mask: "
            "write finite values, or load the optimizer's state to go back"
        )


def _was_written(slot: Slot, k: int) -> StateError:
    return StateError(
        f"'{slot.name}' was written since step {k}, but training goes on from the dense weights in "
        "the optimizer's state: call flow.sync() after the write to take the new weights as dense "
        "ones, write inside `with flow.dense():`, or load the optimizer's state with them"
    )
