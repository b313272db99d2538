"""A teacher that remembers its rows trains as one that is asked at every step."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import nmflow
from nmflow.distill import Distiller
from nmflow.integrations.distillation import Distillation
from nmflow.integrations.transformers import NMFlowCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "study"))
remembered: Any = importlib.import_module("remembered")


class Asked:
    """A mixin that changes nothing."""


def network() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    made = {}
    for name in ("input_ids", "token_type_ids"):
        parts = [torch.tensor(row[name]) for row in rows]
        made[name] = nn.utils.rnn.pad_sequence(parts, batch_first=True)
    made["attention_mask"] = (made["input_ids"] > 0).long()
    made["labels"] = torch.tensor([row["labels"] for row in rows])
    return made


def rows() -> Any:
    draw = torch.Generator().manual_seed(1)
    made = []
    for i in range(20):
        ids = torch.randint(1, 50, (3 + 4 * (i % 5),), generator=draw).tolist()
        made.append({"input_ids": ids, "token_type_ids": [i % 2] * len(ids), "labels": i % 2})
    # The same tokens of another type are another row.
    return [*made, {**made[0], "token_type_ids": [1] * len(made[0]["input_ids"])}]


def trained(folder: Path, kind: type) -> tuple[torch.Tensor, int]:
    """The weights after training with a teacher, and how often it was asked."""
    model = network()
    args = TrainingArguments(
        str(folder), max_steps=24, per_device_train_batch_size=7, learning_rate=1e-3, bf16=True,
        use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        remove_unused_columns=False, seed=3,
    )  # fmt: skip
    made: Any = type("T", (kind, Distillation, Trainer), {})(
        model=model, args=args, data_collator=collate, train_dataset=rows(),
        callbacks=[NMFlowCallback(nmflow.recipes.resolve("settling"), "1:4", include="ff")],
    )  # fmt: skip
    made.distiller = Distiller.of(model)
    asked: list[int] = []
    bert: Any = made.distiller.teacher.bert
    bert.register_forward_hook(lambda *_: asked.append(1))
    made.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(asked)


def test_training_is_that_of_a_teacher_who_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_said", {})
    asked, times = trained(tmp_path / "a", Asked)
    told, first = trained(tmp_path / "b", remembered.Remembered)
    again, later = trained(tmp_path / "c", remembered.Remembered)
    assert (times, first, later) == (24, 3, 0)  # 21 rows are three batches
    start = torch.cat([p.detach().flatten() for p in network().parameters()])
    assert (told - asked).norm() < 1e-3 * (asked - start).norm()
    assert (again - told).norm() < 1e-3 * (asked - start).norm()


def test_what_a_row_gets_is_what_the_teacher_says_of_it() -> None:
    teacher: Any = network()
    batch = collate(rows())
    labels = batch.pop("labels")
    assert len(labels) == 21
    with torch.no_grad():
        before = teacher(**batch, output_hidden_states=True)
        remembered.remember(teacher)
        teacher(**batch, output_hidden_states=True)
        few = collate([rows()[i] for i in (20, 0, 3)])
        del few["labels"]
        told = teacher(**few, output_hidden_states=True)
    torch.testing.assert_close(told["logits"], before["logits"][[20, 0, 3]])
    counts = few["attention_mask"].bool()
    width = counts.shape[1]
    assert len(told["hidden_states"]) == 3
    for h, whole in zip(told["hidden_states"], before["hidden_states"], strict=True):
        assert h.shape == (3, width, 32)
        torch.testing.assert_close(h[counts], whole[[20, 0, 3], :width][counts])
    assert not torch.allclose(told["logits"][0], told["logits"][1])


def test_other_inputs_are_refused() -> None:
    teacher: Any = network()
    remembered.remember(teacher)
    with pytest.raises(ValueError, match="it must be"):
        teacher(input_ids=torch.ones(1, 2, dtype=torch.long))
