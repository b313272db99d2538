"""Translation: an encoder-decoder, beam search, BLEU by sacrebleu."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.errors import ConfigError, DataError
from nmflow.experiments.data.tokenization import Tokens
from nmflow.experiments.specs import Data, Strict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """From `source` to `target`, the keys of the column `translation` or two columns.

    `tokens`: one tokeniser for both languages; `length`: the most tokens of a sentence; `beams`:
    beams of the search at evaluation; `stream`: read the data during training, and learn the
    tokeniser from its first `tokens.rows` rows.
    """

    source: str = "en"
    target: str = "de"
    tokens: Tokens = Tokens()
    length: Annotated[int, Field(strict=True, ge=8)] = 128
    beams: Annotated[int, Field(strict=True, ge=1)] = 4
    stream: bool = False


def build(run: Run) -> Problem:
    """The problem: pairs of sentences as token ids."""
    from nmflow.experiments.tasks import Problem, _text

    options = Options(**run.options)
    dump = (run.data.model_dump_json(), options.model_dump_json())
    if options.stream:
        sets, tokenizer, card, kind = _streamed(run, options)
    else:
        (sets, tokenizer, card), kind = _cached(*dump), _text.GeneratingTrainer
    collate = _text.collate(int(tokenizer.pad_token_id))

    return Problem(
        data=card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=collate,
        model=lambda: _text.seq2seq(run.model, tokenizer, options.length),
        example=collate([sets["test"][0]]),
        headline="bleu",
        metrics=lambda prediction: _bleu(tokenizer, prediction),
        trainer=kind,
        arguments=_text.generation(options.length, options.beams),
        save=tokenizer.save_pretrained,
    )


def pair(row: Any, data: Data, options: Options, where: str) -> tuple[str, str]:
    """Both sentences of a row.

    Raises:
        DataError: a sentence is empty, or a column or a language is missing.
    """
    from nmflow.experiments.tasks._text import sentence

    both = data.columns.get("translation", "translation")
    cells = row.get(both, row)
    out = []
    for language in (options.source, options.target):
        key = data.columns.get(language, language)
        if not isinstance(cells, dict) or key not in cells:
            there = ", ".join(cells) if isinstance(cells, dict) else type(cells).__name__
            raise DataError(
                f"data has no {key!r} at {where}: set options.source, options.target or "
                f"data.columns.{language} to one of {there}"
            )
        out.append(sentence(cells[key], key, where))
    return out[0], out[1]


def _bleu(tokenizer: Any, prediction: Any) -> dict[str, float]:
    import sacrebleu

    from nmflow.experiments.tasks._text import decoded

    said = decoded(tokenizer, prediction.predictions)
    wanted = decoded(tokenizer, prediction.label_ids)
    return {"bleu": float(sacrebleu.corpus_bleu(said, [wanted]).score)}


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Any:
    from nmflow.experiments.data.sources import rows
    from nmflow.experiments.data.tokenization import tokenizer

    data, how = Data.model_validate_json(dump), Options.model_validate_json(options)
    table = rows(data)
    pairs = {
        split: [
            pair(row, data, how, f"row {number} of {split}")
            for number, row in enumerate(part.to_list())
        ]
        for split, part in table.splits.items()
    }
    found = tokenizer(how.tokens, itertools.chain.from_iterable(pairs["train"]))
    sets = {split: _examples(found, part, how) for split, part in pairs.items()}
    return sets, found, table.card


def _examples(tokenizer: Any, pairs: Iterable[tuple[str, str]], how: Options) -> Any:
    from nmflow.experiments.tasks import _text

    sides = zip(*pairs, strict=True)
    ids = [_text.Ragged(_text.ids_of(tokenizer, side, how.length)) for side in sides]
    return _text.Examples(ids[0], ids[1])


def _streamed(run: Run, how: Options) -> Any:
    from transformers import Seq2SeqTrainer

    from nmflow.experiments.data import streams
    from nmflow.experiments.data.tokenization import tokenizer
    from nmflow.experiments.tasks import _text

    streams.refuse_noise(run)
    if how.tokens.load is None and not how.tokens.rows:
        raise ConfigError(
            "options.tokens.rows is 0: a stream has no end, so give the number of its first rows "
            "to learn the tokeniser from, such as 200000"
        )
    found = streams.source(run.data)

    def pairs(split: str, count: int | None) -> Iterable[tuple[str, str]]:
        rows = found.splits[split] if count is None else found.splits[split].take(count)
        for number, row in enumerate(rows):
            yield pair(row, run.data, how, f"row {number} of the {split} stream")

    first = pairs("train", how.tokens.rows)
    made = tokenizer(how.tokens, (text for both in first for text in both))

    def example(row: Any, where: str, draw: Any) -> dict[str, Any]:
        sides = pair(row, run.data, how, where)
        source, target = _text.ids_of(made, sides, how.length)
        return {"input_ids": source, "labels": target}

    batch = run.training.batch_size

    def group(held: list[Any], draw: np.random.Generator) -> list[Any]:
        lengths = np.array([len(e["input_ids"]) + len(e["labels"]) for e in held])
        return [held[i] for i in _text.by_length(lengths, batch, draw)]

    sets: dict[str, Any] = {
        # At most thousands of sentences: in memory, so that processes can split them.
        split: _examples(made, pairs(split, None), how)
        for split in ("validation", "test")
    }
    sets["train"] = streams.Stream(
        found.splits["train"], example, "train", run.seed, group, _text.WINDOW * batch
    )
    kind = type("StreamingSeq2SeqTrainer", (streams.Streaming, Seq2SeqTrainer), {})
    return sets, made, found.card, kind
