"""The tiny data on which script_table.py tries the scripts of others: one function each."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def tokens(place: Path) -> None:
    """A text of one batch."""
    folder = place / "data" / "tiny"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(17, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 64}))


def words(place: Path) -> None:
    """Three texts of a few words."""
    rng = np.random.default_rng(0)
    (place / "data").mkdir()
    for split in ("train", "valid", "test"):
        said = [" ".join(f"w{i}" for i in rng.integers(0, 40, 8)) for _ in range(40)]
        (place / "data" / f"{split}.txt").write_text("\n".join(said), encoding="utf-8")


def images(place: Path) -> None:
    """Images of one colour, of one class, as `ImageFolder` reads them."""
    for split in ("train", "val", "validation"):
        folder = place / "data" / split / "a"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (64, 64), (90, 140, 30)).save(folder / f"{i}.png")


def bert(place: Path, name: str) -> None:
    """A BERT of two layers, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **special).save_pretrained(
        place / name
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(place / name)


_WORDS = [f"w{i}" for i in range(40)]


def _sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, 6)) for _ in range(count)]


def _json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def mrpc(place: Path) -> None:
    """Pairs of sentences under the name that a script asks the hub for, and a metric."""
    bert(place, "bert-base-cased")
    for split in ("train", "validation"):
        said = _sentences(128)
        rows = [
            {"sentence1": a, "sentence2": b, "label": i % 2, "idx": i}
            for i, (a, b) in enumerate(zip(said[::2], said[1::2], strict=True))
        ]
        _json_lines(place / "nyu-mll" / "glue" / "mrpc" / f"{split}.jsonl", rows)
    (place / "nyu-mll" / "glue" / "README.md").write_text(
        "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
        "  - {split: train, path: mrpc/train.jsonl}\n"
        "  - {split: validation, path: mrpc/validation.jsonl}\n---\n"
    )
    (place / "glue").mkdir()
    (place / "glue" / "glue.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Glue(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = {k: datasets.Value('int64') for k in ('predictions', 'references')}\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "                                   features=datasets.Features(features))\n"
        "    def _compute(self, predictions, references):\n"
        "        right = sum(p == r for p, r in zip(predictions, references))\n"
        "        return {'accuracy': right / len(references), 'f1': 0.0}\n"
    )


def stsb(place: Path) -> None:
    """Pairs of sentences with scores, and a model without a head."""
    bert(place, "tiny-bert")
    for split in ("train", "validation", "test"):
        said = _sentences(1280 if split == "train" else 32)
        rows = [
            {"sentence1": a, "sentence2": b, "score": (i % 5) / 4}
            for i, (a, b) in enumerate(zip(said[::2], said[1::2], strict=True))
        ]
        _json_lines(place / "sentence-transformers" / "stsb" / f"{split}.jsonl", rows)


def chats(place: Path) -> None:
    """A text column, and a Llama of two layers with a tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    bert(place, "tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    tokenizer.eos_token = "[SEP]"
    shutil.rmtree(place / "tiny-llama")
    tokenizer.save_pretrained(place / "tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "tiny-llama")
    _json_lines(place / "texts" / "train.jsonl", [{"text": said} for said in _sentences(64)])


def nothing(place: Path) -> None:
    """No data: the script draws its own."""
