"""Data in memory: its sources, its splits, and the card that describes it in a report."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nmflow import disk
from nmflow.errors import DataError
from nmflow.experiments.specs import FILES, Data

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Table as Rows

SPLITS = ("train", "validation", "test")
TEXT_SPLIT = "the first 80 % of the text trains, the next 10 % validates, the last 10 % tests"
ROW_SPLIT = "a fixed permutation of the rows: 70 % train, 15 % validate, 15 % test"


@dataclass(frozen=True)
class Card:
    """The description of the data for a report."""

    name: str
    sha256: str
    unit: str
    sizes: dict[str, int]
    split: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """One text per split."""

    texts: dict[str, str]
    card: Card


@dataclass(frozen=True)
class Table:
    """One `datasets.Dataset` per split."""

    splits: dict[str, Dataset]
    card: Card


def corpus(data: Data) -> Corpus:
    """The text of a source, cut into splits.

    Raises:
        DataError: an unreadable or empty text, a missing column.
    """
    if data.source in (*FILES, "hub"):
        table = rows(data)
        column = data.columns.get("text", "text")
        texts = {name: "\n".join(_texts(part, column, name)) for name, part in table.splits.items()}
        sizes = {name: len(text) for name, text in texts.items()}
        card = Card(table.card.name, table.card.sha256, "characters", sizes, table.card.split)
        return Corpus(texts, card)
    name, text, notes = _pydoc() if data.source == "pydoc" else _text_files(data)
    if data.limit:
        text = text[: data.limit]
        notes.append(f"only the first {data.limit:,} characters are used")
    a, b = len(text) * 8 // 10, len(text) * 9 // 10
    texts = {"train": text[:a], "validation": text[a:b], "test": text[b:]}
    if not all(texts.values()):
        raise DataError(
            f"data is {name!r}: its text holds {len(text)} characters, too few to split"
        )
    sizes = {part: len(words) for part, words in texts.items()}
    return Corpus(texts, Card(name, _sha(text.encode()), "characters", sizes, TEXT_SPLIT, notes))


def rows(data: Data) -> Table:
    """The rows of a source of files, an image folder, the hub or Python, with all three splits.

    If the source lacks a validation or test split, it is cut from the training rows by a fixed
    permutation. Test rows are never trained on.

    Raises:
        DataError: a missing file or data set, or a split without rows.
    """
    if data.source == "digits":
        return _digits(data)
    splits, name, sha, notes = _files(data) if data.source in FILES else _datasets(data)
    splits, how = _complete(splits, {**data.held_out})
    if data.limit:
        splits = {k: part.select(range(min(data.limit, len(part)))) for k, part in splits.items()}
        notes.append(f"only the first {data.limit:,} rows of each split are used")
    for split, part in splits.items():
        if len(part) == 0:
            raise DataError(f"data is {name!r}: its {split} split has no rows")
    return Table(splits, Card(name, sha, "rows", _sizes(splits), how, notes))


def column(part: Dataset, role: str, name: str, split: str) -> Any:
    """The values of the column that plays `role`, or a DataError that lists the columns."""
    if name not in part.column_names:
        raise DataError(
            f"data has no column {name!r} for the {role} in its {split} split: set "
            f"data.columns.{role} to one of {', '.join(part.column_names)}"
        )
    return part[name]


def _texts(part: Dataset, name: str, split: str) -> list[str]:
    values = list(column(part, "text", name, split))
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"data has no text at row {row} of {split}, column {name!r}: remove it")
    return values


def _pydoc() -> tuple[str, str, list[str]]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    note = (
        f"English documentation that ships with CPython {platform.python_version()}; the text "
        "differs between Python versions, and with it every figure"
    )
    return "pydoc_data.topics", text, [note]


def _text_files(data: Data) -> tuple[str, str, list[str]]:
    path = Path(str(data.path))
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    parts = []
    for file in files:
        try:
            parts.append(disk.read_bytes(file).decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"byte {error.start} is not UTF-8"  # type: ignore[union-attr]
            raise DataError(
                f"data.path is {str(file)!r}: {reason}; give a UTF-8 text file"
            ) from None
    text = "\n".join(parts)
    if not text.strip():
        raise DataError(f"data.path is {str(path)!r}: it holds no text; give .txt files with text")
    return str(path), text, []


def _digits(data: Data) -> Table:
    from datasets import Array3D as Pixels
    from datasets import ClassLabel, Dataset, Features
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = (digits.images * 15).astype(np.uint8)[:, None]  # 0..16 in the source
    features = Features(
        {"image": Pixels((1, 8, 8), "uint8"), "label": ClassLabel(names=list("0123456789"))}
    )
    part = Dataset.from_dict({"image": pixels, "label": digits.target.tolist()}, features=features)
    size = int(len(part) * 0.15)
    splits = _cut({"train": part.with_format("numpy")}, {"validation": size, "test": size})
    sha = _sha(pixels.tobytes() + digits.target.astype(np.int64).tobytes())
    notes = [f"only the first {data.limit} rows of each split are used"] if data.limit else []
    if data.limit:
        splits = {k: part.select(range(min(data.limit, len(part)))) for k, part in splits.items()}
    return Table(
        splits, Card("scikit-learn digits", sha, "images", _sizes(splits), ROW_SPLIT, notes)
    )


def _files(data: Data) -> tuple[dict[str, Dataset], str, str, list[str]]:
    from datasets import Dataset
    from pyarrow import ArrowException

    splits, sha = {}, hashlib.sha256()
    for split, file in sorted(data.files.items()):
        try:
            content = disk.read_bytes(file)
            sha.update(content)
            splits[split] = Dataset(_read(data.source, file, content))
        except (OSError, ArrowException) as error:
            what = {"parquet": "a Parquet file", "csv": "CSV", "json": "JSON, an object a line"}
            reason = getattr(error, "strerror", None) or f"not {what[data.source]}"
            if data.source != "parquet":
                reason += f" ({' '.join(str(error).split())[:160]})"
            raise DataError(f"data.files.{split} is {file!r}: {reason}") from None
    return splits, Path(data.files["train"]).parent.name, sha.hexdigest(), []


def _read(source: str, file: str, content: bytes) -> Rows:
    """The rows of a file, read by Arrow.

    `datasets.load_dataset` is not used: it keeps a copy in a cache, draws a bar for each file, and
    reads the words `null` and `NA` of a CSV file as missing values.
    """
    from pyarrow import BufferReader, csv, json, parquet

    # In one block, since a row may have any length.
    size = max(len(content), 1)
    if source == "csv":
        return csv.read_csv(
            BufferReader(content),
            csv.ReadOptions(block_size=size),
            csv.ParseOptions(newlines_in_values=True),
        )
    if source == "json":
        return json.read_json(BufferReader(content), json.ReadOptions(block_size=size))
    return parquet.read_table(file)


def _datasets(data: Data) -> tuple[dict[str, Dataset], str, str, list[str]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = str(data.path)
    where = f"data.path is {path!r}"
    try:
        if data.source == "images":
            if not Path(path).is_dir():
                raise DataError(f"{where}: no such folder; give a folder of classes of images")
            found = load_dataset("imagefolder", data_dir=path, trust_remote_code=False)
        else:
            found = load_dataset(path, data.subset, trust_remote_code=False)
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: it cannot be loaded ({reason[:200]})") from None
    names = data.splits or {name: name for name in SPLITS if name in found}
    if missing := [name for name in names.values() if name not in found]:
        raise DataError(
            f"{where}: no split {missing[0]!r}; data.splits may name {', '.join(map(str, found))}"
        )
    splits = {split: found[name] for split, name in names.items()}
    if "train" not in splits:
        raise DataError(
            f"{where}: no training split; set data.splits.train to one of {list(found)}"
        )
    if data.source == "images":
        return splits, path, _folder_sha(Path(path)), []
    prints = "".join(part._fingerprint for part in splits.values())
    note = f"loaded as {path} {data.subset or ''}; the hash is of the splits' fingerprints"
    return splits, path, _sha(prints.encode()), [note]


def _complete(
    splits: dict[str, Dataset], wanted: Mapping[Any, int]
) -> tuple[dict[str, Dataset], str]:
    missing = [name for name in SPLITS[1:] if name not in splits]
    for name in wanted:
        if name not in missing:
            raise DataError(f"data.held_out.{name} is given, but the source has that split")
    if not missing:
        return splits, "the splits of the source"
    total = len(splits["train"])
    sizes = {name: wanted.get(name, int(total * 0.1)) for name in missing}
    if sum(sizes.values()) >= total:
        raise DataError(
            f"data.held_out is {dict(wanted)}: the source has {total} training rows, and none "
            "would be left; hold out fewer"
        )
    each = ", ".join(f"{wanted[n]:,}" if n in wanted else "10 %" for n in missing)
    how = f"{' and '.join(missing)}: {each} of the training rows, by a fixed permutation"
    return _cut(splits, sizes), how


def _cut(splits: dict[str, Dataset], sizes: Mapping[str, int]) -> dict[str, Dataset]:
    train = splits["train"]
    order = np.random.default_rng(0).permutation(len(train))
    out = dict(splits)
    for name, size in sizes.items():
        out[name], order = train.select(np.sort(order[:size])), order[size:]
    out["train"] = train.select(np.sort(order))
    return out


def _sizes(splits: dict[str, Dataset]) -> dict[str, int]:
    return {name: len(splits[name]) for name in SPLITS}


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _folder_sha(folder: Path) -> str:
    sha = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha.update(str(file.relative_to(folder)).encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()
