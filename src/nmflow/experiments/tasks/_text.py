"""Shared by tasks on text: checked sentences, token ids in memory, batches by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer

from nmflow.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from nmflow.experiments.specs import Model

IGNORED = -100  # the label that the losses of `transformers` ignore
WINDOW = 32  # batches that are sorted by length together


def sentence(value: Any, column: str, where: str) -> str:
    """Return the text after a check.

    Raises:
        DataError: the value is not text, or is empty; the error has its row.
    """
    if not isinstance(value, str) or not value.strip():
        found = "an empty sentence" if isinstance(value, str) or value is None else "no text"
        raise DataError(f"data has {found} at {where}, column {column!r}: remove the row")
    return value


class Ragged:
    """Sequences of token ids of unequal length, end to end in one array."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self.ends = np.cumsum(self.lengths)
        self.ids = np.fromiter((i for row in rows for i in row), np.int32, int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        stop = self.ends[index]
        return self.ids[stop - self.lengths[index] : stop]


class Examples:
    """Inputs with labels; a label is a sequence or a number."""

    def __init__(self, inputs: Ragged, labels: Ragged | np.ndarray) -> None:
        self.inputs, self.labels = inputs, labels
        other = labels.lengths if isinstance(labels, Ragged) else 0
        self.lengths = inputs.lengths + other

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


def ids_of(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int, end: bool = True
) -> list[list[int]]:
    """Token ids of each text, cut to `length`, with an end token if `end`."""
    raw = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    stop: Any = [tokenizer.eos_token_id] if end else []
    return [row[: length - len(stop)] + stop for row in raw]


def collate(pad: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Pad a batch to its longest sequence; padding is masked and has no label."""

    def batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs, mask = padded([row["input_ids"] for row in rows], pad)
        labels = [row["labels"] for row in rows]
        if np.ndim(labels[0]) == 0:
            wanted = torch.tensor([int(label) for label in labels])
            return {"input_ids": inputs, "attention_mask": mask, "labels": wanted}
        wanted = padded(labels, IGNORED)[0]
        # The decoder's inputs are given, since under label smoothing the `Trainer` keeps the labels
        # from the network.
        begin = torch.full((len(rows), 1), pad)
        seen = torch.cat((begin, wanted[:, :-1].masked_fill(wanted[:, :-1] == IGNORED, pad)), 1)
        return {
            "input_ids": inputs,
            "attention_mask": mask,
            "decoder_input_ids": seen,
            "labels": wanted,
        }

    return batch


def padded(rows: Sequence[Sequence[int] | np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """Rows padded with `value` to one width, and a mask of the places without padding."""
    width = max(len(row) for row in rows)
    out = np.full((len(rows), width), value, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(out), torch.from_numpy(mask)


class ByLength(Sampler[int]):
    """Shuffled batches of sequences with similar lengths, which need little padding.

    An epoch's order depends only on the seed and the epoch, so that a resume within it repeats it.
    The sampler of `transformers` draws from the global generator, whose state differs by then.
    """

    def __init__(self, lengths: np.ndarray, batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; `accelerate` calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        order = draw.permutation(len(self.lengths))
        for start in range(0, len(order), WINDOW * self.batch):
            window = order[start : start + WINDOW * self.batch]
            yield from window[by_length(self.lengths[window], self.batch, draw)].tolist()


def by_length(lengths: np.ndarray, batch: int, draw: np.random.Generator) -> np.ndarray:
    """An order with similar lengths in each `batch` consecutive rows, and shuffled batches."""
    order = np.argsort(-lengths, kind="stable")
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    # The last batch may be short: if it came first, all later ones would straddle two.
    mixed = [batches[i] for i in draw.permutation(len(batches) - 1)]
    return np.concatenate([*mixed, batches[-1]])


class _Sorting:
    """Batches by length, if the data set knows the lengths of its rows."""

    args: Any
    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        return ByLength(lengths, self.args.train_batch_size, self.args.seed)


class SortingTrainer(_Sorting, Trainer):
    """`Trainer` whose batches hold sequences of similar length."""


class GeneratingTrainer(_Sorting, Seq2SeqTrainer):
    """`Seq2SeqTrainer` whose batches hold sequences of similar length."""


def seq2seq(model: Model, tokenizer: PreTrainedTokenizerFast, length: int) -> Any:
    """An encoder-decoder of `model` for this tokeniser; decoding starts on padding, like T5's."""
    from transformers import AutoModelForSeq2SeqLM

    from nmflow.experiments import models

    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    fields = {
        "vocab_size": len(tokenizer),
        "decoder_vocab_size": len(tokenizer),
        "pad_token_id": pad,
        "eos_token_id": end,
        "bos_token_id": tokenizer.bos_token_id,
        "decoder_start_token_id": pad,
        "forced_eos_token_id": end,
        "max_position_embeddings": length,
    }
    made: Any = models.build(model, AutoModelForSeq2SeqLM, fields)
    made.config.decoder_start_token_id = pad  # not every kind's config takes it as a field
    settings = made.generation_config
    settings.decoder_start_token_id, settings.pad_token_id = pad, pad
    settings.eos_token_id, settings.bad_words_ids = end, [[pad]]
    return made


def generation(length: int, beams: int) -> dict[str, Any]:
    """`TrainingArguments` for evaluation by generation."""
    return {
        "predict_with_generate": True,
        "generation_max_length": length,
        "generation_num_beams": beams,
    }


def scored(logits: Any, labels: Tensor) -> Tensor:
    """For each token but the first: is it the likeliest, its loss in nats, and does it count?"""
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    wanted = labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED
    ).view(len(logits), -1)
    counts = wanted != IGNORED
    return torch.stack(((logits.argmax(-1) == wanted).float(), loss, counts.float()), -1)


def figures(prediction: Any) -> dict[str, float]:
    """Perplexity and accuracy of a token, from the results of `scored`."""
    rows = np.asarray(prediction.predictions, np.float64).reshape(-1, 3)
    # Batches of unequal width are padded with -100.
    right, loss, _ = rows[rows[:, 2] == 1].mean(0)
    return {"perplexity": float(np.exp(loss)), "accuracy": float(right)}


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Any) -> list[str]:
    """Texts of padded ids."""
    rows: Any = np.where(ids < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
