"""Runs of seconds, for tests of whatever trains one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from nmflow.experiments.config import Experiment, Run, parse

TINY: dict[str, Any] = {"n_embd": 32, "n_inner": 64, "n_layer": 1, "n_head": 2}
DEMO: dict[str, Any] = {
    "task": "language-modelling",
    "options": {"length": 16},
    "data": {"source": "pydoc", "limit": 20_000},
    "model": {"kind": "gpt2", "fields": TINY},
    "pattern": "1:8",
    "training": {
        "steps": 24, "batch_size": 4, "learning_rate": 3e-3, "log_every": 4, "eval_every": 8,
        "save_every": 8, "eval_rows": 8, "track_every": 4, "device": "cpu",
    },
    "recipes": ["sr-ste"],
}  # fmt: skip


def experiment(**change: Any) -> Experiment:
    return parse(Experiment, {**DEMO, **change}, "test")


def one(recipe: Any = "mdgf-exponential", seed: int = 0, **change: Any) -> Run:
    return next(experiment(recipes=[recipe], seeds=[seed], **change).runs())
