"""Every system of the paper at a size of seconds, on made-up data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from datasets import Dataset, Features
from pyarrow import parquet

from nmflow.experiments import config as configs
from nmflow.experiments.data import synthetic

IMAGES = {"task": "image-classification", "options": {"size": 16}}

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
    "gpt2 instructed": {
        "task": "instruction-tuning", "options": {"length": 32, "tokens": {"size": 300}},
        "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
        "pattern": "1:4", "include": "ff",
    },
    "gpt2 instructed, padded": {
        "task": "instruction-tuning",
        "options": {"length": 32, "packing": False, "tokens": {"size": 300}},
        "model": {"kind": "gpt2", "fields": {"n_embd": 32, "n_layer": 1, "n_head": 2}},
        "pattern": "1:4", "include": "ff",
    },
    "lstm": {
        "task": "token-modelling",
        "options": {"length": 16, "tokens": {"size": 60, "kind": "word"}},
        "model": {"kind": "lstm", "fields": {"hidden_size": 32, "num_hidden_layers": 2}},
        "pattern": "1:16", "include": "*lstm.*",
    },
}  # fmt: skip


def experiment_of(raw: dict[str, Any], **more: Any) -> configs.Experiment:
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


def run_of(raw: dict[str, Any], folder: Path, **more: Any) -> configs.Run:
    """The run, on synthetic data where the test gives none."""
    run = next(experiment_of(raw, **more).runs())
    if run.data.source != "hub":
        return run
    data, _ = synthetic.make(run, folder)
    return run.model_copy(update={"data": data})


def written(path: Path, rows: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    table = Dataset.from_dict(rows, features=Features(features)).data.table
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return {"source": "parquet", "files": {s: str(path) for s in ("train", "validation", "test")}}
