"""The cost of a network and its training, for a run's record and a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmflow.experiments.config import Run
from nmflow.experiments.report.blocks import quantity
from nmflow.inspect.cost import cost
from nmflow.inspect.training_flops import RULE

COLUMNS = (
    "parameters",
    "not pruned",
    "bytes, dense",
    "bytes, N:M + index",
    "inference FLOPs",
    "of dense",
    "training FLOPs",
    "of dense",
)
NOTE = (
    "Counted, not timed. Bytes are of values and of the index that says where they are; inference "
    "FLOPs are of one example, training FLOPs of the whole run. Rule: " + RULE
)


def counted(run: Run, model: Any, example: Any, processes: int = 1) -> dict[str, Any]:
    """The cost of a run as plain values; `example` is a batch of one.

    Products are linear in the number of examples, so the training of a step is counted on one and
    multiplied: a full batch would not fit into memory for the networks that need many devices.
    """
    t = run.training
    found = cost(
        model,
        example,
        pattern=run.pattern,
        include=run.include,
        exclude=run.exclude,
        recipe=run.recipe.build(),
        total_steps=t.steps,
    ).to_dict()
    examples = t.batch_size * t.accumulate * processes
    return {
        **found,
        "examples_per_step": examples,
        "run_training_flops": found["training_flops"] * examples,
        "run_dense_training_flops": found["dense_training"] * examples,
    }


def row(cost: Mapping[str, Any]) -> list[str]:
    """The cells of a table row under `COLUMNS`."""
    inference, training = cost["flops"], cost["run_training_flops"]
    return [
        f"{cost['parameters']:,}",
        f"{cost['remaining']:,}",
        f"{cost['dense_bytes']:,}",
        f"{cost['bytes']:,}",
        quantity(inference),
        f"{inference / max(1, cost['dense_flops']):.0%}",
        quantity(training),
        f"{training / max(1, cost['run_dense_training_flops']):.0%}",
    ]
