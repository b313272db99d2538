"""GLUE as text to text, like T5: the input is a task's name and sentences, the output a label."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.experiments.data.tokenization import Tokens
from nmflow.experiments.specs import Data, Strict
from nmflow.experiments.tasks.glue_names import Names

if TYPE_CHECKING:
    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """`tasks`: tasks of GLUE, mixed by their rows; `tokens`; `length`: the most tokens of an input.

    `beams`: beams of the search at evaluation.
    """

    tasks: Names = ("sst2",)
    tokens: Tokens = Tokens()
    length: Annotated[int, Field(strict=True, ge=8)] = 128
    beams: Annotated[int, Field(strict=True, ge=1)] = 1


def build(run: Run) -> Problem:
    """The problem: `sst2 sentence: a fine film` becomes `positive`, scored by exact match."""
    from nmflow.experiments.tasks import Problem, _text, glue

    options = Options(**run.options)
    pool, tokenizer, sets, longest = _cached(run.data.model_dump_json(), options.model_dump_json())
    names: tuple[str, ...] = options.tasks
    collate = _text.collate(int(tokenizer.pad_token_id))

    def metrics(prediction: Any) -> dict[str, float]:
        starts = _text.decoded(tokenizer, prediction.inputs[:, :16])
        words = _text.decoded(tokenizer, prediction.predictions)
        truths = _text.decoded(tokenizer, prediction.label_ids)
        places = np.array([names.index(start.split()[0]) for start in starts])
        numbers = [_number(names[p], word) for p, word in zip(places, words, strict=True)]
        true = [_number(names[p], word) for p, word in zip(places, truths, strict=True)]
        return glue.summary(names, places, np.array(numbers), np.array(true))

    return Problem(
        data=pool.card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=collate,
        model=lambda: _text.seq2seq(run.model, tokenizer, options.length),
        example=collate([sets["test"][0]]),
        headline=glue.headline(names),
        metrics=metrics,
        trainer=_text.GeneratingTrainer,
        arguments={
            **_text.generation(longest + 2, options.beams),
            "include_for_metrics": ["inputs"],
        },
        save=tokenizer.save_pretrained,
    )


def prompt(name: str, sentences: tuple[str, ...]) -> str:
    """The input of a row: `mrpc sentence1: ... sentence2: ...`."""
    from nmflow.experiments.tasks.glue import TASKS

    parts = zip(TASKS[name].columns, sentences, strict=True)
    return f"{name} " + " ".join(f"{column}: {text}" for column, text in parts)


def _number(name: str, word: str) -> int:
    from nmflow.experiments.tasks.glue import TASKS

    labels = TASKS[name].labels
    # A tokeniser of words separates marks: "not _ equivalent".
    word = word.replace(" ", "")
    return labels.index(word) if word in labels else -1


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Any:
    from nmflow.experiments.data.tokenization import tokenizer
    from nmflow.experiments.tasks import _text, glue

    data, how = Data.model_validate_json(dump), Options.model_validate_json(options)
    pool = glue.pooled(data, how.tasks)
    prompts, answers = {}, {}
    for split, rows in pool.sentences.items():
        named = [how.tasks[place] for place in pool.tasks[split]]
        prompts[split] = [prompt(name, row) for name, row in zip(named, rows, strict=True)]
        answers[split] = [
            glue.TASKS[name].labels[number]
            for name, number in zip(named, pool.labels[split], strict=True)
        ]
    words = [word for name in how.tasks for word in glue.TASKS[name].labels]
    found = tokenizer(how.tokens, [*words, *prompts["train"]])
    longest = max(map(len, _text.ids_of(found, words, how.length)))
    sets = {
        split: _text.Examples(
            _text.Ragged(_text.ids_of(found, prompts[split], how.length)),
            _text.Ragged(_text.ids_of(found, answers[split], how.length)),
        )
        for split in prompts
    }
    return pool, found, sets, longest
