"""Packed networks by the calls of transformers: `save_pretrained`, `from_pretrained` and others."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import nn

import nmflow
from networks_of_hf import IDS, MODELS
from nmflow.errors import CompressError, ConfigError, FileFormatError
from nmflow.packed import compress, decompress, save
from nmflow.packed.build import PACKED
from nmflow.packed.int8 import Int8Linear
from nmflow.packed.modules import PackedLinear
from pruned import prune

HF = [name for name in MODELS if name != "a network of one"]


def packed_of(name: str) -> tuple[Any, Any, dict[str, Any]]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = prune(make()).eval()
    return model, compress(model, measure=False), inputs


def count(model: nn.Module) -> int:
    return sum(isinstance(m, PACKED) for m in model.modules())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a packed BERT, and the dense network."""
    folder = tmp_path_factory.mktemp("bert")
    model, packed, _ = packed_of("bert")
    packed.save_pretrained(folder)
    return folder, model


def _other_head(model: Any) -> None:
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))


def _wrapped_layer(model: Any) -> None:
    layer = model.bert.encoder.layer[0]
    layer.output.dense = nn.ModuleDict({"base_layer": layer.output.dense})
    layer.output.dense.forward = layer.output.dense["base_layer"].forward


def _weight_norm(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.bert.pooler.dense)


@pytest.mark.parametrize("change", [_other_head, _wrapped_layer, _weight_norm])
def test_a_config_is_written_only_for_a_network_that_it_builds(change: Any, tmp_path: Path) -> None:
    make, inputs = MODELS["bert"]
    model = prune(make()).eval()
    change(model)
    packed = compress(model, measure=False, inplace=True)
    with pytest.raises(CompressError, match="which its config does not build"):
        packed.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    save(packed, tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    again = make().eval()
    change(again)
    with torch.no_grad():
        assert torch.equal(nmflow.load(tmp_path / "a", again)(**inputs)[0], packed(**inputs)[0])


@pytest.mark.parametrize("name", HF)
def test_a_packed_network_is_the_masked_dense_one(name: str, tmp_path: Path) -> None:
    model, packed, inputs = packed_of(name)
    packed.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        want, told = type(model).from_pretrained(tmp_path / "dense", output_loading_info=True)
        again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        for key, value in told.items():
            assert set(info[key]) == set(value), key
        assert torch.equal(again(**inputs)[0], packed(**inputs)[0])
        torch.testing.assert_close(again(**inputs)[0], want(**inputs)[0], atol=1e-5, rtol=1e-4)
        assert count(again) == count(packed) > 0
        ours = nmflow.from_pretrained(tmp_path)
        assert type(ours) is type(again)
        assert not ours.training
        assert torch.equal(ours(**inputs)[0], again(**inputs)[0])
    dense = decompress(again)
    assert {
        n: t for n, t in dense.state_dict().items() if not torch.equal(t, want.state_dict()[n])
    } == {}
    # Who shared a weight shares it again.
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in packed.named_parameters()}


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", ["bert", "qwen3", "gpt2"])
def test_8_bit_values_come_back_by_either_call(name: str, activations: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = prune(make()).eval()
    packed = compress(model, measure=False, values="int8", activations=activations)
    packed.save_pretrained(tmp_path)
    with torch.no_grad():
        want = packed(**inputs)[0]
        for again in (nmflow.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
            assert torch.equal(again(**inputs)[0], want)
            kept = [m for m in again.modules() if isinstance(m, Int8Linear)]
            assert len(kept) == sum(isinstance(m, Int8Linear) for m in packed.modules()) > 0
        headless = hf.AutoModel.from_pretrained(tmp_path)
        assert type(headless) is type(model.base_model)
        assert torch.equal(headless(**inputs)[0], packed.base_model(**inputs)[0])
        # The dense network of the rounded weights, by arithmetic of its own.
        near = {"float": 1e-4, "int8": 0.1}[activations]
        rounded = decompress(again)(**inputs)[0]
        assert float((want - rounded).abs().max() / rounded.abs().max()) < near


def test_a_siglip_whose_head_is_an_attention_of_torch(tmp_path: Path) -> None:
    config = hf.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prune(cast(Any, hf.SiglipVisionModel(config))).eval()
    packed = compress(model, measure=False)
    packed.save_pretrained(tmp_path)
    again = hf.SiglipVisionModel.from_pretrained(tmp_path)
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(pixels).pooler_output, packed(pixels).pooler_output)
    assert count(again) == count(packed)


# What a dense folder reports, too: a head that the class does not have.
UNEXPECTED: dict[str, set[str]] = {
    "BertModel": {"classifier.weight", "classifier.bias"},
    "BertForMaskedLM": {
        "classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"
    },
    "BertForSequenceClassification": set(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_heads_come_and_go_as_in_transformers(kind: str, bert: tuple[Path, Any]) -> None:
    folder, model = bert
    again, told = getattr(hf, kind).from_pretrained(folder, output_loading_info=True)
    body = again if kind == "BertModel" else again.bert
    with torch.no_grad():
        want = model.bert(**IDS)[0]
        torch.testing.assert_close(body(**IDS)[0], want, atol=1e-5, rtol=1e-4)
    assert count(body) >= 12
    unexpected = {key.partition("#")[0] for key in told["unexpected_keys"]}
    assert unexpected == UNEXPECTED[kind]
    assert not [n for n, p in again.named_parameters() if p.is_meta or not p.isfinite().all()]


def test_a_body_that_is_saved_gets_a_head(tmp_path: Path, bert: tuple[Path, Any]) -> None:
    _, model = bert
    body = compress(model.bert, measure=False)
    body.save_pretrained(tmp_path)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert count(again) == count(body)
    with torch.no_grad():
        assert torch.equal(again.bert(**IDS)[0], body(**IDS)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_a_dense_network(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _, inputs = packed_of("llama")
    model = model.to(dtype)
    packed = compress(model, measure=False)
    packed.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "dense")
    for wanted in ("auto", torch.bfloat16, torch.float32):
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
        want = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=wanted)
        assert [p.dtype for p in decompress(again).parameters()] == [
            p.dtype for p in want.parameters()
        ]
        with torch.no_grad():
            atol, rtol = (1e-5, 1e-4) if want.dtype == torch.float32 else (0.02, 0.05)
            got = again(**inputs)[0]
            torch.testing.assert_close(got, want(**inputs)[0], atol=atol, rtol=rtol)


def test_what_transformers_keeps_in_float32_is_kept_so(tmp_path: Path) -> None:
    _, packed, _ = packed_of("t5")
    packed.save_pretrained(tmp_path)
    again = hf.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    layer = cast(Any, again.encoder.block[0]).layer[1].DenseReluDense
    assert [layer.wo.weight.dtype, layer.wi.weight.dtype] == [torch.float32, torch.float16]


def test_generation_goes_on_as_before(tmp_path: Path) -> None:
    _, packed, inputs = packed_of("t5")
    packed.generation_config.max_new_tokens = 3
    packed.generation_config.num_beams = 2
    packed.save_pretrained(tmp_path)
    again = nmflow.from_pretrained(tmp_path)
    assert again.generation_config.num_beams == 2
    ids = inputs["input_ids"]
    assert torch.equal(again.generate(ids), packed.generate(ids))


def test_a_pipeline_and_a_trainer_take_the_folder(tmp_path: Path, bert: tuple[Path, Any]) -> None:
    folder, model = bert
    shutil.copytree(folder, tmp_path / "net")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = hf.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "net")
    ask = hf.pipeline("text-classification", model=str(tmp_path / "net"))
    want = hf.pipeline("text-classification", model=model, tokenizer=tokenizer)
    assert count(ask.model) > 0
    said, wanted = ask("a b c")[0], want("a b c")[0]
    assert said["label"] == wanted["label"]
    assert abs(said["score"] - wanted["score"]) < 1e-5
    trainer = hf.Trainer(ask.model, hf.TrainingArguments(str(tmp_path / "out"), report_to=[]))
    rows = [{"input_ids": IDS["input_ids"][i], "labels": i} for i in range(2)]
    assert trainer.evaluate(cast(Any, rows))["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "again"))
    assert count(nmflow.from_pretrained(tmp_path / "again")) == count(ask.model)


def test_what_was_loaded_is_saved_copied_and_pickled(
    bert: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = bert
    again = nmflow.from_pretrained(folder)
    for i, one in enumerate((again, copy.deepcopy(again), pickle.loads(pickle.dumps(again)))):
        one.save_pretrained(tmp_path / str(i), max_shard_size="1GB", safe_serialization=True)
        assert (tmp_path / str(i) / "nmflow.json").read_bytes() == (
            folder / "nmflow.json"
        ).read_bytes()
        assert "quantization_config" not in one.config.to_dict()
    dense = decompress(again)
    dense.save_pretrained(tmp_path / "dense")
    back = hf.AutoModel.from_pretrained(tmp_path / "dense")
    assert count(back) == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    with pytest.raises(CompressError, match=r"push_to_hub is True: call model\.push_to_hub"):
        again.save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(CompressError, match="state_dict is 'dict', which"):
        again.save_pretrained(tmp_path / "x", state_dict={})
    assert not (tmp_path / "x").exists()
    again.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_push_to_hub_uploads_the_packed_folder(
    bert: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = nmflow.from_pretrained(bert[0])
    seen: set[str] = set()

    def upload(self: Any, working_dir: str, *args: Any, **kwargs: Any) -> None:
        seen.update(file.name for file in Path(working_dir).iterdir())

    class Api:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

    monkeypatch.setattr(type(again), "_upload_modified_files", upload)
    monkeypatch.setattr(hf.utils.hub, "hf_api", Api)
    again.push_to_hub("someone/packed")
    assert {"nmflow.json", "config.json", "model.safetensors.index.json"} <= seen


def test_what_is_written(bert: tuple[Path, Any]) -> None:
    folder, model = bert
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "nmflow"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["dtype"] == "float32"
    assert "auto_map" not in config
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    header = json.loads((folder / "nmflow.json").read_text())
    assert set(index["weight_map"]) == set(header["tensors"])
    assert set(index["weight_map"].values()) == {header["file"]}
    assert not hasattr(model.config, "quantization_config")


def hub(folder: Path, cache: Path) -> str:
    """A hub's cache with a repository in it, as downloads leave it."""
    name, commit = "someone/packed", "0123456789abcdef0123456789abcdef01234567"
    repo = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return name


def test_a_name_of_the_hub(bert: tuple[Path, Any], tmp_path: Path) -> None:
    name = hub(bert[0], tmp_path)
    again = hf.AutoModel.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)
    assert count(again) > 0


ORDERS = {
    "the quantizer first": "import transformers; import nmflow.integrations.quantizer",
    "nmflow first": "import nmflow; import transformers",
    "transformers first": "import transformers; transformers.BertModel; import nmflow",
    "reloaded": "import nmflow, importlib; importlib.reload(nmflow); import transformers",
}


@pytest.mark.parametrize(
    "order", [x if x == "nmflow first" else pytest.param(x, marks=pytest.mark.slow) for x in ORDERS]
)
def test_an_import_of_nmflow_is_all_it_takes(order: str, bert: tuple[Path, Any]) -> None:
    code = f"""
{ORDERS[order]}
import sys
assert not any(type(f).__module__.startswith("nmflow") for f in sys.meta_path) or (
    "transformers.quantizers.auto" not in sys.modules
)
model = transformers.AutoModel.from_pretrained({str(bert[0])!r})
assert sum(type(m).__name__ == "PackedLinear" for m in model.modules()) >= 12
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_without_nmflow_transformers_fails(bert: tuple[Path, Any]) -> None:
    """It does not make up the weights that it cannot read."""
    code = f"import transformers; transformers.AutoModel.from_pretrained({str(bert[0])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "Unknown quantization type, got nmflow" in text
    assert "mismatch" in text.splitlines()[-1] + text


def test_a_weight_that_only_the_file_holds_packed(tmp_path: Path) -> None:
    model, _, inputs = packed_of("bert")
    packed = compress(model, measure=False, exclude="*query*")
    packed.save_pretrained(tmp_path)
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert count(again) == count(packed)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], packed(**inputs)[0])
    layer = cast(Any, again).bert.encoder.layer[0].attention.self
    assert type(layer.query) is nn.Linear
    header = json.loads((tmp_path / "nmflow.json").read_text())
    assert header["weights"]["bert.encoder.layer.0.attention.self.query.weight"]["run"] == "dense"


def test_what_a_stranger_wrote_is_refused(bert: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = bert
    file = next(folder.glob("weights-*.safetensors"))

    def broken(name: str, change: Any) -> Path:
        shutil.copytree(folder, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def damage(place: Path) -> None:
        content = bytearray((place / file.name).read_bytes())
        content[-1] ^= 1
        (place / file.name).write_bytes(content)

    def rival(place: Path) -> None:
        save_file({"x": torch.ones(1)}, place / "model.safetensors", metadata={"format": "pt"})

    def elsewhere(place: Path) -> None:
        shutil.copy(place / file.name, place / "weights-0.safetensors")
        index = json.loads((place / "model.safetensors.index.json").read_text())
        names = dict.fromkeys(index["weight_map"], "weights-0.safetensors")
        index["weight_map"] = names
        (place / "model.safetensors.index.json").write_text(json.dumps(index))

    def code(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "own.C", "AutoModel": "own.M"}
        (place / "config.json").write_text(json.dumps(config))
        (place / "own.py").write_text("raise SystemExit('run')")

    def wider(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        config["intermediate_size"] = 128
        (place / "config.json").write_text(json.dumps(config))

    for change, said in (
        (damage, "checksum"), (rival, "would be read in place of"), (wider, "in the model"),
        (elsewhere, "would be read in place of"),
        (lambda place: (place / "nmflow.json").write_text("{"), "not JSON"),
        (lambda place: (place / "nmflow.json").unlink(), "cannot be read|nmflow.json"),
    ):  # fmt: skip
        place = broken(said[:5] + getattr(change, "__name__", "") + str(id(change)), change)
        with pytest.raises((FileFormatError, OSError), match=said):
            hf.AutoModelForSequenceClassification.from_pretrained(place)
    with pytest.raises(ConfigError, match=r"architecture|code of its own"):
        nmflow.from_pretrained(broken("code", lambda p: (code(p), other(p))))
    assert count(nmflow.from_pretrained(broken("plain code", code))) > 0


def other(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    config.update(architectures=["Own"], model_type="own")
    (place / "config.json").write_text(json.dumps(config))


def test_errors_name_the_mend(bert: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = bert
    with pytest.raises(ConfigError, match=r"source is .* holds no packed network"):
        nmflow.from_pretrained(tmp_path)
    with pytest.raises(CompressError, match=r"device_map is .* on one device"):
        hf.AutoModel.from_pretrained(folder, device_map={"embeddings": "cpu", "encoder": "disk"})
    model.save_pretrained(tmp_path)
    with pytest.raises(CompressError, match=r"holds model.safetensors, which transformers would"):
        save(model, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    from nmflow.integrations.quantizer import NMFlowConfig

    with pytest.raises(CompressError, match="quantization_config is nmflow's, but"):
        hf.AutoModel.from_pretrained(tmp_path, quantization_config=cast(Any, NMFlowConfig()))


def test_a_network_of_your_own_takes_the_index_away(tmp_path: Path, bert: tuple[Path, Any]) -> None:
    shutil.copytree(bert[0], tmp_path / "net")
    own = nn.Sequential(nn.Linear(32, 8))
    own[0].weight.data *= nmflow.mask(own[0].weight, "1:16")  # pyright: ignore
    save(own, tmp_path / "net")
    assert not (tmp_path / "net" / "model.safetensors.index.json").exists()
    assert type(nmflow.load(tmp_path / "net", nn.Sequential(nn.Linear(32, 8)))[0]) is PackedLinear
