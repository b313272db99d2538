"""Tasks: what to learn, from which data, scored how. A new task is one file and one row here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nmflow.errors import ConfigError
from nmflow.experiments.config_errors import parse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import EvalPrediction, PreTrainedModel, Trainer

    from nmflow.experiments.config import Run
    from nmflow.experiments.data.sources import Card

# Each file has `Options`, a pydantic model, and `build(run) -> Problem`; imported when it is asked
# for, so that a configuration is checked without any heavy import.
FILES = {
    "language-modelling": "lm",
    "image-classification": "vision",
    "image-classification-stream": "image_stream",
    "text-classification": "classification",
    "text-to-text": "text_to_text",
    "translation": "translation",
    "token-modelling": "tokens",
    "instruction-tuning": "instructions",
}


@dataclass(frozen=True)
class Problem:
    """All that the trainer has to know of a task with its data.

    Attributes:
        data: the card of the data.
        train, validation, test: map-style data sets; with `__getitems__` they give whole batches.
        collate: makes a batch of what the data set gives.
        model: builds the network; called after the seed is set.
        example: a batch of one example, for `nmflow.cost`.
        headline: the metric that reports lead with, one of `metrics`' keys.
        metrics: figures from predictions, as `Trainer.compute_metrics`.
        reduce: shrinks logits to predictions before they are gathered.
        trainer: `Trainer` or a subclass, such as `Seq2SeqTrainer`.
        arguments: further `TrainingArguments` of the task.
        save: writes what a saved network needs beside it (vocabulary, tokeniser, labels).
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


def module(task: str) -> ModuleType:
    """The file of a task."""
    if task not in FILES:
        close = difflib.get_close_matches(task, FILES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(FILES)}"
        raise ConfigError(f"task is {task!r}: {hint}")
    return importlib.import_module(f"nmflow.experiments.tasks.{FILES[task]}")


def options(task: str, raw: Mapping[str, Any]) -> Any:
    """The task's options, checked."""
    return parse(module(task).Options, dict(raw), "options")


def build(run: Run) -> Problem:
    """Load the data of a run and describe its task."""
    return module(run.task).build(run)
