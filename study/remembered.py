"""A teacher that remembers what it said of each row: it does not change, and epochs repeat rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nmflow.experiments.provenance import fingerprint

MOST_ROWS = 10_000
"""Of larger training sets a run sees few rows twice, and what is kept would take much memory."""

GIVEN = {"input_ids", "attention_mask", "output_hidden_states"}
"""What a teacher is given, and token types where there are any."""

_said: dict[str, dict[bytes, list[Tensor]]] = {}
"""By teacher and a row's tokens: its logits, and its hidden states `(tokens, width)`."""


class Remembered:
    """A mixin whose teacher runs once a row; what it says is the same but for rounding.

    It is for rows of tokens that are padded at their end. Padding, which does not count, says 0.
    Later runs of the same process and teacher use what earlier ones heard.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        """`Trainer.compute_loss`, after the first call has wrapped the teacher."""
        trainer: Any = self
        distiller = getattr(trainer, "distiller", None)
        few = len(trainer.train_dataset) <= MOST_ROWS
        if few and distiller is not None and "forward" not in vars(distiller.teacher):
            remember(distiller.teacher)
        own: Any = super()
        return own.compute_loss(model, inputs, *args, **more)


def remember(teacher: nn.Module) -> None:
    """Let a frozen classifier of sequences answer rows that it has seen from memory."""
    forward = teacher.forward
    store = _said.setdefault(fingerprint(teacher), {})

    @functools.wraps(forward)
    def answer(**given: Any) -> Any:
        if set(given) - {"token_type_ids"} != GIVEN:
            raise ValueError(f"the teacher is given {sorted(given)}: it must be {sorted(GIVEN)}")
        keys = _keys(given)
        if any(key not in store for key in keys):
            told = forward(**given)
            lengths = given["attention_mask"].sum(-1).tolist()
            for i, (key, length) in enumerate(zip(keys, lengths, strict=True)):
                states = [h[i, :length].clone() for h in told["hidden_states"]]
                store[key] = [told["logits"][i].clone(), *states]
            return told
        rows = [store[key] for key in keys]
        width = given["input_ids"].shape[1]
        logits, *states = zip(*rows, strict=True)
        hidden = tuple(_padded(layer, width) for layer in states)
        return {"logits": torch.stack(logits), "hidden_states": hidden}

    teacher.forward = answer  # type: ignore[method-assign]


def _keys(given: Mapping[str, Tensor]) -> list[bytes]:
    names = [name for name in ("input_ids", "token_type_ids") if name in given]
    whole = torch.stack([given[name] for name in names], dim=-1)
    lengths = given["attention_mask"].sum(-1).tolist()
    return [row[:length].numpy().tobytes() for row, length in zip(whole, lengths, strict=True)]


def _padded(rows: Any, width: int) -> Tensor:
    made = pad_sequence(list(rows), batch_first=True)
    return nn.functional.pad(made, (0, 0, 0, width - made.shape[1]))
