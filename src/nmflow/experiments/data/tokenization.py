"""Tokenisers: loaded from a folder or the hub, or learnt from the training text and cached."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from filelock import FileLock
from pydantic import Field, model_validator

from nmflow.errors import ConfigError
from nmflow.experiments import origins
from nmflow.experiments.files import beside, left_over, one_sentence, remove
from nmflow.experiments.specs import Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN, START, BREAK = "<pad>", "</s>", "<unk>", "<s>", "<sep>"
# The order gives the ids: T5 and Marian expect padding at 0 and the end at 1.
SPECIAL = (PAD, END, UNKNOWN, START, BREAK)
# Part of the key of a cached tokeniser: raise it with each change of this code.
VERSION = "1"

Vocabulary = Annotated[int, Field(strict=True, ge=len(SPECIAL) + 1)]


class Tokens(Strict):
    """`load` a tokeniser from where `model.load` finds a network, or learn one of `size` tokens.

    `kind`: `bpe` joins the bytes of UTF-8 and knows every text; `word` takes the most frequent
    words and punctuation marks, lower-cased. `rows`: how many texts it is learnt from; 0 takes all.
    """

    load: str | None = None
    size: Vocabulary = 8000
    kind: Literal["bpe", "word"] = "bpe"
    lower: bool = False
    rows: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _one(self) -> Tokens:
        # By value, since a spec that was dumped and read again has every key.
        if self.load is not None and self.model_copy(update={"load": None}) != Tokens():
            raise ValueError("'load' takes a tokeniser as it is: leave the other keys out")
        return self


def tokenizer(tokens: Tokens, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokeniser that `tokens` describes; `texts` are read only to learn it.

    Raises:
        ConfigError: a tokeniser that cannot be loaded.
    """
    if tokens.load is not None:
        return _loaded(tokens.load)
    return learnt(tokens, list(texts))


def learnt(tokens: Tokens, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Learn a tokeniser, or take the cached one from the same texts."""
    texts = texts[: tokens.rows] if tokens.rows else texts
    sha = hashlib.sha256(f"{VERSION} {tokens.model_dump_json()}".encode())
    for text in texts:
        sha.update(text.encode("utf-8", "surrogatepass") + b"\0")
    place = cache() / sha.hexdigest()[:32]
    if not (place / "tokenizer.json").is_file():
        with one_sentence(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            # If two processes want the same one, the second waits for the first.
            with FileLock(str(place.with_name(f".{place.name}.lock"))):
                if not (place / "tokenizer.json").is_file():
                    _put(_learn(tokens, texts), place)
    return _loaded(str(place))


def _put(tokenizer: PreTrainedTokenizerFast, place: Path) -> None:
    """Save it whole, in place of any other; the caller holds the lock."""
    for path in left_over(place.parent):
        if path.name.startswith(f".{place.name}."):
            remove(path)
    staging = beside(place)
    try:
        staging.mkdir()
        tokenizer.save_pretrained(staging)
        remove(place)
        os.replace(staging, place)
    finally:
        remove(staging)


def cache() -> Path:
    """The folder of learnt tokenisers: `$NMFLOW_CACHE`, or `nmflow` in the user's cache folder."""
    chosen = os.environ.get("NMFLOW_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(chosen) if chosen else Path(home) / "nmflow") / "tokenizers"


@functools.lru_cache(maxsize=8)
def _loaded(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    key = "options.tokens.load"
    origin = origins.locate(name, key)
    try:
        found = AutoTokenizer.from_pretrained(
            origin.place, **origin.options, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{origins.reason(name, key, error)}, or leave it out to learn one from the training "
            "text"
        ) from None
    if found.pad_token_id is None:
        found.pad_token = found.eos_token  # GPT-2's has none; its labels are masked instead
    return found


def _learn(tokens: Tokens, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers.models import BPE, WordLevel
    from transformers import PreTrainedTokenizerFast

    if tokens.kind == "bpe":
        made = Tokenizer(BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=tokens.size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        made = Tokenizer(WordLevel(unk_token=UNKNOWN))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordLevelTrainer(
            vocab_size=tokens.size, special_tokens=list(SPECIAL), show_progress=False
        )
    steps: list[Any] = [normalizers.NFC()]
    if tokens.lower or tokens.kind == "word":
        steps.append(normalizers.Lowercase())
    made.normalizer = normalizers.Sequence(steps)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        bos_token=START,
        sep_token=BREAK,
        clean_up_tokenization_spaces=False,
    )
