"""Image classification on a streamed data set, which need not fit into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from nmflow.errors import ConfigError, DataError
from nmflow.experiments.files import write_json
from nmflow.experiments.specs import Strict

if TYPE_CHECKING:
    from PIL.Image import Image

    from nmflow.experiments.config import Run
    from nmflow.experiments.tasks import Problem


class Options(Strict):
    """`size`: pixels of the square image; `mean` and `deviation` of each colour, 0 to 1.

    Training images are flipped at random and cropped to a random share of their area, `least` to 1,
    with an aspect ratio of 3:4 to 4:3. Other images are cropped to the center: `middle` of their
    shorter side.
    """

    size: Annotated[int, Field(strict=True, ge=8)] = 224
    least: Annotated[float, Field(gt=0, le=1)] = 0.08
    middle: Annotated[float, Field(gt=0, le=1)] = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)


def build(run: Run) -> Problem:
    """The problem; the data set or the network's fields give the number of classes."""
    import torch
    from transformers import AutoModelForImageClassification, Trainer

    from nmflow.experiments import models
    from nmflow.experiments.data import streams
    from nmflow.experiments.tasks import Problem, vision

    options = Options(**run.options)
    streams.refuse_noise(run)
    found = streams.source(run.data)
    image = run.data.columns.get("image", "image")
    label = run.data.columns.get("label", "label")
    for split, rows in found.splits.items():
        streams.columns(rows, {"image": image, "label": label}, split)
    classes = _classes(found.splits["train"], label, run)
    mean = torch.tensor(options.mean).view(1, 3, 1, 1)
    deviation = torch.tensor(options.deviation).view(1, 3, 1, 1)

    def example(train: bool) -> Any:
        def make(row: Any, where: str, draw: np.random.Generator) -> dict[str, Any]:
            picture = opened(row[image], where)
            cut = cropped(picture, options, draw) if train else middle(picture, options)
            number = row[label]
            if not isinstance(number, int) or not 0 <= number < len(classes):
                raise DataError(
                    f"data has the label {number!r} at {where}: the classes are 0 to "
                    f"{len(classes) - 1}"
                )
            return {"pixel_values": np.asarray(cut, np.uint8).transpose(2, 0, 1), "labels": number}

        return make

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        raw = torch.from_numpy(np.stack([row["pixel_values"] for row in rows]))
        return {
            "pixel_values": (raw.float() / 255 - mean) / deviation,
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    sets = {
        split: streams.Stream(
            _undecoded(rows, image), example(split == "train"), split,
            run.seed if split == "train" else None,
        )
        for split, rows in found.splits.items()
    }  # fmt: skip
    fields = {"num_labels": len(classes), "image_size": options.size, "num_channels": 3}
    blank = np.zeros((3, options.size, options.size), np.uint8)
    return Problem(
        data=found.card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=collate,
        model=lambda: models.build(run.model, AutoModelForImageClassification, fields),
        example=collate([{"pixel_values": blank, "labels": 0}]),
        headline="accuracy",
        metrics=vision._accuracy,
        reduce=lambda logits, labels: vision._first(logits).argmax(-1),
        trainer=type("StreamingTrainer", (streams.Streaming, Trainer), {}),
        save=lambda folder: write_json(folder / "classes.json", classes),
    )


def opened(cell: Any, where: str) -> Image:
    """The image in a cell, in colour.

    Raises:
        DataError: an image is missing or cannot be decoded; the error has its row.
    """
    import io

    from PIL import Image, UnidentifiedImageError

    source = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
    if not isinstance(source, (bytes, str)):
        raise DataError(f"data has no image at {where}: remove the row")
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert(
            "RGB"
        )
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"data has an undecodable image at {where} ({reason}): remove it") from None


def cropped(picture: Image, options: Options, draw: np.random.Generator) -> Image:
    """A random part of the image, perhaps flipped (arXiv 1409.4842, section 6)."""
    from PIL import Image

    width, height = picture.size
    area = width * height * draw.uniform(options.least, 1.0)
    aspect = np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(width, max(1, round((area * aspect) ** 0.5)))
    h = min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = draw.integers(0, width - w + 1), draw.integers(0, height - h + 1)
    box = (int(left), int(top), int(left) + w, int(top) + h)
    out = picture.resize((options.size, options.size), Image.Resampling.BICUBIC, box)
    flip = draw.random() < 0.5
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out


def middle(picture: Image, options: Options) -> Image:
    """The center of the image."""
    from PIL import Image

    width, height = picture.size
    side = min(width, height) * options.middle
    box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    return picture.resize((options.size, options.size), Image.Resampling.BICUBIC, box)


def _undecoded(rows: Any, name: str) -> Any:
    from datasets import Image

    feature = (rows.features or {}).get(name)
    return rows.cast_column(name, Image(decode=False)) if isinstance(feature, Image) else rows


def _classes(rows: Any, name: str, run: Run) -> list[str]:
    feature: Any = (rows.features or {}).get(name)
    if hasattr(feature, "names"):
        return list(feature.names)
    count = run.model.fields.get("num_labels")
    if not isinstance(count, int):
        raise ConfigError(
            f"data does not name the classes of its column {name!r}, and a stream cannot be "
            "searched for them: set model.fields.num_labels to their number"
        )
    return [str(number) for number in range(count)]
