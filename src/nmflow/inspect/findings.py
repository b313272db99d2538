"""The result of an audit, and its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from nmflow.pattern import Pattern
from nmflow.text_table import table


@dataclass(frozen=True)
class AuditRow:
    """One weight, or those of its output rows that share a pattern.

    Attributes:
        name: the parameter's name, with the rows if it is not all of them: `qkv.weight[0:64]`.
        shape: the parameter's shape.
        pattern: the pattern that it is checked for, or that was found; None if it was left out.
        holds: whether at most N of every M are not zero; None without a pattern.
        density: nonzero / total.
        nonzero: weights that are not zero.
        total: weights.
        reason: why it was left out.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern | None
    holds: bool | None
    density: float
    nonzero: int
    total: int
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        pattern = None if self.pattern is None else str(self.pattern)
        return {**asdict(self), "shape": list(self.shape), "pattern": pattern}


@dataclass(frozen=True)
class Audit:
    """The findings; as `str`, a table of every weight.

    Attributes:
        rows: the weights that were judged, or those that hold a pattern if nothing said what to
            judge.
        others: every other weight of at least two dimensions, with the reason.
        judged: how the rows were chosen: `"pattern"`, `"record"`, or `"found"` if nothing said
            which weights were pruned, so that no weight is wrong.
    """

    rows: list[AuditRow] = field(default_factory=list)
    others: list[AuditRow] = field(default_factory=list)
    judged: str = "pattern"

    @property
    def ok(self) -> bool:
        """Whether every weight that was judged holds its pattern."""
        return all(row.holds for row in self.rows)

    @property
    def density(self) -> float:
        """The share of weights that are not zero, over `rows`."""
        return sum(row.nonzero for row in self.rows) / max(1, sum(row.total for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "ok": self.ok,
            "judged": self.judged,
            "density": self.density,
            "rows": [row.to_dict() for row in self.rows],
            "others": [row.to_dict() for row in self.others],
        }

    def __str__(self) -> str:
        lines = [("weight", "shape", "pattern", "held", "density", "nonzero", "of", "left out")]
        for row in (*self.rows, *self.others):
            lines.append((
                row.name, "x".join(map(str, row.shape)), str(row.pattern or "-"),
                {True: "yes", False: "NO", None: "-"}[row.holds], f"{row.density:.2%}",
                f"{row.nonzero:,}", f"{row.total:,}", row.reason,
            ))  # fmt: skip
        return f"{table(lines, right=(4, 5, 6))}\n{self._verdict()}"

    def _verdict(self) -> str:
        count = len(self.rows)
        density = f"; density {self.density:.2%} over {count} weights"
        if self.judged == "found":
            if not count:
                return "no weight holds an N:M pattern of a density of at most 75 %"
            return (
                f"{count} of {count + len(self.others)} weights hold an N:M pattern{density}; "
                "nothing says which were pruned: name a pattern to judge them"
            )
        broken = sum(not row.holds for row in self.rows)
        verdict = f"{broken} of {count} weights break" if broken else "every weight holds"
        what = "its pattern, as recorded by the run" if self.judged == "record" else "the pattern"
        said = f"{verdict} {what}{density}"
        if broken and self.judged == "pattern":
            said += "; if not all of them were pruned, name those in include"
        return said
