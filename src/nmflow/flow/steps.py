"""The steps of one optimizer: dense weights in before each, sparse ones out after it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError, NMFlowError
from nmflow.flow import hosts, preconditioner
from nmflow.flow.edits import FINAL_MASKS, Edits, Late
from nmflow.flow.observing import Observation
from nmflow.flow.record import Record
from nmflow.flow.sharding import local
from nmflow.flow.weights import Weights

log = logging.getLogger("nmflow")


class Steps:
    """What happens around the steps of one optimizer, and around other calls that move weights.

    Attributes:
        block: the `with` block of the flow that is open, in which nothing may step; or "".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Weights,
        edits: Edits,
        record: Record,
        observations: list[Observation],
    ) -> None:
        self.block = ""
        self._optimizer, self._observations = optimizer, observations
        self._weights, self._edits, self._record = weights, edits, record
        # Of the step that runs now: whether it began, whether W is in the parameters, whether it
        # counts, and how to write W̃ after it.
        self._inside = self._entered = self._counts = False
        self._reuse: bool | None = None
        self._frozen: list[preconditioner.Frozen] = []
        self._known = False  # whether the optimizer keeps finer weights than the model
        # How many calls of `step` are running, whether their hooks ran, and how many are nested.
        self._calls, self._hooked, self._nested = 0, False, 0

    # -- the hooks of a step -------------------------------------------------------------------

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict) -> tuple | None:
        """The hook before a step, which puts W in; with a closure, after the closure ran."""
        self._hooked = True
        if self._inside and self._calls:
            self._nested += 1  # a subclass calls its base class's step, which has hooks too
            return None
        self.mend()
        self._check_no_block("optimizer.step()")
        self._check_capture(optimizer)
        self._weights.groups.check(self._weights.run.recipe)
        self._record.notice()
        self._edits.check(self._record.k, wait=False)
        self._weights.read_finite(self._record.k)
        self._inside, self._nested, self._reuse = True, 0, None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._enter(gathered=True)
            return None

        def sparse_closure() -> Any:
            # The closure is the forward and backward pass: the network has to be sparse in it.
            if self._entered:
                raise FlowError(
                    f"{type(optimizer).__name__} called its closure twice in one step, which would "
                    "evaluate the dense weights: use an optimizer that evaluates once"
                )
            if not self._edits.untouched():
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

    def _check_capture(self, optimizer: Optimizer) -> None:
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            return
        kind = type(optimizer).__name__
        if self._weights.flags.kept is None:
            raise FlowError(
                f"{kind}.step() is captured in a CUDA graph, whose replays would neither count "
                "steps nor follow a schedule: give the training step to flow.graphed(), or "
                "capture the forward and backward pass and call step() after each replay"
            )
        if getattr(optimizer, "found_inf", None) is not None:
            raise FlowError(
                f"{kind}.step() is captured in a CUDA graph under a GradScaler, which decides on "
                "the host whether a step counts: train in bfloat16, or without flow.graphed()"
            )

    @torch.no_grad()
    def before_replay(self, late: Late) -> None:
        """Before a CUDA graph of a step is replayed: what `before` does on the host."""
        self.mend()
        self._check_no_block("a graphed step")
        self._weights.groups.check(self._weights.run.recipe)
        self._record.notice()
        self._edits.check_replay(self._record.k, late)
        self._weights.read_finite(self._record.k)

    def after_replay(self, flags: list[Tensor]) -> None:
        """After the replay, which will raise flags: what `after` does on the host."""
        self._count()
        self._weights.flags.send(flags)
        self._weights.tell(self._record.k)

    @torch.no_grad()
    def _enter(self, gathered: bool = False) -> None:
        self._counts = not self._is_phantom()
        if self._counts:
            recipe = self._weights.run.recipe
            moves = recipe.pull or recipe.lr_scale != 1.0
            if moves and not self._known and self._optimizer.state:
                hosts.check_masters(self._optimizer, self._weights.slots, self._weights.run.recipe)
                self._known = True
            # Only a fused optimizer, which unscales inside its step, has a scale here.
            scale = getattr(self._optimizer, "grad_scale", None)
            self._observe(scale)
            self._weights.shrink()
            self._weights.apply_gradient_rule(self._record.k, scale, hosts.uphill(self._optimizer))
            if self._weights.run.recipe.pull and not self._found_inf():
                self._weights.draw(self._record.k, self._weights.groups.rates())
            self._weights.paces.remember(self._record.k)
        self._entered = True
        self._weights.enter(gathered)
        if (
            self._counts
            and self._weights.run.recipe.freezes_second_moment
            and self._record.k >= self._weights.run.dense_steps
        ):
            self._frozen = preconditioner.freeze(self._optimizer)

    def _observe(self, scale: Tensor | None) -> None:
        due = [o for o in self._observations if self._record.k % o.every == 0]
        if not due or self._found_inf() or self._weights.prepared.observed:
            return
        views = self._weights.views(self._record.k, scale)
        for observation in due:
            observation.observer(self._record.k, views)
        self._weights.prepared.observed = True

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The hook after a step, which counts it and writes W̃."""
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
            first = self._record.k == self._weights.run.dense_steps
            preconditioner.settle(self._optimizer, self._frozen, first)
            self._frozen = []
        self._leave()
        self._weights.prepared.clear()
        if counts:
            self._weights.paces.rescale(self._record.k)
            self._reuse = self._weights.run.reuses(self._weights.known, self._record.k + 1)
            self._count()
        self._weights.write(self._record.k, self._reuse)
        self._inside = False

    def _count(self) -> None:
        self._record.k += 1
        total = self._weights.run.total_steps
        if self._weights.pruned and self._record.k == total + 1:
            log.warning("step %d is past total_steps: the final masks go on", total + 1)
        self._record.write()

    def _found_inf(self) -> bool:
        """Whether a loss scaler makes this step of a fused optimizer do nothing."""
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _leave(self) -> None:
        preconditioner.thaw(self._frozen)
        self._frozen = []
        held = self._optimizer.state.values()
        self._weights.leave(stateless=not any(s for s in held if isinstance(s, dict)))
        self._entered = False

    def _is_phantom(self) -> bool:
        """Whether this step only builds the optimizer's state, as a distributed checkpoint does.

        Before the first save or load, `torch.distributed.checkpoint.state_dict` makes an optimizer
        without state step at lr 0 on zero gradients.
        """
        groups = self._optimizer.param_groups
        if self._optimizer.state or any(g.get("lr") is None or float(g["lr"]) for g in groups):
            return False
        grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        return not any(bool(local(g).any()) for g in grads)

    # -- the guards of calls -------------------------------------------------------------------

    def begins(self, args: tuple, kwargs: dict) -> None:
        """Before a call of `step`, which should run the hooks."""
        if not self._calls:
            self.mend()
            self._hooked = False
        self._calls += 1

    def ends(self, out: Any) -> Any:
        """After a call of `step`: raise a `FlowError` if it ran no hooks."""
        self._calls -= 1
        if not self._calls and (self._inside or not self._hooked):
            with torch.no_grad():
                self._weights.write(self._record.k)
            raise FlowError(
                f"{type(self._optimizer).__name__}.step() ran without the hooks of "
                "torch.optim.Optimizer, so it did not step the dense weights: its step is dropped, "
                "so use an optimizer whose step() runs them"
            )
        return out

    def fails(self) -> None:
        """After a call of `step` that raised: W̃ is in the parameters again at once."""
        self._calls = max(0, self._calls - 1)
        if not self._calls:
            self.mend()

    def before_saving(self, *_: Any) -> None:
        """Before the optimizer saves: repair a step that raised past its guard."""
        if not self._calls:
            self.mend()
        self._weights.expand()

    def before_loading(self, *_: Any) -> None:
        """Before the optimizer loads; not while other weights are shown."""
        self._check_no_block("optimizer.load_state_dict()")
        self.before_saving()

    def _check_no_block(self, what: str) -> None:
        if self.block:
            raise FlowError(
                f"{what} was called inside flow.{self.block}, where the network does not show "
                "its weights of this step: call it outside the with block"
            )

    def mend(self) -> None:
        """Continue after a step that raised: do not count it, and adopt its weights as W."""
        if self._inside:
            self._mend()

    @torch.no_grad()
    def _mend(self) -> None:
        log.warning("an optimizer.step() was broken off after step %d", self._record.k)
        self._weights.paces.forget()
        try:
            if self._entered:
                self._leave()
            if self._weights.flags.kept is None:  # a capture has done nothing to the weights
                self._weights.write(self._record.k, self._reuse)
        except NMFlowError as error:
            # The caller gets the exception of the step; the next step raises this one again.
            log.warning("%s", error)
        self._inside = self._entered = False

    def lend(self, args: tuple, kwargs: dict) -> None:
        """Put W into the parameters for a method that moves weights between steps."""
        if self.block == FINAL_MASKS:
            self._edits.check_final(self._record.k)
        else:
            self._check_no_block("a change of the optimizer's mode")
            self._edits.check(self._record.k)
        with torch.no_grad():
            self._weights.enter()

    @torch.no_grad()
    def give_back(self, out: Any = None) -> Any:
        """Take W out of the parameters after such a method, and write W̃ from the W that it left."""
        self._leave()
        if self.block == FINAL_MASKS:
            self._edits.harden(self._record.k)
        else:
            self._weights.write(self._record.k)
        return out
