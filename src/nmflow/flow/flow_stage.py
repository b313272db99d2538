"""Where a flow is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nmflow.pattern import Pattern
from nmflow.recipes.schedules import Stage


@dataclass(frozen=True)
class FlowStage:
    """Where a flow is: the phase, and what each target goes through.

    Attributes:
        phase: `"dense"`, `"decay"`, `"sparse"`, `"finetune"` or `"final"`.
        patterns: the pattern of each target's mask now, by label; None while it is dense.
        delta: δ now; the largest one where the hybrid's frames differ between targets.
        targets: the whole `Stage` of each target, by label.
    """

    phase: str
    patterns: dict[str, Pattern | None]
    delta: float
    targets: dict[str, Stage]

    @classmethod
    def of(cls, stages: Mapping[str, Stage]) -> FlowStage:
        """The same of the stages of all targets, by label."""
        return cls(
            next(iter(stages.values())).phase,
            {label: stage.pattern for label, stage in stages.items()},
            max(stage.delta for stage in stages.values()),
            dict(stages),
        )
