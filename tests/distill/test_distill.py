"""Distillation: losses against numpy, positions that count, and a student that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nmflow
from nmflow.distill import Distiller, hidden_loss, logit_loss
from nmflow.errors import DistillError

special = pytest.importorskip("scipy.special")
transformers = pytest.importorskip("transformers")


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8.0), st.booleans())
def test_the_logit_loss_is_the_divergence_that_scipy_finds(seed: int, t: float, masked: bool):
    torch.manual_seed(seed)
    s, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.rand(3, 4) > 0.5 if masked else torch.ones(3, 4, dtype=torch.bool)
    p = special.softmax(teacher.double().numpy() / t, -1)
    q = special.softmax(s.double().numpy() / t, -1)
    each = t**2 * special.rel_entr(p, q).sum(-1)
    expected = each[mask.numpy()].mean() if mask.any() else 0.0
    found = logit_loss(s, teacher, temperature=t, mask=mask if masked else None)
    assert found.item() == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_positions_that_do_not_count_may_hold_anything():
    s = torch.randn(2, 3, 4, requires_grad=True)
    teacher, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    teacher[mask == 0] = float("inf")
    with torch.no_grad():
        s[mask == 0] = -float("inf")
    found = logit_loss(s, teacher, mask=mask)
    assert found.isfinite()


def test_a_shallower_student_is_compared_with_every_kth_state():
    student = [torch.randn(2, 3, 4) for _ in range(3)]
    teacher = [torch.randn(2, 3, 4) for _ in range(7)]
    assert torch.equal(hidden_loss(student, teacher), hidden_loss(student, teacher[::3]))
    for states, taught in ((0, 7), (1, 7), (3, 6), (4, 3)):
        with pytest.raises(DistillError, match="as many layers or a multiple"):
            hidden_loss([student[0]] * states, teacher[:taught])


def test_the_hidden_loss_is_normalised_by_layer_and_masked():
    torch.manual_seed(0)
    h = [torch.randn(2, 3, 4) for _ in range(2)]
    t = [torch.randn(2, 3, 4) * scale for scale in (1.0, 100.0)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.bool().numpy()
    ratios = [
        np.square((a - b).numpy()[kept]).sum() / np.square(b.numpy()[kept]).sum()
        for a, b in zip(h, t, strict=True)
    ]
    assert hidden_loss(h, t, mask=mask).item() == pytest.approx(np.mean(ratios), rel=1e-5)
    assert hidden_loss(h, h).item() == 0.0


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def bert() -> nn.Module:
    config = transformers.BertConfig(intermediate_size=32, vocab_size=50, **SIZES)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        intermediate_size=32, image_size=8, patch_size=4, num_labels=3, **SIZES
    )
    return transformers.ViTForImageClassification(config)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (4, 6))
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    labels = ids.masked_fill(attention == 0, -100)
    labels = {"bert": torch.tensor([0, 1, 0, 1]), "gpt2": labels, "t5": labels}[name]
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


MODELS = {"bert": bert, "gpt2": gpt2, "t5": t5, "vit": vit}


@pytest.mark.parametrize("name", MODELS)
def test_a_student_that_is_its_teacher_has_the_task_loss_alone(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    batch = batch_of(name)
    found = Distiller.of(model, task=0.5)(model, batch)
    assert found.loss.item() == pytest.approx(0.5 * model(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_loss_is_the_sum_of_its_parts(name: str):
    torch.manual_seed(0)
    model, teacher = MODELS[name]().eval(), MODELS[name]().eval()
    batch = batch_of(name)
    whole = Distiller(teacher, task=0.3, logits=0.7, hidden=2.0, temperature=3.0)
    parts = [
        Distiller(teacher, task=0.3, logits=0.7, hidden=0.0, temperature=3.0),
        Distiller(teacher, task=0.0, logits=0.0, hidden=2.0),
    ]
    total = sum(part(model, batch).loss.item() for part in parts)
    assert whole(model, batch).loss.item() == pytest.approx(total, rel=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_changes_nothing(name: str):
    torch.manual_seed(0)
    model, teacher = MODELS[name]().eval(), MODELS[name]().eval()
    batch = batch_of(name)
    one = {k: v[1:2] for k, v in batch.items()}
    short = {k: v[:, :4] if v.ndim == 2 else v for k, v in one.items()}
    distiller = Distiller(teacher)
    found = distiller(model, one).loss.item()
    assert found == pytest.approx(distiller(model, short).loss.item(), rel=1e-4)


def test_a_causal_model_is_compared_where_it_predicts_a_label_that_counts():
    torch.manual_seed(0)
    model, teacher = gpt2().eval(), gpt2().eval()
    batch = batch_of("gpt2")
    batch["labels"][:] = -100
    batch["labels"][0, 3] = 7
    distiller = Distiller(teacher, task=0.0, logits=1.0, hidden=0.0)
    with torch.no_grad():
        at = [m(batch["input_ids"]).logits[0, 2] for m in (model, teacher)]
    expected = logit_loss(at[0], at[1], temperature=2.0)
    assert distiller(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_accumulated_batches_of_a_trainer_have_the_gradient_of_one_batch(tmp_path: Path):
    from nmflow.integrations.distillation import Distillation

    class Student(Distillation, transformers.Trainer):
        pass

    batch = batch_of("gpt2")
    batch["attention_mask"][:] = 1
    batch["labels"] = batch["input_ids"]
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    ended = []
    for micro in (4, 2, 1):
        torch.manual_seed(0)
        model, teacher = gpt2(), gpt2()
        for one in (model, teacher):
            one.eval()
            for module in one.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        args = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro, max_steps=2, learning_rate=0.1, optim="sgd",
            max_grad_norm=0, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
        )  # fmt: skip
        trainer = cast(Any, Student)(model, args, train_dataset=rows)
        trainer.distiller = Distiller(teacher, hidden=0.0)
        trainer.train()
        ended.append(model.get_parameter("transformer.h.0.mlp.c_fc.weight").detach().clone())
    assert torch.allclose(ended[0], ended[1], atol=1e-5)
    assert torch.allclose(ended[0], ended[2], atol=1e-5)


def test_it_trains_a_sparse_network_and_finalizes():
    torch.manual_seed(0)
    model = vit()
    distiller = Distiller.of(model, hidden=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    flow = nmflow.attach(model, optimizer, "settling", "1:4", include="ff", total_steps=30)
    batch, losses = batch_of("vit"), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = distiller(model, batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    flow.finalize()
    assert nmflow.audit(model, "1:4", include="ff").ok
    assert losses[-1] < losses[0]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"task": -1}, "task is -1: give a finite number"),
    ({"logits": 0, "hidden": 0}, "both 0"),
    ({"temperature": 0}, "temperature is 0"),
]


@pytest.mark.parametrize(("options", "said"), MISTAKES)
def test_mistakes_are_one_sentence(options: dict[str, Any], said: str):
    with pytest.raises(DistillError, match=said):
        Distiller(nn.Linear(2, 2), **options)


def test_a_teacher_that_does_not_fit_is_named():
    torch.manual_seed(0)
    model, batch = bert(), batch_of("bert")
    config = transformers.BertConfig(
        intermediate_size=32, vocab_size=50, num_labels=3, **{**SIZES, "num_hidden_layers": 1}
    )
    other = transformers.BertForSequenceClassification(config)
    with pytest.raises(DistillError, match="same classes"):
        Distiller(other, hidden=0.0)(model, batch)
    with pytest.raises(DistillError, match="as many layers"):
        Distiller(other, logits=0.0)(model, batch)
    del batch["labels"]
    with pytest.raises(DistillError, match="set task=0"):
        Distiller.of(model)(model, batch)
    assert Distiller.of(model, task=0)(model, batch).loss.isfinite()


# --- at the edge of what is allowed -------------------------------------------------------------


@pytest.mark.parametrize("where", ["teacher", "both"])
def test_a_class_that_the_teacher_rules_out_counts_nothing(where: str) -> None:
    """As if both networks lacked the class, in value; and its logit gets no NaN for a gradient."""
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    t[:, 2] = -torch.inf
    if where == "both":
        s[:, 2] = -torch.inf
    s.requires_grad_()
    loss = logit_loss(s, t)
    loss.backward()
    assert s.grad is not None
    assert bool(torch.isfinite(s.grad).all())
    if where == "both":
        keep = [0, 1, 3]
        torch.testing.assert_close(loss, logit_loss(s.detach()[:, keep], t[:, keep]))
    else:
        p, q = (torch.softmax(x.detach().double() / 2, -1).numpy() for x in (t, s))
        assert loss.item() == pytest.approx(4 * special.rel_entr(p, q).sum(-1).mean(), rel=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hidden_states_that_do_not_count_may_hold_anything(value: float) -> None:
    """Rows that attend to nothing are NaN in some attention: not a term, and no gradient."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    clean = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 3, 4) for _ in range(2)]
    expected = hidden_loss(clean, teacher, mask=mask)
    expected.backward()
    for of in ("student", "teacher", "both"):
        hurt = [x.detach().clone() for x in clean]
        told = [x.clone() for x in teacher]
        for one in (hurt if of != "teacher" else []) + (told if of != "student" else []):
            one[mask == 0] = value
        hurt = [x.requires_grad_() for x in hurt]
        loss = hidden_loss(hurt, told, mask=mask)
        loss.backward()
        assert torch.equal(loss, expected)
        for one, other in zip(hurt, clean, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", ["task", "logits", "hidden", "temperature"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1, "1", None, True])
def test_weights_of_a_loss_are_finite_numbers(name: str, value: Any) -> None:
    with pytest.raises(DistillError, match=f"{name} is {value!r}: give a"):
        Distiller(nn.Linear(2, 2), **{name: value})


class _Plain(nn.Module):
    """A network whose outputs are like those of transformers, and its arguments are not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        return {"logits": logits, "loss": logits.square().mean()}


def test_what_a_network_does_not_take_is_said_before_it_runs() -> None:
    student, batch = _Plain(), {"x": torch.randn(2, 4)}
    with pytest.raises(DistillError, match=r"forward of _Plain .*output_hidden_states.*hidden=0"):
        Distiller(_Plain())(student, batch)
    Distiller(_Plain(), hidden=0)(student, batch).get("loss").backward()
    assert student.linear.weight.grad is not None
    for wrong in (batch["x"], (batch["x"],), [batch], None):
        with pytest.raises(DistillError, match=r"batch is a \w+: give a mapping"):
            Distiller(_Plain(), hidden=0)(student, cast("Any", wrong))
    with pytest.raises(DistillError, match=r"forward of _Plain .*'y'"):
        Distiller(_Plain(), hidden=0)(student, {**batch, "y": 0})
    with pytest.raises(DistillError, match="states are a Tensor"):
        hidden_loss(cast("Any", torch.ones(2, 2)), cast("Any", torch.ones(2, 2)))


def test_a_teacher_is_another_network() -> None:
    """`Distiller(model)` freezes the model: told at the first step, or where it would hurt."""
    model, batch = _Plain(), {"x": torch.randn(2, 4)}
    with pytest.raises(DistillError, match=r"student itself.*Distiller\.of\(model\)"):
        Distiller(model, hidden=0)(model, batch)
    model = _Plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    flow = nmflow.attach(model, optimizer, "ste", "1:4", include="*", total_steps=3)
    with pytest.raises(DistillError, match=r"under a recipe.*Distiller\.of\(model\)"):
        Distiller(model)
    assert model.linear.weight.requires_grad
    flow.finalize()
