"""Hugging Face's `Trainer` with a teacher: its training loss is a distiller's."""

from __future__ import annotations

from typing import Any

from torch import nn

from nmflow.distill.distiller import Distiller
from nmflow.distill.outputs import check_outputs
from nmflow.errors import DistillError


class Distillation:
    """A mixin whose training loss is a distiller's; evaluation keeps the task's own loss.

    Set `distiller` before training. The teacher runs in the trainer's mixed precision. When batches
    are accumulated, the teacher's terms of each batch count by its share of the labels, as the
    task's own loss does.

    Example:
        >>> from transformers import Trainer
        >>> from nmflow.integrations.distillation import Distillation
        >>> class StudentTrainer(Distillation, Trainer):
        ...     pass
        >>> # trainer = StudentTrainer(model, args, ...); trainer.distiller = Distiller.of(model)
    """

    distiller: Distiller | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """`Trainer.compute_loss`, with the teacher's terms while the network trains."""
        if self.distiller is None:
            raise DistillError("distiller is None: set trainer.distiller before training")
        own: Any = super()
        trainer: Any = self
        if not model.training:
            return own.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.distiller.check(model, inputs)
        more = {"output_hidden_states": True} if self.distiller.hidden else {}
        loss, outputs = own.compute_loss(model, {**inputs, **more}, True, num_items_in_batch)
        check_outputs(outputs, "student")
        outputs["loss"] = loss
        share = 1.0
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
            if trainer.args.average_tokens_across_devices:
                # The items are those of all processes, whose gradients are then averaged.
                share = trainer.accelerator.num_processes
        # `Trainer` has its mixed precision inside the prepared model, which the teacher is not.
        with trainer.accelerator.autocast():
            loss = self.distiller.loss(outputs, inputs, share=share)
        return (loss, outputs) if return_outputs else loss
