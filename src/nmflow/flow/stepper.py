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

from nmflow.errors import FlowError, WeightError
from nmflow.flow import preconditioner, resume
from nmflow.flow.edits import Edits
from nmflow.flow.observing import Observation
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import DENSE_KEY, GROUP_KEYS, RECIPE_KEY, STEP_KEY, Run
from nmflow.flow.weights import Weights

log = logging.getLogger("nmflow")

_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A weak reference to the live optimizer for every parameter, so that none is attached to twice."""


class Stepper:
    """One optimizer's slots, its hooks and its count of steps.

    Attributes:
        k: the optimizer steps done.
        slots: the parameters that it owns and a recipe targets.
        edits: what may be done to them between two steps.
        block: the `with` block of the flow that is open, in which nothing may step; or "".
    """

    def __init__(
        self, run: Run, optimizer: Optimizer, slots: Sequence[Slot], observations: list[Observation]
    ) -> None:
        self._asked, self.optimizer, self.slots, self.k = run, optimizer, slots, 0
        self._weights = Weights(run, slots)
        self.edits = Edits(self._weights)
        self._signature = run.signature(self._weights.targets)
        self._observations = observations
        self._handles: list[Any] = []
        self._entered = self._counts = False
        self.block = ""
        self._frozen: list[preconditioner.Frozen] = []

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
        if self.run.recipe.freezes_second_moment:
            preconditioner.check(self.optimizer)
        if resume.is_there(self.optimizer):
            groups = self.optimizer.param_groups
            resume.run_of(groups, self._asked, self._weights.targets)
            if self.prunes:
                state, params = self.optimizer.state, resume.params_of(groups)
                self._check_slots(state, params)

    def start(self) -> None:
        """Take the weights, or the state that is there already, and hook the optimizer."""
        for slot in self.slots:
            _owners[slot.param] = weakref.ref(self.optimizer)
        if resume.is_there(self.optimizer):
            self._adopt(self.optimizer)
        else:
            self._write_groups()
            self._weights.start()
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
    def run(self) -> Run:
        """The recipe over its run; another than was asked for while a state is prolonged."""
        return self._weights.run

    @property
    def prunes(self) -> bool:
        """Whether there are dense weights beside the network's own."""
        return self.run.recipe.prunes

    # -- the hooks of a step -------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict) -> tuple | None:
        self._check_no_block("optimizer.step()")
        self._mend_broken_step()
        self.edits.check(self.k, wait=False)
        self._weights.read_finite(self.k)
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
        return (*args[:1], sparse_closure, *args[2:]), kwargs

    @torch.no_grad()
    def _enter(self) -> None:
        self._counts = not self._is_phantom()
        if self._counts:
            # Only a fused optimizer, which unscales inside its step, has a scale here.
            scale = getattr(self.optimizer, "grad_scale", None)
            due = [o for o in self._observations if self.k % o.every == 0]
            if due and not self._found_inf():
                views = self._weights.views(self.k, scale)
                for observation in due:
                    observation.observer(self.k, views)
            self._weights.apply_gradient_rule(self.k, scale)
            if self.run.recipe.pull and not self._found_inf():
                self._weights.draw(self.k, self.optimizer.param_groups)
        self._weights.enter()
        if (
            self._counts
            and self.run.recipe.freezes_second_moment
            and self.k >= self.run.dense_steps
        ):
            self._frozen = preconditioner.freeze(self.optimizer)
        self._entered = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._entered:
            raise FlowError(
                f"{type(optimizer).__name__} did not call the closure that it was given, so it "
                "stepped the sparse weights: call backward() first and step() without a closure"
            )
        self._entered = False
        counts = self._counts and not self._found_inf()
        if counts and self._frozen:
            first = self.k == self.run.dense_steps
            preconditioner.settle(self.optimizer, self._frozen, first)
            self._frozen = []
        self._leave()
        if counts:
            self.k += 1
            if self.prunes and self.k == self.run.total_steps + 1:
                log.warning(
                    "step %d is past total_steps: the final masks go on", self.run.total_steps + 1
                )
            self._write_groups()
            self._weights.write(self.k, self.run.reuses(self._weights.targets, self.k))
        else:
            self._weights.write(self.k)

    def _found_inf(self) -> bool:
        """Whether a loss scaler makes this step of a fused optimizer do nothing."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _leave(self) -> None:
        preconditioner.thaw(self._frozen)
        self._frozen = []
        self._weights.leave(stateless=not any(self.optimizer.state.values()))

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
            self._weights.write(self.k)

    def _check_no_block(self, what: str) -> None:
        if self.block:
            raise FlowError(
                f"{what} was called inside flow.{self.block}, where the network does not show "
                "its weights of this step: call it outside the with block"
            )

    # -- the state that travels ----------------------------------------------------------------

    def _write_groups(self) -> None:
        for group in self.optimizer.param_groups:
            group[STEP_KEY], group[RECIPE_KEY] = self.k, self._signature

    def _add_pending(self, optimizer: Optimizer, state_dict: dict) -> dict:
        return resume.add_pending(optimizer, self.slots, state_dict)

    def _check_loaded(self, optimizer: Optimizer, state_dict: dict) -> None:
        self._check_no_block("optimizer.load_state_dict()")
        groups = state_dict["param_groups"]
        resume.run_of(groups, self._asked, self._weights.targets)
        keys = resume.params_of(groups)
        # Where the number differs, the optimizer itself refuses the state.
        if self.prunes and len(keys) == len(resume.params_of(optimizer.param_groups)):
            self._check_slots(state_dict["state"], keys)

    def _check_slots(self, state: dict, keys: list) -> None:
        needed = (DENSE_KEY, *self.run.held_keys)
        resume.check_slots(self.optimizer, self.slots, state, keys, needed)

    @torch.no_grad()
    def _adopt(self, optimizer: Optimizer) -> None:
        self.k = int(optimizer.param_groups[0][STEP_KEY])
        groups = optimizer.param_groups
        self._weights.run = resume.run_of(groups, self._asked, self._weights.targets)
        self._signature = self.run.signature(self._weights.targets)
        if self.run.begun is not None:
            log.info(
                "%d steps of a run that was begun as one of %d: its phases go on as they were",
                self.run.total_steps,
                self.run.begun,
            )
        self._write_groups()
        self._entered = False
        self.edits.forget()
        if self.prunes:
            resume.adopt(optimizer, self.slots)
            self._weights.write(self.k)
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
