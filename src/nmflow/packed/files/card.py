"""The model card of a packed network: what it is, how it was made, what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nmflow.errors import CompressError
from nmflow.packed.files.companions import is_pretrained, is_timm
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import file_bits
from nmflow.packed.report import Report, report_of

CARD = "README.md"
# It marks a card of ours, which may be overwritten.
MARK = "<!-- written by nmflow; delete this line to keep the file as it is -->"


def card_of(
    model: nn.Module,
    weights: Mapping[str, Stored],
    tensors: Mapping[str, Tensor],
    recipe: object = None,
    quality: Mapping[str, float] | None = None,
) -> str:
    """A model card in Markdown, with the front matter that the hub reads.

    Args:
        model: the network, for its class and the report of `compress`.
        weights: what the file holds packed.
        tensors: what it holds plain.
        recipe: how it was trained, as text or as a recipe; None says that it is not known.
        quality: names of figures to their values, such as `{"accuracy": 0.91}`.
    """
    library = "transformers" if is_pretrained(model) else "timm" if is_timm(model) else "nmflow"
    front = ["---", f"library_name: {library}", "tags:", "- nmflow", "- n-m-sparsity", "---"]
    rows = [("Architecture", type(model).__name__), ("Recipe", _recipe(recipe))]
    rows += _patterns(weights) + _sizes(weights, tensors)
    rows += [
        (f"Quality: {_plain(name)}", f"{value:.6g}") for name, value in (quality or {}).items()
    ]
    rows += [] if quality else [("Quality", "not given")]
    rows += _times(model)
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*front, MARK, "", f"# {type(model).__name__}, packed", "",
                      "An N:M sparse network (N weights kept of every M), packed by nmflow.", "",
                      *table, "",
                      "## Load it", "", "```python", *_call(library), "```", ""])  # fmt: skip


def _call(library: str) -> list[str]:
    if library == "nmflow":
        return ["import nmflow", "", "model = nmflow.load(folder, dense_architecture)"]
    return ["import nmflow", "", "model = nmflow.from_pretrained(folder)"]


def _recipe(recipe: object) -> str:
    return "not given" if recipe is None else f"`{_plain(str(recipe))}`"


def _plain(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def _patterns(weights: Mapping[str, Stored]) -> list[tuple[str, str]]:
    held: Counter[str] = Counter()
    for stored in weights.values():
        held.update({str(run.pattern) for run in stored.runs})
    said = ", ".join(f"{pattern} ({n} weight{'s'[: n > 1]})" for pattern, n in held.most_common())
    return [("Pattern", said)]


def _sizes(weights: Mapping[str, Stored], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Density of the packed weights and of the network, and bytes of the dense and packed one."""
    whole = sum(math.prod(stored.shape) for stored in weights.values())
    kept = sum(part.values.numel() for stored in weights.values() for part in stored.parts)
    plain = sum(t.numel() for t in tensors.values())
    beside = sum(t.nbytes for t in tensors.values())
    dense = beside + sum(stored.dense_bytes for stored in weights.values())
    packed = beside + sum(_bytes(stored) for stored in weights.values())
    return [
        ("Density of the packed weights", f"{kept / whole:.4f}"),
        ("Density of the network", f"{(kept + plain) / (whole + plain):.4f}"),
        ("Bytes", f"{packed:,} (dense: {dense:,}, {dense / packed:.1f} times as many)"),
    ]


def _bytes(stored: Stored) -> int:
    """The bytes that the file takes for a weight."""
    size = stored.stored_bytes
    for part in stored.parts:
        if part.shape is not None:
            size += part.shape.lists * -(-part.shape.entries * file_bits(part.shape.m) // 8)
        size += 0 if part.scale is None else part.scale.nbytes
    return size


def _times(model: nn.Module) -> list[tuple[str, str]]:
    """What `compress` measured for the packed layers, if it measured."""
    try:
        report = report_of(model)
    except CompressError:
        report = Report()  # loaded, or saved as it was pruned
    ratios: dict[int, list[float]] = {}
    for row in report.packed:
        for tokens, (packed, dense, _) in row.times.items():
            ratios.setdefault(tokens, []).append(dense / packed)
    rows = [
        (f"Time of the packed layers at {tokens} token{'s'[: tokens > 1]}",
         f"{_mean(found):.2f} times as fast as the best dense way (geometric mean)")
        for tokens, found in sorted(ratios.items())
    ]  # fmt: skip
    return rows or [("Time", "not measured")]


def _mean(ratios: Iterable[float]) -> float:
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logs) / len(logs))
