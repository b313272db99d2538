"""`Flow`: a recipe at work on a model's weights, and what you do with it beside the loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.flow import copies
from nmflow.flow.before import Before
from nmflow.flow.blocks import Blocks, Dense, FinalMasks
from nmflow.flow.copies import Copy
from nmflow.flow.graphs import GraphedStep, on_cuda
from nmflow.flow.loading import Loading, watch
from nmflow.flow.looking import Looking
from nmflow.flow.placing import slots_of
from nmflow.flow.sparse_steps import Mode
from nmflow.flow.state import Run
from nmflow.flow.stepper import Stepper
from nmflow.flow.thawed import watch_frozen
from nmflow.recipes import Recipe
from nmflow.select.plan import Plan

log = logging.getLogger("nmflow")
T = TypeVar("T")


class Flow(Looking):
    """A recipe at work on a model's weights; made by `attach`.

    Attributes:
        model: the model.
        recipe: the recipe.
        plan: the targets, with what was left out and why.
        total_steps: K.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        chosen: Plan,
        run: Run,
        norms: Mapping[str, Tensor],
        sparse_steps: Mode = "off",
    ) -> None:
        self.model, self.plan, self._norms = model, chosen, norms
        self.recipe: Recipe = run.recipe
        self.total_steps = run.total_steps
        self._observations = []
        self._loading: list[Loading] = []
        slots = slots_of(model, optimizers, run.recipe, chosen, norms)
        owned = {id(o): [s for s in slots if s.optimizer is o] for o in optimizers}
        self._steppers = [
            Stepper(run, o, owned[id(o)], self._observations, sparse_steps)
            for o in optimizers
            if owned[id(o)]
        ]
        watch_frozen(model, chosen, self._steppers)
        self._blocks = Blocks(self._steppers)

    def _start(self) -> None:
        for stepper in self._steppers:
            stepper.check()
        before = [Before(stepper.optimizer, stepper.slots) for stepper in self._steppers]
        try:
            for stepper in self._steppers:
                stepper.start()
            if self.recipe.prunes:
                slots = [slot for stepper in self._steppers for slot in stepper.slots]
                self._loading = watch(slots)
        except BaseException:
            for stepper, one in zip(self._steppers, before, strict=True):
                stepper.unhook()
                one.restore()
            raise
        log.info("attached %s to %d weights", self.recipe.name, len(self.plan))

    def graphed(self, step: Callable[[], T]) -> GraphedStep[T]:
        """A training step that runs as a CUDA graph, captured anew where the recipe changes it.

        Each call is one step of training: it looks for writes by others, tells the graph its δ,
        replays it and counts. A step runs without a graph before its first capture, and whenever
        it differs from the last step: a new phase, another pattern, new masks that will be held.
        Weights that do not share a launch (panels, two masks, float64, sharded weights; S-STE,
        MaxQ and STEP's second phase) never have a graph, nor do steps that an observer sees.
        `GraphedStep.why` gives the reason.

        Args:
            step: does zero_grad, forward, backward and `optimizer.step()`, on tensors that keep
                their memory. It must not wait for the device, and has no GradScaler. The next
                call overwrites what it returned.

        Returns:
            A callable to call instead of `step`.

        Raises:
            FlowError: there is no CUDA device, the weights are elsewhere, the optimizer has
                capturable=False, or the flow is finalized.

        Example:
            >>> step = flow.graphed(train_one_batch)  # doctest: +SKIP
            >>> for batch in loader:  # doctest: +SKIP
            ...     x.copy_(batch)
            ...     loss = step()
        """
        self._check_live("graphed()")
        return on_cuda([s.graphs for s in self._steppers], step)

    # -- what one does with it -----------------------------------------------------------------

    def final_masks(self, copy: Copy | None = None) -> contextlib.AbstractContextManager[None]:
        """Show the network with the final N:M masks, to evaluate it while weights still decay.

        Args:
            copy: a copy of the network, such as a moving average, which is shown as
                `finalize_copy` would leave it, instead of the network itself.

        Returns:
            A context manager, which may be nested.

        Raises:
            FlowError: the flow is finalized or inside `dense()`; an optimizer steps, or loads a
                state, inside.
            StateError: somebody wrote a weight since the last step, or inside. A write inside
                stays in the network, and `sync` adopts it.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=9)
            >>> with flow.final_masks():
            ...     int((model.weight != 0).sum())
            8
        """
        if copy is not None:
            return copies.pruned(copy, self.model, self._to_prune, self._norms)
        self._check_live("final_masks()")
        return FinalMasks(self._blocks)

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """Show the dense weights W, adopt their values at the end of the block, and show W̃ again.

        Use it to change weights beside the optimizer: a constraint after each step, another
        checkpoint, new values for some units, an average of W. A block that raises changes nothing.
        Held masks stay, except those that are due now and those of weights that `load_state_dict`
        wrote.

        Returns:
            A context manager. It does not turn gradients off.

        Raises:
            FlowError: the flow is finalized or in a block; an optimizer steps, or loads a state,
                inside; a layer was replaced.
            StateError: somebody wrote a weight since the last step, or gave it another shape.
            WeightError: the block left a NaN or an infinity.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, "ste", "1:4", include="*", total_steps=9)
            >>> with flow.dense(), torch.no_grad():
            ...     _ = model.weight.clamp_(-0.25, 0.25)
            >>> float(flow.dense_weights()["weight"].abs().max()) <= 0.25
            True
        """
        self._check_live("dense()")
        return Dense(self._blocks)

    def sync(self) -> None:
        """Adopt as dense weights what somebody wrote into the parameters since the last step.

        `W = where(param != W̃, param, W)`: a value that equals W̃ is no write, so a pruned weight
        that nobody wrote keeps its W. A weight from `load_state_dict` that differs from W̃ is
        adopted whole, zeros too. A held mask is taken anew in the written groups. The step does
        not change.

        Raises:
            FlowError: the flow is finalized or in a block; a layer was replaced.
            StateError: a weight has another shape.
            WeightError: somebody wrote a NaN or an infinity; nothing is adopted then.
        """
        self._check_live("sync()")
        self._blocks.check_none("sync()")
        for stepper in self._steppers:
            stepper.edits.check_writes(stepper.k)
        with torch.no_grad():
            for stepper in self._steppers:
                stepper.edits.sync(stepper.k)

    def finalize(self) -> None:
        """Leave a plain model: exact N:M weights, no hooks, an optimizer without nmflow's state.

        Raises:
            FlowError: called twice, or inside a block; a layer was replaced.
            StateError: somebody wrote a weight since the last step.
            WeightError: a weight is not finite.
        """
        self._check_live("finalize()")
        self._blocks.check_none("finalize()")
        for stepper in self._steppers:
            stepper.edits.check(stepper.k)
        for stepper in self._steppers:
            stepper.edits.check_finite(stepper.k)
        if self.steps_done < self.total_steps:
            log.warning(
                "finalized after %d of %d steps: the masks are final, the recipe is not",
                self.steps_done,
                self.total_steps,
            )
        for stepper in self._steppers:
            with torch.no_grad():
                stepper.edits.harden(stepper.k)
            stepper.stop()
        self._end("finalized")

    def detach(self) -> None:
        """Leave the dense network and a clean optimizer, as if no recipe had been attached.

        For a run that you give up: the parameters hold W, which no mask has touched, and another
        recipe may be attached. What a frozen mask pruned under `sparse_steps` is 0 in W.

        Raises:
            FlowError: the flow has ended, or is inside a block; a layer was replaced.
            StateError: somebody wrote a weight since the last step.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, "ste", "1:4", include="*", total_steps=9)
            >>> flow.detach()
            >>> int((model.weight != 0).sum())
            32
        """
        self._check_live("detach()")
        self._blocks.check_none("detach()")
        for stepper in self._steppers:
            stepper.edits.check(stepper.k)
        for stepper in self._steppers:
            with torch.no_grad():
                stepper.edits.open()
            stepper.stop()
        self._end("detached")

    def _end(self, how: str) -> None:
        for hook in self._loading:
            hook.remove()
        self._ended = how

    def finalize_copy(self, copy: Copy) -> None:
        """Make a copy of the network, such as a moving average of it, exactly N:M, in place.

        Each target of the copy keeps the N largest of its own weights in every group of M. An
        average of a network in training is not N:M, since the averaged masks differ. You may call
        this before and after `finalize`.

        Args:
            copy: a module with the model's parameters, under their names or with the prefixes of
                wrappers, or a dictionary of its tensors.

        Raises:
            FlowError: the copy lacks a weight, has it in another shape, or shares it with the
                model; nothing is changed.
            WeightError: a weight is not finite; nothing is changed.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=9)
            >>> average = torch.optim.swa_utils.AveragedModel(model)
            >>> flow.finalize_copy(average)
            >>> nmflow.holds(average.module.weight, "1:4")
            True
        """
        copies.prune(copy, self.model, self._to_prune, self._norms)

    @property
    def _to_prune(self) -> Plan:
        return self.plan if self.recipe.prunes else Plan()


def let_go(flow: Flow) -> None:
    """End a flow where a trainer restored the weights and the optimizer's state: both stay."""
    for stepper in flow._steppers:
        stepper.unhook()
    flow._end("detached")
