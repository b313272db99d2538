"""Streams: data that is read during training, from the hub or Parquet files, by any process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nmflow.errors import ConfigError, DataError
from nmflow.experiments.config import Data, Run
from nmflow.experiments.data.sources import SPLITS, Card
from nmflow.experiments.specs import FILES

if TYPE_CHECKING:
    import datasets

BUFFER = 10_000  # rows among which a training stream is shuffled, beside its shards


@dataclass(frozen=True)
class Source:
    """One stream of rows per split."""

    splits: dict[str, datasets.IterableDataset]
    card: Card


def source(data: Data) -> Source:
    """Open the streams of the hub or of files; only their index is read yet.

    Raises:
        DataError: the source is of another kind, the data set cannot be opened, or a split is
            missing: a stream cannot be cut, so all three must be named.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if data.source not in ("hub", *FILES):
        raise DataError(
            f"data.source is {data.source!r}: only {', '.join(FILES)} and hub can be streamed"
        )
    if data.limit:
        raise DataError("data.limit cannot be used with a stream: leave it out")
    path = str(data.path) if data.source == "hub" else data.source
    name = path if data.source == "hub" else str(data.files["train"])
    files: Any = dict(data.files) or None
    # The words `null` and `NA` are text here too.
    reading: Any = {"keep_default_na": False} if data.source == "csv" else {}
    try:
        found: Any = load_dataset(
            path, data.subset, data_files=files, streaming=True, trust_remote_code=False, **reading
        )
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"data is {name!r}: it cannot be opened ({reason[:200]})") from None
    names = data.splits or {split: split for split in SPLITS}
    for split in SPLITS:
        if names.get(split) not in found:
            raise DataError(
                f"data is {name!r}: its {split} split is missing, and none can be cut from a "
                f"stream; set data.splits.{split} to one of {', '.join(map(str, found))}"
            )
    splits = {split: found[names[split]] for split in SPLITS}
    info = splits["train"].info
    known = info.splits or {}
    sizes = {s: known[names[s]].num_examples for s in SPLITS if names[s] in known}
    about = f"{name} {data.subset} {info.version} {sorted(names.items())}"
    card = Card(
        name,
        hashlib.sha256(about.encode()).hexdigest(),
        "rows",
        {split: sizes.get(split) or 0 for split in SPLITS},
        "the splits of the source: " + ", ".join(f"{s} is {n}" for s, n in sorted(names.items())),
        ["streamed: the hash is of its name and version, not of its rows; a size of 0 is unknown"],
    )
    return Source(splits, card)


def columns(stream: datasets.IterableDataset, roles: dict[str, str], split: str) -> None:
    """Check that the columns for `roles` exist, before the first batch is read."""
    there: list[str] = list(stream.column_names or next(iter(stream), {}))
    for role, name in roles.items():
        if name not in there:
            raise DataError(
                f"data has no column {name!r} for the {role} in its {split} split: set "
                f"data.columns.{role} to one of {', '.join(there)}"
            )


class Stream(IterableDataset):
    """Examples made of a stream's rows.

    Args:
        rows: the stream.
        example: makes an example of (row, its position as text, a generator of random numbers).
        split: its name, for messages.
        seed: makes it a training stream: shuffled and endless, with each process and each of its
            workers reading its own part. None reads all rows once, in order.
        group: for a training stream: orders examples that were read together.
        window: the number of these examples.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        example: Callable[[dict[str, Any], str, np.random.Generator], dict[str, Any]],
        split: str,
        seed: int | None = None,
        group: Callable[[list[Any], np.random.Generator], list[Any]] | None = None,
        window: int = 1,
    ) -> None:
        self.rows, self.example, self.split, self.seed = rows, example, split, seed
        self.group, self.window = group, window

    def take(self, count: int) -> Stream:
        """The first `count` examples."""
        return Stream(self.rows.take(count), self.example, self.split, self.seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.seed is None:
            yield from self._once(self.rows, np.random.default_rng(0))
            return
        from datasets.distributed import split_dataset_by_node

        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        worker = get_worker_info()
        # A resume reads from the beginning and drops rows that were seen, so it draws the same.
        draw = np.random.default_rng([self.seed, rank, worker.id if worker else 0])
        turn = 0
        while True:
            mixed = self.rows.shuffle(seed=self.seed + turn, buffer_size=BUFFER)
            mine = split_dataset_by_node(mixed, rank, world) if world > 1 else mixed
            seen = False
            for example in self._grouped(self._once(mine, draw), draw):
                seen = True
                yield example
            if not seen:
                raise DataError(
                    f"data has no row in its {self.split} split for process {rank} of {world}"
                )
            turn += 1

    def _once(self, rows: Any, draw: np.random.Generator) -> Iterator[dict[str, Any]]:
        from pyarrow import ArrowException

        number = -1
        try:
            for number, row in enumerate(rows):
                yield self.example(row, f"row {number} of the {self.split} stream", draw)
        except (OSError, ArrowException) as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(
                f"data cannot be read after row {number} of the {self.split} stream ({reason}): "
                "correct it and start again; the run continues from its last checkpoint"
            ) from None

    def _grouped(self, examples: Iterator[Any], draw: np.random.Generator) -> Iterator[Any]:
        if self.group is None:
            yield from examples
            return
        held: list[Any] = []
        for example in examples:
            held.append(example)
            if len(held) == self.window:
                yield from self.group(held, draw)
                held = []
        if held:
            yield from self.group(held, draw)


class _Loader(DataLoader):
    """A `DataLoader` whose workers report bad data in one sentence."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except DataError as error:
            # PyTorch passes on a worker's whole traceback, with the message last.
            sentence = str(error).strip().splitlines()[-1]
            raise DataError(sentence.partition("DataError: ")[2] or sentence) from None


class Streaming:
    """A mixin for a `Trainer` whose training data is a `Stream`, split over processes by itself.

    Without it, `accelerate` would read every row in the first process and send it to the others.
    """

    args: Any
    train_dataset: Any
    data_collator: Any
    _train_batch_size: int

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process."""
        workers = self.args.dataloader_num_workers
        return _Loader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=workers > 0,
        )


def refuse_noise(run: Run) -> None:
    """Raise if a run needs random rows of the training data, which a stream cannot give."""
    if run.training.noise_batches:
        raise ConfigError(
            f"training.noise_batches is {run.training.noise_batches}: a stream has no rows to draw "
            "at random; set it to 0"
        )
