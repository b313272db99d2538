"""The weights of one optimizer under a recipe: W̃ from W at step k, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError, WeightError
from nmflow.flow import gradients
from nmflow.flow.bundle import Bundle
from nmflow.flow.flags import Flags
from nmflow.flow.homes import Homes
from nmflow.flow.hosts import Groups
from nmflow.flow.observing import View
from nmflow.flow.plans import Plan, Plans, Share, addresses
from nmflow.flow.prepared import Prepared
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import Kind, Run, kind_of
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
        known: the kinds of target that there are.
        prepared: what a step that raised has done already.
        flags: what devices are asked, and answer a step later.
        groups: the optimizer's groups that have the parameters.
        homes: the places of the parameters in the model.
        deltas: while a CUDA graph is captured, where each step's δ of each kind is; else None.
        shrinks: whether steps may be on kept values alone.
        bundle: the slots that are stepped as one; None where there are none.
        singles: the others.
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
        self.deltas: Mapping[tuple[int, Kind], Tensor] | None = None
        self.bundle: Bundle | None = None
        self.singles: Sequence[Slot] = self.pruned
        self._optimizer = optimizer
        self._plans: Plans | None = None
        self._kinds: tuple[Run | None, int, dict[Kind, Stage]] = None, -1, {}
        self._stages: tuple[dict[Kind, Stage] | None, dict[str, Stage]] = None, {}
        self._before: dict[int, Tensor] = {}

    def gather(self) -> Bundle | None:
        """The weights that are stepped as one, where they are as they were, or anew."""
        if self.bundle is not None and self.bundle.holds():
            return self.bundle
        self.bundle, self.singles, self._plans = None, self.pruned, None
        fit = [slot for slot in self.pruned if Bundle.fits(slot)]
        if fit:
            own = {id(slot) for slot in fit}
            self.bundle = Bundle(fit, self._optimizer)
            self.singles = [slot for slot in self.pruned if id(slot) not in own]
            self._plans = Plans(self.bundle, self.slots)
        return self.bundle

    def start(self) -> None:
        """Take the parameters as W."""
        for slot in self.pruned:
            slot.start(self.run.held_keys)

    def shrink(self) -> None:
        """Take kept values together where the step that begins is on them alone."""
        shrunk = [slot.shrink() for slot in self.pruned] if self.shrinks else []
        if any(shrunk):
            self.gather()  # a bundle has whole weights

    def expand(self) -> None:
        """Have whole tensors in the optimizer's state."""
        for slot in self.pruned:
            slot.expand()

    def enter(self, gathered: bool = False) -> None:
        """Put W into the parameters, for the optimizer's step.

        Args:
            gathered: whether nobody can have moved anything since `gather`.
        """
        bundle = self.bundle if gathered else self.gather()
        if bundle is not None:
            bundle.enter()
        for slot in self.singles:
            slot.enter()

    def leave(self, stateless: bool) -> None:
        """Take W out of the parameters again; out of all of them, whatever one of them raises."""
        raised: list[FlowError] = []
        odd = [] if self.bundle is None else self.bundle.leave()
        for slot in (*odd, *self.singles):
            try:
                if slot.stepping:
                    slot.leave(stateless)
            except FlowError as error:
                raised.append(error)
        if odd:
            self.gather()
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

    def holding(self, k: int) -> tuple[bool, bool, bool]:
        """Whether masks are held before step `k + 1`, stay in it, and are held after it."""
        return self.has_masks(k), self.run.reuses(self.known, k + 1), self.run.holds(k + 1)

    def plans(self, k: int) -> tuple[Plan, Plan] | None:
        """What is launched before step `k + 1` and after it; None where weights go one by one."""
        bundle = self.gather()
        if bundle is None or self._plans is None or bundle.prints is None or self.singles:
            return None
        held, reuse, hold = self.holding(k)
        before = self._plans.of(self.kinds(k), held, False)
        after = self._plans.of(self.run.kinds(self.known, k + 1), reuse, hold)
        return None if before.rest or after.rest else (before, after)

    def _delta(self, share: Share, k: int) -> float | Tensor:
        """δ of a launch at step `k`; where a CUDA graph finds it, while one is captured."""
        if self.deltas is None:
            return self.kinds(k)[share.kind].delta
        return self.deltas[k, share.kind]

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
        rest = self._rule_together(k, scale) if not uphill else self.pruned
        stages, held = self.stages(k) if rest else {}, self.has_masks(k)
        for slot in rest:
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
                    slot.refine(region, stage, held, part, lam, scale)
                elif stage.delta != 1.0 or stage.previous is not None:
                    slot.fade(region, stage, held, part)
                self.prepared.change(label, slot.param.grad)

    def _rule_together(self, k: int, scale: Tensor | None) -> Sequence[Slot]:
        """The rule in one launch where that can be; the slots that are left."""
        bundle = self.bundle
        if bundle is None or self._plans is None or self.prepared.any_changed:
            return self.pruned
        grads = [param.grad for param in bundle.params]
        stages, held, lam = self.kinds(k), self.has_masks(k), self.run.recipe.lam
        plan = self._plan(grads, stages, held)
        given = [bundle.params[i].grad for i in plan.places]
        if not all(map(_like, given, [bundle.dense[i] for i in plan.places])):
            return self.pruned
        for share in plan.shares:
            stage = stages[share.kind]
            if stage.pattern is None or not (lam or stage.delta != 1.0):
                continue
            at = addresses(share.parts, grads)
            if lam:
                pull = lam * (1.0 - stage.delta)
                share.launch(at, at, delta=1.0, pull=pull, scale=scale)
            else:
                share.launch(at, at, delta=self._delta(share, k))
            for part in share.parts:
                self.prepared.change(part.region.target.label, bundle.params[part.place].grad)
        return [*plan.rest, *self.singles]

    def _plan(self, grads: Sequence[Tensor | None], stages: Any, held: bool) -> Plan:
        """The plan of a rule on the gradients that are there."""
        assert self._plans is not None
        among = None
        if any(g is None for g in grads):
            among = frozenset(i for i, g in enumerate(grads) if g is not None)
        return self._plans.of(stages, held, False, among)

    def draw(self, k: int, rates: Sequence[float | Tensor]) -> None:
        """Draw W to W̃ by the recipe's pull, where the optimizer will step, at rates by slot."""
        if not self.run.recipe.pull:
            return
        rest = {id(slot) for slot in self._draw_together(k, rates)}
        if not rest:
            return
        stages, held = self.stages(k), self.has_masks(k)
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

    def _draw_together(self, k: int, rates: Sequence[float | Tensor]) -> Sequence[Slot]:
        """The pull in one launch where that can be; the slots that are left."""
        bundle = self.bundle
        if bundle is None or self._plans is None or self.prepared.any_drawn:
            return self.pruned
        stages, pull = self.kinds(k), self.run.recipe.pull
        plan = self._plan([param.grad for param in bundle.params], stages, self.has_masks(k))
        rest = [*plan.rest, *self.singles]
        for share in plan.shares:
            stage = stages[share.kind]
            if stage.pattern is None or stage.delta == 1.0:
                continue
            groups = share.by(self.groups)
            for lr, w, shown in ((rates[slot], *lists) for slot, *lists in groups):
                if not isinstance(lr, Tensor):
                    _FOREACH._foreach_lerp_(w, shown, min(1.0, lr * pull * stage.rate))
                elif len(groups) == 1:
                    amount = (lr.to(w[0].device, torch.float32) * pull * stage.rate).clamp(max=1.0)
                    share.launch(delta=1.0, pull=-1.0, scale=amount * (1.0 - self._delta(share, k)))
                else:
                    rest += [bundle.slots[part.place] for part in share.parts]
                    break
            else:
                self.prepared.draw_all(share.labels)
        return rest

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
        for slot in self.slots if self._before else ():
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
        hold = self.run.holds(k)
        raised: list[Tensor] = []
        rest = self._write_together(k, reuse, hold, raised)
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
        self.tell(k)

    def tell(self, k: int) -> None:
        """Say that W̃ of step `k` was written."""
        for tell in self.told:
            tell(self.run, k)

    def _write_together(
        self, k: int, reuse: bool, hold: bool, raised: list[Tensor]
    ) -> Sequence[Slot]:
        """W̃ in one launch where that can be; the slots that are left."""
        bundle = self.gather()
        if bundle is None or self._plans is None or bundle.prints is None:
            return self.pruned
        stages = self.kinds(k)
        plan = self._plans.of(stages, reuse, hold)
        if plan.rest:
            return self.pruned
        for share in plan.shares:
            raised.append(share.launch(share.out, delta=self._delta(share, k)))
        bundle.wrote()
        return self.singles

    def read_finite(self, k: int) -> None:
        """Raise a `WeightError` if the last write on a device met a weight that is not finite."""
        if self.flags.raised:
            self.flags.raised = False
            self.check_finite(k)

    def check_finite(self, k: int) -> None:
        """Raise a `WeightError` that names the first weight that is not finite."""
        for slot in self.pruned:
            if not bool(torch.isfinite(local(slot.dense)).all()):
                raise _not_finite(slot, k)


def _like(g: Tensor, w: Tensor) -> bool:
    """Whether a gradient lies in memory as a contiguous weight does."""
    return g.dtype is w.dtype and g.device == w.device and not g.is_sparse and g.is_contiguous()


def _not_finite(slot: Slot, k: int) -> WeightError:
    return WeightError(
        f"'{slot.name}' holds a NaN or an infinity after step {k}, so it has no mask: resume from "
        "an earlier state, with a lower learning rate or with gradient clipping"
    )
