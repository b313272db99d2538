"""Hugging Face's `Trainer`: a callback that attaches a recipe, and honest evaluation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from nmflow.errors import FlowError, StateError
from nmflow.flow import Flow, attach
from nmflow.flow.sparse_steps import Mode
from nmflow.integrations import again
from nmflow.integrations.checkpoints import ExactCheckpoints, Witness, check_saved
from nmflow.integrations.metrics import PHASES, Metrics, figures
from nmflow.recipes import DEFAULT, Recipe
from nmflow.select.plan import Names, Patterns

__all__ = [
    "PHASES",
    "ExactCheckpoints",
    "FinalMasksEvaluation",
    "HardEvaluation",
    "NMFlowCallback",
    "figures",
]


class NMFlowCallback(Witness, TrainerCallback):
    r"""Train to N:M with an unchanged `Trainer`: `Trainer(..., callbacks=[NMFlowCallback(...)])`.

    It attaches when training begins, after the `Trainer` has made its optimizer and restored a
    checkpoint, and takes the number of steps from it. `trainer.train(resume_from_checkpoint=...)`
    resumes exactly, since the optimizer's state holds the recipe's. The `Trainer`'s state holds
    checksums of the network, so a checkpoint that was loaded in part is refused. After a training
    that was broken off (Ctrl-C, an error, `auto_find_batch_size`) call `train()` again: it resumes,
    or begins with the dense weights, as a dense training would.

    The evaluations of the `Trainer`'s strategy see the final N:M network, as `flow.final_masks()`
    shows it. A checkpoint that is saved right after one holds that network too, and still resumes
    exactly. For your own `trainer.evaluate()` during training, use `FinalMasksEvaluation`.

    Every log entry gains the figures of `Metrics`, in `trainer.state.log_history` and in the
    trackers of `report_to`. Flip rates compare masks `logging_steps` apart. The history also has
    `nmflow_phase` and `nmflow_pattern` as text.

    `load_best_model_at_end` loads the best of the final N:M networks that were evaluated, and
    training ends on it. Each checkpoint must be saved right after an evaluation, which that option
    demands anyway.

    Args:
        recipe: a name or a recipe, see `nmflow.attach`.
        pattern: N:M with N kept, or patterns by glob.
        include: presets or globs of the weights.
        exclude: presets or globs to leave out.
        remainder: `"auto"`, `"error"` or `"skip"` an axis that M does not divide, see `plan`.
        mask_interval: steps between masks.
        freeze_mask: hold the mask through the fine-tune phase.
        sparse_steps: `"on"`, `"auto"` or `"off"`: layers compute on kept places where they can.
        total_steps: K, the optimizer steps of the run; None takes the `Trainer`'s.
        final_masks: evaluate the final N:M network while the mask still decays. False evaluates the
            network as it is at that step, which scores better than N:M would.
        finalize: leave a plain N:M model when training ends; with False call
            `callback.flow.finalize()` yourself.

    Raises:
        FlowError: `load_best_model_at_end` without `final_masks`, which would put weights of
            mid-decay into the network; a second training after one that came to its end.
        StateError: after a resume, or with the best model at the end, the network does not hold
            the weights that the checkpoint was saved with; a checkpoint without the recipe's state.

    Example:
        >>> from nmflow.integrations.transformers import NMFlowCallback
        >>> callback = NMFlowCallback("mdgf-exponential", "1:16", include="ff")
        >>> callback.flow is None  # attached when training begins
        True
    """

    def __init__(
        self,
        recipe: str | Recipe = DEFAULT,
        pattern: Patterns = "1:16",
        include: Names = "all",
        exclude: Names = (),
        *,
        remainder: str = "auto",
        mask_interval: int = 1,
        freeze_mask: bool = False,
        sparse_steps: Mode = "off",
        total_steps: int | None = None,
        final_masks: bool = True,
        finalize: bool = True,
    ) -> None:
        self.flow: Flow | None = None
        self.live, self._training = False, False
        self.final_masks = final_masks
        self._hooks: list[Any] = []
        self._shown: contextlib.AbstractContextManager[None] | None = None
        self._total_steps, self._finalize = total_steps, finalize
        self._how: dict[str, Any] = {
            "recipe": recipe,
            "pattern": pattern,
            "include": include,
            "exclude": exclude,
            "remainder": remainder,
            "mask_interval": mask_interval,
            "freeze_mask": freeze_mask,
            "sparse_steps": sparse_steps,
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
        if args.load_best_model_at_end and not self.final_masks:
            raise FlowError(
                "load_best_model_at_end is True and final_masks False: the best checkpoint may be "
                "from the middle of the decay, where the network is not N:M yet; leave out one of "
                "them"
            )
        if model is None or optimizer is None:
            raise FlowError("the Trainer gave no model or no optimizer when training began")
        written = self._leave(state, model) if self.live else ()
        self.witness_resume(state, model, written)
        steps = self._total_steps or state.max_steps
        self.flow = attach(model, optimizer, total_steps=steps, **self._how)
        if self._total_steps is None:
            mend = "with its optimizer's state (save_only_model=False)"
            again.check_resumed(self.flow, state.global_step, mend)
        self.live, self._training = True, True
        # After an evaluation that was broken off the final masks are shown, when a state is loaded.
        self._hooks = [
            one.register_load_state_dict_pre_hook(self._give_way, prepend=True)
            for one in self.flow.optimizers
        ]
        self._metrics = Metrics(self.flow, every=max(1, int(state.logging_steps or 1)))
        _before_the_trackers(self)
        if args.eval_on_start:
            self._show()

    # What a save will hold is noted when it is shown.
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the final masks, if an evaluation is next."""
        if control.should_evaluate:
            self._show()
        super().on_step_end(args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the final masks, if an evaluation is next."""
        if control.should_evaluate:
            self._show()
        super().on_epoch_end(args, state, control, **kwargs)

    # Not when an evaluation ends: with several data sets another one follows.
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the masks of the step again."""
        self._hide()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the masks of the step again."""
        super().on_save(args, state, control, **kwargs)
        self._hide()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the figures of the run beside the loss."""
        if self.flow is None or not self.live or not state.log_history:
            return
        found = self._metrics()
        state.log_history[-1].update({**figures(self.flow), **found})
        if logs is not None:
            logs.update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave an exactly N:M model, unless told to wait."""
        self._training = False
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and self.flow is not None and self.live:
            # The Trainer has loaded it: an N:M network, which all masks of its own magnitudes keep.
            self._give_way()
            self.flow.sync()
            if state.is_world_process_zero:
                check_saved(Path(best), self.flow.model)
        self._hide()
        for hook in self._hooks:
            hook.remove()
        if self.flow is not None and self.live and self._finalize:
            self.flow.finalize()
            self.live = False

    def _leave(self, state: TrainerState, model: nn.Module) -> Collection[str]:
        """Leave a training of the same network that was broken off, and is begun or resumed now.

        Returns:
            The names of the weights that it wrote from a checkpoint's state.

        Raises:
            FlowError: the callback's training came to its end, or was of another network.
        """
        assert self.flow is not None
        if not self._training or self.flow.model is not model:
            raise FlowError(
                "this NMFlowCallback is attached already: give every training one of its own, and "
                "call callback.flow.finalize() or .detach() if that network is to be trained anew"
            )
        self._give_way()
        for hook in self._hooks:
            hook.remove()
        self.live, names = False, self.flow.dense_weights().keys()
        again.leave(self.flow, resumed=bool(state.global_step))
        return names

    def _show(self) -> None:
        if self.flow is not None and self.live and self.final_masks and self._shown is None:
            self._shown = self.flow.final_masks()
            self._shown.__enter__()

    def _give_way(self, *_: Any) -> None:
        """Show the masks of the step again, where a network that was loaded is to stay."""
        with contextlib.suppress(StateError):
            self._hide()

    def _hide(self) -> None:
        if self._shown is not None:
            shown, self._shown = self._shown, None
            shown.__exit__(None, None, None)


class FinalMasksEvaluation:
    """A mixin whose `evaluate` and `predict` see the final N:M network, whoever calls them.

    `NMFlowCallback` alone sees to the evaluations that the `Trainer`'s strategy asks for.

    Example:
        >>> from transformers import Trainer
        >>> from nmflow.integrations.transformers import FinalMasksEvaluation
        >>> class SparseTrainer(FinalMasksEvaluation, Trainer):
        ...     pass
    """

    callback_handler: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`Trainer.evaluate` under `flow.final_masks()`."""
        with self._final_masks():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.predict` under `flow.final_masks()`."""
        with self._final_masks():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def _final_masks(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for one in self.callback_handler.callbacks:
            if isinstance(one, NMFlowCallback) and one.live and one.flow and one.final_masks:
                stack.enter_context(one.flow.final_masks())
        return stack


HardEvaluation = FinalMasksEvaluation  # its name before


def _before_the_trackers(callback: TrainerCallback) -> None:
    """Move a callback in front of those that report, so that they see what it logs.

    A `Trainer` puts its trackers before the callbacks that it is given, and hands none of them its
    list: it is found where the handler calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            others = [c for c in handler.callbacks if c is not callback]
            first = sum(isinstance(c, DefaultFlowCallback) for c in others[:1])
            # A new list: the handler is walking along the old one.
            handler.callbacks = [*others[:first], callback, *others[first:]]
            return
        frame = frame.f_back
