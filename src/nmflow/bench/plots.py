"""The plot of a bench: speedups over the best dense way, one panel per layer and network."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nmflow.errors import CompressError

if TYPE_CHECKING:
    from nmflow.bench.results import Bench, Measured

# Okabe and Ito's colours, which the colour-blind can tell apart, and a hatch for print.
_LOOKS = {
    "packed": ("#0072B2", ""),
    "packed int8": ("#004C80", ""),
    "packed bfloat16": ("#5AA9D6", ""),
    "F.linear": ("#999999", ""),
    "dense": ("#999999", ""),
    "oneDNN": ("#CCCCCC", ""),
    "oneDNN packed": ("#E69F00", "//"),
    "dense, best": ("#E69F00", "//"),
    "int8 dynamic": ("#009E73", ".."),
    "int8 dynamic (torch)": ("#009E73", ".."),
    "oneDNN bfloat16": ("#F0E442", "oo"),
    "bfloat16 (torch)": ("#F0E442", "oo"),
    "torch.compile": ("#BBBBBB", "++"),
    "torch.compile, packed": ("#5AA9D6", "++"),
    "torch.compile, packed int8": ("#2E7DAF", "++"),
    "onnxruntime float32": ("#56B4E9", "\\\\"),
    "onnxruntime packed": ("#D55E00", "\\\\"),
    "onnxruntime packed int8": ("#A34800", "\\\\"),
    "onnxruntime int8 dynamic": ("#CC79A7", "xx"),
}


def plot(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Draw the speedups as bars, the best dense way of each panel at 1.

    Args:
        bench: what was measured.
        path: the file; its ending says the format (png, svg, pdf).

    Raises:
        CompressError: nothing was measured, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    panels: dict[tuple[str, str, str], dict[int, list[Measured]]] = {}
    for row in bench.rows:
        title = (f"{row.name} {row.shape}".strip(), row.pattern, row.dtype)
        panels.setdefault(title, {}).setdefault(row.tokens, []).append(row)
    if not panels:
        raise CompressError("bench has no rows to draw: measure layers or the network")
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (title, groups) in zip(axes[:, 0], panels.items(), strict=True):
        labels, named, at = [], set(), 0.0
        for tokens, rows in groups.items():
            labels.append((at + (len(rows) - 1) / 2, f"T = {tokens}"))
            for row in rows:
                color, hatch = _LOOKS.get(row.way, ("#000000", ""))
                label = None if row.way in named else row.way
                named.add(row.way)
                axis.bar(at, row.speedup, color=color, hatch=hatch, edgecolor="white", label=label)
                axis.text(at, row.speedup, f"{row.speedup:.1f}", ha="center", va="bottom", size=7)
                at += 1
            at += 1
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(", ".join(filter(None, title)), size=9)
        axis.set_ylabel("× best dense")
        axis.set_xticks([x for x, _ in labels], [text for _, text in labels])
        axis.margins(y=0.3)
        axis.legend(fontsize=7, ncols=2)
    one = bench.rows[0]
    figure.suptitle(f"{one.threads} threads, {one.cpu}\n{one.versions}", size=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise CompressError(f"path '{path}' cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
