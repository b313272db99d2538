"""Hugging Face's `Trainer`: a callback that attaches a recipe, and honest evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nmflow.errors import FlowError
from nmflow.flow import Flow, attach
from nmflow.pattern import Pattern
from nmflow.recipes import DEFAULT, Recipe


class NMFlowCallback(TrainerCallback):
    r"""Train to N:M with an unchanged `Trainer`: `Trainer(..., callbacks=[NMFlowCallback(...)])`.

    It attaches when training begins, after the `Trainer` has made its optimizer and restored a
    checkpoint, and takes the number of steps from it. `trainer.train(resume_from_checkpoint=...)`
    goes on exactly, since the recipe's state travels in the optimizer's.

    Every log entry of `trainer.state.log_history` gains `nmflow_delta`, δ, and `nmflow_density`,
    the share of the targets' weights that the mask keeps.

    Args:
        recipe: a name or a recipe, see `nmflow.attach`.
        pattern: N:M with N kept, or patterns by glob.
        include: presets or globs of the weights.
        exclude: presets or globs to leave out.
        remainder: `"auto"`, `"error"` or `"skip"` an axis that M does not divide, see `plan`.
        mask_interval: steps between masks.
        freeze_mask: hold the mask through the fine-tune phase.
        total_steps: K; the `Trainer`'s number of optimizer steps as a rule.
        finalize: leave a plain N:M model when training ends; with False call
            `callback.flow.finalize()` yourself.

    Raises:
        FlowError: `load_best_model_at_end`, which would put weights of mid-decay into the network.

    Example:
        >>> from nmflow.integrations.transformers import NMFlowCallback
        >>> callback = NMFlowCallback("mdgf-exponential", "1:16", include="ff")
        >>> callback.flow is None  # attached when training begins
        True
    """

    def __init__(
        self,
        recipe: str | Recipe = DEFAULT,
        pattern: str | Pattern | Mapping[str, str | Pattern] = "1:16",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        *,
        remainder: str = "auto",
        mask_interval: int = 1,
        freeze_mask: bool = False,
        total_steps: int | None = None,
        finalize: bool = True,
    ) -> None:
        self.flow: Flow | None = None
        self.live = False
        self._total_steps, self._finalize = total_steps, finalize
        self._how: dict[str, Any] = {
            "recipe": recipe,
            "pattern": pattern,
            "include": include,
            "exclude": exclude,
            "remainder": remainder,
            "mask_interval": mask_interval,
            "freeze_mask": freeze_mask,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach, now that the optimizer is made and, on a resume, its state restored."""
        if args.load_best_model_at_end:
            raise FlowError(
                "load_best_model_at_end is True: the best checkpoint may lie in mid-decay, where "
                "the network is not N:M yet; set it to False"
            )
        if self.live:
            raise FlowError(
                "this NMFlowCallback is attached already: give every training one of its own"
            )
        if model is None or optimizer is None:
            raise FlowError("the Trainer gave no model or no optimizer when training began")
        steps = self._total_steps or state.max_steps
        self.flow = attach(model, optimizer, total_steps=steps, **self._how)
        self.live = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put δ and the density beside the loss."""
        if self.flow is not None and self.live and state.log_history:
            state.log_history[-1].update(figures(self.flow))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave an exactly N:M model, unless told to wait."""
        if self.flow is not None and self.live and self._finalize:
            self.flow.finalize()
            self.live = False


class HardEvaluation:
    """A mixin that evaluates the final N:M network, also while the mask still decays.

    Without it a `Trainer` evaluates in mid-decay what the network computes with at that step,
    which is better than what N:M would give.

    Example:
        >>> from transformers import Trainer
        >>> from nmflow.integrations.transformers import HardEvaluation
        >>> class SparseTrainer(HardEvaluation, Trainer):
        ...     pass
    """

    callback_handler: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer.evaluate` under `flow.hard()`."""
        with contextlib.ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, NMFlowCallback) and callback.live and callback.flow:
                    stack.enter_context(callback.flow.hard())
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


def figures(flow: Flow) -> dict[str, Any]:
    """δ, the density of the targets' masks, and the phase of a flow now."""
    stage = flow.stage
    kept = total = 0.0
    for target in flow.plan:
        pattern = stage.patterns[target.label]
        kept += target.numel * (pattern.density if pattern else 1.0)
        total += target.numel
    return {
        "nmflow_delta": stage.delta,
        "nmflow_density": kept / total,
        "nmflow_phase": stage.phase,
    }
