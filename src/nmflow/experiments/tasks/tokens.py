"""Language modelling by words or subwords: a decoder or an LSTM predicts the next token."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.errors import DataError
from nmflow.experiments.data.tokenization import Tokens
from nmflow.experiments.specs import Data, Strict

if TYPE_CHECKING:
    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """`length`: tokens that the network sees, each of which predicts the next; `tokens`."""

    length: Annotated[int, Field(strict=True, ge=2)] = 64
    tokens: Tokens = Tokens(size=2000)


def build(run: Run) -> Problem:
    """The problem: windows of token ids. The perplexity is per token, not per word."""
    from transformers import AutoModelForCausalLM

    from nmflow.experiments import models
    from nmflow.experiments.tasks import Problem, _text, lm

    options = Options(**run.options)
    length = options.length
    ids, tokenizer, card = _cached(run.data.model_dump_json(), options.model_dump_json())
    for split, values in ids.items():
        if len(values) < length:
            raise DataError(
                f"data is {card.name!r}: its {split} text has {len(values)} tokens, fewer than "
                f"options.length {length}; give more text or a smaller length"
            )
    fields = {
        "vocab_size": len(tokenizer),
        "n_positions": length,
        "max_position_embeddings": length,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    sets = lm.windows(ids, length)

    return Problem(
        data=card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=lm.same,
        model=lambda: models.build(run.model, AutoModelForCausalLM, fields),
        example=sets["test"].__getitems__([0]),
        headline="perplexity",
        metrics=_text.figures,
        reduce=_text.scored,
        save=tokenizer.save_pretrained,
    )


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Any:
    from nmflow.experiments.data.sources import corpus
    from nmflow.experiments.data.tokenization import tokenizer

    how = Options.model_validate_json(options)
    found = corpus(Data.model_validate_json(dump))
    made = tokenizer(how.tokens, found.texts["train"].splitlines())
    ids = {}
    for split, text in found.texts.items():
        rows = made([line for line in text.splitlines() if line], add_special_tokens=False)
        # A line ends with the end token, or its words would join those of the next.
        ends: Any = [made.eos_token_id]
        ids[split] = np.array([i for row in rows["input_ids"] for i in row + ends], np.int64)
    return ids, made, found.card
