"""Broken data of any task: one sentence each; and streams."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

from datasets import ClassLabel, Image, Translation, Value
from PIL import Image as Pictures

from nmflow.errors import ConfigError, DataError
from nmflow.experiments import config as configs
from nmflow.experiments import tasks
from nmflow.experiments.run_folder import RunFolder
from nmflow.experiments.training import train
from small_systems import SYSTEMS, run_of, written

pytestmark = pytest.mark.usefixtures("own_cache")


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
    data = written(tmp_path / "rows.parquet", rows, features)
    raw = {**SYSTEMS[system], "options": {"tasks": ["sst2"]}, "data": data}
    with pytest.raises(DataError, match=says) as caught:
        train(run_of(raw, tmp_path), RunFolder(tmp_path / "run"))
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
    data = written(tmp_path / "rows.parquet", {"translation": pairs}, languages)
    with pytest.raises(DataError, match=says) as caught:
        tasks.build(run_of({**SYSTEMS[system], "data": data}, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_worker_says_one_sentence_too(tmp_path: Path) -> None:
    rows = {"image": [_picture(), {"bytes": b"no image", "path": None}], "label": [0, 1]}
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    data = written(tmp_path / "rows.parquet", rows, features)
    workers = {"trainer": {"dataloader_num_workers": 1}}
    run = run_of({**SYSTEMS["streamed vit"], "data": data, "training": workers}, tmp_path)
    with pytest.raises(DataError, match=r"^data has an undecodable image at row 1") as caught:
        train(run, RunFolder(tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_a_damaged_stream_is_one_sentence(tmp_path: Path) -> None:
    run = run_of(SYSTEMS["streamed vit"], tmp_path)
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
    data = written(tmp_path / "rows.parquet", rows, features)
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
            run_of({**SYSTEMS[system], "model": model, "data": data}, tmp_path),
            RunFolder(tmp_path / "run"),
        )
    assert "\n" not in str(caught.value)


def test_a_stream_says_what_it_cannot_do(tmp_path: Path) -> None:
    run = run_of(SYSTEMS["marian streamed"], tmp_path)
    some = run.model_copy(update={"options": {**run.options, "tokens": {}}})
    with pytest.raises(ConfigError, match=r"options\.tokens\.rows is 0"):
        tasks.build(some)
    files = {key: value for key, value in run.data.files.items() if key != "test"}
    lacking = run.model_copy(update={"data": run.data.model_copy(update={"files": files})})
    with pytest.raises(DataError, match="its test split is missing"):
        tasks.build(lacking)
    noisy = run.training.model_copy(update={"noise_batches": 4})
    with pytest.raises(ConfigError, match="noise_batches is 4"):
        tasks.build(run.model_copy(update={"training": noisy}))


def test_processes_share_a_stream_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmflow.experiments.data import streams

    rows = {"text": [f"row {i}" for i in range(40)]}
    data = configs.Data(**written(tmp_path / "rows.parquet", rows, {"text": Value("string")}))

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
