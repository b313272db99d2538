"""Steps as graphs: what is recorded for each shape is what the `Trainer` would have computed."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import nmflow
from nmflow.distill import Distiller
from nmflow.integrations.distillation import Distillation
from nmflow.integrations.transformers import NMFlowCallback

sys.path.insert(0, str(Path(__file__).parents[2] / "study"))
graphed: Any = importlib.import_module("graphed")


def on_a_cpu(work: Callable[[], list[Tensor | None]], pool: Any) -> Any:
    """What stands for a graph where there is no GPU: the same tensors, filled at each replay."""
    held = [x if x is None else x.clone() for x in work()]

    def replay() -> None:
        for to, x in zip(held, work(), strict=True):
            if to is not None and x is not None:
                to.copy_(x)

    return replay, held


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["ids"])] = torch.tensor(row["ids"])
    labels = torch.tensor([row["label"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def trained(
    folder: Path, kind: type, taught: bool, recipe: str, half: bool
) -> tuple[Any, Any, Any]:
    """The weights before and after, and the `Trainer`."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    draw = torch.Generator().manual_seed(1)
    rows: Any = [
        {"ids": torch.randint(1, 50, (3 + 9 * (i % 5),), generator=draw).tolist(), "label": i % 2}
        for i in range(44)
    ]
    args = TrainingArguments(
        str(folder), max_steps=24, per_device_train_batch_size=8, learning_rate=1e-3, bf16=half,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, seed=3,
    )  # fmt: skip
    mixins = (Distillation,) if taught else ()
    made: Any = type("T", (kind, *mixins, Trainer), {})(
        model=model, args=args, data_collator=collate, train_dataset=rows,
        callbacks=[NMFlowCallback(nmflow.recipes.resolve(recipe), "1:4", include="ff")],
    )  # fmt: skip
    if taught:
        made.distiller = Distiller.of(model)
    before = flat(model)
    made.train()
    return before, flat(model), made


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


class Widened:
    """The same padding, and nothing else."""

    def training_step(self, model: Any, inputs: Any, items: Any = None) -> Tensor:
        own: Any = super()
        return own.training_step(model, graphed.widened(inputs, 0), items)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("recipe", ["sr-ste", "mdgf-exponential", "settling"])
def test_a_run_by_graphs_is_the_run(
    recipe: str, taught: bool, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphed, "record", on_a_cpu)
    before, want, _ = trained(tmp_path / "a", Widened, taught, recipe, half)
    _, found, trainer = trained(tmp_path / "b", graphed.Graphed, taught, recipe, half)
    steps = trainer.graphed_steps.values()
    assert sum(step is not None for step in steps) >= 3
    if torch.cuda.is_available():  # other kernels may run, whose sums have another order
        assert (found - want).norm() <= (0.2 if half else 0.02) * (want - before).norm()
    else:
        assert torch.equal(found, want)


@pytest.mark.parametrize(("width", "want"), [(1, 16), (16, 16), (17, 32)])
def test_padding_does_not_count(width: int, want: int) -> None:
    ids = torch.ones(2, width, dtype=torch.long)
    made = graphed.widened({"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}, 7)
    assert made["input_ids"].shape == made["attention_mask"].shape == (2, want)
    assert made["attention_mask"].sum() == 2 * width
    assert (made["input_ids"][:, width:] == 7).all()
