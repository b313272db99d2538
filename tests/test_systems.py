"""The paper's systems at small size: train, finalize, audit, reload, the same predictions."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from datasets import ClassLabel, Dataset, Features, Image, Translation, Value
from PIL import Image as Pictures
from pyarrow import parquet

from nmflow import audit
from nmflow.errors import ConfigError, DataError, NMFlowError
from nmflow.experiments import config as configs
from nmflow.experiments import smoke, synthetic, tasks
from nmflow.experiments.results import MODEL, RunFolder
from nmflow.experiments.tasks import _text, glue
from nmflow.experiments.tasks.glue_names import Name
from nmflow.experiments.tokenization import Tokens, learnt, tokenizer
from nmflow.experiments.training import train

ROOT = Path(__file__).parents[1]
IMAGES = {"task": "image-classification", "options": {"size": 16}}
WORDS = ("good", "bad", "film", "plot", "the", "a", "very", "not", "is", "was")

# One row a system: task and options, network, pattern and placement. All at a size of seconds.
SYSTEMS: dict[str, dict[str, Any]] = {
    "vit": {
        **IMAGES,
        "model": {"kind": "vit", "fields": {"hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}},
        "pattern": {"ff": "1:16", "qkv": "1:4"}, "include": ["ff", "qkv"],
    },
    "swinv2": {
        **IMAGES,
        "model": {"kind": "swinv2", "fields": {"embed_dim": 16, "depths": [1, 1],
                  "num_heads": [1, 2], "window_size": 2, "patch_size": 4}},
        "pattern": {"ff": "1:16", "qk": "2:4"}, "include": ["ff", "qk"],
    },
    "resnet": {
        **IMAGES,
        "model": {"kind": "resnet", "fields": {"embedding_size": 16, "hidden_sizes": [32, 64],
                  "depths": [1, 1], "layer_type": "bottleneck"}},
        "pattern": "1:4", "include": "*.encoder.*",
    },
    "mixer": {
        **IMAGES,
        "model": {"kind": "mlp-mixer", "fields": {"patch_size": 4, "hidden_size": 32,
                  "tokens_mlp_dim": 32, "intermediate_size": 64, "num_hidden_layers": 1}},
        "pattern": "1:16", "include": "ff",
    },
    "streamed vit": {
        "task": "image-classification-stream", "options": {"size": 16},
        "model": {"kind": "vit", "fields": {"hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}},
        "pattern": "1:16", "include": "ff",
    },
    "bert": {
        "task": "text-classification", "options": {"tasks": ["sst2"], "length": 32},
        "model": {"kind": "bert", "fields": {"hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 1, "num_attention_heads": 2}},
        "pattern": {"ff": "1:16", "qkv": "1:4"}, "include": ["ff", "qkv"],
    },
    "bert pooled": {
        "task": "text-classification",
        "options": {"tasks": ["cola", "mrpc", "rte"], "length": 32, "tokens": {"kind": "word"}},
        "model": {"kind": "bert", "fields": {"hidden_size": 32, "intermediate_size": 64,
                  "num_hidden_layers": 1, "num_attention_heads": 2}},
        "pattern": "1:8", "include": "ff",
    },
    "t5": {
        "task": "text-to-text", "options": {"tasks": ["cola", "mrpc"], "length": 48},
        "model": {"kind": "t5", "fields": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1,
                  "num_decoder_layers": 1, "num_heads": 2}},
        "pattern": {"ff": "1:16", "qkv": "1:4"}, "include": ["ff", "qkv"],
    },
    "marian": {
        "task": "translation", "options": {"length": 24, "beams": 2},
        "model": {"kind": "marian", "fields": {"d_model": 32, "encoder_layers": 1,
                  "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                  "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}},
        "pattern": {"ff": "1:16", "qkv": "1:4"}, "include": ["ff", "qkv"],
        "training": {"trainer": {"label_smoothing_factor": 0.1}},
    },
    "marian streamed": {
        "task": "translation",
        "options": {"length": 24, "beams": 2, "stream": True, "tokens": {"rows": 20}},
        "model": {"kind": "marian", "fields": {"d_model": 32, "encoder_layers": 1,
                  "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                  "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}},
        "pattern": "1:16", "include": "ff",
    },
    "gpt2": {
        "task": "token-modelling", "options": {"length": 16, "tokens": {"size": 300}},
        "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
        "pattern": {"ff": "1:16", "qkv": "1:4"}, "include": ["ff", "qkv"],
    },
    "lstm": {
        "task": "token-modelling",
        "options": {"length": 16, "tokens": {"size": 60, "kind": "word"}},
        "model": {"kind": "lstm", "fields": {"hidden_size": 32, "num_hidden_layers": 2}},
        "pattern": "1:16", "include": "*lstm.*",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NMFLOW_CACHE", str(tmp_path / "cache"))
    # `datasets` waits 5 s for threads of Arrow's whenever a stream is left before its end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def _experiment(raw: dict[str, Any], **more: Any) -> configs.Experiment:
    training = {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 2, "eval_rows": 4,
                "track_every": 2, "device": "cpu"}  # fmt: skip
    training |= raw.get("training", {})
    whole = {
        "name": "small",
        "data": {"source": "hub", "path": "nobody/nothing"},
        "recipes": ["mdgf-exponential"],
        **raw,
        "training": training,
        **more,
    }
    return configs.parse(configs.Experiment, whole, "test")


def _run(raw: dict[str, Any], folder: Path, **more: Any) -> configs.Run:
    """The run, on synthetic data where the test gives none."""
    run = next(_experiment(raw, **more).runs())
    if run.data.source != "hub":
        return run
    data, _ = synthetic.make(run, folder)
    return run.model_copy(update={"data": data})


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains_finalizes_and_reloads(system: str, tmp_path: Path) -> None:
    run = _run(SYSTEMS[system], tmp_path / "data")
    held: list[Any] = []
    built = tasks.build

    def keep(run: configs.Run) -> tasks.Problem:
        problem = built(run)
        make = problem.model
        object.__setattr__(problem, "model", lambda: held.append(make()) or held[-1])
        held.append(problem)
        return problem

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "build", keep)
        result = train(run, RunFolder(tmp_path / "run"))
    problem, model = held

    assert result["audit"]["ok"]
    assert result["audit"]["rows"]
    assert problem.headline in result["test"]
    assert np.isfinite(result["test"]["loss"])
    steps = [row["step"] for row in result["history"] if "eval_loss" in row]
    assert steps == [2, 4]

    saved = tmp_path / "run" / MODEL
    assert audit(saved, run.pattern, run.include, run.exclude).ok
    loaded = type(model).from_pretrained(saved)
    batch = {name: value.to(model.device) for name, value in problem.example.items()}
    with torch.no_grad():
        first, second = model.eval()(**batch).logits, loaded.eval()(**batch).logits
    # Weights to the bit; products may round otherwise where memory is aligned otherwise.
    read = loaded.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(first, second)
    if hasattr(problem, "arguments") and (problem.arguments or {}).get("predict_with_generate"):
        words = {"input_ids": batch["input_ids"], "max_length": 8, "num_beams": 2}
        assert torch.equal(model.generate(**words), loaded.generate(**words))


@pytest.mark.parametrize("system", ["bert", "marian streamed"])
def test_a_stopped_run_goes_on_bit_equal(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {**SYSTEMS[system], "training": {"save_every": 6, "steps": 20, "eval_every": 20}}
    run = _run(raw, tmp_path / "data")  # 32 rows in batches of 4: stopped in the second epoch
    whole = train(run, RunFolder(tmp_path / "whole"))

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.step > 12:
            raise Stop

    with pytest.raises(Stop):
        train(run, RunFolder(tmp_path / "halves"), stop)
    resumed = train(run, RunFolder(tmp_path / "halves"))
    assert resumed["resumed_at"]
    assert resumed["final_sha256"] == whole["final_sha256"]
    assert resumed["test"] == whole["test"]


def test_a_run_begins_where_a_saved_network_ended(tmp_path: Path) -> None:
    run = _run(SYSTEMS["bert"], tmp_path / "data")
    train(run, RunFolder(tmp_path / "first"))
    saved = str(tmp_path / "first" / MODEL)
    raw = {
        **SYSTEMS["bert"],
        "options": {"tasks": ["sst2"], "tokens": {"load": saved}, "length": 32},
        "data": run.data.model_dump(),
        "model": {"load": saved},
        "training": {"learning_rate": 1e-12, "weight_decay": 0.0},
        "recipes": ["ste"],
    }
    again = train(_run(raw, tmp_path), RunFolder(tmp_path / "second"))
    first = RunFolder(tmp_path / "first").result()
    assert again["initial_sha256"] == first["final_sha256"]
    assert again["test"]["loss"] == pytest.approx(first["test"]["loss"], abs=1e-5)


@pytest.mark.parametrize("system", ["mixer", "lstm"])
def test_the_commands_know_our_own_networks(system: str, tmp_path: Path) -> None:
    from nmflow.cli._networks import network

    model = tasks.build(_run(SYSTEMS[system], tmp_path / "data")).model()
    model.save_pretrained(tmp_path / "saved")
    loaded, _, _ = network(tmp_path / "saved")
    assert type(loaded) is type(model)
    for (name, first), second in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.slow
@pytest.mark.parametrize("system", ["bert", "streamed vit", "marian streamed"])
def test_two_processes_train_one_network(system: str, tmp_path: Path) -> None:
    run = _run(SYSTEMS[system], tmp_path / "data")
    raw = run.model_dump(mode="json", exclude={"recipe", "seed"})
    raw |= {"recipes": [run.recipe.name], "output": str(tmp_path / "runs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    script = Path(sys.executable).with_name("nmflow")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "--no-python", str(script), "train", str(tmp_path / "config.yaml")]  # fmt: skip
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    result = RunFolder(tmp_path / "runs" / run.id).result()
    assert result["machine"]["processes"] == 2
    assert result["cost"]["examples_per_step"] == 8
    assert result["audit"]["ok"]
    assert audit(tmp_path / "runs" / run.id / MODEL, run.pattern, run.include).ok


def test_every_task_has_its_stand_in_and_its_name() -> None:
    assert set(tasks.FILES) == set(synthetic._MAKERS)
    assert set(get_args(Name)) == set(glue.TASKS)


# ---- scores


def test_scores_are_those_of_glue() -> None:
    true = np.array([0, 1, 1, 0, 1])
    said = np.array([0, 1, 0, 0, -1])  # -1: no label's word, wrong
    found = glue.scores("mrpc", said, true)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 1 / (2 * 1 + 0 + 2))
    # Matthews by its definition, from the table of true and false.
    tp, tn, fp, fn = 1, 2, 0, 2
    wanted = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert glue.scores("cola", said, true)["matthews"] == pytest.approx(wanted)


def test_pooled_scores_are_the_mean_of_the_tasks() -> None:
    places, true = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    found = glue.summary(("sst2", "mrpc"), places, np.array([0, 0, 1, 0]), true)
    assert found["sst2_accuracy"] == 0.5
    assert found["mrpc_accuracy"] == 0.5
    assert found["mrpc_f1"] == pytest.approx(2 / 3)
    assert found["score"] == pytest.approx((0.5 + (0.5 + 2 / 3) / 2) / 2)


def test_a_pooled_classifier_answers_within_the_task(tmp_path: Path) -> None:
    run = _run(SYSTEMS["bert pooled"], tmp_path)
    problem = tasks.build(run)
    logits = torch.tensor([[9.0, 8, 1, 2, 0, 0], [9.0, 8, 1, 2, 0, 0], [0, 0, 9, 9, 4, 5]])
    labels = torch.tensor([1, 2, 4])  # of cola, mrpc and rte
    assert problem.reduce is not None
    assert problem.reduce(logits, labels).tolist() == [0, 3, 5]


def test_answers_are_told_by_their_words(tmp_path: Path) -> None:
    problem = tasks.build(_run(SYSTEMS["t5"], tmp_path))
    rows = [problem.test[i] for i in range(len(problem.test))]
    batch = problem.collate(rows)

    class Prediction:
        inputs, label_ids = batch["input_ids"].numpy(), batch["labels"].numpy()
        predictions = label_ids

    assert problem.metrics(Prediction())["score"] == 1.0  # type: ignore[arg-type]
    Prediction.predictions = np.zeros_like(Prediction.label_ids)
    assert problem.metrics(Prediction())["cola_accuracy"] == 0.0  # type: ignore[arg-type]


def test_bleu_is_that_of_sacrebleu(tmp_path: Path) -> None:
    problem = tasks.build(_run(SYSTEMS["marian"], tmp_path))
    batch = problem.collate([problem.test[i] for i in range(4)])

    class Prediction:
        predictions, label_ids = batch["labels"].numpy(), batch["labels"].numpy()

    assert problem.metrics(Prediction())["bleu"] == pytest.approx(100)  # type: ignore[arg-type]


# ---- text


def test_a_learnt_tokeniser_is_kept_and_exact(tmp_path: Path) -> None:
    texts = ["Zwei Männer, „im Freien“ 😀.", *(" ".join(WORDS) for _ in range(20))]
    first = learnt(Tokens(size=400), texts)
    kept = list((tmp_path / "cache" / "tokenizers").iterdir())
    again = learnt(Tokens(size=400), texts)
    assert list((tmp_path / "cache" / "tokenizers").iterdir()) == kept
    ids = first(texts, add_special_tokens=False)["input_ids"]
    assert again(texts, add_special_tokens=False)["input_ids"] == ids
    back = [text.strip() for text in first.batch_decode(ids)]
    assert back == texts
    learnt(Tokens(size=300), texts)
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_a_loaded_tokeniser_is_taken_as_it_is() -> None:
    given = Tokens(load="somewhere")
    assert Tokens.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(ValueError, match="leave the other keys out"):
        Tokens(load="somewhere", size=500)
    with pytest.raises(ConfigError, match=r"options\.tokens\.load is './nothing'"):
        tokenizer(Tokens(load="./nothing"), [])


def test_batches_hold_sequences_of_like_length_and_every_row_once() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 1003)
    sampler = _text.ByLength(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    spread = [np.ptp(lengths[order[i : i + 8]]) for i in range(0, 1000, 8)]
    assert np.mean(spread) < 10  # at random it would be about 78
    assert list(sampler) == order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_padding_is_masked_and_the_decoder_sees_the_labels_shifted() -> None:
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [5, 1], "labels": [8, 9, 1]}]
    batch = _text.collate(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]
    assert batch["decoder_input_ids"].tolist() == [[0, 7, 1], [0, 8, 9]]


# ---- broken data: one sentence each


def _table(path: Path, rows: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    table = Dataset.from_dict(rows, features=Features(features)).data.table
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return {"source": "parquet", "files": {s: str(path) for s in ("train", "validation", "test")}}


def _picture() -> dict[str, Any]:
    held = io.BytesIO()
    Pictures.fromarray(np.zeros((9, 7, 3), np.uint8)).save(held, "PNG")
    return {"bytes": held.getvalue(), "path": None}


BROKEN = {
    "an empty sentence": (
        "bert",
        {"sentence": ["fine", " "], "label": [0, 1]},
        "empty sentence at row 1 of",
    ),
    "no sentence": (
        "t5",
        {"sentence": [None, "fine"], "label": [0, 1]},
        "empty sentence at row 0 of",
    ),
    "a label out of range": ("bert", {"sentence": ["a", "b"], "label": [0, 2]}, "label 2 at row 1"),
    "no label": ("bert", {"sentence": ["a", "b"], "label": [0, None]}, "label None at row 1"),
    "a missing column": ("bert", {"text": ["a", "b"], "label": [0, 1]}, "no column 'sentence'"),
    "a missing label": ("bert", {"sentence": ["a", "b"]}, "no column 'label'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_text_is_one_sentence(kind: str, tmp_path: Path) -> None:
    system, rows, says = BROKEN[kind]
    features = {name: Value("int64" if name == "label" else "string") for name in rows}
    data = _table(tmp_path / "rows.parquet", rows, features)
    raw = {**SYSTEMS[system], "options": {"tasks": ["sst2"]}, "data": data}
    with pytest.raises(DataError, match=says) as caught:
        train(_run(raw, tmp_path), RunFolder(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("system", ["marian", "marian streamed"])
@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (
            [{"en": "a", "de": "b"}, {"en": "a", "de": ""}],
            "empty sentence at row 1 of .*, column 'de'",
        ),
        ([{"en": "a", "fr": "b"}], "no 'de' at row 0"),
    ],
)
def test_broken_pairs_are_one_sentence(
    system: str, pairs: list[Any], says: str, tmp_path: Path
) -> None:
    languages = {"translation": Translation(languages=list(pairs[0]))}
    data = _table(tmp_path / "rows.parquet", {"translation": pairs}, languages)
    with pytest.raises(DataError, match=says) as caught:
        tasks.build(_run({**SYSTEMS[system], "data": data}, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_worker_says_one_sentence_too(tmp_path: Path) -> None:
    rows = {"image": [_picture(), {"bytes": b"no image", "path": None}], "label": [0, 1]}
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    data = _table(tmp_path / "rows.parquet", rows, features)
    workers = {"trainer": {"dataloader_num_workers": 1}}
    run = _run({**SYSTEMS["streamed vit"], "data": data, "training": workers}, tmp_path)
    with pytest.raises(DataError, match=r"^data has an undecodable image at row 1") as caught:
        train(run, RunFolder(tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_a_damaged_stream_is_one_sentence(tmp_path: Path) -> None:
    run = _run(SYSTEMS["streamed vit"], tmp_path)
    file = Path(run.data.files["train"])
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + bytes(200) + whole[240:])  # its footer still reads
    with pytest.raises(DataError, match="of the train stream") as caught:
        train(run, RunFolder(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("system", ["vit", "streamed vit"])
@pytest.mark.parametrize("kind", ["undecodable", "no image", "a label out of range", "no column"])
def test_broken_images_are_one_sentence(system: str, kind: str, tmp_path: Path) -> None:
    bad = {"undecodable": {"bytes": b"no image", "path": None}, "no image": None}
    rows: dict[str, Any] = {"image": [_picture(), bad.get(kind, _picture())], "label": [0, 1]}
    features: dict[str, Any] = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    if kind == "a label out of range":
        rows["label"], features["label"] = [0, -1], Value("int64")
    if kind == "no column":
        rows["picture"], features["picture"] = rows.pop("image"), features.pop("image")
    data = _table(tmp_path / "rows.parquet", rows, features)
    model = {**SYSTEMS[system]["model"]}
    model["fields"] = {**model["fields"], "num_labels": 2}
    says = {
        "undecodable": "undecodable image at row 1",
        "no image": "no image at row 1",
        "a label out of range": "label -1 at row 1",
        "no column": "no column 'image'",
    }[kind]
    with pytest.raises(DataError, match=says) as caught:
        train(
            _run({**SYSTEMS[system], "model": model, "data": data}, tmp_path),
            RunFolder(tmp_path / "run"),
        )
    assert "\n" not in str(caught.value)


def test_a_stream_says_what_it_cannot_do(tmp_path: Path) -> None:
    run = _run(SYSTEMS["marian streamed"], tmp_path)
    some = run.model_copy(update={"options": {**run.options, "tokens": {}}})
    with pytest.raises(ConfigError, match=r"options\.tokens\.rows is 0"):
        tasks.build(some)
    files = {key: value for key, value in run.data.files.items() if key != "test"}
    lacking = run.model_copy(update={"data": run.data.model_copy(update={"files": files})})
    with pytest.raises(DataError, match="its test split is not there"):
        tasks.build(lacking)
    noisy = run.training.model_copy(update={"noise_batches": 4})
    with pytest.raises(ConfigError, match="noise_batches is 4"):
        tasks.build(run.model_copy(update={"training": noisy}))


def test_processes_share_a_stream_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmflow.experiments import streams

    rows = {"text": [f"row {i}" for i in range(40)]}
    data = configs.Data(**_table(tmp_path / "rows.parquet", rows, {"text": Value("string")}))

    def seen(rank: int) -> list[str]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        found = streams.source(data).splits["train"]
        stream = streams.Stream(found, lambda row, where, draw: row, "train", seed=1)
        return [row["text"] for row, _ in zip(stream, range(20), strict=False)]

    first, second = seen(0), seen(1)
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(rows["text"])
    assert first == seen(0)


# ---- configs and --smoke


PLACES = ("*", "full/*", "one-gpu/*", "two-cores/*")
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for place in PLACES for path in ROOT.glob(f"configs/{place}.yaml")
)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_is_sound_and_small_enough_to_read(path: str) -> None:
    experiment = configs.load(ROOT / path)
    assert list(experiment.runs())


def test_each_of_the_papers_systems_has_three_sizes() -> None:
    for place in ("full", "one-gpu"):
        found = {path.split("/")[2] for path in CONFIGS if path.startswith(f"configs/{place}/")}
        assert {"vit-imagenet.yaml", "swinv2-imagenet.yaml", "resnet50-imagenet.yaml",
                "t5-glue.yaml", "transformer-wmt.yaml"} <= found  # fmt: skip
    found = {path.split("/")[2] for path in CONFIGS if path.startswith("configs/two-cores/")}
    assert {"vit-cifar10.yaml", "swinv2-cifar10.yaml", "resnet-cifar10.yaml", "t5-glue.yaml",
            "transformer-multi30k.yaml"} <= found  # fmt: skip


@pytest.mark.parametrize("system", ["streamed vit", "t5", "marian streamed", "lstm"])
def test_smoke_needs_no_network(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a smoke run asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    raw = {**SYSTEMS[system], "recipes": ["dense", {"name": "sr-ste", "dense": 2}]}
    if system == "t5":
        raw["options"] = {**raw["options"], "tokens": {"load": "nobody/tokeniser"}}
        fields = {**raw["model"]["fields"], "vocab_size": 500}
        raw["model"] = {"load": "nobody/network", "kind": "t5", "fields": fields}
    experiment = _experiment(raw)
    folder = smoke.folder_of(experiment, tmp_path / "out")
    assert folder == tmp_path / "out-smoke"
    for _ in range(2):  # the second clears what the first left
        result = smoke.smoke(experiment, folder)
    assert result["smoke"]["saved_holds"]
    assert result["audit"]["ok"]
    assert result["run"]["recipe"]["name"] == "sr-ste"
    said = " ".join(result["smoke"]["instead"])
    assert "2 steps" in said
    assert "instead of nobody/nothing on the hub" in said
    if system == "t5":
        assert "a fresh t5 of the same size instead of nobody/network" in said
        assert "instead of nobody/tokeniser" in said


def test_smoke_refuses_what_it_would_destroy_or_cannot_know(tmp_path: Path) -> None:
    folder = tmp_path / "out-smoke"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        smoke.smoke(_experiment(SYSTEMS["lstm"]), folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    raw = {**SYSTEMS["t5"], "model": {"load": "nobody/network"}}
    with pytest.raises(ConfigError, match=r"model\.kind and model\.fields"):
        smoke.smoke(_experiment(raw), tmp_path / "other-smoke")


def test_smoke_of_broken_data_fails(tmp_path: Path) -> None:
    rows = {"sentence": ["fine", ""], "label": [0, 1]}
    features = {"sentence": Value("string"), "label": Value("int64")}
    data = _table(tmp_path / "rows.parquet", rows, features)
    raw = {**SYSTEMS["bert"], "data": data}
    with pytest.raises(NMFlowError, match="row 1 of"):
        smoke.smoke(_experiment(raw), tmp_path / "out-smoke")
