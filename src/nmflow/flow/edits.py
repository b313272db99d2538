"""Between two steps: writes by others, the final masks, and the dense weights to be edited."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmflow.errors import StateError, WeightError
from nmflow.flow import writes
from nmflow.flow.casts import forget_casts
from nmflow.flow.marks import fingerprint
from nmflow.flow.sharding import bare, local
from nmflow.flow.slots import Slot
from nmflow.flow.weights import Weights
from nmflow.recipes.schedules import Stage

FINAL_MASKS, DENSE = "final_masks()", "dense()"
"""The `with` blocks of a flow, by name."""


Late = list[tuple[list[tuple[str, int]], Tensor]]
"""How many fingerprints each parameter has, by name, and which are unchanged, on a device."""


class Edits:
    """What the user may do to the weights of one optimizer between its steps.

    Nothing here counts steps: every method takes k.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._late: Late = []

    # -- writes by others ----------------------------------------------------------------------

    def check(self, k: int, wait: bool = True) -> None:
        """Raise if a parameter was replaced, or written by somebody else, since step `k`.

        Args:
            k: the optimizer steps done.
            wait: whether to wait for a device. Without it, a write there that changes neither
                torch's version nor the address (`p.data.copy_(x)`) is reported at the next check.

        Raises:
            FlowError: the model no longer has the parameter.
            StateError: it was written.
        """
        self._weights.homes.check()
        self._read_late(k)
        late: list[tuple[str, Tensor]] = []
        for slot in self._weights.pruned if wait else self._look_together():
            if not slot.moved():
                if not wait and waits(slot.param):
                    late.append((slot.name, fingerprint(bare(slot.param).detach()) == slot.prints))
                    continue
                if bool(slot.same()):
                    continue
            if self._written(slot, k) is not None:
                raise _was_written(slot, k)
        if late:
            self._tell_late([(n, len(x)) for n, x in late], torch.cat([x for _, x in late]))

    def _look_together(self) -> Sequence[Slot]:
        """Check many without waiting for their device; return the slots that are left."""
        weights, bundle = self._weights, self._weights.together.bundle
        if bundle is None or bundle.moved() or not waits(bundle.params[0]):
            return weights.pruned
        same = bundle.agreeing()
        if same is None:
            return weights.pruned
        self._tell_late(bundle.sizes, same)
        return weights.together.singles

    def check_replay(self, k: int, late: Late) -> None:
        """As `check`, before a CUDA graph is replayed, which looks at the values itself.

        Args:
            k: the optimizer steps done.
            late: what `taken_late` returned after the capture.
        """
        bundle = self._weights.together.bundle
        if bundle is None or bundle.moved():
            self.check(k)
        else:
            self._weights.homes.check()
            self._read_late(k)
            bundle.gather_prints()
        self._late = late

    def taken_late(self) -> Late:
        """Return what the next check would read, and forget it."""
        late, self._late = self._late, []
        return late

    def _tell_late(self, sizes: list[tuple[str, int]], same: Tensor) -> None:
        """Let the next check read which fingerprints of parameters are unchanged."""
        self._late.append((sizes, same))
        self._weights.flags.add(same.all())

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
            FlowError: the model no longer has a parameter.
            StateError: a parameter has another shape.
            WeightError: a NaN or an infinity was written.
        """
        self._weights.homes.check()
        for slot in self._weights.pruned:
            if self._written(slot, k) is not None:
                _check_finite(slot, k)

    def sync(self, k: int) -> None:
        """Adopt the written places as W, if their values are valid."""
        weights = self._weights
        stages, held = weights.stages(k), weights.has_masks(k)
        for slot in weights.pruned:
            places = self._written(slot, k)
            if places is not None:
                writes.take(slot, places)
                if held:
                    writes.retake(slot, stages, places)
                slot.write(stages, held, hold=False)
        forget_casts()

    def forget(self) -> None:
        """Forget the last check on a device: a loaded state replaced what it checked."""
        self._late = []
        self._weights.flags.read()
        self._weights.flags.raised = False

    def _written(self, slot: Slot, k: int) -> Tensor | None:
        return writes.written(slot, self._weights.stages(k), self._weights.has_masks(k))

    def _read_late(self, k: int) -> None:
        late, self._late = self._late, []
        self._weights.flags.read()
        if not self._weights.flags.raised:
            return
        for sizes, same in late:
            parts = same.split([size for _, size in sizes])
            for (name, _), part in zip(sizes, parts, strict=True):
                if not bool(part.all()):
                    raise StateError(
                        f"'{name}' was written before step {k} in a way that torch does not count "
                        "(such as `.data`), and the step continued from the dense weights in the "
                        "optimizer's state: write inside `with flow.dense():`, or call "
                        "flow.sync() after the write"
                    )

    # -- the final masks -----------------------------------------------------------------------

    def harden(self, k: int) -> None:
        """Write the final N:M weights into the parameters."""
        final, held = self._final(k)
        for slot in self._weights.pruned:
            slot.write(final, held, hold=False)
        forget_casts()

    def check_final(self, k: int) -> None:
        """Raise a `StateError` if somebody wrote a parameter that shows its final weights."""
        final, held = self._final(k)
        for slot in self._weights.pruned:
            if writes.written(slot, final, held) is not None:
                raise _was_written(slot, k)

    def soften(self, k: int) -> tuple[list[str], list[StateError]]:
        """Write W̃ of step `k` into the parameters again.

        Returns:
            The names of the parameters that somebody wrote meanwhile. They keep what was written,
            with W̃ around it, so that `sync` can adopt it. And an error for each that cannot hold
            W̃ any longer, which is left as it is.
        """
        weights = self._weights
        final, held = self._final(k)
        stages, has = weights.stages(k), weights.has_masks(k)
        found: list[str] = []
        odd: list[StateError] = []
        for slot in weights.pruned:
            try:
                places = writes.written(slot, final, held)
            except StateError as error:
                odd.append(error)
                continue
            if places is None:
                slot.write(stages, has, hold=False)
            else:
                writes.put_back(slot, stages, has, places)
                if writes.written(slot, stages, has) is not None:
                    found.append(slot.name)
        forget_casts()
        return found, odd

    def _final(self, k: int) -> tuple[dict[str, Stage], bool]:
        weights = self._weights
        final = {t.label: weights.run.final(t) for t in weights.targets}
        now = weights.stages(k)
        # A held mask has the current pattern; if that is already the final one, the mask stays.
        return final, weights.has_masks(k) and all(now[t].pattern == final[t].pattern for t in now)

    # -- the dense weights ---------------------------------------------------------------------

    def open(self) -> None:
        """Write W into the parameters."""
        for slot in self._weights.pruned:
            slot.rest()
        forget_casts()

    def check_edited(self, k: int) -> None:
        """Raise unless what the parameters hold can be W; the errors of `check_writes`."""
        self._weights.homes.check()
        for slot in self._weights.pruned:
            writes.check_kind(slot)
            _check_finite(slot, k)

    def close(self, k: int) -> None:
        """Adopt everything that the parameters hold as W, and write W̃ of step `k` from it.

        Held masks stay, unless they are due at this step or the weight was loaded whole.
        """
        weights = self._weights
        stages, hold = weights.stages(k), weights.run.holds(k)
        reuse = weights.run.reuses(weights.known, k)
        for slot in weights.pruned:
            loaded = slot.loaded
            writes.take(slot, None)
            slot.write(stages, reuse and not loaded, hold)
        forget_casts()

    def abandon(self, k: int) -> None:
        """Write W̃ of step `k` from the previous W, whatever the parameters hold."""
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
        f"'{slot.name}' was written since step {k}, but training continues from the dense weights "
        "in the optimizer's state: call flow.sync() after the write to adopt the new weights as "
        "dense ones, write inside `with flow.dense():`, or load the optimizer's state with them"
    )
