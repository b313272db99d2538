"""Lightning: a callback that attaches a recipe to the trainer's optimizers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl

from nmflow.errors import FlowError
from nmflow.flow import Flow, attach
from nmflow.integrations import again, checkpoints
from nmflow.integrations.metrics import Metrics
from nmflow.recipes import DEFAULT, Recipe
from nmflow.select.plan import Names, Patterns


class NMFlowCallback(pl.Callback):
    r"""Train to N:M with an unchanged `Trainer`: `Trainer(..., callbacks=[NMFlowCallback(...)])`.

    It attaches when training starts, after Lightning has made the optimizers and restored a
    checkpoint, and takes the number of steps from the trainer. `trainer.fit(..., ckpt_path=...)`
    resumes exactly, since the optimizer's state contains the recipe's. A checkpoint holds checksums
    of the network, and is refused if it was loaded in part (`strict_loading` off). After a training
    that was broken off by an error call `fit` again: it resumes, or begins with the dense weights.

    Validation sees the final N:M network, as `flow.final_masks()` shows it, until the next batch
    of training. A checkpoint that a `ModelCheckpoint` saves after it holds that network too, and
    still resumes exactly: the best checkpoint is N:M even if the mask was still decaying.

    The trainer's loggers get the figures of `nmflow.integrations.metrics.Metrics`, every
    `log_every_n_steps`.

    Args:
        recipe: a name or a recipe, see `nmflow.attach`.
        pattern: N:M with N kept, or patterns by glob or preset.
        include: presets or globs of the weights.
        exclude: presets or globs to leave out.
        total_steps: K; the trainer's estimate of its optimizer steps by default.
        final_masks: evaluate the final N:M network while the mask still decays; False evaluates
            what the network computes with at that step, which is better than N:M would be.
        finalize: leave a plain N:M model when training ends.
        **options: `remainder`, `mask_interval`, `freeze_mask` and `sparse_steps` of
            `nmflow.attach`.

    Raises:
        FlowError: the number of steps is not known.
        StateError: a resume, where the network does not hold what the checkpoint was saved of, or
            the checkpoint does not hold the recipe's state.

    Example:
        >>> from nmflow.integrations.lightning import NMFlowCallback
        >>> NMFlowCallback("mdgf-exponential", "1:16", include="ff").flow is None
        True
    """

    def __init__(
        self,
        recipe: str | Recipe = DEFAULT,
        pattern: Patterns = "1:16",
        include: Names = "all",
        exclude: Names = (),
        *,
        total_steps: int | None = None,
        final_masks: bool = True,
        finalize: bool = True,
        **options: Any,
    ) -> None:
        self.flow: Flow | None = None
        self._live, self._training = False, False
        self._total_steps, self._finalize = total_steps, finalize
        self._final_masks = final_masks
        self._shown: AbstractContextManager[None] | None = None
        self._saved: dict[str, str] | None = None
        self._metrics: Metrics | None = None
        self._how = {
            "recipe": recipe,
            "pattern": pattern,
            "include": include,
            "exclude": exclude,
            **options,
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note what is saved."""
        checkpoint[checkpoints.WITNESS] = checkpoints.sums(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what was saved until training starts."""
        self._saved = checkpoint.get(checkpoints.WITNESS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach, now that the optimizers are made and, on a resume, their state restored."""
        steps = self._total_steps or trainer.estimated_stepping_batches
        if steps in (-1, float("inf")):
            raise FlowError(
                "total_steps is None, and the Trainer has no end to take it from: give "
                "total_steps here, or max_steps or max_epochs to the Trainer"
            )
        saved, self._saved = self._saved, None
        if saved is not None and trainer.is_global_zero:
            checkpoints.check(saved, pl_module)
        if self.flow is not None and self._training and self.flow.model is pl_module:
            again.leave(self.flow, resumed=trainer.ckpt_path is not None)
        self.flow = attach(pl_module, trainer.optimizers, total_steps=int(steps), **self._how)
        if self._total_steps is None and trainer.ckpt_path is not None:
            mend = "with the optimizers' states (save_weights_only=False)"
            again.check_resumed(self.flow, trainer.global_step, mend)
        self._live, self._training = True, True
        every = getattr(trainer, "log_every_n_steps", 0)  # a connector puts it there
        if trainer.loggers and every:
            self._metrics = Metrics(self.flow, every=every)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Show the masks of the step again."""
        self._hide()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Log the figures of the run, as callbacks of Lightning's own do."""
        if self._metrics is not None and trainer._logger_connector.should_update_logs:
            for logger in trainer.loggers:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics(self._metrics(), step=step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the final masks."""
        if self.flow is not None and self._live and self._final_masks and self._shown is None:
            self._shown = self.flow.final_masks()
            self._shown.__enter__()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave `final_masks()` when validation was broken off."""
        self._hide()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an exactly N:M model, unless told to wait."""
        self._training = False
        self._hide()
        if self.flow is not None and self._live and self._finalize:
            self.flow.finalize()
            self._live = False

    def _hide(self) -> None:
        if self._shown is not None:
            shown, self._shown = self._shown, None
            shown.__exit__(None, None, None)
