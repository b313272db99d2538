"""The table that `compress` reports: a row per weight, packed or dense, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from nmflow.errors import CompressError
from nmflow.select.modules import check_model
from nmflow.text_table import table

# Tokens to (microseconds packed, microseconds of the best dense way, the name of that way).
Times = dict[int, tuple[float, float, str]]


@dataclass(frozen=True)
class Row:
    """What `compress` did with one weight.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        pattern: the pattern or patterns that it holds, as text; empty where there is none.
        kept: `"packed"` or `"dense"`.
        why: the kernel that serves it, or the reason why it stays dense.
        dense_bytes: bytes of the dense weight.
        bytes: bytes of the weight as it now is.
        times: tokens to (µs packed, µs of the best dense way, that way); of the whole module.
        error: with rounded values, the root mean square error of the layer's outputs relative to
            them, on normal inputs (the largest of a weight's runs); else None.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: str
    why: str
    dense_bytes: int
    bytes: int
    times: Times = field(default_factory=dict)
    error: float | None = None


class Report(list[Row]):
    """A row per weight of at least two dimensions; as `str`, the table.

    Attributes:
        fused: paths of the packed layers that also apply the activation after them.
        together: paths of the packed layers of each group that is computed in one call.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        super().__init__(rows)
        self.fused: list[str] = []
        self.together: list[tuple[str, ...]] = []

    @property
    def packed(self) -> list[Row]:
        """The rows of packed weights."""
        return [row for row in self if row.kept == "packed"]

    def __str__(self) -> str:
        tokens = sorted({t for row in self for t in row.times})
        rounded = any(row.error is not None for row in self)
        rows = [["weight", "shape", "pattern", "kept", "bytes"]]
        rows[0] += ["error"] if rounded else []
        rows[0] += [f"T={t}: packed, best dense (µs)" for t in tokens]
        alike: dict[tuple[str, ...], list[str]] = {}
        reasons: dict[str, list[str]] = {}
        for row in self:
            reasons.setdefault(f"{row.kept}, {row.why}", []).append(row.name)
            if row.pattern:
                cells = ["x".join(map(str, row.shape)), row.pattern, row.kept]
                cells.append(f"{row.bytes / row.dense_bytes:.4f}")
                if rounded:
                    cells.append("" if row.error is None else f"{row.error:.2%}")
                cells += [_shown(row.times.get(t)) for t in tokens]
                alike.setdefault((_numbered(row.name), *cells), []).append(row.name)
        for cells, names in alike.items():
            rows.append([_together(names)[0], *cells[1:]])
        lines = [table(rows)] if len(rows) > 1 else []
        lines += [""] + [f"{why}: {', '.join(_together(n))}" for why, n in reasons.items()]
        if self.fused:
            lines.append(f"activation applied by the layer: {', '.join(_together(self.fused))}")
        for group in _together(["; ".join(paths) for paths in self.together]):
            lines.append(f"computed in one call: {group}")
        before, after = sum(r.dense_bytes for r in self), sum(r.bytes for r in self)
        lines.append(
            f"{len(self.packed)} of {len(self)} weights packed: {before:,} bytes dense, "
            f"{after:,} as they are now"
        )
        return "\n".join(lines)


# The attribute that holds the report: the model's own `report`, if it has one, stays its own.
_ATTRIBUTE = "nmflow_report"


def report_of(model: nn.Module) -> Report:
    """What `compress` did with each weight of a model that it returned.

    Raises:
        CompressError: `compress` did not return this model.

    Example:
        >>> import nmflow
        >>> layer = nn.Linear(64, 32)
        >>> layer.weight.data *= nmflow.mask(layer.weight, "1:16")
        >>> packed = nmflow.compress(nn.Sequential(layer), measure=False)
        >>> report_of(packed)[0].pattern
        '1:16'
    """
    check_model(model, CompressError)
    report = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(report, Report):
        raise CompressError(
            f"model is a {type(model).__name__} without a report: give what nmflow.compress "
            "returned"
        )
    return report


def hang(model: nn.Module, report: Report | None) -> None:
    """Put a report on a model, or remove the one that it has."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if report is not None:
        model.__dict__[_ATTRIBUTE] = report  # a plain attribute, past nn.Module's registry


def _numbered(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _together(names: list[str]) -> list[str]:
    """Names that differ in their numbers only as one: `layers.*.fc1.weight (12)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_numbered(name), []).append(name)
    return [
        group[0] if len(group) == 1 else f"{pattern} ({len(group)})"
        for pattern, group in groups.items()
    ]


def _shown(times: tuple[float, float, str] | None) -> str:
    if times is None:
        return ""
    packed, dense, way = times
    return f"{packed:,.0f}, {dense:,.0f} by {way}: {dense / packed:.2f}x"
