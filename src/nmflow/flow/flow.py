"""`Flow`: a recipe at work on a model's weights, and what you do with it beside the loop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.errors import FlowError
from nmflow.flow.before import Before
from nmflow.flow.observing import Observation, Observer
from nmflow.flow.sharding import region
from nmflow.flow.slots import Slot
from nmflow.flow.state import Run
from nmflow.flow.stepper import Stepper
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe
from nmflow.recipes.schedules import Stage
from nmflow.select.plan import Plan

log = logging.getLogger("nmflow")


@dataclass(frozen=True)
class FlowStage:
    """Where a flow is: the phase, and what each target goes through.

    Attributes:
        phase: `"dense"`, `"decay"`, `"sparse"`, `"finetune"` or `"final"`.
        patterns: the pattern of each target's mask now, by label; None while it is dense.
        delta: δ now; the largest one where the hybrid's frames differ between targets.
        targets: the whole `Stage` of each target, by label.
    """

    phase: str
    patterns: dict[str, Pattern | None]
    delta: float
    targets: dict[str, Stage]


class Flow:
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
        recipe: Recipe,
        chosen: Plan,
        total_steps: int,
        mask_interval: int,
        freeze_mask: bool,
    ) -> None:
        self.model, self.recipe, self.plan, self.total_steps = model, recipe, chosen, total_steps
        self._observations: list[Observation] = []
        self._hard = self._finalized = False
        run = Run(recipe, total_steps, mask_interval, freeze_mask)
        slots = _slots(model, optimizers, recipe, chosen)
        owned = {id(o): [s for s in slots if s.optimizer is o] for o in optimizers}
        self._steppers = [
            Stepper(run, o, owned[id(o)], self._observations) for o in optimizers if owned[id(o)]
        ]

    def _start(self) -> None:
        for stepper in self._steppers:
            stepper.check()
        before = [Before(stepper.optimizer, stepper.slots) for stepper in self._steppers]
        try:
            for stepper in self._steppers:
                stepper.start()
        except BaseException:
            for stepper, one in zip(self._steppers, before, strict=True):
                stepper.unhook()
                one.restore()
            raise
        log.info("attached %s to %d weights", self.recipe.name, len(self.plan))

    # -- where it is ---------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        """k, the optimizer steps done; the fewest, where several optimizers step on their own."""
        return min(stepper.k for stepper in self._steppers)

    @property
    def stage(self) -> FlowStage:
        """The phase, the pattern of each target and δ, now."""
        return self.stage_at(self.steps_done)

    def stage_at(self, k: int) -> FlowStage:
        """The phase, the pattern of each target and δ after `k` optimizer steps."""
        stages = {
            t.label: self.recipe.stage(k, self.total_steps, t.pattern, t.length) for t in self.plan
        }
        return FlowStage(
            next(iter(stages.values())).phase,
            {label: stage.pattern for label, stage in stages.items()},
            max(stage.delta for stage in stages.values()),
            stages,
        )

    def dense_weights(self) -> dict[str, Tensor]:
        """The dense weights W by parameter name: the tensors themselves, not copies."""
        self._check_live("dense_weights()")
        slots = [slot for stepper in self._steppers for slot in stepper.slots]
        return {s.name: s.dense if self.recipe.prunes else s.param for s in slots}

    def observe(self, observer: Observer, every: int = 1) -> Observation:
        """Call `observer(step, views)` before an optimizer step, on what it will step with.

        Args:
            observer: called with the number of steps done and a `View` of each target.
            every: call it at steps 0, `every`, 2 · `every` … only; the others cost nothing.

        Returns:
            A handle; its `remove()` ends it.

        Raises:
            FlowError: `every` is not a whole number of at least 1.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise FlowError(f"every is {every!r}: give a whole number of steps, at least 1")
        observation = Observation(observer, every, self._observations)
        self._observations.append(observation)
        return observation

    # -- what one does with it -----------------------------------------------------------------

    @contextlib.contextmanager
    def hard(self) -> Iterator[None]:
        """Show the network with the final N:M masks, for an honest evaluation in mid-decay.

        Raises:
            FlowError: the flow is finalized, or an optimizer steps inside.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=9)
            >>> with flow.hard():
            ...     int((model.weight != 0).sum())
            8
        """
        self._check_live("hard()")
        if self._hard:
            yield
            return
        for stepper in self._steppers:
            stepper.check_untouched()
        self._hard = True
        try:
            for stepper in self._steppers:
                stepper.harden()
            yield
        finally:
            self._hard = False
            for stepper in self._steppers:
                stepper.soften()

    def sync(self) -> None:
        """Take what the parameters hold now as the dense weights, where somebody wrote them.

        For after a `load_state_dict` of other weights in mid-run. The step does not change.
        """
        self._check_live("sync()")
        for stepper in self._steppers:
            stepper.sync()

    def finalize(self) -> None:
        """Leave a plain model: exact N:M weights, no hooks, an optimizer without our state.

        Raises:
            FlowError: called twice, or inside `hard()`.
            StateError: somebody wrote a weight since the last step.
            WeightError: a weight is not finite.
        """
        self._check_live("finalize()")
        if self._hard:
            raise FlowError("finalize() was called inside hard(): call it after the with block")
        for stepper in self._steppers:
            stepper.check_untouched()
        for stepper in self._steppers:
            stepper.check_finite()
        if self.steps_done < self.total_steps:
            log.warning(
                "finalized after %d of %d steps: the masks are final, the recipe is not",
                self.steps_done,
                self.total_steps,
            )
        for stepper in self._steppers:
            stepper.harden()
            stepper.stop()
        self._finalized = True

    def __repr__(self) -> str:
        where = "finalized" if self._finalized else f"step {self.steps_done} of {self.total_steps}"
        return f"<Flow {self.recipe.name}, {len(self.plan)} weights, {where}>"

    def _check_live(self, what: str) -> None:
        if self._finalized:
            raise FlowError(f"{what} was called after finalize(): attach again to go on training")


def _slots(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    recipe: Recipe,
    chosen: Plan,
) -> list[Slot]:
    """One slot a parameter, with the optimizer that owns it."""
    params = dict(model.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in reversed(params.items())}
    owners: dict[int, Optimizer] = {}
    for one in optimizers:
        for group in one.param_groups:
            for p in group["params"]:
                if owners.setdefault(id(p), one) is not one:
                    raise FlowError(
                        f"'{names.get(id(p), 'a parameter')}' is in two of the optimizers, which "
                        "would both step it: leave it to one of them"
                    )
    slots = []
    for name in dict.fromkeys(t.name for t in chosen):
        param = params[name]
        if id(param) not in owners:
            raise FlowError(
                f"'{name}' is not in the optimizer, so nothing would train its dense weights: add "
                "it to the optimizer's parameters, or exclude it"
            )
        regions = []
        for target in (t for t in chosen if t.name == name):
            used = recipe.patterns(target.pattern, target.length)
            regions.append(region(param, target, max(p.m for p in used)))
        slots.append(Slot(name, param, owners[id(param)], regions))
    return slots
