"""Distilling every kind of head: what is compared is what the network's own loss reads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nmflow.distill import Distiller, hidden_loss, multilabel_loss, regression_loss
from nmflow.errors import DistillError

special = pytest.importorskip("scipy.special")
hf = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
TWO_SIDES = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
torch.manual_seed(0)
IDS = torch.randint(3, 40, (3, 6))
ATTENTION = torch.ones_like(IDS)
ATTENTION[1, 4:] = 0
TOKENS = {"input_ids": IDS, "attention_mask": ATTENTION}
# The first label and a part in the middle do not count either.
LABELS = IDS.masked_fill(ATTENTION == 0, -100)
LABELS[0, :3] = -100
LABELS[2, 2] = -100
LM = {**TOKENS, "labels": LABELS}
ANSWERS = {
    **TOKENS, "start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 2, 3]),
}  # fmt: skip
SEEN = torch.cat([torch.full((3, 4), 39), IDS.clamp(max=38)], 1)


class Own(nn.Module):
    """A causal language model of one's own, by no name and without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        logits = self.head(self.embed(input_ids).cumsum(1))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return {"logits": logits, "loss": loss}


def llava() -> nn.Module:
    text = hf.LlamaConfig(**SIZES)
    eyes = hf.CLIPVisionConfig(**EYES)
    config = hf.LlavaConfig(text_config=text, vision_config=eyes, image_token_id=39)
    return hf.LlavaForConditionalGeneration(config)


# Networks with a label at each position, by where it belongs.
PLACED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "a causal model": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
        ),
        LM,
    ),
    "experts": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                **SIZES, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
            )
        ),
        LM,
    ),
    "a causal model's decoder alone, whose labels are not shifted": (
        lambda: hf.BartForCausalLM(hf.BartConfig(**TWO_SIDES)),
        LM,
    ),
    "permuted attention, not shifted": (
        lambda: hf.XLNetLMHeadModel(
            hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=32)
        ),
        LM,
    ),
    "images and text": (
        llava,
        {
            "input_ids": SEEN, "attention_mask": torch.ones_like(SEEN),
            "pixel_values": torch.randn(3, 3, 8, 8), "labels": SEEN.masked_fill(SEEN == 39, -100),
        },
    ),
    "an encoder-decoder": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**TWO_SIDES)),
        LM,
    ),
    "masked tokens": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), LM),
    "classes of tokens": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES, num_labels=3)),
        {**TOKENS, "labels": torch.where(LABELS < 0, LABELS, LABELS % 3)},
    ),
    "choices": (
        lambda: hf.GPT2DoubleHeadsModel(
            hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)
        ),
        {"input_ids": IDS[None], "labels": LABELS[None], "mc_labels": torch.tensor([1])},
    ),
    "one's own": (Own, LM),
}  # fmt: skip


def made(make: Callable[[], Any], seed: int) -> Any:
    """A network in evaluation mode, far enough from another seed's."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return model


def asked(loss: Tensor, logits: Tensor) -> list[Any]:
    """The positions of logits that a loss reads."""
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return (grad.abs().sum(-1) > 0).tolist()


@pytest.mark.parametrize("name", PLACED)
def test_logits_are_compared_where_the_networks_own_loss_reads_them(name: str):
    make, batch = PLACED[name]
    student = made(make, 0)
    own = student(**batch)
    wanted = asked(own["loss"], own["logits"])
    assert not all(np.ravel(wanted))
    found = Distiller(made(make, 1), task=0.0, hidden=0.0)(student, batch)
    assert asked(found["loss"], found["logits"]) == wanted


SLOW = pytest.mark.slow  # torch.compile alone takes seconds to import


@pytest.mark.parametrize("wrap", [pytest.param("torch.compile", marks=SLOW), "DataParallel"])
def test_a_wrapped_teacher_is_compared_as_a_plain_one(wrap: str):
    make, batch = PLACED["a causal model"]
    student, teacher = made(make, 0), made(make, 1)
    wanted = Distiller(copy.deepcopy(teacher))(student, batch).loss
    wrapped = nn.DataParallel(teacher)
    if wrap == "torch.compile":
        wrapped = cast(Any, torch.compile(teacher, backend="eager"))
    torch.testing.assert_close(Distiller(wrapped)(student, batch).loss, wanted)


def test_the_teacher_is_asked_twice_for_the_place_of_labels_and_only_once():
    make, batch = PLACED["a causal model"]
    student, teacher, calls = made(make, 0), made(make, 1), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(teacher)
    for _ in range(3):
        distiller(student, batch)
    assert len(calls) == 5


# --- other predictions than one class an example ------------------------------------------------


def divergence(s: Tensor, t: Tensor) -> Any:
    p, q = (special.softmax(x.detach().double().numpy() / 2, -1) for x in (t, s))
    return 4 * special.rel_entr(p, q).sum(-1)


def of_classes(name: str) -> Callable[[Any, Any], float]:
    return lambda s, t: divergence(s[name], t[name]).mean()


def of_answers(s: Any, t: Any) -> float:
    return (of_classes("start_logits")(s, t) + of_classes("end_logits")(s, t)) / 2


def of_pixels(s: Any, t: Any) -> float:
    return divergence(s.logits.movedim(1, -1), t.logits.movedim(1, -1)).mean()


def of_yes_and_no(s: Any, t: Any) -> float:
    p, q = (special.expit(x.logits.detach().double().numpy() / 2) for x in (t, s))
    return float(4 * (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).mean())


def of_values(s: Any, t: Any) -> float:
    return float(((s.logits - t.logits) ** 2).mean())


def of_both_ways(s: Any, t: Any) -> float:
    found = [of_classes(f"logits_per_{kind}")(s, t) for kind in ("image", "text")]
    return sum(found) / 2


def bert(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, f"BertFor{kind}")(hf.BertConfig(**SIZES, **more))


HEADS: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[Any, Any], float]]] = {
    "answers": (
        bert("QuestionAnswering"),
        ANSWERS,
        of_answers,
    ),
    "a value": (
        bert("SequenceClassification", num_labels=1),
        {**TOKENS, "labels": torch.tensor([0.1, -2.0, -100.0])},
        of_values,
    ),
    "values": (
        bert("SequenceClassification", num_labels=3, problem_type="regression"),
        {**TOKENS, "labels": torch.randn(3, 3)},
        of_values,
    ),
    "several labels": (
        bert("SequenceClassification", num_labels=4),
        {**TOKENS, "labels": torch.rand(3, 4).round()},
        of_yes_and_no,
    ),
    "several labels by the config": (
        bert("SequenceClassification", num_labels=4, problem_type="multi_label_classification"),
        {**TOKENS, "labels": torch.rand(3, 4).round()},
        of_yes_and_no,
    ),
    "choices": (
        bert("MultipleChoice"),
        {**{k: v[None] for k, v in TOKENS.items()}, "labels": torch.tensor([1])},
        of_classes("logits"),
    ),
    "pixels": (
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
                patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2],
                mlp_ratios=[2, 2], decoder_hidden_size=8, num_labels=3,
            )
        ),
        {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(0, 3, (2, 16, 16))},
        of_pixels,
    ),
    "an encoder-decoder's answers": (
        lambda: hf.BartForQuestionAnswering(hf.BartConfig(**TWO_SIDES)),
        ANSWERS,
        of_answers,
    ),
    "convolutions": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        ),
        {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])},
        of_classes("logits"),
    ),
    "boxes": (
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**EYES, "image_size": [8, 8]}, num_detection_tokens=5, num_labels=3)
        ),
        {
            "pixel_values": torch.randn(2, 3, 8, 8),
            "labels": [{"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4)}] * 2,
        },
        of_classes("logits"),
    ),
    "pairs": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=hf.CLIPTextConfig(**SIZES).to_dict(),
                          vision_config=hf.CLIPVisionConfig(**EYES).to_dict(), projection_dim=8)
        ),
        {**TOKENS, "pixel_values": torch.randn(3, 3, 8, 8), "return_loss": True},
        of_both_ways,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_compared_by_what_its_outputs_are(name: str):
    make, batch, reference = HEADS[name]
    if name == "boxes":
        pytest.importorskip("scipy.optimize", reason="Yolos matches boxes with it")
    student, teacher = made(make, 0), made(make, 1)
    with torch.no_grad():
        wanted = reference(student(**batch), teacher(**batch))
    assert wanted > 1e-4
    hidden = 0.0 if name == "pairs" else 1.0
    only = Distiller(copy.deepcopy(teacher), task=0.0, logits=1.0, hidden=0.0)
    found = only(student, batch)["loss"]
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    whole = Distiller(teacher, task=0.5, logits=1.0, hidden=hidden)(student, batch)["loss"]
    assert bool(whole.isfinite())
    assert whole.item() > found.item()


class Alone(nn.Module):
    """A network of one's own that gives what it is told to."""

    def __init__(self, *shape: int, **more: Any) -> None:
        super().__init__()
        self.out, self.more = nn.Parameter(torch.randn(shape)), more

    def forward(self, labels: Any = None) -> Any:
        return {"logits": self.out, **self.more}


def test_what_a_single_logit_is_must_be_told():
    student, teacher = Alone(3, 1), Alone(3, 1)
    with pytest.raises(DistillError, match="single one is: give problem='regression', or"):
        Distiller(teacher, task=0, hidden=0)(student, {})
    for problem, loss in (
        ("regression", regression_loss),
        ("multi_label_classification", multilabel_loss),
    ):
        found = Distiller(teacher, task=0, logits=1, hidden=0, problem=problem)(student, {})
        torch.testing.assert_close(found["loss"], loss(student.out, teacher.out))
        assert found["loss"] > 0
    with pytest.raises(DistillError, match="problem is 'values': choose from single_label"):
        Distiller(teacher, problem="values")


UNCLEAR: list[tuple[Any, dict[str, Any], str]] = [
    (Alone(2, 3, 4, 4), {}, "which axis has the classes"),
    (Alone(2, 3, 4, 4), {"labels": torch.ones(2, 4, 4, dtype=torch.int64)}, ""),
    (Alone(2, 3, 4, 5), {"labels": torch.ones(2, 3, 4, dtype=torch.int64)}, ""),
]


@pytest.mark.parametrize(("student", "batch", "said"), UNCLEAR)
def test_the_axis_of_the_classes_is_not_guessed(student: Any, batch: Any, said: str):
    distiller = Distiller(copy.deepcopy(student), task=0, hidden=0)
    if said:
        with pytest.raises(DistillError, match=said):
            distiller(student, batch)
    else:
        assert distiller(student, batch)["loss"].item() == pytest.approx(0, abs=1e-6)


def test_outputs_that_cannot_be_compared_are_named():
    make, batch = PLACED["a causal model"]
    student, teacher = made(make, 0), made(make, 1)
    with pytest.raises(DistillError, match="the student's outputs are a tuple: return a mapping"):
        Distiller(teacher).loss(student(**batch, return_dict=False), batch)
    outputs = student(**batch, output_hidden_states=True)
    outputs["logits"] = None  # as with fused losses
    with pytest.raises(DistillError, match="without logits over classes: set logits=0"):
        Distiller(teacher).loss(outputs, batch)
    assert bool(Distiller(teacher, logits=0).loss(outputs, batch).isfinite())
    other = made(bert("QuestionAnswering"), 1)
    with pytest.raises(DistillError, match="predicts logits and the teacher start_logits"):
        Distiller(other, task=0, hidden=0)(student, TOKENS)


# --- padding --------------------------------------------------------------------------------------


def cut(batch: dict[str, Any], most: int) -> dict[str, Any]:
    return {k: v[..., :most] if v.ndim > 1 else v for k, v in batch.items()}


SOUND = torch.randn(1, 400)
PADDED: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "choices": (
        bert("MultipleChoice"),
        {"input_ids": IDS[None, :2], "labels": torch.tensor([1]),
         "attention_mask": torch.tensor([[[1, 1, 1, 1, 0, 0]] * 2])},
        4,
    ),
    "an encoder-decoder's class": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**TWO_SIDES)),
        {"input_ids": torch.tensor([[5, 6, 7, 2, 0, 0]]), "labels": torch.tensor([1]),
         "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]])},
        4,
    ),
    "sound": (
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                **SIZES, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 2),
                num_feat_extract_layers=2, num_conv_pos_embeddings=4, mask_time_prob=0.0,
                num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
            )
        ),
        {"input_values": SOUND.masked_fill(torch.arange(400) >= 205, 0.0),
         "attention_mask": (torch.arange(400) < 205)[None].long()},
        205,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing_for_any_head(name: str):
    make, batch, most = PADDED[name]
    student, distiller = made(make, 0), Distiller(made(make, 1), task=0.0)
    found, short = (distiller(student, x)["loss"].item() for x in (batch, cut(batch, most)))
    assert found == pytest.approx(short, rel=1e-4)
    everywhere = {k: v for k, v in batch.items() if k != "attention_mask"}
    assert distiller(student, everywhere)["loss"].item() != pytest.approx(short, rel=1e-3)


def test_examples_with_a_label_of_minus_100_do_not_count():
    make = bert("SequenceClassification", num_labels=3)
    student, distiller = made(make, 0), Distiller(made(make, 1), task=0.5, hidden=0.0)
    labels = torch.tensor([1, -100, 2])
    found = distiller(student, {**TOKENS, "labels": labels})["loss"]
    kept = {k: v[[0, 2]] for k, v in {**TOKENS, "labels": labels}.items()}
    torch.testing.assert_close(found, distiller(student, kept)["loss"])


# --- teacher and student are two networks ---------------------------------------------------------


def prepared(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "prepared": prepared,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW) if n == "compiled" else n for n in WRAPS]
)
def test_the_teacher_stays_what_it_was_while_the_student_changes(name: str):
    make, _ = PLACED["a causal model"]
    wrapped = WRAPS[name](made(make, 0))
    distiller = Distiller.of(wrapped)
    before = distiller.teacher(input_ids=IDS).logits
    with torch.no_grad():
        for param in wrapped.parameters():
            param.add_(1.0)
    assert torch.equal(distiller.teacher(input_ids=IDS).logits, before)


def test_what_a_teacher_froze_is_not_trained_without_a_word():
    class Headed(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, **batch: Any) -> Any:
            return self.body(**batch)

    make, batch = PLACED["a causal model"]
    model = made(make, 0)
    with pytest.raises(DistillError, match="share 'body', which is frozen now"):
        Distiller(model)(Headed(model), batch)
    with pytest.raises(DistillError, match="student itself"):
        Distiller(model)(nn.DataParallel(model), batch)
    model, teacher = made(make, 0), made(make, 1)
    teacher.transformer.wte.weight = model.transformer.wte.weight
    with pytest.raises(DistillError, match=r"share 'transformer\.wte\.weight'"):
        Distiller(teacher)(model, batch)
    # Weights that were frozen already may be shared, to save memory.
    model, teacher = made(make, 0), made(make, 1)
    model.transformer.wpe.requires_grad_(False)
    teacher.transformer.wpe.weight = model.transformer.wpe.weight
    Distiller(teacher)(model, batch).loss.backward()


def test_a_distiller_is_copied_and_pickled_without_the_student():
    make, batch = PLACED["one's own"]
    student, distiller = made(make, 0), Distiller(made(make, 1), hidden=0.0)
    wanted = distiller(student, batch)["loss"]
    for other in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert torch.equal(other(student, batch)["loss"], wanted)
    assert len(pickle.dumps(distiller)) < 2 * len(pickle.dumps(distiller.teacher))


# --- a Trainer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "micro"),
    # transformers does not divide the loss of several labels by the accumulated batches.
    [("a causal model", 4), ("a causal model", 1), ("answers", 2), ("several labels", 4)],
)
def test_a_trainer_weighs_the_terms_as_the_distiller_does(kind: str, micro: int, tmp_path: Path):
    """One step of SGD, of one batch or several, is the step of the distiller's loss on all rows."""
    from nmflow.integrations.distillation import Distillation

    class Student(Distillation, hf.Trainer):
        pass

    if kind == "a causal model":
        # Its loss is divided by the labels that it reads; transformers counts one more for GPT-2.
        make, labels = lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)), IDS.clone()
        labels[0, :4] = -100
        batch = {"input_ids": IDS, "labels": labels}
    else:
        make, batch, _ = HEADS[kind]
    batch = {k: torch.cat([v, v[:1]]) for k, v in batch.items()}
    model, teacher = made(make, 0), made(make, 1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    Distiller(copy.deepcopy(teacher), hidden=0.0)(alone, batch)["loss"].backward()
    optimizer.step()
    rows = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    args = hf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro,
        max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = cast(Any, Student)(model, args, train_dataset=rows)
    trainer.distiller = Distiller(teacher, hidden=0.0)
    trainer.train()
    for (name, found), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5), name


def test_items_of_ones_own_loop_weigh_the_other_terms_too():
    make, _ = PLACED["a causal model"]
    student, distiller = made(make, 0), Distiller(made(make, 1), hidden=0.0)
    labels = IDS.clone()
    labels[0, :4] = -100
    batch = {"input_ids": IDS, "labels": labels}
    items = (labels[:, 1:] != -100).sum()
    parts = [
        {"input_ids": IDS[i : i + 1], "labels": labels[i : i + 1], "num_items_in_batch": items}
        for i in range(3)
    ]
    found = sum(distiller(student, part).loss.item() for part in parts)
    assert found == pytest.approx(distiller(student, batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["smoothed", "of one's own"])
def test_a_trainer_with_another_loss_keeps_it(loss: str, tmp_path: Path):
    from nmflow.integrations.distillation import Distillation

    class Student(Distillation, hf.Trainer):
        pass

    make, batch = PLACED["an encoder-decoder"]
    batch = {**batch, "decoder_input_ids": IDS}
    model, teacher = made(make, 0), made(make, 1)
    more: dict[str, Any] = {}
    if loss != "smoothed":
        more["compute_loss_func"] = lambda outputs, labels, **_: outputs.logits.square().mean()
    args = hf.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True,
        label_smoothing_factor=0.1 if loss == "smoothed" else 0.0,
    )  # fmt: skip
    own = hf.Trainer(model, args, **more).compute_loss(model, dict(batch))
    trainer = cast(Any, Student)(model, args, **more)
    trainer.distiller = Distiller(teacher, task=0.3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.dropout = 0.0
    for layer in model.modules():
        if hasattr(layer, "dropout") and isinstance(layer.dropout, float):
            layer.dropout = 0.0
    found = trainer.compute_loss(model, dict(batch))
    model.eval()
    rest = Distiller(teacher, task=0.0)(model, batch).loss
    assert found.item() == pytest.approx((0.3 * own + rest).item(), rel=1e-4)


def test_hidden_states_of_convolutions_are_compared_by_their_norm():
    make, batch, _ = HEADS["convolutions"]
    student, teacher = made(make, 0), made(make, 1)
    states = [m(**batch, output_hidden_states=True).hidden_states for m in (student, teacher)]
    assert states[0][0].ndim == 4
    found = Distiller(teacher, task=0.0, logits=0.0, hidden=1.0)(student, batch).loss
    torch.testing.assert_close(found, hidden_loss(*states))
