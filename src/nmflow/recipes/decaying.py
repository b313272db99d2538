"""The decaying recipes, a frozen dataclass each: MDGF, SDGF, hybrid and settling."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from nmflow.errors import RecipeError
from nmflow.numbers import check_not_negative, check_positive
from nmflow.pattern import Pattern
from nmflow.recipes import schedules
from nmflow.recipes.base import (
    GRADIENTS,
    Decaying,
    check_choice,
    check_fading,
    check_phases,
    check_stairs,
    frames_note,
    warn_of_high_delta,
)
from nmflow.recipes.schedules import Stage


@dataclass(frozen=True)
class MDGF(Decaying):
    """Mask decay gradient flow: δ, the value of the mask where m is 0, decays from 1 to 0.

    Linear δ = max(0, 1 - β·(k - d)); exponential δ = exp(-β·(k - d)), exactly 0 from the
    fine-tune phase on.

    Args:
        decay: `"linear"` or `"exponential"`.
        beta: β per optimizer step; None solves it so that δ reaches 0 (linear) or e⁻⁵
            (exponential) at the end of the decay phase.
        gradient: `"masked"` or `"straight-through"`, see `Recipe`.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, with the binary mask; a fraction or steps.
        stairs: how often δ and the mask change, at equal distances in the decay phase, and for the
            last time when it ends; 0 is at every step.

    References:
        arXiv 2402.04744, section 3 (MDGF). Its text reads like the masked rule. The authors' code
        for images is straight-through; their code for language (JAX: praxis and aqt) is masked,
        with a linear δ and at most 16 stairs: `MDGF("linear", stairs=16)`.
    """

    decay: str = "exponential"
    _: KW_ONLY
    beta: float | None = None
    gradient: str = "masked"
    dense: float = 0.0
    finetune: float = 0.2
    stairs: int = 0

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, schedules.DECAYS)
        check_fading(self, self.beta)
        check_stairs(self)

    @property
    def name(self) -> str:
        """`mdgf-linear` or `mdgf-exponential`."""
        return f"mdgf-{self.decay}"

    def check(self, total_steps: int) -> None:
        """As for every recipe; warns when δ is still above 0.1 as the mask turns binary."""
        super().check(total_steps)
        warn_of_high_delta(self.decay, self.beta, total_steps - sum(self.phases(total_steps)))

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """N:M with δ(t)."""
        return Stage("decay", pattern, None, schedules.DECAYS[self.decay](t, span, self.beta))


@dataclass(frozen=True)
class SDGF(Decaying):
    """Structure decay gradient flow: binary masks whose pattern sharpens frame by frame.

    Stepwise: (M-1):M, ⌈M/2⌉:M … N:M. Geometric: 8N:8M, 4N:4M, 2N:2M, N:M. Panels: N:M, N:M@2, N:M@4
    … N:M@V. Frames of equal length.

    Args:
        structure: `"stepwise"`, `"geometric"` or `"panels"`.
        gradient: `"straight-through"` or `"masked"`, see `Recipe`.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, at N:M; a fraction or steps.
        stairs: how often the pattern and the mask change, at equal distances in the decay phase,
            and for the last time when it ends; 0 is at every step.

    References:
        arXiv 2402.04744, section 3 (SDGF). The authors' code for images is straight-through; their
        code for language (JAX: praxis and aqt) is masked, with at most 16 stairs:
        `SDGF(gradient="masked", stairs=16)`. `"panels"` is nmflow's own.
    """

    structure: str = "stepwise"
    _: KW_ONLY
    gradient: str = "straight-through"
    dense: float = 0.0
    finetune: float = 0.2
    stairs: int = 0

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, schedules.FRAMES)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_phases(self)
        check_stairs(self)

    @property
    def name(self) -> str:
        """`sdgf-stepwise`, `sdgf-geometric` or `sdgf-panels`."""
        return f"sdgf-{self.structure}"

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """The frame's pattern."""
        frames = self.patterns(pattern, length)
        return Stage("decay", frames[schedules.frame_at(t, span, len(frames))[0]])

    def patterns(self, pattern: Pattern, length: int) -> tuple[Pattern, ...]:
        """The frames' patterns."""
        return schedules.FRAMES[self.structure](pattern, length)

    def note(self, pattern: Pattern, length: int) -> str:
        """Says which geometric frames had to shrink, and where there are no panels to grow."""
        return frames_note(self.structure, pattern, length)


@dataclass(frozen=True)
class Hybrid(Decaying):
    """SDGF's frames; in each, the weights that the new pattern drops fade by MDGF's δ.

    W̃ = W ⊙ (m + (1 - m) ⊙ m' · δ) with m of the frame's pattern and m' of the frame before it.

    Args:
        structure: `"stepwise"`, `"geometric"` or `"panels"`, as for `SDGF`.
        decay: `"linear"` or `"exponential"`, within each frame.
        beta: β per optimizer step; None solves it for each frame.
        gradient: `"masked"` or `"straight-through"`.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, at N:M; a fraction or steps.

    References:
        arXiv 2402.04744 names the combination as an open question; this form is nmflow's.
    """

    structure: str = "stepwise"
    _: KW_ONLY
    decay: str = "exponential"
    beta: float | None = None
    gradient: str = "masked"
    dense: float = 0.0
    finetune: float = 0.2
    name: ClassVar[str] = "hybrid"
    fades_between: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, schedules.FRAMES)
        check_choice("decay", self.decay, schedules.DECAYS)
        check_fading(self, self.beta)

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """The frame's pattern, the one before it, and δ within the frame."""
        frames = self.patterns(pattern, length)
        index, start, stop = schedules.frame_at(t, span, len(frames))
        delta = schedules.DECAYS[self.decay](t - start, stop - start, self.beta)
        return Stage("decay", frames[index], frames[index - 1] if index else None, delta)

    def patterns(self, pattern: Pattern, length: int) -> tuple[Pattern, ...]:
        """The frames' patterns."""
        return schedules.FRAMES[self.structure](pattern, length)

    def note(self, pattern: Pattern, length: int) -> str:
        """Says which geometric frames had to shrink, and where there are no panels to grow."""
        return frames_note(self.structure, pattern, length)


@dataclass(frozen=True)
class MaxQ(Decaying):
    """MaxQ: important weights are enhanced by a soft mask, and groups become N:M one after another.

    W̃ = W ⊙ m ⊙ (1 + q). q looks along the output row of a weight: among the share N/M of its
    largest |w| it is σ((|w| - t)/τ), t halfway between the last that is among them and the first
    that is not, and elsewhere 0. Of a convolution of several places a second term looks at all
    weights of one place. In the decay phase m keeps all of a share of the groups, those of the
    largest Σ|w|, which falls from 1 to 0. The dense weight receives g + λ·(1 - m) ⊙ W.

    Args:
        schedule: how the share falls: `"cosine"`, cos(½π·t/T), or `"linear"`.
        lam: λ.
        tau: τ.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, with every group at N:M; a fraction or steps.

    References:
        arXiv 2312.07061 and the authors' code. Differs from it: the share falls
        at every step, where theirs falls by epochs.
    """

    schedule: str = "cosine"
    _: KW_ONLY
    lam: float = 2e-4
    tau: float = 1e-2
    dense: float = 0.0
    finetune: float = 0.2
    name: ClassVar[str] = "maxq"
    form: ClassVar[str] = "multi-axis"

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, schedules.SHARES)
        check_not_negative("lam", self.lam, RecipeError)
        check_positive("tau", self.tau, RecipeError, ", in units of the weights")
        check_phases(self)

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """N:M, but for a share of the groups."""
        share = schedules.SHARES[self.schedule](t, span)
        return Stage("decay", pattern, whole=share)


@dataclass(frozen=True, kw_only=True)
class Settling(MDGF):
    """MDGF whose dense weights are drawn to the sparse ones, so that the mask settles.

    W̃ = W ⊙ (m + (1 - m)·δ) as in MDGF, and beside each optimizer step, at its learning rate,
    W ← W + lr·μ·(W̃ - W), that is W ← W - lr·μ·(1 - δ)·(1 - m) ⊙ W, with lr·μ at most 1.

    Without the pull, a pruned weight grows while it fades, above all under Adam, and comes back
    when the mask turns binary. Under the pull, it stays only as large as its updates are
    consistent. The pull is separate from the gradient, like AdamW's weight decay, so μ needs no
    tuning to the gradient's scale.

    Args:
        decay: as for `MDGF`.
        beta: as for `MDGF`.
        gradient: as for `MDGF`, but `"straight-through"` by default: the pull does what masking
            does for MDGF, and both together are no better.
        dense: d, a fraction (float) or steps (int).
        finetune: the last steps, with the binary mask; a fraction or steps.
        stairs: as for `MDGF`.
        pull: μ, a finite number that is 0 or more; 0 is `MDGF`.

    References:
        nmflow's own; SR-STE (arXiv 2102.04010) puts such a term into the gradient.
    """

    gradient: str = "straight-through"
    dense: float = 0.05
    finetune: float = 0.2
    pull: float = 3.0
    name: ClassVar[str] = "settling"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("pull", self.pull, RecipeError)
