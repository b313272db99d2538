"""Data and networks of a run: texts, digits, images, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM

from nmflow.errors import ConfigError, DataError
from nmflow.experiments import models, tasks
from nmflow.experiments.config import Data, Model
from nmflow.experiments.data import sources as data
from nmflow.experiments.tasks import vision
from small_runs import one

ROOT = Path(__file__).parents[2]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10"
VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_the_text_is_split_once_and_its_hash_is_kept():
    found = data.corpus(Data(source="pydoc"))
    whole = "".join(found.texts[name] for name in data.SPLITS)
    assert len(whole) > 300_000
    assert found.card.sizes["test"] == pytest.approx(len(whole) / 10, abs=1)
    assert len(found.card.sha256) == 64
    assert data.corpus(Data(source="pydoc")).card == found.card


def test_a_text_file_and_a_folder_of_them(tmp_path: Path):
    (tmp_path / "a.txt").write_text("hello " * 100, encoding="utf-8")
    (tmp_path / "b.txt").write_text("world " * 100, encoding="utf-8")
    found = data.corpus(Data(source="text", path=str(tmp_path)))
    assert found.texts["train"].startswith("hello")
    assert "world" in found.texts["test"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text"),
        (b"   \n", "holds no text"),
        (b"\xff\xff", "not UTF-8"),
        (b"a", "too few"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        data.corpus(Data(source="text", path=str(tmp_path / "a.txt")))


def test_a_missing_text_and_one_that_is_too_short(tmp_path: Path):
    with pytest.raises(DataError, match="No such file"):
        data.corpus(Data(source="text", path=str(tmp_path / "none.txt")))
    (tmp_path / "a.txt").write_text("short text " * 5)
    with pytest.raises(DataError, match=r"fewer than options\.length 16"):
        tasks.build(one(data={"source": "text", "path": str(tmp_path / "a.txt")}))


def test_digits_are_split_without_overlap():
    found = data.rows(Data(source="digits"))
    assert found.card.sizes == {"train": 1259, "validation": 269, "test": 269}
    seen = [np.asarray(found.splits[name]["image"]).reshape(-1, 64) for name in data.SPLITS]
    assert sum(len(part) for part in seen) == 1797


def png(value: int, size: int = 4) -> bytes:
    import io

    sink = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def parquet(folder: Path, labels: list[Any], images: list[Any] | None = None) -> Data:
    images = images or [{"bytes": png(9 * i), "path": None} for i in range(len(labels))]
    Dataset.from_dict({"image": images, "label": labels}).to_parquet(str(folder / "a.parquet"))
    return Data(source="parquet", files={"train": str(folder / "a.parquet")})


def pictures(source: Data, **options: Any) -> tasks.Problem:
    options = {"size": 4, **options}
    return tasks.build(
        one(
            task="image-classification", options=options, data=source.model_dump(),
            model={"kind": "vit", "fields": VIT},
        )
    )  # fmt: skip


def test_images_come_from_parquet(tmp_path: Path):
    problem = pictures(parquet(tmp_path, [0, 1] * 10))
    batch = problem.train.__getitems__([0, 1, 2])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert batch["labels"].tolist() == [0, 1, 0] or batch["labels"].max() <= 1
    assert problem.data.sizes == {"train": 16, "validation": 2, "test": 2}
    assert problem.model().config.num_labels == 2


def test_images_come_from_a_folder(tmp_path: Path):
    for name, value in (("cat", 10), ("dog", 200)):
        for i in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(png(value + i, 6))
    problem = pictures(Data(source="images", path=str(tmp_path)))
    assert problem.data.sizes["train"] == 16
    assert problem.model().config.num_labels == 2


def test_images_that_do_not_fit_into_memory_are_decoded_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = parquet(tmp_path, [0, 1] * 10)
    whole = pictures(source)
    vision._cached.cache_clear()
    monkeypatch.setattr(vision, "MEMORY", 0)
    lazy = pictures(source)
    vision._cached.cache_clear()
    assert isinstance(lazy.train.pixels, vision.Encoded)
    for a, b in zip(
        whole.train.__getitems__([3, 1]).values(),
        lazy.train.__getitems__([3, 1]).values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_augmentation_is_a_function_of_the_batch(tmp_path: Path):
    problem = pictures(parquet(tmp_path, [0, 1] * 10), augment="crop-flip", size=8)
    first, again = (problem.train.__getitems__([1, 5])["pixel_values"] for _ in range(2))
    assert torch.equal(first, again)
    assert problem.test.augment == "none"


@pytest.mark.parametrize(
    ("labels", "images", "said"),
    [
        ([0, 1, None, 1] * 5, None, r"label None at row \d+ of"),
        ([0, -1] * 10, None, r"label -1 at row \d+ of"),
        ([0, 1] * 10, [b"no image"] * 20, "undecodable image at row 0"),
    ],
)
def test_broken_images_and_labels_are_one_sentence(
    tmp_path: Path, labels: list[Any], images: list[Any] | None, said: str
):
    with pytest.raises(DataError, match=said):
        pictures(parquet(tmp_path, labels, images))


def test_a_label_that_training_does_not_know(tmp_path: Path):
    source = parquet(tmp_path, [0, 1] * 10)
    for name in ("validation", "test"):
        Dataset.from_dict(
            {"image": [{"bytes": png(3), "path": None}], "label": [7]}
        ).to_parquet(str(tmp_path / f"{name}.parquet"))  # fmt: skip
        source.files[name] = str(tmp_path / f"{name}.parquet")  # type: ignore[index]
    with pytest.raises(DataError, match="label 7 at row 0 of"):
        pictures(source)


def test_a_missing_column_and_a_file_that_is_no_parquet(tmp_path: Path):
    source = parquet(tmp_path, [0, 1] * 10)
    with pytest.raises(DataError, match=r"no column .kind. for the label.*image, label"):
        pictures(source.model_copy(update={"columns": {"label": "kind"}}))
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        data.rows(Data(source="parquet", files={"train": str(tmp_path / "b.parquet")}))
    with pytest.raises(DataError, match="No such file"):
        data.rows(Data(source="parquet", files={"train": str(tmp_path / "c.parquet")}))


@pytest.mark.data
def test_cifar_as_it_lies_beside_the_checkout():
    if not CIFAR.is_dir():
        pytest.skip("no CIFAR-10 beside the checkout")
    files = {split: str(CIFAR / f"{split}.parquet") for split in ("train", "test")}
    problem = pictures(Data(source="parquet", files=files, limit=64), size=32)  # type: ignore[arg-type]
    assert problem.test.__getitems__([0])["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"kind": "gpt3"}, r"model\.kind is 'gpt3'.*did you mean"),
        ({"kind": "gpt2", "fields": {"n_embed": 4}}, r"'model\.fields\.n_embed'.*did you mean"),
        ({"kind": "gpt2", "fields": {"n_embd": 30, "n_head": 4}}, "cannot be built"),
        ({"load": "/no/such/folder"}, r"model\.load is '/no/such/folder'"),
    ],
)
def test_a_network_that_cannot_be_built(model: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        models.build(Model.model_validate(model), AutoModelForCausalLM, {"vocab_size": 9})
