"""Language modelling by characters: a decoder predicts the next one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.errors import DataError
from nmflow.experiments.files import write_json
from nmflow.experiments.specs import Data, Strict

if TYPE_CHECKING:
    from torch import Tensor

    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """`length`: characters that the network sees; each predicts the next."""

    length: Annotated[int, Field(strict=True, ge=2)] = 64


class Windows:
    """Windows of `length` characters, `stride` apart; a batch is one indexing operation."""

    def __init__(self, ids: Tensor, length: int, stride: int) -> None:
        self.views = ids.unfold(0, length, stride)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        batch = self.views[indices].contiguous()
        labels = batch.clone()
        # Nothing predicts the first character, and the Trainer divides by the number of labels.
        labels[:, 0] = -100
        return {"input_ids": batch, "labels": labels}


def windows(ids: dict[str, Any], length: int) -> dict[str, Windows]:
    """The windows of each split; those of `train` overlap, so that an epoch has random crops."""
    import torch

    return {
        split: Windows(torch.from_numpy(values), length, 1 if split == "train" else length)
        for split, values in ids.items()
    }


def build(run: Run) -> Problem:
    """The problem; its vocabulary is the training text's characters, and one for all others."""
    from transformers import AutoModelForCausalLM

    from nmflow.experiments import models
    from nmflow.experiments.tasks import Problem

    options = Options(**run.options)
    length = options.length
    ids, alphabet, card = _encoded(run.data)
    for split, values in ids.items():
        if len(values) < length:
            raise DataError(
                f"data is {card.name!r}: its {split} text has {len(values)} characters, fewer than "
                f"options.length {length}; give more text or a smaller length"
            )
    fields = {
        "vocab_size": len(alphabet) + 1,
        "n_positions": length,
        "max_position_embeddings": length,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    sets = windows(ids, length)
    return Problem(
        data=card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=same,
        model=lambda: models.build(run.model, AutoModelForCausalLM, fields),
        example=sets["test"].__getitems__([0]),
        headline="accuracy",
        metrics=_accuracy,
        reduce=lambda logits, labels: _first(logits).argmax(-1),
        save=lambda folder: write_json(folder / "alphabet.json", alphabet),
    )


@functools.lru_cache(maxsize=2)
def _cached(dump: str) -> Any:
    # One process may train many runs on a text, which is read and encoded once.
    from nmflow.experiments.data.sources import corpus

    found = corpus(Data.model_validate_json(dump))
    alphabet = sorted(set(found.texts["train"]))
    code = {character: number for number, character in enumerate(alphabet)}
    ids = {
        split: np.fromiter((code.get(c, len(alphabet)) for c in text), np.int64, len(text))
        for split, text in found.texts.items()
    }
    return ids, alphabet, found.card


def _encoded(data: Data) -> Any:
    return _cached(data.model_dump_json())


def same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, which the data set made already."""
    return batch


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}
