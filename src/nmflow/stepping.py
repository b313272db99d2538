"""The hooks of one optimizer: dense weights in before its step, sparse ones out after it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from nmflow import gradients, resume
from nmflow.errors import FlowError, StateError, WeightError
from nmflow.observing import Observer, View
from nmflow.schedules import Stage
from nmflow.sharding import local
from nmflow.slots import Slot
from nmflow.states import GROUP_KEYS, RECIPE_KEY, STEP_KEY, Run

log = logging.getLogger("nmflow")

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A weak reference to the live optimizer for every parameter, so that none is attached to twice."""


class Stepper:
    """One optimizer's slots, its hooks and its count of steps.

    Attributes:
        k: the optimizer steps done.
        slots: the parameters that it owns and a recipe targets.
    """

    def __init__(
        self, run: Run, optimizer: Optimizer, slots: Sequence[Slot], observers: list[Observer]
    ) -> None:
        self.run, self.optimizer, self.slots, self.k = run, optimizer, slots, 0
        self._observers = observers
        self._targets = [r.target for s in slots for r in s.regions]
        self._signature = run.signature(self._targets)
        self._handles: list[Any] = []
        self._hard = self._entered = self._counts = False
        self._unread: list[Tensor] = []

    # -- from attach to finalize ---------------------------------------------------------------

    def check(self) -> None:
        """Raise unless the optimizer and the weights can be taken; change nothing."""
        for slot in self.slots:
            if _owned(slot.param):
                raise FlowError(
                    f"'{slot.name}' already has a recipe attached: call finalize() on that flow "
                    "first, or exclude it"
                )
        for slot in self.slots:
            if not bool(torch.isfinite(local(slot.param)).all()):
                raise WeightError(
                    f"'{slot.name}' holds a NaN or an infinity, which no magnitude mask can order: "
                    "mend the weight before attaching"
                )
        if resume.is_there(self.optimizer):
            groups = self.optimizer.param_groups
            resume.check_groups(groups, self._signature)
            if self.prunes:
                state, params = self.optimizer.state, resume.params_of(groups)
                resume.check_slots(self.optimizer, self.slots, state, params)

    def start(self) -> None:
        """Take the weights, or the state that is there already, and hook the optimizer."""
        for slot in self.slots:
            _owners[slot.param] = weakref.ref(self.optimizer)
        if resume.is_there(self.optimizer):
            self._adopt(self.optimizer)
        else:
            if self.prunes:
                for slot in self.slots:
                    slot.start()
            self._write_groups()
            self._write(reuse=False)
        add = self.optimizer
        self._handles = [
            add.register_step_pre_hook(self._before),
            add.register_step_post_hook(self._after),
            add.register_state_dict_post_hook(self._add_pending),
            add.register_load_state_dict_pre_hook(self._check_loaded),
            add.register_load_state_dict_post_hook(self._adopt),
        ]

    def stop(self) -> None:
        """Leave the optimizer as it would be without a recipe; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            for key in GROUP_KEYS:
                group.pop(key, None)
        for slot in self.slots:
            slot.clear()
            _owners.pop(slot.param, None)

    @property
    def prunes(self) -> bool:
        """Whether there are dense weights beside the network's own."""
        return self.run.recipe.prunes

    # -- the hooks of a step -------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict) -> tuple | None:
        if self._hard:
            raise FlowError(
                "optimizer.step() was called inside flow.hard(), where the network shows its final "
                "masks: step outside the with block"
            )
        self._mend_broken_step()
        self.check_untouched()
        self._read_finite()
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._enter()
            return None

        def sparse_closure() -> Any:
            # The closure is the forward and backward pass: the network has to be sparse in it.
            if self._entered:
                raise FlowError(
                    f"{type(optimizer).__name__} called its closure twice in one step, which would "
                    "evaluate the dense weights: use an optimizer that evaluates once"
                )
            loss = closure()
            self._enter()
            return loss

        if kwargs.get("closure"):
            return args, {**kwargs, "closure": sparse_closure}
        return (args[0], sparse_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _enter(self) -> None:
        self._counts = not self._is_phantom()
        if self._counts:
            self._tell_observers()
            if self.prunes:
                self._apply_gradient_rule()
        if self.prunes:
            for slot in self.slots:
                slot.enter()
        self._entered = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._entered:
            raise FlowError(
                f"{type(optimizer).__name__} did not call the closure that it was given, so it "
                "stepped the sparse weights: call backward() first and step() without a closure"
            )
        self._entered = False
        self._leave()
        found_inf = getattr(optimizer, "found_inf", None)
        if self._counts and (found_inf is None or not bool(found_inf)):
            self.k += 1
            if self.k == self.run.total_steps + 1:
                log.warning(
                    "step %d is past total_steps: the final masks go on", self.run.total_steps + 1
                )
            self._write_groups()
            self._write(self.run.reuses(self._targets, self.k))
        else:
            self._write(self._has_masks())

    def _leave(self) -> None:
        stateless = not any(self.optimizer.state.values())
        for slot in self.slots:
            if slot.stepping:
                slot.leave(stateless)

    def _is_phantom(self) -> bool:
        """Whether this step only builds the optimizer's state, as a distributed checkpoint does.

        Before the first save or load, `torch.distributed.checkpoint.state_dict` steps an optimizer
        without state at lr 0 on gradients of zero.
        """
        groups = self.optimizer.param_groups
        if self.optimizer.state or any(float(g.get("lr", 1.0)) != 0.0 for g in groups):
            return False
        grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        return not any(bool(local(g).any()) for g in grads)

    def _mend_broken_step(self) -> None:
        """Go on after a step that raised: it is not counted, and its weights are taken as W."""
        if not self._entered:
            return
        log.warning("the last optimizer.step() raised: it is not counted")
        self._entered = False
        self._leave()
        with torch.no_grad():
            self._write(self._has_masks())

    def _apply_gradient_rule(self) -> None:
        recipe = self.run.recipe
        if recipe.gradient != "masked" and not recipe.lam:
            return
        stages, held = self.run.stages(self._targets, self.k), self._has_masks()
        for slot in self.slots:
            if slot.param.grad is None:
                continue
            if slot.param.grad.is_sparse:
                raise FlowError(
                    f"'{slot.name}' has a sparse gradient, which the rule of {recipe.name} cannot "
                    "change: build the embedding with sparse=False"
                )
            g, dense, shown = local(slot.param.grad), local(slot.dense), local(slot.param)
            for region in slot.regions:
                stage = stages[region.target.label]
                if stage.pattern is None or region.count == 0:
                    continue
                if recipe.lam:
                    scale = getattr(self.optimizer, "grad_scale", None)
                    gradients.refined(
                        region.of(g), region.of(dense), region.of(shown), recipe.lam, scale
                    )
                elif stage.delta != 1.0 or stage.previous is not None:
                    kept, fading = slot.masks(region, stage, held)
                    gradients.masked(region.of(g), kept, fading, stage.delta)

    def _tell_observers(self) -> None:
        if not self._observers:
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        stages, held = self.run.stages(self._targets, self.k), self._has_masks()
        views = []
        for slot in self.slots:
            weight = local(slot.dense if self.prunes else slot.param)
            grad = slot.param.grad
            for region in slot.regions:
                stage, target = stages[region.target.label], region.target
                final = Stage("final", target.pattern)
                dense = stage.pattern is None
                mask, _ = slot.masks(region, final if dense else stage, held and not dense)
                g = None if grad is None else region.of(local(grad))
                if g is not None and scale is not None:
                    g = g / scale
                views.append(View(target, region.of(weight), g, mask, stage))
        for observer in list(self._observers):
            observer(self.k, views)

    # -- W̃ ------------------------------------------------------------------------------------

    def _has_masks(self) -> bool:
        """Whether the masks of the current step are in the state rather than taken from W."""
        stages = self.run.stages(self._targets, self.k)
        return self.prunes and self.run.holds(self.k) and all(s.holds(stages) for s in self.slots)

    def _write(self, reuse: bool) -> None:
        if not self.prunes:
            return
        stages, hold = self.run.stages(self._targets, self.k), self.run.holds(self.k)
        for slot in self.slots:
            flags = slot.write(stages, reuse, hold)
            if local(slot.param).device.type != "cpu":
                # Reading a flag waits for the device; before the next step it is there already.
                self._unread += flags
            elif not all(bool(f) for f in flags):
                for one in self.slots:
                    one.rest()
                self._raise_not_finite(slot.name)

    def _read_finite(self) -> None:
        if self._unread:
            fine = bool(torch.stack(self._unread).all())
            self._unread = []
            if not fine:
                self.check_finite()

    def check_finite(self) -> None:
        """Raise a `WeightError` that names the first dense weight that is not finite."""
        if self.prunes:
            for slot in self.slots:
                if not bool(torch.isfinite(local(slot.dense)).all()):
                    self._raise_not_finite(slot.name)

    def _raise_not_finite(self, name: str) -> None:
        raise WeightError(
            f"'{name}' holds a NaN or an infinity after step {self.k}, so it has no mask: resume "
            "from an earlier state, with a lower learning rate or with gradient clipping"
        )

    def check_untouched(self) -> None:
        """Raise a `StateError` if somebody wrote a parameter since the last step."""
        if not self.prunes:
            return
        stages, held = self.run.stages(self._targets, self.k), self._has_masks()
        for slot in self.slots:
            if slot.untouched():
                continue
            if not slot.shows(stages, held):
                raise StateError(
                    f"'{slot.name}' was written since step {self.k}, but training goes on from the "
                    "dense weights in the optimizer's state: call flow.sync() after the write to "
                    "take the new weights as dense ones, or load the optimizer's state with them"
                )
            slot.seen()

    @torch.no_grad()
    def harden(self) -> None:
        """Write the final N:M weights into the parameters."""
        if not self.prunes:
            return
        final = {t.label: Stage("final", t.pattern) for t in self._targets}
        now = self.run.stages(self._targets, self.k)
        # A held mask is of the current pattern; where that is the final one already, it stays.
        reuse = self._has_masks() and all(
            now[label].pattern == final[label].pattern for label in now
        )
        for slot in self.slots:
            slot.write(final, reuse, hold=None)

    @torch.no_grad()
    def rewrite(self) -> None:
        """Write the current W̃ into the parameters."""
        self._write(self._has_masks())

    @torch.no_grad()
    def sync(self) -> None:
        """Take each parameter that somebody wrote as W."""
        if not self.prunes:
            return
        stages, held = self.run.stages(self._targets, self.k), self._has_masks()
        changed = [s for s in self.slots if not s.untouched() and not s.shows(stages, held)]
        for slot in changed:
            if not bool(torch.isfinite(local(slot.param)).all()):
                self._raise_not_finite(slot.name)
        for slot in changed:
            local(slot.dense).copy_(local(slot.param))
            slot.write(stages, False, self.run.holds(self.k))

    # -- the state that travels ----------------------------------------------------------------

    def _write_groups(self) -> None:
        for group in self.optimizer.param_groups:
            group[STEP_KEY], group[RECIPE_KEY] = self.k, self._signature

    def _add_pending(self, optimizer: Optimizer, state_dict: dict) -> dict:
        return resume.add_pending(optimizer, self.slots, state_dict)

    def _check_loaded(self, optimizer: Optimizer, state_dict: dict) -> None:
        groups = state_dict["param_groups"]
        resume.check_groups(groups, self._signature)
        keys = resume.params_of(groups)
        # Where the number differs, the optimizer itself refuses the state.
        if self.prunes and len(keys) == len(resume.params_of(optimizer.param_groups)):
            resume.check_slots(optimizer, self.slots, state_dict["state"], keys)

    @torch.no_grad()
    def _adopt(self, optimizer: Optimizer) -> None:
        self.k = int(optimizer.param_groups[0][STEP_KEY])
        self._entered, self._unread = False, []
        if self.prunes:
            resume.adopt(optimizer, self.slots)
            self._write(self._has_masks())
        log.info("resumed %s at step %d", self.run.recipe.name, self.k)


def _owned(param: Tensor) -> bool:
    """Whether a live optimizer has a recipe on the parameter."""

    def owner() -> Optimizer | None:
        found = _owners.get(param)
        return None if found is None else found()

    if owner() is not None:
        # An optimizer that was dropped and its hooks refer to each other until they are collected.
        gc.collect()
    return owner() is not None
