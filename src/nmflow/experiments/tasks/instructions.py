"""Instruction tuning: a decoder learns the completion of a prompt, or the turns of an assistant."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nmflow.errors import ConfigError, DataError
from nmflow.experiments.data.tokenization import Tokens
from nmflow.experiments.specs import Data, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem
    from nmflow.experiments.tasks._text import Ragged


class Options(Strict):
    """`length`: the most tokens of a row; `packing`: a batch is one row without padding; `tokens`.

    Packed rows must not see each other, which is checked on the network before training.
    """

    length: Annotated[int, Field(strict=True, ge=4)] = 512
    packing: bool = True
    tokens: Tokens = Tokens()


class Conversations:
    """Rows of token ids with labels; whole batches, packed or padded on the right."""

    def __init__(self, inputs: Ragged, labels: Ragged, pad: int) -> None:
        self.inputs, self.labels, self.pad = inputs, labels, pad

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        from nmflow.experiments.tasks import _text

        inputs, mask = _text.padded([self.inputs[i] for i in indices], self.pad)
        labels, _ = _text.padded([self.labels[i] for i in indices], _text.IGNORED)
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


class Sorted(Conversations):
    """Rows with known lengths, for the sampler."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return self.inputs.lengths


class Packed(Conversations):
    """Rows end to end, each with its own positions; the first token of each is not predicted."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        from transformers import DataCollatorWithFlattening

        rows = [
            {"input_ids": self.inputs[i].tolist(), "labels": self.labels[i].tolist()}
            for i in indices
        ]
        flat: Any = DataCollatorWithFlattening()(rows)
        return flat


def build(run: Run) -> Problem:
    """The problem; loss and perplexity are over the tokens of completions only."""
    from transformers import AutoModelForCausalLM

    from nmflow.experiments import models
    from nmflow.experiments.tasks import Problem, _text, lm

    options = Options(**run.options)
    rows, tokenizer, card = _cached(run.data.model_dump_json(), options.model_dump_json())
    pad = int(tokenizer.pad_token_id)
    kind: dict[str, type[Conversations]] = {"train": Packed if options.packing else Sorted}
    sets = {}
    for split, found in rows.items():
        inputs, labels = (_text.Ragged(side) for side in zip(*found, strict=True))
        sets[split] = kind.get(split, Conversations)(inputs, labels, pad)
    fields = {
        "vocab_size": len(tokenizer),
        "n_positions": options.length,
        "max_position_embeddings": options.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
    }

    def model() -> PreTrainedModel:
        made: Any = models.build(run.model, AutoModelForCausalLM, fields)
        made.config.use_cache = False
        room = made.get_input_embeddings().weight.shape[0]
        if room < len(tokenizer):
            raise ConfigError(
                f"options.tokens has {len(tokenizer)} tokens, and the network {room}: give the "
                "tokeniser of the network"
            )
        if options.packing:
            refuse_mixing(made)
        return made

    return Problem(
        data=card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=lm.same,
        model=model,
        example=sets["test"].__getitems__([0]),
        headline="perplexity",
        metrics=_text.figures,
        reduce=_text.scored,
        trainer=_text.SortingTrainer,
        save=tokenizer.save_pretrained,
    )


def refuse_mixing(model: PreTrainedModel) -> None:
    """Raise if a packed row changes the network's outputs for the next row."""
    first, last = torch.arange(5) % 4, torch.arange(3) + 1
    places = torch.cat((torch.arange(5), torch.arange(3)))[None]
    training, device = model.training, next(model.parameters()).device
    model.eval()

    def behind(row: Tensor) -> Tensor:
        ids = torch.cat((row, last))[None]
        return model(input_ids=ids.to(device), position_ids=places.to(device)).logits[0, 5:]

    try:
        with torch.no_grad():
            alone = model(input_ids=last[None].to(device)).logits[0]
            one, other = behind(first), behind((first + 1) % 4)
        size = alone.abs().max()
        # Masked places add nothing to a sum, so only the order of sums may change the bits.
        near = 16 * torch.finfo(one.dtype).eps * size
        apart = bool((one - other).abs().max() <= near and (one - alone).abs().max() <= 0.01 * size)
    except TypeError:  # it takes no positions
        apart = False
    finally:
        model.train(training)
    if not apart:
        raise ConfigError(
            f"options.packing is true: in {type(model).__name__} packed rows would see each other; "
            "set it to false"
        )


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Any:
    from nmflow.experiments.data.sources import rows
    from nmflow.experiments.data.tokenization import tokenizer
    from nmflow.experiments.tasks._conversations import encode, read

    data, how = Data.model_validate_json(dump), Options.model_validate_json(options)
    table = rows(data)
    talks = {split: read(part, data, split) for split, part in table.splits.items()}
    learnt = (turn["content"] for talk, _ in talks["train"] for turn in talk)
    found = tokenizer(how.tokens, learnt)
    out, notes = {}, list(table.card.notes)
    for split, some in talks.items():
        ids = [
            encode(found, talk, given, f"row {row} of {split}")
            for row, (talk, given) in enumerate(some)
        ]
        cut = [(row[: how.length], labels[: how.length]) for row, labels in ids]
        out[split] = [(row, labels) for row, labels in cut if any(label >= 0 for label in labels)]
        if not out[split]:
            raise DataError(
                f"options.length is {how.length}: no completion of {split} begins within it; give "
                "a larger one"
            )
        long, lost = sum(len(row) > how.length for row, _ in ids), len(ids) - len(out[split])
        if long:
            notes.append(
                f"{long:,} rows of {split} are cut to {how.length} tokens; {lost:,} whose "
                "completion begins behind them are left out"
            )
    sizes = {split: len(found) for split, found in out.items()}
    return out, found, replace(table.card, sizes=sizes, notes=notes)
