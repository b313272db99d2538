"""Networks of transformers and timm, stopped and resumed in a `Trainer`: bit-equal, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from nmflow.errors import StateError
from nmflow.integrations.transformers import ExactCheckpoints, FinalMasksEvaluation, NMFlowCallback

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 4,
}  # fmt: skip
# Kind → head and fields.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("MaskedLM", TEXT),
    "roberta": ("MaskedLM", TEXT),
    "distilbert": ("MaskedLM", {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 2,
                                "n_heads": 2, "max_position_embeddings": 32}),
    "albert": ("MaskedLM", {**TEXT, "embedding_size": 16}),
    "deberta-v2": ("MaskedLM", TEXT),
    "electra": ("MaskedLM", {**TEXT, "embedding_size": 16}),
    "gpt2": ("CausalLM", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2,
                          "n_positions": 32}),
    "llama": ("CausalLM", {**TEXT, "tie_word_embeddings": True}),
    "qwen2": ("CausalLM", TEXT),
    "qwen2_moe": ("CausalLM", {**TEXT, "num_experts": 4, "moe_intermediate_size": 32,
                               "shared_expert_intermediate_size": 32}),
    "mixtral": ("CausalLM", {**TEXT, "num_local_experts": 4}),
    "t5": ("Seq2SeqLM", {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
                         "num_heads": 2, "decoder_start_token_id": 0}),
    "vit": ("ImageClassification", IMAGE),
    "deit": ("ImageClassification", {**IMAGE, "architectures": ["DeiTForImageClassification"]}),
    "beit": ("ImageClassification", IMAGE),
    "dinov2": ("ImageClassification", IMAGE),
    "swin": ("ImageClassification", {"image_size": 16, "patch_size": 2, "embed_dim": 16,
                                     "depths": [1, 1], "num_heads": [1, 2], "window_size": 2,
                                     "num_labels": 4}),
    "convnext": ("ImageClassification", {"image_size": 16, "patch_size": 2, "num_labels": 4,
                                         "hidden_sizes": [16, 32], "depths": [1, 1],
                                         "num_stages": 2}),
    "mobilevit": ("ImageClassification", {"image_size": 64, "num_labels": 4,
                                          "hidden_sizes": [32, 48, 64],
                                          "neck_hidden_sizes": [16, 16, 32, 48, 64, 80, 96]}),
    "resnet": ("ImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32],
                                       "depths": [1, 1], "num_labels": 4}),
}  # fmt: skip
QUICK = ("vit", "albert", "gpt2", "resnet")
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]


class Batches(torch.utils.data.Dataset):
    """Sixteen examples of noise."""

    def __init__(self, head: str, size: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(16):
            if head == "ImageClassification":
                label = torch.randint(4, (), generator=draw)
                image = torch.rand(3, size, size, generator=draw)
                self.rows.append({"pixel_values": image, "labels": label})
            else:
                words = torch.randint(2, 64, (8,), generator=draw)
                self.rows.append({"input_ids": words, "labels": words})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class Break(TrainerCallback):
    """Ends the training after its third step, as a kill would."""

    class Here(Exception):
        pass

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise self.Here


class Exact(ExactCheckpoints, FinalMasksEvaluation, Trainer):
    pass


def network(name: str) -> nn.Module:
    head, fields = NETWORKS[name]
    known = set(transformers.CONFIG_MAPPING[name]().to_dict()) | {"num_labels"}
    aliases = getattr(transformers.CONFIG_MAPPING[name], "attribute_map", {})
    given = {k: v for k, v in fields.items() if k in known or k in aliases}
    config = transformers.AutoConfig.for_model(name, **given)
    for key in ("decoder_start_token_id", "architectures"):  # fields of no config's own
        if key in fields:
            setattr(config, key, fields[key])
    return getattr(transformers, f"AutoModelFor{head}").from_config(config)


def trained(
    make: Any, data: Any, folder: Path, kind: Any = Exact, resume: bool = False, stop: bool = False
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    callback = NMFlowCallback("mdgf-linear", "1:4", include="all", remainder="skip")
    args = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3,
        report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=100, learning_rate=1e-2,
    )  # fmt: skip
    trainer = kind(
        model=make(), args=args, train_dataset=data,
        callbacks=[callback, Break()] if stop else [callback],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if stop:
        with pytest.raises(Break.Here):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def stop_and_go(make: Any, data: Any, folder: Path) -> bool:
    """Whether a plain `Trainer` could resume; with `ExactCheckpoints` it has to."""
    whole = trained(make, data, folder / "whole")

    def equal(other: dict[str, torch.Tensor]) -> bool:
        return other.keys() == whole.keys() and all(
            torch.equal(value, other[name]) for name, value in whole.items()
        )

    trained(make, data, folder / "exact", stop=True)
    assert equal(trained(make, data, folder / "exact", resume=True))
    trained(make, data, folder / "plain", Trainer, stop=True)
    try:
        resumed = trained(make, data, folder / "plain", Trainer, resume=True)
    except StateError as error:
        said = str(error)
    else:
        assert equal(resumed)
        return True
    assert "loaded in part" in said
    assert "\n" not in said
    return False


@pytest.mark.parametrize("name", NAMES)
def test_a_network_resumes_bit_equal_or_is_refused(name: str, tmp_path: Path) -> None:
    head, fields = NETWORKS[name]
    data = Batches(head, fields.get("image_size", 32))
    stop_and_go(lambda: network(name), data, tmp_path)


TIMM = (
    "vit_tiny_patch16_224",
    "resnet18",
    "mixer_s32_224",
    "convnext_atto",
    "mobilenetv3_small_050",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_resumes_bit_equal(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm.create_model(name, num_classes=4)

        def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
            logits = self.body(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    assert stop_and_go(Classifier, Batches("ImageClassification", 224), tmp_path)


class Renamed(Trainer):
    """Saves one tensor under another name, and one with other values, as a lossy format would."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = dict(self.model.state_dict())  # type: ignore[union-attr]
        state["other.name"] = state.pop("first.bias")
        state["norm.running_mean"] = state["norm.running_mean"] + 1
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        torch.save(state, Path(str(output_dir)) / "pytorch_model.bin")


class Small(nn.Module):
    _keys_to_ignore_on_save = None  # which transformers asks for where something is missing

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        rows = nn.functional.one_hot(input_ids[:, 0] % 16, 16).float()
        logits = self.head(self.norm(self.first(rows)))
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0]), "logits": logits}


def test_what_a_load_leaves_out_is_named(tmp_path: Path) -> None:
    data = Batches("CausalLM", 0)
    trained(Small, data, tmp_path, Renamed, stop=True)
    with pytest.raises(StateError, match=r"2 of the network's \d+ tensors.*first\.bias") as caught:
        trained(Small, data, tmp_path, Renamed, resume=True)
    assert "norm.running_mean" in str(caught.value)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    data = Batches("CausalLM", 0)
    trained(Small, data, tmp_path, stop=True)

    class Wider(Small):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(3))

    with pytest.raises(StateError, match=r"extra of 1 not in the file"):
        trained(Wider, data, tmp_path, resume=True)
