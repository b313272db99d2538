"""Every config is sound, and `--smoke` tries it without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from datasets import Value

from nmflow.errors import ConfigError, NMFlowError
from nmflow.experiments import config as configs
from nmflow.experiments import smoke
from small_systems import SYSTEMS, experiment_of, written

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("own_cache")


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


@pytest.mark.parametrize(
    "system", ["streamed vit", "t5", "marian streamed", "lstm", "gpt2 instructed"]
)
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
    experiment = experiment_of(raw)
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
        smoke.smoke(experiment_of(SYSTEMS["lstm"]), folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    raw = {**SYSTEMS["t5"], "model": {"load": "nobody/network"}}
    with pytest.raises(ConfigError, match=r"model\.kind and model\.fields"):
        smoke.smoke(experiment_of(raw), tmp_path / "other-smoke")


def test_smoke_of_broken_data_fails(tmp_path: Path) -> None:
    rows = {"sentence": ["fine", ""], "label": [0, 1]}
    features = {"sentence": Value("string"), "label": Value("int64")}
    data = written(tmp_path / "rows.parquet", rows, features)
    raw = {**SYSTEMS["bert"], "data": data}
    with pytest.raises(NMFlowError, match="row 1 of"):
        smoke.smoke(experiment_of(raw), tmp_path / "out-smoke")
