"""The baselines: dense, one-shot, STE, SR-STE, STEP and gradual pruning, a dataclass each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nmflow.errors import RecipeError
from nmflow.numbers import check_not_negative
from nmflow.pattern import Pattern
from nmflow.recipes import schedules
from nmflow.recipes.base import (
    GRADIENTS,
    Decaying,
    Recipe,
    check_choice,
    check_phases,
)
from nmflow.recipes.schedules import DENSE, Stage


@dataclass(frozen=True)
class Dense(Recipe):
    """No sparsity: the baseline, with the same hooks and diagnostics. It is never pruned."""

    prunes: ClassVar[bool] = False
    name: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        if (self.scale, self.lr_scale) != (1.0, 1.0):
            raise RecipeError(
                f"scale is {self.scale!r} and lr_scale {self.lr_scale!r}, but the dense baseline "
                "has no sparse weights: leave them out"
            )

    def stage(self, k: int, total_steps: int, pattern: Pattern, length: int) -> Stage:
        """Dense at every step."""
        return DENSE


@dataclass(frozen=True, kw_only=True)
class OneShot(Recipe):
    """Dense until step d, then a magnitude mask taken once and kept: one-shot and fine-tune.

    W̃ = W ⊙ m from step d, and the gradient is m ⊙ g.

    Args:
        dense: d, as a fraction of all steps (float) or a number of steps (int).
    """

    dense: float = 0.5
    name: ClassVar[str] = "one-shot"
    gradient: ClassVar[str] = "masked"

    def __post_init__(self) -> None:
        check_phases(self)

    def frozen_since(self, total_steps: int) -> int | None:
        """The end of the dense phase."""
        return self.phases(total_steps)[0]


@dataclass(frozen=True, kw_only=True)
class STE(Recipe):
    """Straight-through: W̃ = W ⊙ m from step d, and the dense weight receives g.

    Args:
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, in which `freeze_mask` may keep the mask.
    """

    dense: float = 0.0
    finetune: float = 0.0
    name: ClassVar[str] = "ste"

    def __post_init__(self) -> None:
        check_phases(self)


@dataclass(frozen=True, kw_only=True)
class SRSTE(Recipe):
    """Sparse-refined straight-through: STE with g + λ·(1 - m) ⊙ W.

    The term is added once per optimizer step, to unscaled gradients: neither a loss scaler nor
    gradient accumulation changes λ.

    Args:
        lam: λ, the strength of the pull of pruned weights toward 0.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, in which `freeze_mask` may keep the mask.

    References:
        arXiv 2102.04010, equation 10. Differs from the code of arXiv 2402.04744, which divides λ
        by the loss scale.
    """

    lam: float = 2e-4
    dense: float = 0.0
    finetune: float = 0.0
    name: ClassVar[str] = "sr-ste"

    def __post_init__(self) -> None:
        check_not_negative("lam", self.lam, RecipeError)
        check_phases(self)


@dataclass(frozen=True, kw_only=True)
class SSTE(Recipe):
    """S-STE: W̃ is a continuous function of W, since only the excess over a threshold is kept.

    W̃ = β·sign(W) ⊙ max(|W| - t, 0) from step d, with t the largest |w| of a group that is not kept
    (of 2:4, the third largest), and the dense weight receives g. β = ⟨W, S⟩/⟨S, S⟩ with S = W̃ / β
    is the least-squares factor of a weight tensor at step d, and stays constant.

    Args:
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, in which `freeze_mask` may keep the mask.

    References:
        arXiv 2409.09099, for 2:4. Differs from it: any N:M; a panel's rows share the places, and
        each row has its own threshold; the paper's unbiased estimate of activation gradients and
        FP8 are not part of the recipe.
    """

    dense: float = 0.0
    finetune: float = 0.0
    name: ClassVar[str] = "s-ste"
    form: ClassVar[str] = "soft-threshold"

    def __post_init__(self) -> None:
        check_phases(self)


@dataclass(frozen=True, kw_only=True)
class STEP(Recipe):
    """STEP: a dense phase with Adam, whose second moment is then frozen as a preconditioner.

    W̃ = W ⊙ m from step d, the dense weight receives g + λ·(1 - m) ⊙ W, and Adam divides by the
    √v of step d, for every parameter of the optimizer.

    Args:
        dense: d, a fraction (float) or steps (int), at least one step.
        lam: λ of SR-STE's term; 0 is plain straight-through.
        finetune: the last steps, in which `freeze_mask` may keep the mask.

    References:
        arXiv 2302.01172, algorithm 1. Differs from it: d is given, where the paper's AutoSwitch
        watches the change of v.
    """

    dense: float = 0.5
    lam: float = 2e-4
    finetune: float = 0.0
    name: ClassVar[str] = "step"
    freezes_second_moment: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_not_negative("lam", self.lam, RecipeError)
        check_phases(self)

    def check(self, total_steps: int) -> None:
        """As for every recipe; and there has to be a moment to freeze."""
        super().check(total_steps)
        if self.phases(total_steps)[0] < 1:
            raise RecipeError(
                f"dense is {self.dense} of {total_steps} steps: STEP freezes the second moment of "
                "a dense phase, so give it at least one step"
            )


@dataclass(frozen=True, kw_only=True)
class Gradual(Decaying):
    """Gradual magnitude pruning: binary masks that keep fewer of every M by the cubic law.

    t steps into a decay of T, n(t) = ⌈N + (M - N)·(1 - t/T)³⌉ of every M are kept, at most M - 1;
    exactly N from the fine-tune phase on. A pruned weight keeps its value, receives no gradient
    under the masked rule, and comes back if others shrink below it.

    Args:
        gradient: `"masked"` or `"straight-through"`, see `Recipe`.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, at N:M; a fraction or steps.

    References:
        arXiv 1710.01878, equation 1, from sparsity 0. Differs from it: the number kept is counted
        in every group of M, and the mask is taken at every step, where the paper takes it every
        so many.
    """

    gradient: str = "masked"
    dense: float = 0.0
    finetune: float = 0.2
    name: ClassVar[str] = "gradual"

    def __post_init__(self) -> None:
        check_choice("gradient", self.gradient, GRADIENTS)
        check_phases(self)

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """n(t):M."""
        return Stage("decay", schedules.cubic(t, span, pattern))

    def patterns(self, pattern: Pattern, length: int) -> tuple[Pattern, ...]:
        """From (M-1):M down to N:M, one by one: a run of few steps leaves some out."""
        return schedules.cubic_frames(pattern)
