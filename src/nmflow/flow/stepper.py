"""The hooks of one optimizer: dense weights in before its step, sparse ones out after it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError, NMFlowError, StateError, WeightError
from nmflow.flow import hosts, owners, preconditioner, resume
from nmflow.flow.guard import Guard, overrides
from nmflow.flow.observing import Observation
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import DENSE_KEY, GROUP_KEYS, RECIPE_KEY, STEP_KEY, Run
from nmflow.flow.weights import Weights

log = logging.getLogger("nmflow")


class Stepper:
    """One optimizer's slots, its hooks and its count of steps.

    Attributes:
        k: the optimizer steps done.
        slots: the parameters that it owns and a recipe targets.
    """

    def __init__(
        self, run: Run, optimizer: Optimizer, slots: Sequence[Slot], observations: list[Observation]
    ) -> None:
        self.run, self.optimizer, self.slots, self.k = run, optimizer, slots, 0
        self._weights = Weights(run, slots)
        self._observations = observations
        self._signature = run.signature(self._weights.targets)
        self._handles: list[Any] = []  # of hooks and guards
        self._hard = False
        # Of the step that runs now: whether it began, whether W is in the parameters, whether it
        # counts, how many calls of `step` and of its hooks are nested, and how to write W̃ after it.
        self._inside = self._entered = self._counts = False
        self._calls = self._nested = 0
        self._hooked = False
        self._reuse: bool | None = None
        self._frozen: list[preconditioner.Frozen] = []

    # -- from attach to finalize ---------------------------------------------------------------

    def check(self) -> None:
        """Raise unless the optimizer and the weights can be taken; change nothing."""
        for slot in self.slots:
            if owners.is_owned(slot.param):
                raise FlowError(
                    f"'{slot.name}' already has a recipe attached: call finalize() on that flow "
                    "first, or exclude it"
                )
        if owners.owns(self.optimizer):
            raise FlowError(
                f"the {type(self.optimizer).__name__} already has a recipe attached, on other "
                "weights: attach once, with a mapping of patterns such as {'ff': '1:16', 'qk': "
                "'1:4'}, or with an nn.ModuleList of the models"
            )
        for slot in self.slots:
            if slot.param.is_meta:
                raise WeightError(
                    f"'{slot.name}' is on the meta device, where it has no values: load the model "
                    "onto a device (`to_empty`, then `load_state_dict`) before attaching"
                )
            if not bool(torch.isfinite(local(slot.param)).all()):
                raise WeightError(
                    f"'{slot.name}' holds a NaN or an infinity, which no magnitude mask can order: "
                    "mend the weight before attaching"
                )
        if self.run.recipe.freezes_second_moment:
            preconditioner.check(self.optimizer)
        self._check_hosted()
        if resume.is_there(self.optimizer):
            self._check_live_state()

    def start(self) -> None:
        """Take the weights, or the state that is there already, and hook the optimizer."""
        for slot in self.slots:
            owners.add(slot.param, self.optimizer)
        self._hook()
        if resume.is_there(self.optimizer):
            self._take_over()
        else:
            self._write_groups()
            self._weights.start()
            if overrides(self.optimizer, "state_dict"):
                resume.check_saved(self.optimizer, self.optimizer.state_dict())
        with torch.no_grad():
            self._weights.write(self.k, None if self.k else False)

    def _hook(self) -> None:
        one, quiet = self.optimizer, torch.compiler.disable  # a compiler goes around our hooks
        self._handles += [
            one.register_step_pre_hook(quiet(self._before)),
            one.register_step_post_hook(quiet(self._after)),
            one.register_state_dict_pre_hook(self._before_saving),
            one.register_state_dict_post_hook(self._add_pending),
            one.register_load_state_dict_pre_hook(self._check_loaded),
            one.register_load_state_dict_post_hook(self._adopt),
        ]
        # What hooks of others do after a step is done with the sparse weights, and counted.
        one._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)
        self._guard("step", self._call_begins, self._call_ends, self._call_fails)
        for name in ("train", "eval"):
            if callable(getattr(one, name, None)):
                self._guard(name, self._lend, self._give_back, self._give_back)
        if overrides(one, "state_dict"):
            self._guard("state_dict", lambda *_: self._before_saving(one), self._saved)
        if overrides(one, "load_state_dict"):
            self._guard("load_state_dict", self._check_loading, self._loaded)

    def _guard(self, name: str, begin: Any, done: Any, fail: Any = lambda: None) -> None:
        self._handles.append(Guard(self.optimizer, name, begin, done, fail))

    def stop(self) -> None:
        """Leave the optimizer as it would be without a recipe; the weights stay as they are."""
        self.unhook()
        for group in self.optimizer.param_groups:
            for key in GROUP_KEYS:
                group.pop(key, None)
        for slot in self.slots:
            slot.clear()

    def unhook(self) -> None:
        """Take no further part in what the optimizer does."""
        for handle in reversed(self._handles):
            handle.remove()
        for slot in self.slots:
            owners.remove(slot.param)

    @property
    def prunes(self) -> bool:
        """Whether there are dense weights beside the network's own."""
        return self.run.recipe.prunes

    # -- between steps -------------------------------------------------------------------------

    def check_untouched(self) -> None:
        """Raise a `StateError` if somebody wrote a parameter since the last step."""
        self._weights.check_untouched(self.k)

    def check_finite(self) -> None:
        """Raise a `WeightError` if a dense weight is not finite."""
        self._weights.check_finite(self.k)

    @torch.no_grad()
    def harden(self) -> None:
        """Show the final N:M weights, and step no more until `soften`."""
        self._weights.harden(self.k)
        self._hard = True

    @torch.no_grad()
    def soften(self) -> None:
        """Show the current W̃ again."""
        self._weights.write(self.k)
        self._hard = False

    @torch.no_grad()
    def sync(self) -> None:
        """Take each parameter that somebody wrote as W."""
        self._weights.sync(self.k)

    # -- the hooks of a step -------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict) -> tuple | None:
        self._hooked = True
        if self._inside and self._calls:
            self._nested += 1  # a subclass that calls the step of its base, which has hooks too
            return None
        self._mend_broken_step()
        if self._hard:
            raise FlowError(
                "optimizer.step() was called inside flow.hard(), where the network shows its final "
                "masks: step outside the with block"
            )
        self._check_hosted()
        self._notice()
        self._weights.check_untouched(self.k)
        self._weights.read_finite(self.k)
        self._inside, self._nested, self._reuse = True, 0, None
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
            if not self._weights.untouched():
                raise FlowError(
                    f"{type(optimizer).__name__} moved the weights before it called its closure, "
                    "and no recipe can tell what it would put back: use an optimizer that "
                    "evaluates the network at its own weights"
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
            self._observe(scale)
            self._weights.apply_gradient_rule(self.k, scale, hosts.uphill(self.optimizer))
            if self.run.recipe.pull and not self._found_inf():
                self._weights.draw(self.k, hosts.rates(self.optimizer))
        self._entered = True
        self._weights.enter()
        if (
            self._counts
            and self.run.recipe.freezes_second_moment
            and self.k >= self.run.dense_steps
        ):
            self._frozen = preconditioner.freeze(self.optimizer)

    def _observe(self, scale: Tensor | None) -> None:
        due = [o for o in self._observations if self.k % o.every == 0]
        if not due or self._found_inf() or self._weights.prepared.observed:
            return
        views = self._weights.views(self.k, scale)
        for observation in due:
            observation.observer(self.k, views)
        self._weights.prepared.observed = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self._nested:
            self._nested -= 1
            return
        if not self._entered:
            raise FlowError(
                f"{type(optimizer).__name__} did not call the closure that it was given, so it "
                "stepped the sparse weights: call backward() first and step() without a closure"
            )
        counts = self._counts and not self._found_inf()
        if counts and self._frozen:
            first = self.k == self.run.dense_steps
            preconditioner.settle(self.optimizer, self._frozen, first)
            self._frozen = []
        self._leave()
        self._weights.prepared.clear()
        if counts:
            self._reuse = self.run.reuses(self._weights.targets, self.k + 1)
            self.k += 1
            if self.prunes and self.k == self.run.total_steps + 1:
                log.warning(
                    "step %d is past total_steps: the final masks go on", self.run.total_steps + 1
                )
            self._write_groups()
        self._weights.write(self.k, self._reuse)
        self._inside = False

    def _found_inf(self) -> bool:
        """Whether a loss scaler makes this step of a fused optimizer do nothing."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _leave(self) -> None:
        preconditioner.thaw(self._frozen)
        self._frozen = []
        held = self.optimizer.state.values()
        self._weights.leave(stateless=not any(s for s in held if isinstance(s, dict)))
        self._entered = False

    def _is_phantom(self) -> bool:
        """Whether this step only builds the optimizer's state, as a distributed checkpoint does.

        Before the first save or load, `torch.distributed.checkpoint.state_dict` steps an optimizer
        without state at lr 0 on gradients of zero.
        """
        groups = self.optimizer.param_groups
        if self.optimizer.state or any(g.get("lr") is None or float(g["lr"]) for g in groups):
            return False
        grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        return not any(bool(local(g).any()) for g in grads)

    # -- calls, hooks or not -------------------------------------------------------------------

    def _call_begins(self, args: tuple, kwargs: dict) -> None:
        if not self._calls:
            self._mend_broken_step()
            self._hooked = False
        self._calls += 1

    @torch.no_grad()
    def _call_ends(self, out: Any) -> Any:
        self._calls -= 1
        if not self._calls and (self._inside or not self._hooked):
            self._weights.write(self.k)
            raise FlowError(
                f"{type(self.optimizer).__name__}.step() ran without the hooks of "
                "torch.optim.Optimizer, so it did not step the dense weights: its step is dropped, "
                "so use an optimizer whose step() runs them"
            )
        return out

    def _call_fails(self) -> None:
        self._calls = max(0, self._calls - 1)
        if not self._calls:
            self._mend_broken_step()

    @torch.no_grad()
    def _mend_broken_step(self) -> None:
        """Go on after a step that raised: it is not counted, and its weights are taken as W."""
        if not self._inside:
            return
        log.warning("optimizer.step() raised after step %d", self.k)
        try:
            if self._entered:
                self._leave()
            self._weights.write(self.k, self._reuse)
        except NMFlowError as error:  # beside the exception that goes on, and again at the next step
            log.warning("%s", error)
        self._inside = self._entered = False

    def _lend(self, args: tuple, kwargs: dict) -> None:
        """Put W into the parameters for a method that moves weights between steps."""
        if not self._hard:
            self._weights.check_untouched(self.k)
        with torch.no_grad():
            self._weights.enter()

    @torch.no_grad()
    def _give_back(self, out: Any = None) -> Any:
        self._leave()
        if self._hard:
            self._weights.harden(self.k)
        else:
            self._weights.write(self.k)
        return out

    def _check_hosted(self) -> None:
        """Raise unless the optimizer still steps the weights, at a rate that the recipe can use."""
        hosts.check_groups(self.optimizer, self.slots, self.run.recipe)

    # -- the state that travels ----------------------------------------------------------------

    def _write_groups(self) -> None:
        for group in self.optimizer.param_groups:
            group[STEP_KEY], group[RECIPE_KEY] = self.k, self._signature

    def _before_saving(self, optimizer: Optimizer) -> None:
        if not self._calls:
            self._mend_broken_step()
        self._notice()
        self._write_groups()  # a group that was added since the last step has none

    def _add_pending(self, optimizer: Optimizer, state_dict: dict) -> dict:
        return resume.add_pending(optimizer, self.slots, state_dict)

    def _saved(self, out: Any) -> Any:
        return self._add_pending(self.optimizer, out)

    def _check_loading(self, args: tuple, kwargs: dict) -> None:
        self._check_loaded(self.optimizer, args[0] if args else kwargs["state_dict"])

    def _check_loaded(self, optimizer: Optimizer, state_dict: dict) -> None:
        groups = state_dict["param_groups"]
        resume.check_groups(groups, self._signature)
        keys = resume.params_of(groups)
        # Where the number differs, the optimizer itself refuses the state.
        if self.prunes and len(keys) == len(resume.params_of(optimizer.param_groups)):
            self._check_slots(state_dict["state"], keys)

    def _check_live_state(self) -> None:
        groups = self.optimizer.param_groups
        resume.check_groups(groups, self._signature)
        if self.prunes:
            self._check_slots(self.optimizer.state, resume.params_of(groups))

    def _check_slots(self, state: dict, keys: list) -> None:
        needed = (DENSE_KEY, *self.run.held_keys)
        resume.check_slots(self.optimizer, self.slots, state, keys, needed)

    def _loaded(self, out: Any) -> Any:
        if resume.is_foreign(self.optimizer, self.slots, self.k):
            self._check_live_state()
            self._adopt(self.optimizer)
        return out

    def _notice(self) -> None:
        """Take over a state that was loaded where neither a hook nor a guard saw it.

        Raises:
            StateError: it is not of this run, or the gradients are of other weights than its own.
        """
        if not resume.is_foreign(self.optimizer, self.slots, self.k):
            return
        self._check_live_state()
        self._take_over()
        shown = self._weights.shown(self.k)
        with torch.no_grad():
            self._weights.write(self.k)
        if not shown:
            raise StateError(
                f"a state of step {self.k} was loaded where no hook saw it, and the gradients are "
                "of other weights: it is taken over now, so call zero_grad(), go forward and "
                "backward again, and step"
            )

    def _take_over(self) -> None:
        self.k = resume.steps_in(self.optimizer.param_groups)
        self._inside = self._entered = False
        self._weights.prepared.clear()
        if self.prunes:
            resume.adopt(self.optimizer, self.slots)
        self._write_groups()
        log.info("resumed %s at step %d", self.run.recipe.name, self.k)

    @torch.no_grad()
    def _adopt(self, optimizer: Optimizer) -> None:
        self._take_over()
        self._weights.write(self.k)
