"""The weights of one optimizer under a recipe: W̃ from W at step k, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError, WeightError
from nmflow.flow import gradients
from nmflow.flow.casts import forget_casts
from nmflow.flow.flags import Flags
from nmflow.flow.homes import Homes
from nmflow.flow.hosts import Groups
from nmflow.flow.observing import View
from nmflow.flow.paces import Paces
from nmflow.flow.plans import Plan
from nmflow.flow.prepared import Prepared
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import Kind, Run, kind_of
from nmflow.flow.together import Together
from nmflow.recipes.schedules import Stage

_FOREACH: Any = torch  # whose functions for many tensors it does not type


class Weights:
    """Slots that step together. Nothing here counts steps: every method takes k.

    Attributes:
        run: the recipe over its run.
        slots: the parameters.
        pruned: those of them that have dense weights beside the network's own: all, or none where
            the recipe does not prune.
        targets: the targets of all slots, in the same order.
        known: the kinds of target that there are.
        prepared: what a step that raised has already done.
        flags: questions to devices, whose answers come a step later.
        groups: the optimizer's groups that have the parameters.
        homes: the places of the parameters in the model.
        shrinks: whether the optimizer may step kept values alone.
        paces: how far steps go if the learning rate has a factor.
        together: operations on many of them at once.
        told: called with the run and k whenever W̃ of step k was written.
    """

    def __init__(self, run: Run, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        self.run, self.slots = run, slots
        self.pruned = slots if run.recipe.prunes else ()
        self.targets = [r.target for s in slots for r in s.regions]
        self.known = list(dict.fromkeys(map(kind_of, self.targets)))
        self.prepared = Prepared()
        self.told: list[Callable[[Run, int], None]] = []
        self.flags = Flags()
        self.groups = Groups(optimizer, slots)
        self.homes = Homes([(slot.home, slot.param) for slot in slots])
        self.shrinks = False
        self.paces = Paces(self.pruned, run.recipe.lr_scale, self.stages)
        self.together = Together(optimizer, self.pruned, self.groups, self.prepared)
        self._kinds: tuple[Run | None, int, dict[Kind, Stage]] = None, -1, {}
        self._stages: tuple[dict[Kind, Stage] | None, dict[str, Stage]] = None, {}

    def start(self) -> None:
        """Take the parameters as W."""
        for slot in self.pruned:
            slot.start(self.run.held_keys)

    def shrink(self) -> None:
        """Compress to kept values if the next step is on them alone."""
        shrunk = [slot.shrink() for slot in self.pruned] if self.shrinks else []
        if any(shrunk):
            self.together.gather()  # a bundle has whole weights

    def expand(self) -> None:
        """Expand the tensors in the optimizer's state to whole ones."""
        for slot in self.pruned:
            slot.expand()

    def enter(self, gathered: bool = False) -> None:
        """Put W into the parameters, for the optimizer's step.

        Args:
            gathered: whether nobody can have moved anything since `gather`.
        """
        together = self.together
        bundle = together.bundle if gathered else together.gather()
        if bundle is not None:
            bundle.enter()
        for slot in together.singles:
            slot.enter()

    def leave(self, stateless: bool) -> None:
        """Take W out of the parameters again; out of all of them, whatever one of them raises."""
        raised: list[FlowError] = []
        together = self.together
        odd = [] if together.bundle is None else together.bundle.leave()
        for slot in (*odd, *together.singles):
            try:
                if slot.stepping:
                    slot.leave(stateless)
            except FlowError as error:
                raised.append(error)
        if odd:
            together.gather()
        if raised:
            raise raised[0]

    def stages(self, k: int) -> dict[str, Stage]:
        """The stage of each target after `k` steps, by label."""
        kinds = self.kinds(k)
        if self._stages[0] is not kinds:
            self._stages = kinds, self.run.spread(self.targets, kinds)
        return self._stages[1]

    def kinds(self, k: int) -> dict[Kind, Stage]:
        """The stage of each kind of target after `k` steps."""
        run, at, _ = self._kinds
        if run is not self.run or at != k:
            self._kinds = self.run, k, self.run.kinds(self.known, k)
        return self._kinds[2]

    def plans(self, k: int) -> tuple[Plan, Plan] | None:
        """The launches before step `k + 1` and after it; None if weights go one by one."""
        held, reuse, hold = (
            self.has_masks(k),
            self.run.reuses(self.known, k + 1),
            self.run.holds(k + 1),
        )
        before = self.together.plan(self.kinds(k), held, False)
        after = self.together.plan(self.run.kinds(self.known, k + 1), reuse, hold)
        return None if before is None or after is None else (before, after)

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
        held, rest = self.has_masks(k), self.pruned
        if not (uphill and recipe.lam):
            rest = self.together.rule(k, self.kinds(k), held, recipe.lam, scale)
        stages = self.stages(k) if rest else {}
        for slot in rest:
            if slot.param.grad is None or slot.places is not None:
                continue
            if self.together.deltas is not None:
                raise FlowError(
                    f"'{slot.name}' has a gradient whose memory is ordered unlike the weight's, "
                    "so its rule would read δ as a number, which a CUDA graph cannot change: "
                    "leave .grad to backward(), or step without flow.graphed()"
                )
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
                    slot.refine(region, stage, held, part, lam, scale)
                elif stage.delta != 1.0 or stage.previous is not None:
                    slot.fade(region, stage, held, part)
                self.prepared.change(label, slot.param.grad)

    def draw(self, k: int, rates: Sequence[float | Tensor]) -> None:
        """Draw W to W̃ by the recipe's pull, where the optimizer will step, at rates by slot."""
        if not self.run.recipe.pull:
            return
        held, pull = self.has_masks(k), self.run.recipe.pull
        rest = set(map(id, self.together.draw(k, self.kinds(k), held, pull, rates)))
        if not rest:
            return
        stages = self.stages(k)
        alike: dict[float, list[tuple[Tensor, Tensor]]] = {}  # what one launch does, by amount
        for slot, lr in zip(self.pruned, rates, strict=True):
            if slot.param.grad is None or slot.places is not None or id(slot) not in rest:
                continue
            dense, shown = local(slot.dense), local(slot.param)
            for region in slot.regions:
                stage = stages[region.target.label]
                if stage.pattern is None or stage.delta == 1.0 or region.count == 0:
                    continue
                if self.prepared.drawn(region.target.label):
                    continue
                part, sparse = region.of(dense), region.of(shown)
                by_mask = (held and not stage.previous) or stage.gain != 1.0
                by_mask &= self.together.deltas is None  # W̃ has the δ that a graph is told
                kept = slot.masks(region, stage, held)[0] if by_mask else None
                if kept is None and not isinstance(lr, Tensor):
                    amount = min(1.0, lr * pull * stage.rate)
                    alike.setdefault(amount, []).append((part, sparse))
                else:
                    gradients.drawn(part, sparse, lr, pull * stage.rate, kept, stage.delta)
                self.prepared.draw(region.target.label)
        for amount, pairs in alike.items():
            parts, shown = map(list, zip(*pairs, strict=True))
            _FOREACH._foreach_lerp_(parts, shown, amount)

    def views(self, k: int, scale: Tensor | None) -> list[View]:
        """What an observer sees before step `k + 1`; `scale` as for the gradient rule."""
        stages, held = self.stages(k), self.has_masks(k)
        views = []
        for slot in self.slots:
            weight, shown = local(slot.weight), local(slot.param)
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
                views.append(View(target, region.of(weight), g, mask, stage, region.of(shown)))
        return views

    # -- W̃ from W ------------------------------------------------------------------------------

    def has_masks(self, k: int) -> bool:
        """Whether the masks of step `k` are in the state; otherwise W gives them."""
        return bool(self.pruned) and self.run.holds(k)

    def write(self, k: int, reuse: bool | None = None) -> None:
        """Write W̃ of step `k` into the parameters.

        Args:
            k: the optimizer steps done.
            reuse: whether to use the held masks; None: if they belong to step `k`.
        """
        reuse = self.has_masks(k) if reuse is None else reuse
        hold = self.run.holds(k)
        raised: list[Tensor] = []
        rest = self.together.write(k, self.kinds(k), reuse, hold, raised)
        stages = self.stages(k) if rest else {}
        for slot in rest:
            if self.run.recipe.form == "soft-threshold":
                slot.take_scales(stages)
            flags = slot.write(stages, reuse, hold)
            if slot.param.device.type != "cpu":
                raised += flags  # reading one would wait for the device
            elif not all(bool(f) for f in flags):
                for one in self.pruned:
                    one.rest()
                raise _not_finite(slot, k)
        self.flags.send(raised)
        forget_casts()
        self.tell(k)

    def tell(self, k: int) -> None:
        """Say that W̃ of step `k` was written."""
        for tell in self.told:
            tell(self.run, k)

    def read_finite(self, k: int) -> None:
        """Raise a `WeightError` if the last write on a device found a weight that is not finite."""
        if self.flags.raised:
            self.flags.raised = False
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
