"""Conversations for instruction tuning: read from rows, and turned into token ids and labels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from nmflow.errors import DataError
from nmflow.experiments.data.sources import column
from nmflow.experiments.specs import Data
from nmflow.experiments.tasks._text import IGNORED, sentence

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Turns = list[dict[str, str]]
Row = tuple[list[int], list[int]]  # token ids, and their labels
ANSWERS = "assistant"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read(part: Dataset, data: Data, split: str) -> list[tuple[Turns, int]]:
    """Each row as turns of a conversation, with the number of given turns.

    Raises:
        DataError: a column is missing, or a row is not a conversation; it has the row's number.
    """
    name = data.columns.get("messages", "messages")
    if "messages" in data.columns or name in part.column_names:
        cells = column(part, "messages", name, split)
        return [(_turns(cell, name, f"row {row} of {split}"), 0) for row, cell in enumerate(cells)]
    roles = ("prompt", "completion")
    names = [data.columns.get(role, role) for role in roles]
    sides = [column(part, role, at, split) for role, at in zip(roles, names, strict=True)]
    out = []
    for row, (prompt, completion) in enumerate(zip(*sides, strict=True)):
        where = f"row {row} of {split}"
        before = _turns(prompt, names[0], where, "user")
        out.append((before + _turns(completion, names[1], where, ANSWERS), len(before)))
    return out


def _turns(cell: Any, name: str, where: str, role: str = "") -> Turns:
    if role and not isinstance(cell, list):
        return [{"role": role, "content": sentence(cell, name, where)}]
    good = isinstance(cell, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in cell
    )
    if not good or not cell:
        raise DataError(
            f"data has no conversation at {where}, column {name!r}: give a list of mappings with "
            "'role' and 'content'"
        )
    turns = [
        {"role": turn["role"], "content": sentence(turn.get("content"), name, where)}
        for turn in cell
    ]
    if role != "user" and all(turn["role"] != ANSWERS for turn in turns):
        raise DataError(
            f"data has nothing to learn at {where}, column {name!r}: no turn's role is {ANSWERS!r}"
        )
    return turns


def encode(tokenizer: PreTrainedTokenizerFast, talk: Turns, given: int, where: str) -> Row:
    """Ids and labels of a conversation; labels cover the assistant's turns after the `given` ones.

    Without a chat template, they are the prompt, the completion and the end token.

    Raises:
        DataError: the conversation needs a chat template and the tokeniser has none, or the
            template does not render it turn by turn.
    """
    if tokenizer.chat_template is None:
        if len(talk) != 2 or talk[1]["role"] != ANSWERS:
            raise DataError(
                f"data has a conversation of {len(talk)} turns at {where}, but the tokeniser has "
                "no chat template: name one that has it in options.tokens.load"
            )
        prompt: Any = tokenizer(talk[0]["content"])["input_ids"]
        if prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        rest: Any = tokenizer(talk[1]["content"], add_special_tokens=False)["input_ids"]
        rest = [*rest, tokenizer.eos_token_id]
        return [*prompt, *rest], [IGNORED] * len(prompt) + rest
    ids, said = _rendered(tokenizer, talk, given, where)
    labels = [i if learnt else IGNORED for i, learnt in zip(ids, said, strict=True)]
    return ids, [IGNORED, *labels[1:]]  # nothing predicts the first token


def _rendered(tokenizer: Any, talk: Turns, given: int, where: str) -> tuple[list[int], list[int]]:
    """Ids by the chat template, and which of them are the assistant's."""

    def render(turns: Turns, **more: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **more)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(
                f"data at {where} does not fit the tokeniser's chat template ({reason}): correct "
                "or remove the row"
            ) from None

    if not given and MARKED.search(str(tokenizer.chat_template)):
        made = render(talk, return_assistant_tokens_mask=True)
        return made["input_ids"], made["assistant_masks"]
    ids = render(talk)["input_ids"]
    said = [0] * len(ids)
    for turn in range(given, len(talk)):
        if talk[turn]["role"] != ANSWERS:
            continue
        before = render(talk[:turn], add_generation_prompt=True)["input_ids"]
        after = render(talk[: turn + 1])["input_ids"]
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"data at {where}: the tokeniser's chat template renders turn {turn} differently "
                "when more turns follow; give a template that marks {% generation %}, or one row "
                "for each answer"
            )
        said[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, said
