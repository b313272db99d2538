"""GLUE with a classifier: one task, or several pooled under one head."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.experiments.data.tokenization import Tokens
from nmflow.experiments.files import write_json
from nmflow.experiments.specs import Data, Strict
from nmflow.experiments.tasks.glue_names import Names

if TYPE_CHECKING:
    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """`tasks`: tasks of GLUE; `tokens`: the tokeniser; `length`: the most tokens of a row.

    Several tasks are pooled: each row begins with its task's name, the head has the labels of all
    tasks one after the other, and a row is scored among those of its own task.
    """

    tasks: Names = ("sst2",)
    tokens: Tokens = Tokens()
    length: Annotated[int, Field(strict=True, ge=4)] = 128


def build(run: Run) -> Problem:
    """The problem: rows of the tasks as token ids, labels as numbers of one head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from nmflow.experiments import models
    from nmflow.experiments.tasks import Problem, _text, glue

    options = Options(**run.options)
    pool, tokenizer, sets = _cached(run.data.model_dump_json(), options.model_dump_json())
    first, count = _offsets(options.tasks)
    words = [f"{n}: {w}" for n in options.tasks for w in glue.TASKS[n].labels]
    fields = {
        "vocab_size": len(tokenizer),
        "num_labels": count,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": options.length,
        "problem_type": "single_label_classification",
    }
    collate = _text.collate(int(tokenizer.pad_token_id))
    owner = np.repeat(np.arange(len(first)), np.diff([*first, count]))
    own = torch.from_numpy(owner[:, None] == owner[None])

    def reduce(logits: Any, labels: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.masked_fill(~own.to(logits.device)[labels], -torch.inf).argmax(-1)

    def metrics(prediction: Any) -> dict[str, float]:
        places = owner[prediction.label_ids]
        start = first[places]
        return glue.summary(
            options.tasks, places, prediction.predictions - start, prediction.label_ids - start
        )

    def save(folder: Any) -> None:
        tokenizer.save_pretrained(folder)
        write_json(folder / "labels.json", words)

    return Problem(
        data=pool.card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=collate,
        model=lambda: models.build(run.model, AutoModelForSequenceClassification, fields),
        example=collate([sets["test"][0]]),
        headline=glue.headline(options.tasks),
        metrics=metrics,
        reduce=reduce,
        trainer=_text.SortingTrainer,
        save=save,
    )


def _offsets(names: tuple[str, ...]) -> tuple[np.ndarray, int]:
    from nmflow.experiments.tasks.glue import TASKS

    counts = [len(TASKS[name].labels) for name in names]
    return np.cumsum([0, *counts[:-1]]), sum(counts)


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Any:
    from nmflow.experiments.data.tokenization import tokenizer
    from nmflow.experiments.tasks import _text, glue

    data, how = Data.model_validate_json(dump), Options.model_validate_json(options)
    pool = glue.pooled(data, how.tasks)
    learnt = (text for row in pool.sentences["train"] for text in row)
    found = tokenizer(how.tokens, learnt)
    first, _ = _offsets(how.tasks)
    sets = {}
    for split, rows in pool.sentences.items():
        inputs = _inputs(found, how, rows, pool.tasks[split])
        labels = pool.labels[split] + first[pool.tasks[split]]
        sets[split] = _text.Examples(_text.Ragged(inputs), labels)
    return pool, found, sets


def _inputs(
    tokenizer: Any, how: Options, rows: list[tuple[str, ...]], places: np.ndarray
) -> list[list[int]]:
    """Start, (task name,) sentences with separators, end; the longest sentence is cut first."""
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    cut = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    texts = [text for row in rows for text in row]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    several = len(how.tasks) > 1
    named = [
        tokenizer(name, add_special_tokens=False)["input_ids"] if several else []
        for name in how.tasks
    ]
    out = []
    for row, place in zip(rows, places, strict=True):
        parts = [next(ids) for _ in row]
        room = how.length - 1 - len(named[place]) - len(parts)
        while sum(map(len, parts)) > max(room, len(parts)):
            longest = max(range(len(parts)), key=lambda i: len(parts[i]))
            parts[longest] = parts[longest][:-1]
        out.append([start, *named[place], *(i for part in parts for i in (*part, cut))])
    return out
