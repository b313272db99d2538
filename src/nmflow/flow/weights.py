"""The weights of one optimizer under a recipe: W̃ from W at step k, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import FlowError, WeightError
from nmflow.flow import gradients
from nmflow.flow.flags import Flags
from nmflow.flow.marks import fingerprints
from nmflow.flow.observing import View
from nmflow.flow.prepared import Prepared
from nmflow.flow.sharding import bare, local
from nmflow.flow.slot_masks import Later
from nmflow.flow.slots import Slot
from nmflow.flow.state import Run
from nmflow.masks import project_all
from nmflow.recipes.schedules import Stage

_FOREACH: Any = torch  # whose functions for many tensors it does not type


class Weights:
    """Slots that step together. Nothing here counts: every method is told k.

    Attributes:
        run: the recipe over its run.
        slots: the parameters.
        pruned: those of them that have dense weights beside the network's own: all, or none where
            the recipe does not prune.
        targets: the targets of all slots, in the same order.
        told: called with the run and k whenever W̃ of step k was written.
    """

    def __init__(self, run: Run, slots: Sequence[Slot]) -> None:
        self.run, self.slots = run, slots
        self.pruned = slots if run.recipe.prunes else ()
        self.targets = [r.target for s in slots for r in s.regions]
        self.prepared = Prepared()
        self.told: list[Callable[[Run, int], None]] = []
        self._flags = Flags()
        self._stages: tuple[Run | None, int, dict[str, Stage]] = None, 0, {}
        self._before: dict[int, Tensor] = {}

    def start(self) -> None:
        """Take the parameters as W."""
        for slot in self.pruned:
            slot.start(self.run.held_keys)

    def shrink(self) -> None:
        """Take kept values together where the step that begins is on them alone."""
        for slot in self.pruned:
            slot.shrink()

    def expand(self) -> None:
        """Have whole tensors in the optimizer's state."""
        for slot in self.pruned:
            slot.expand()

    def enter(self) -> None:
        """Put W into the parameters, for the optimizer's step."""
        for slot in self.pruned:
            slot.enter()

    def leave(self, stateless: bool) -> None:
        """Take W out of the parameters again; out of all of them, whatever one of them raises."""
        raised: list[FlowError] = []
        for slot in self.slots:
            try:
                if slot.stepping:
                    slot.leave(stateless)
            except FlowError as error:
                raised.append(error)
        if raised:
            raise raised[0]

    def stages(self, k: int) -> dict[str, Stage]:
        """The stage of each target after `k` steps, by label."""
        run, at, _ = self._stages
        if run is not self.run or at != k:
            self._stages = self.run, k, self.run.stages(self.targets, k)
        return self._stages[2]

    # -- before a step -------------------------------------------------------------------------

    def apply_gradient_rule(self, k: int, scale: Tensor | None, uphill: set[int]) -> None:
        """Change the gradients by the recipe's rule.

        Args:
            k: the optimizer steps done.
            scale: the loss scale that is still in the gradients.
            uphill: the ids of parameters whose gradient the optimizer negates, since it maximizes;
                λ draws weights to 0 all the same.
        """
        recipe = self.run.recipe
        if recipe.gradient != "masked" and not recipe.lam:
            return
        stages, held = self.stages(k), self.has_masks(k)
        later: Later = []
        for slot in self.pruned:
            if slot.param.grad is None or slot.places is not None:
                continue
            if slot.param.grad.is_sparse:
                raise FlowError(
                    f"'{slot.name}' has a sparse gradient, which the rule of {recipe.name} cannot "
                    "change: build the embedding with sparse=False"
                )
            g, lam = local(slot.param.grad), recipe.lam
            lam = -lam if id(slot.param) in uphill else lam
            for region in slot.regions:
                label = region.target.label
                stage, part = stages[label], region.of(g)
                if stage.pattern is None or region.count == 0:
                    continue
                if self.prepared.changed(label, slot.param.grad):
                    continue
                if lam:
                    slot.refine(region, stage, held, part, lam, scale, later)
                elif stage.delta != 1.0 or stage.previous is not None:
                    slot.fade(region, stage, held, part, later)
                self.prepared.change(label, slot.param.grad)
        project_all(later)

    def draw(self, k: int, rates: Mapping[int, float | Tensor]) -> None:
        """Draw W to W̃ by the recipe's pull, where the optimizer will step, at rates by id."""
        if not self.run.recipe.pull:
            return
        stages, held = self.stages(k), self.has_masks(k)
        alike: dict[float, list[tuple[Tensor, Tensor]]] = {}  # what one launch does, by amount
        for slot in self.pruned:
            if slot.param.grad is None or slot.places is not None:
                continue
            dense, shown, lr = local(slot.dense), local(slot.param), rates[id(slot.param)]
            for region in slot.regions:
                stage = stages[region.target.label]
                if stage.pattern is None or stage.delta == 1.0 or region.count == 0:
                    continue
                if self.prepared.drawn(region.target.label):
                    continue
                part, sparse = region.of(dense), region.of(shown)
                by_mask = (held and not stage.previous) or stage.gain != 1.0
                kept = slot.masks(region, stage, held)[0] if by_mask else None
                pull = self.run.recipe.pull * stage.rate
                if kept is None and not isinstance(lr, Tensor):
                    alike.setdefault(min(1.0, lr * pull), []).append((part, sparse))
                else:
                    gradients.drawn(part, sparse, lr, pull, kept, stage.delta)
                self.prepared.draw(region.target.label)
        for amount, pairs in alike.items():
            parts, shown = map(list, zip(*pairs, strict=True))
            _FOREACH._foreach_lerp_(parts, shown, amount)

    def remember(self, k: int) -> None:
        """Before the optimizer's step: keep W where its learning rate has a factor."""
        if self.run.recipe.lr_scale == 1.0:
            return
        stages = self.stages(k)
        for slot in self.pruned:
            rated = any(stages[r.target.label].rate != 1.0 for r in slot.regions)
            if rated and slot.param.grad is not None:
                self._before[id(slot)] = local(slot.dense).clone()

    def rescale(self, k: int) -> None:
        """After the step: go on from W before it by so many times the way that it went."""
        stages = self.stages(k) if self._before else {}
        for slot in self.slots:
            before = self._before.get(id(slot))
            if before is None:
                continue
            for region in slot.regions:
                w, rate = region.of(local(slot.dense)), stages[region.target.label].rate
                if rate != 1.0 and region.count:
                    w.copy_(torch.lerp(region.of(before), w, rate))
        self._before.clear()

    def forget(self) -> None:
        """The step was broken off: what was kept for it is of no use."""
        self._before.clear()

    def views(self, k: int, scale: Tensor | None) -> list[View]:
        """What an observer sees before step `k + 1`; `scale` as for the gradient rule."""
        stages, held = self.stages(k), self.has_masks(k)
        views = []
        for slot in self.slots:
            weight = local(slot.weight)
            grad = None if slot.param.grad is None else local(slot.param.grad)
            if grad is not None and scale is not None:
                grad = grad / scale.to(grad.device)
            for region in slot.regions:
                stage, target = stages[region.target.label], region.target
                if stage.pattern is None:
                    mask = slot.chosen(region, region.of(weight), target.pattern)
                else:
                    mask, _ = slot.masks(region, stage, held)
                g = None if grad is None else region.of(grad)
                views.append(View(target, region.of(weight), g, mask, stage))
        return views

    # -- W̃ from W ------------------------------------------------------------------------------

    def has_masks(self, k: int) -> bool:
        """Whether the masks of step `k` are in the state rather than taken from W."""
        return bool(self.pruned) and self.run.holds(k)

    def write(self, k: int, reuse: bool | None = None) -> None:
        """Write W̃ of step `k` into the parameters.

        Args:
            k: the optimizer steps done.
            reuse: whether to mask by the masks that are held; None says: if they are of step `k`.
        """
        reuse = self.has_masks(k) if reuse is None else reuse
        stages, hold = self.stages(k), self.run.holds(k)
        raised: list[Tensor] = []
        later: Later = []  # what one launch does for all
        waiting: list[Slot] = []  # those that it writes
        for slot in self.pruned:
            if self.run.recipe.form == "soft-threshold":
                slot.take_scales(stages)
            before = len(later)
            flags = slot.write(stages, reuse, hold, later)
            if len(later) > before:
                waiting.append(slot)
            if slot.param.device.type != "cpu":
                raised += flags  # reading one would wait for the device
            elif not all(bool(f) for f in flags):
                for one in self.pruned:
                    one.rest()
                raise _not_finite(slot, k)
        raised += project_all(later)
        prints = fingerprints([bare(slot.param) for slot in waiting])
        for slot, known in zip(waiting, prints, strict=True):
            slot.wrote(known)
        self._flags.send(raised)
        for tell in self.told:
            tell(self.run, k)

    def read_finite(self, k: int) -> None:
        """Raise a `WeightError` if the last write on a device met a weight that is not finite."""
        if not self._flags.read():
            self.check_finite(k)

    def check_finite(self, k: int) -> None:
        """Raise a `WeightError` that names the first weight that is not finite."""
        for slot in self.pruned:
            if not bool(torch.isfinite(local(slot.dense)).all()):
                raise _not_finite(slot, k)


def _not_finite(slot: Slot, k: int) -> WeightError:
    return WeightError(
        f"'{slot.name}' holds a NaN or an infinity after step {k}, so it has no mask: resume from "
        "an earlier state, with a lower learning rate or with gradient clipping"
    )
