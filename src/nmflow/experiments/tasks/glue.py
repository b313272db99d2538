"""GLUE's tasks: their columns, words for labels, and scores (arXiv 1804.07461)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nmflow.errors import DataError
from nmflow.experiments.data.sources import Card, column, rows
from nmflow.experiments.specs import Data
from nmflow.experiments.tasks._text import sentence

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        columns: its sentences, as GLUE and T5 name them.
        labels: the words of its labels, as T5 spells them, in the order of their numbers.
        scores: its scores, whose mean counts in the GLUE score.
        validation: the name of its validation split.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    scores: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"


_ENTAILMENT = ("entailment", "not_entailment")
_SAME = ("accuracy", "f1")
TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _SAME),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), _SAME),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    "qnli": Task(("question", "sentence"), _ENTAILMENT),
    "rte": Task(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


@dataclass(frozen=True)
class Pool:
    """The rows of one or several tasks, split by split.

    Attributes:
        sentences: the sentences of each row, by split.
        labels: the label of each row within its task, by split.
        tasks: the index of each row's task in `names`, by split.
    """

    names: tuple[str, ...]
    sentences: dict[str, list[tuple[str, ...]]]
    labels: dict[str, np.ndarray]
    tasks: dict[str, np.ndarray]
    card: Card


def pooled(data: Data, names: Sequence[str]) -> Pool:
    """The rows of the tasks; `{task}` in the data's paths, subset and splits is each task's name.

    Raises:
        DataError: an empty sentence, a label out of range, a missing column or file.
    """
    sentences: dict[str, list[tuple[str, ...]]] = {}
    labels: dict[str, list[np.ndarray]] = {}
    places: dict[str, list[np.ndarray]] = {}
    cards = []
    for place, name in enumerate(names):
        table = rows(_of_task(data, name))
        cards.append(table.card)
        for split, part in table.splits.items():
            found, numbers = _rows(part, data, name, split)
            sentences.setdefault(split, []).extend(found)
            labels.setdefault(split, []).append(numbers)
            places.setdefault(split, []).append(np.full(len(numbers), place, np.int64))
    return Pool(
        tuple(names),
        sentences,
        {split: np.concatenate(parts) for split, parts in labels.items()},
        {split: np.concatenate(parts) for split, parts in places.items()},
        cards[0] if len(cards) == 1 else _joined(names, cards),
    )


def scores(name: str, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """A task's scores, from label numbers.

    A prediction of -1 is an answer that is no label. It is wrong, and counts as the label after
    the true one.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    task = TASKS[name]
    predicted = np.where(predicted < 0, (true + 1) % len(task.labels), predicted)
    out = {"accuracy": float((predicted == true).mean())}
    if "f1" in task.scores:
        out["f1"] = float(f1_score(true, predicted, zero_division=0))  # type: ignore[arg-type]
    if "matthews" in task.scores:
        # With a single label it is 0 by convention, and scikit-learn warns.
        single = len(np.union1d(true, predicted)) < 2
        out["matthews"] = 0.0 if single else float(matthews_corrcoef(true, predicted))
    return out


def summary(names: Sequence[str], places: Any, predicted: Any, true: Any) -> dict[str, float]:
    """All scores, prefixed by the task's name if there are several, and `score`.

    `score` is the GLUE average: the mean over tasks of the mean of each task's scores.
    """
    out: dict[str, float] = {}
    means = []
    for place, name in enumerate(names):
        mine = places == place
        if not mine.any():
            continue
        found = scores(name, predicted[mine], true[mine])
        means.append(np.mean([found[score] for score in TASKS[name].scores]))
        prefix = f"{name}_" if len(names) > 1 else ""
        out |= {prefix + key: value for key, value in found.items()}
    return out | {"score": float(np.mean(means))}


def headline(names: Sequence[str]) -> str:
    """The headline score: GLUE's own for one task, the mean for several."""
    known = TASKS[names[0]].scores
    return known[0] if len(names) == 1 and len(known) == 1 else "score"


def _of_task(data: Data, name: str) -> Data:
    def put(value: str | None) -> str | None:
        return value.replace("{task}", name) if value else value

    splits = {split: str(put(text)) for split, text in data.splits.items()}
    if splits.get("validation") == "validation":
        splits["validation"] = TASKS[name].validation
    return data.model_copy(
        update={
            "path": put(data.path),
            "subset": put(data.subset),
            "files": {split: str(put(file)) for split, file in data.files.items()},
            "splits": splits,
        }
    )


def _rows(
    part: Dataset, data: Data, name: str, split: str
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    task = TASKS[name]
    roles = [data.columns.get(role, role) for role in task.columns]
    texts = [
        list(column(part, role, at, split)) for role, at in zip(task.columns, roles, strict=True)
    ]
    values = list(column(part, "label", data.columns.get("label", "label"), split))
    numbers = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(task.labels):
            raise DataError(
                f"data has the label {value!r} at row {row} of {split}: the labels of {name} are "
                f"0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
            )
        numbers[row] = value
    found = [
        tuple(
            sentence(text, role, f"row {row} of {split} ({name})")
            for role, text in zip(task.columns, cells, strict=True)
        )
        for row, cells in enumerate(zip(*texts, strict=True))
    ]
    return found, numbers


def _joined(names: Sequence[str], cards: Sequence[Card]) -> Card:
    splits = cards[0].sizes
    sizes = {split: sum(card.sizes[split] for card in cards) for split in splits}
    notes = list(dict.fromkeys(note for card in cards for note in card.notes))
    sha = hashlib.sha256("".join(card.sha256 for card in cards).encode()).hexdigest()
    return Card(", ".join(names), sha, cards[0].unit, sizes, cards[0].split, notes)
