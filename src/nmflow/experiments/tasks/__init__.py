"""Tasks: data, network and scores; to add one, write a file and a row of `registry`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nmflow.experiments.tasks.registry import FILES, module, options

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel, Trainer

    from nmflow.experiments.config import Run
    from nmflow.experiments.data.sources import Card

__all__ = ["FILES", "Problem", "build", "module", "options"]


@dataclass(frozen=True)
class Problem:
    """All that the trainer needs of a task with its data.

    Attributes:
        data: the card of the data.
        train, validation, test: map-style data sets; with `__getitems__` they give whole batches.
        collate: makes a batch of examples.
        model: builds the network; called after the seed is set.
        example: a batch of one example, for `nmflow.cost`.
        headline: the metric that reports lead with, one of `metrics`' keys.
        metrics: figures from predictions, as `Trainer.compute_metrics`.
        reduce: shrinks logits to predictions before they are gathered.
        trainer: `Trainer` or a subclass, such as `Seq2SeqTrainer`.
        arguments: further `TrainingArguments` of the task.
        save: writes the files that a saved network needs (vocabulary, tokeniser, labels).
    """

    data: Card
    train: Any
    validation: Any
    test: Any
    collate: Callable[[Any], dict[str, Tensor]]
    model: Callable[[], PreTrainedModel]
    example: dict[str, Tensor]
    headline: str
    metrics: Callable[[EvalPrediction], dict[str, float]]
    reduce: Callable[[Any, Any], Any] | None = None
    trainer: type[Trainer] | None = None
    arguments: Mapping[str, Any] | None = None
    save: Callable[[Any], None] | None = None


def build(run: Run) -> Problem:
    """Load the data of a run and describe its task."""
    return module(run.task).build(run)
