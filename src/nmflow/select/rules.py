"""The notes that `plan` keeps while it goes through its keys and the rows of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nmflow.pattern import Pattern
from nmflow.select.layer import Layer, Part
from nmflow.select.presets import PRESETS


@dataclass
class Rule:
    """A key with its pattern, and the fate of the weights that it matches."""

    key: str
    pattern: Pattern
    took: int = 0
    missed: dict[str, str] = field(default_factory=dict)
    taken: int = 0
    lost: dict[str, tuple[int, str]] = field(default_factory=dict)

    def lose(self, layer: Layer, part: Part, reason: str) -> None:
        """Note a part that the key's role has, and that it cannot take."""
        self.missed[layer.name] = reason
        told = layer.is_matrix and (self.key != "all" or part.role != "other")
        if self.key in PRESETS and told and not layer.frozen:
            self.lose_rows(layer, part.stop - part.start, reason)

    def lose_rows(self, layer: Layer, rows: int, reason: str) -> None:
        """Note some rows of a weight."""
        before, _ = self.lost.get(layer.name, (0, ""))
        self.lost[layer.name] = before + _count(layer, rows), reason


@dataclass
class Run:
    """Neighbouring rows that share their fate: a pattern, or a reason why they have none."""

    what: Pattern | str
    start: int
    stop: int
    rules: list[Rule]


def matches(key: str, layer: Layer, part: Part) -> bool:
    """Whether a preset or a glob takes a part of a weight."""
    if key in PRESETS:
        return part.role in PRESETS[key]
    return any(fnmatchcase(t, key) or fnmatchcase(f".{t}", key) for t in layer.paths)


def append(runs: list[Run], what: Pattern | str, part: Part, rule: Rule | None) -> None:
    """Add a part, joined to the one before it where they share their fate."""
    by = [] if rule is None else [rule]
    if runs and runs[-1].what == what and runs[-1].stop == part.start:
        runs[-1].stop = part.stop
        runs[-1].rules += [one for one in by if one not in runs[-1].rules]
    else:
        runs.append(Run(what, part.start, part.stop, by))


def _count(layer: Layer, rows: int) -> int:
    """The weights in some output rows."""
    return math.prod(layer.shape) // max(1, layer.out) * rows
