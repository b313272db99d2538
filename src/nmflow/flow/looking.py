"""What a flow reports: where it is, its dense weights, and how its layers compute."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError
from nmflow.flow.flow_stage import FlowStage
from nmflow.flow.observing import Observation, Observer
from nmflow.flow.sparse_steps import LayerSteps
from nmflow.flow.stepper import Stepper
from nmflow.numbers import check_whole
from nmflow.recipes import Recipe
from nmflow.select.plan import Plan

L = TypeVar("L", bound="Looking")


class Looking:
    """The part of a `Flow` that changes nothing.

    Attributes:
        recipe: the recipe.
        plan: the targets, with what was left out and why.
        total_steps: K.
    """

    recipe: Recipe
    plan: Plan
    total_steps: int
    _steppers: Sequence[Stepper]
    _observations: list[Observation]
    _ended = ""  # how, once it has

    @property
    def steps_done(self) -> int:
        """k, the optimizer steps done; the fewest, where several optimizers step on their own."""
        return min(stepper.k for stepper in self._steppers)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that step the weights, without the wrappers of a trainer."""
        return [stepper.optimizer for stepper in self._steppers]

    @property
    def stage(self) -> FlowStage:
        """The phase, the pattern of each target and δ, now."""
        return self.stage_at(self.steps_done)

    def stage_at(self, k: int) -> FlowStage:
        """The phase, the pattern of each target and δ after `k` optimizer steps."""
        run = min(self._steppers, key=lambda stepper: stepper.k).run
        return FlowStage.of(run.stages(self.plan, k))

    def dense_weights(self) -> dict[str, Tensor]:
        """The dense weights W by parameter name: the tensors themselves, not copies."""
        self._check_live("dense_weights()")
        slots = [slot for stepper in self._steppers for slot in stepper.slots]
        return {s.name: s.weight for s in slots}

    def observe(self, observer: Observer, *, every: int = 1) -> Observation:
        """Call `observer(step, views)` before an optimizer step, on what it will step with.

        Args:
            observer: called with the number of steps done and a `View` of each target.
            every: call it at steps 0, `every`, 2 · `every` … only; the others cost nothing.

        Returns:
            A handle; its `remove()` ends it.

        Raises:
            FlowError: `every` is not a whole number of at least 1.
        """
        check_whole("every", every, FlowError, 1, " of steps")
        observation = Observation(observer, every, self._observations)
        self._observations.append(observation)
        for stepper in self._steppers:
            stepper.layers.show(stepper.run, stepper.k)
        return observation

    def explain(self) -> LayerSteps:
        """How each weight's layer computes now, on kept places or dense, and why; see `attach`.

        Returns:
            An entry a weight; as text it is a table.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(16, 8)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, "ste", "1:8", include="*", total_steps=9)
            >>> print(flow.explain())
            weight  forward and backward          optimizer step
            ------------------------------------------------------------------
            weight  dense: sparse_steps is 'off'  whole: sparse_steps is 'off'
        """
        return LayerSteps(tuple(x for s in self._steppers for x in s.layers.explain()))

    def _check_live(self, what: str) -> None:
        if self._ended:
            when = "after finalize() or detach()"
            when = "on a copy of a flow" if self._ended == "copied" else when
            raise FlowError(f"{what} was called {when}: attach again to go on training")

    def __repr__(self) -> str:
        where = self._ended or f"step {self.steps_done} of {self.total_steps}"
        return f"<Flow {self.recipe.name}, {len(self.plan)} weights, {where}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A flow that trains is no value: pickle refuses it."""
        if self._ended:
            return super().__reduce_ex__(protocol)
        raise FlowError(
            "a flow that trains cannot be pickled: save model.state_dict() and "
            "optimizer.state_dict(), which hold the whole run, and load them after another attach()"
        )

    def __deepcopy__(self: L, memo: dict[int, Any]) -> L:
        """The flow of a copied model has ended, since no optimizer steps for it."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(deepcopy(vars(self), memo))
        copied._ended = self._ended or "copied"
        return copied
