"""Synthetic data with the columns and shapes of data that is not at hand, drawn at random."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nmflow.errors import ConfigError
from nmflow.experiments.config import Data, Run
from nmflow.experiments.files import write

ROWS = {"train": 32, "validation": 4, "test": 4}
CLASSES = 10
SYLLABLES = ("ka", "to", "mi", "ren", "sol", "ban", "der", "lu", "fi", "gra", "stu", "pe")


def make(run: Run, folder: Path) -> tuple[Data, str]:
    """Write data for the run's task into `folder`.

    Returns:
        The data section that reads it, and a sentence that describes it.

    Raises:
        ConfigError: no data can be drawn for the task.
    """
    if run.task not in _MAKERS:
        raise ConfigError(f"task is {run.task!r}: no synthetic data can be drawn for it")
    folder.mkdir(parents=True, exist_ok=True)
    return _MAKERS[run.task](run, folder, np.random.default_rng(0))


def sentence(draw: np.random.Generator, words: int) -> str:
    """Words made of syllables, which repeat often enough for a tokeniser to learn them."""
    made = [
        "".join(SYLLABLES[i] for i in draw.integers(0, len(SYLLABLES), count))
        for count in draw.integers(1, 4, words)
    ]
    return " ".join(made).capitalize() + "."


def _images(run: Run, folder: Path, draw: np.random.Generator) -> tuple[Data, str]:
    from datasets import ClassLabel, Features, Image
    from PIL import Image as Pictures

    size, classes = int(run.options.get("size", 32)), run.model.fields.get("num_labels", CLASSES)
    image, label = run.data.columns.get("image", "image"), run.data.columns.get("label", "label")
    names = ClassLabel(names=[f"class {number}" for number in range(classes)])
    features = Features({image: Image(), label: names})

    def cell() -> dict[str, Any]:
        # Small and not square: the images are resized anyway.
        pixels = draw.integers(0, 256, (size // 2 + 8, size // 2 + 16, 3), np.uint8)
        held = io.BytesIO()
        Pictures.fromarray(pixels).save(held, "JPEG")
        return {"bytes": held.getvalue(), "path": None}

    files = {}
    for split, count in ROWS.items():
        rows = {
            image: [cell() for _ in range(count)],
            label: draw.integers(0, classes, count).tolist(),
        }
        files[split] = _parquet(rows, features, folder / f"{split}.parquet")
    return _data(run, files), f"{sum(ROWS.values())} images of noise in {classes} classes"


def _glue(run: Run, folder: Path, draw: np.random.Generator) -> tuple[Data, str]:
    from datasets import ClassLabel, Features, Value

    from nmflow.experiments.tasks import options
    from nmflow.experiments.tasks.glue import TASKS

    names = options(run.task, run.options).tasks
    label = run.data.columns.get("label", "label")
    for name in names:
        task = TASKS[name]
        roles = [run.data.columns.get(role, role) for role in task.columns]
        features = Features(
            {**{role: Value("string") for role in roles}, label: ClassLabel(names=[*task.labels])}
        )
        for split, count in ROWS.items():
            rows: dict[str, Any] = {
                role: [sentence(draw, 12) for _ in range(count)] for role in roles
            }
            rows[label] = draw.integers(0, len(task.labels), count).tolist()
            _parquet(rows, features, folder / name / f"{split}.parquet")
    files = {split: str(folder / "{task}" / f"{split}.parquet") for split in ROWS}
    return _data(run, files), f"made-up sentences with labels at random for {', '.join(names)}"


def _pairs(run: Run, folder: Path, draw: np.random.Generator) -> tuple[Data, str]:
    from datasets import Features, Translation

    from nmflow.experiments.tasks import options

    how = options(run.task, run.options)
    keys: list[Any] = [
        run.data.columns.get(language, language) for language in (how.source, how.target)
    ]
    column = run.data.columns.get("translation", "translation")
    features = Features({column: Translation(languages=keys)})
    files = {}
    for split, count in ROWS.items():
        rows = {column: [{key: sentence(draw, 12) for key in keys} for _ in range(count)]}
        files[split] = _parquet(rows, features, folder / f"{split}.parquet")
    return _data(run, files), "made-up sentences that are no translations of each other"


def _instructions(run: Run, folder: Path, draw: np.random.Generator) -> tuple[Data, str]:
    from datasets import Features, Value

    sides = [run.data.columns.get(role, role) for role in ("prompt", "completion")]
    features = Features({side: Value("string") for side in sides})
    files = {}
    for split, count in ROWS.items():
        rows = {side: [sentence(draw, 3) for _ in range(count)] for side in sides}
        files[split] = _parquet(rows, features, folder / f"{split}.parquet")
    columns = {k: v for k, v in run.data.columns.items() if k != "messages"}
    return Data(source="parquet", files=files, columns=columns), "made-up prompts and completions"


def _text(run: Run, folder: Path, draw: np.random.Generator) -> tuple[Data, str]:
    length = int(run.options.get("length", 64))
    # Each split needs a window; the smallest is a tenth of the text. A word is at least a token.
    lines = [sentence(draw, 12) for _ in range(2 * length)]
    path = folder / "text.txt"
    write(path, "\n".join(lines))
    return Data(source="text", path=str(path)), "made-up sentences"


def _parquet(rows: dict[str, Any], features: Any, path: Path) -> str:
    from datasets import Dataset
    from pyarrow import parquet

    held = io.BytesIO()
    # `to_parquet` would draw a progress bar for every file.
    parquet.write_table(Dataset.from_dict(rows, features=features).data.table, held)
    write(path, held.getvalue())
    return str(path)


def _data(run: Run, files: Any) -> Data:
    return Data(source="parquet", files=files, columns=run.data.columns)


_MAKERS: dict[str, Callable[[Run, Path, np.random.Generator], tuple[Data, str]]] = {
    "image-classification": _images,
    "image-classification-stream": _images,
    "text-classification": _glue,
    "text-to-text": _glue,
    "translation": _pairs,
    "language-modelling": _text,
    "token-modelling": _text,
    "instruction-tuning": _instructions,
}
