"""Image classification: pixels are in memory if they fit, and otherwise decoded when read."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from nmflow.errors import DataError
from nmflow.experiments.files import write_json
from nmflow.experiments.specs import Data, Strict

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

    from nmflow.experiments.config import Run
    from nmflow.experiments.data.sources import Card
    from nmflow.experiments.tasks import Problem

MEMORY = 2 << 30  # bytes of decoded pixels that may be kept in memory


class Options(Strict):
    """`size`: pixels of the square image; `channels`: 1 grey, 3 colour; `augment`: crop, flip."""

    size: Annotated[int, Field(strict=True, ge=1)] = 32
    channels: Literal[1, 3] = 3
    augment: Literal["none", "crop", "crop-flip"] = "none"


@dataclass(frozen=True)
class Loaded:
    """The tables, labels and statistics of a source, shared by all runs of a process."""

    pixels: dict[str, Any]
    labels: dict[str, np.ndarray]
    classes: list[str]
    mean: np.ndarray
    std: np.ndarray
    card: Card


class Pictures:
    """Normalized images with labels; a batch is one indexing operation."""

    def __init__(self, loaded: Loaded, split: str, options: Options, seed: int) -> None:
        import torch

        self.pixels, self.options, self.seed = loaded.pixels[split], options, seed
        self.labels = torch.from_numpy(loaded.labels[split])
        self.augment = options.augment if split == "train" else "none"
        self.mean = torch.from_numpy(loaded.mean).view(1, -1, 1, 1)
        self.std = torch.from_numpy(loaded.std).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        import torch

        raw = torch.from_numpy(np.ascontiguousarray(self.pixels[indices]))
        images = (raw.float() / 255 - self.mean) / self.std
        if self.augment != "none":
            images = self._augmented(images, indices)
        return {"pixel_values": images, "labels": self.labels[indices]}

    def _augmented(self, images: Tensor, indices: list[int]) -> Tensor:
        # Drawn from the batch itself, not from a global generator: equal for all recipes of a seed,
        # and after a resume.
        import torch

        draw = np.random.default_rng([self.seed, *indices])
        pad = max(1, self.options.size // 8)
        padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        size = self.options.size
        out = torch.empty_like(images)
        for i, (top, left) in enumerate(draw.integers(0, 2 * pad + 1, (len(indices), 2))):
            out[i] = padded[i, :, top : top + size, left : left + size]
        if self.augment == "crop-flip":
            flip = torch.from_numpy(draw.random(len(indices)) < 0.5)
            out[flip] = out[flip].flip(-1)
        return out


class Encoded:
    """The pixels of encoded images, which are decoded for each batch."""

    def __init__(self, part: Dataset, name: str, split: str, options: Options) -> None:
        self.part, self.name, self.split, self.options = part, name, split, options

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, indices: list[int] | slice) -> np.ndarray:
        cells = self.part[indices][self.name]
        every = range(len(self.part))
        numbers = every[indices] if isinstance(indices, slice) else indices
        return np.stack(
            [
                decode(cell, f"row {row} of {self.split}", self.options)
                for row, cell in zip(numbers, cells, strict=True)
            ]
        )


def build(run: Run) -> Problem:
    """The problem: classes from the labels, mean and deviation from the training images."""
    from transformers import AutoModelForImageClassification

    from nmflow.experiments import models
    from nmflow.experiments.tasks import Problem

    options = Options(**run.options)
    loaded = _cached(run.data.model_dump_json(), options.model_dump_json())
    fields = {
        "num_labels": len(loaded.classes),
        "image_size": options.size,
        "num_channels": options.channels,
    }
    sets = {split: Pictures(loaded, split, options, run.seed) for split in loaded.labels}
    return Problem(
        data=loaded.card,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        collate=_same,
        model=lambda: models.build(run.model, AutoModelForImageClassification, fields),
        example=sets["test"].__getitems__([0]),
        headline="accuracy",
        metrics=_accuracy,
        reduce=lambda logits, labels: _first(logits).argmax(-1),
        save=lambda folder: write_json(folder / "classes.json", loaded.classes),
    )


def decode(cell: Any, where: str, options: Options) -> np.ndarray:
    """One image as uint8 (channels, size, size), from encoded bytes, a path or an array.

    Raises:
        DataError: an image cannot be decoded; the error has its row.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(cell, np.ndarray) and cell.ndim == 3:
        if cell.shape == (options.channels, options.size, options.size):
            return cell
        cell = Image.fromarray(cell[0])
    mode = "L" if options.channels == 1 else "RGB"
    try:
        if isinstance(cell, dict):
            source = cell.get("bytes") or cell.get("path")
            if not source:
                raise DataError(f"data has no image at {where}: remove the row")
            cell = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        elif isinstance(cell, bytes):
            cell = Image.open(io.BytesIO(cell))
        elif not isinstance(cell, Image.Image):
            raise DataError(f"data has no image at {where}, but a {type(cell).__name__}")
        picture = cell.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"data has an undecodable image at {where} ({reason}): remove it") from None
    if picture.size != (options.size, options.size):
        picture = picture.resize((options.size, options.size), Image.Resampling.BICUBIC)
    array = np.asarray(picture, dtype=np.uint8)
    return array[None] if options.channels == 1 else array.transpose(2, 0, 1)


def labels_of(values: list[Any], classes: list[str], split: str) -> np.ndarray:
    """Labels as numbers of `classes`.

    Raises:
        DataError: a label is not one of the classes; the error has its row.
    """
    names = {name: number for number, name in enumerate(classes)}
    out = np.empty(len(values), np.int64)
    for row, value in enumerate(values):
        number = names.get(value) if isinstance(value, str) else value
        if number is None or isinstance(number, float) or not 0 <= number < len(classes):
            raise DataError(
                f"data has the label {value!r} at row {row} of {split}: the classes are 0 to "
                f"{len(classes) - 1} ({', '.join(classes[:8])}{'...' if len(classes) > 8 else ''})"
            )
        out[row] = number
    return out


@functools.lru_cache(maxsize=2)
def _cached(dump: str, options: str) -> Loaded:
    from nmflow.experiments.data import sources

    data, how = Data.model_validate_json(dump), Options.model_validate_json(options)
    table = sources.rows(data)
    image, label = data.columns.get("image", "image"), data.columns.get("label", "label")
    values = {s: list(sources.column(p, "label", label, s)) for s, p in table.splits.items()}
    classes = _classes(table.splits["train"], label, values["train"])
    labels = {split: labels_of(found, classes, split) for split, found in values.items()}
    pixels: dict[str, Any] = {}
    for split, part in table.splits.items():
        sources.column(part.select(range(0)), "image", image, split)
        encoded = Encoded(_undecoded(part, image), image, split, how)
        size = len(part) * how.channels * how.size**2
        pixels[split] = encoded[:] if size <= MEMORY else encoded
    some = np.linspace(0, len(labels["train"]) - 1, min(len(labels["train"]), 10_000)).astype(int)
    sample = pixels["train"][some.tolist()].astype(np.float32) / 255
    mean = sample.mean((0, 2, 3), dtype=np.float64).astype(np.float32)
    std = sample.std((0, 2, 3), dtype=np.float64).astype(np.float32)
    return Loaded(pixels, labels, classes, mean, np.maximum(std, 1e-3), table.card)


def _undecoded(part: Dataset, name: str) -> Dataset:
    from datasets import Image

    if isinstance(part.features[name], Image):
        return part.cast_column(name, Image(decode=False))
    return part


def _classes(part: Dataset, name: str, values: list[Any]) -> list[str]:
    feature = part.features[name]
    if hasattr(feature, "names"):
        return list(feature.names)
    present = [value for value in values if value is not None]
    if present and isinstance(present[0], str):
        return sorted(set(present))
    whole = [int(v) for v in present if isinstance(v, (int, np.integer))]
    return [str(number) for number in range(max(whole, default=0) + 1)]


def _same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _first(logits: Any) -> Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}
