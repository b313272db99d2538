"""What every recipe is: a schedule, a gradient rule and a name; and the checks of its fields."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from nmflow.errors import NMFlowWarning, RecipeError
from nmflow.numbers import check_positive, check_whole
from nmflow.pattern import Pattern
from nmflow.recipes import schedules
from nmflow.recipes.schedules import DENSE, Stage, check_amount, steps_of

GRADIENTS = ("straight-through", "masked")


@dataclass(frozen=True)
class Recipe:
    """What every recipe answers, all of it as pure functions of its fields and the step.

    Args:
        scale: γ, the factor of the weights that are kept. It grows from 1 with the sparsity.
        lr_scale: the factor of the learning rate of weights under the recipe. It grows alike.

    Attributes:
        gradient: the rule for the dense weight's gradient, from g = ∂L/∂W̃:
            `"straight-through"` passes g, `"masked"` passes g ⊙ (m + (1 - m) ⊙ m' · δ).
        lam: λ of SR-STE's term λ·(1 - m) ⊙ W, added to g once per optimizer step.
        pull: μ, by which W is drawn to W̃ beside each optimizer step: W ← W + lr·μ·(W̃ - W).
        prunes: whether weights end at N:M; False for the dense baseline alone.
        fades_between: whether a stage has two masks, m and m'.
        stairs: how often δ, the pattern and the mask change in the decay phase, at equal distances,
            and for the last time when it ends; 0 lets them change at every step.
        form: what a kept weight becomes, one of `masks.FORMS`; "" leaves it as it is.
        freezes_second_moment: whether Adam's second moment stays as it is from step d on.
    """

    # A recipe whose user chooses one of these makes it a field. They have no annotations here: a
    # dataclass orders its own fields after the names that its base annotates.
    gradient = "straight-through"
    lam = 0.0
    pull = 0.0
    prunes = True
    freezes_second_moment = False
    fades_between = False
    stairs = 0
    form = ""
    tau = 0.0

    scale: float = field(default=1.0, kw_only=True)
    lr_scale: float = field(default=1.0, kw_only=True)

    @property
    def name(self) -> str:
        """The name under which `attach` knows the recipe."""
        raise AssertionError("every recipe names itself")  # pragma: no cover

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Dense steps at the start and fine-tune steps at the end, of `total_steps`."""
        given = {n: getattr(self, n) for n in ("dense", "finetune") if hasattr(self, n)}
        steps = {name: steps_of(name, amount, total_steps) for name, amount in given.items()}
        return steps.get("dense", 0), steps.get("finetune", 0)

    def check(self, total_steps: int) -> None:
        """Raise a `RecipeError` unless the phases fit into `total_steps`; warn if δ stays high."""
        of = " of optimizer steps for the whole run"
        check_whole("total_steps", total_steps, RecipeError, 1, of)
        d, f = self.phases(total_steps)
        span = total_steps - d - f
        if span < (1 if self.decays else 0):
            mend = "leave a step of decay between them" if self.decays else "shorten them"
            raise RecipeError(
                f"total_steps is {total_steps}, but dense takes {d} and finetune {f} steps: {mend}"
            )

    @property
    def decays(self) -> bool:
        """Whether there is a phase between dense and sparse."""
        return False

    def stage(self, k: int, total_steps: int, pattern: Pattern, length: int) -> Stage:
        """The stage of a weight after `k` optimizer steps.

        Args:
            k: optimizer steps done; from `total_steps` on the stage is final.
            total_steps: K, the optimizer steps of the whole run.
            pattern: the final pattern N:M.
            length: the length of the grouped axis, which a geometric frame has to divide.
        """
        return self.dressed(self._bare(k, total_steps, pattern, length), pattern)

    def dressed(self, stage: Stage, pattern: Pattern) -> Stage:
        """A stage with the recipe's form, and with its scales, as far as the sparsity has come."""
        if stage.pattern is None or (self.scale == self.lr_scale == 1.0 and not self.form):
            return stage
        come = min(1.0, stage.sparsity / pattern.sparsity) if pattern.sparsity else 0.0
        gain, rate = (1.0 + (factor - 1.0) * come for factor in (self.scale, self.lr_scale))
        return replace(stage, gain=gain, rate=rate, form=self.form, tau=self.tau)

    def _bare(self, k: int, total_steps: int, pattern: Pattern, length: int) -> Stage:
        d, f = self.phases(total_steps)
        if k >= total_steps:
            return Stage("final", pattern)
        if k < d:
            return DENSE
        if k >= total_steps - f:
            return Stage("finetune", pattern)
        t, span = k - d, total_steps - d - f
        if self.stairs:
            t = schedules.stair_at(t, span, self.stairs)[1]
        return self.between(t, span, pattern, length)

    def between(self, t: int, span: int, pattern: Pattern, length: int) -> Stage:
        """The stage `t` steps into the `span` steps between dense and fine-tune."""
        return Stage("sparse", pattern)

    def patterns(self, pattern: Pattern, length: int) -> tuple[Pattern, ...]:
        """Every pattern that a weight's mask goes through, N:M the last."""
        return (pattern,)

    def frozen_since(self, total_steps: int) -> int | None:
        """The step at which the mask is taken once and kept, if the recipe keeps one."""
        return total_steps - self.phases(total_steps)[1] if self.stairs else None

    def same_stair(self, k: int, total_steps: int) -> bool:
        """Whether step `k` is on the stair of step `k - 1`, so that the mask stays."""
        d, f = self.phases(total_steps)
        span = total_steps - d - f
        if not self.stairs or k <= d:
            return False
        now, before = (schedules.stair_at(t, span, self.stairs) for t in (k - d, k - d - 1))
        return now == before

    def note(self, pattern: Pattern, length: int) -> str:
        """What `plan` should say of this recipe on an axis of `length`; usually empty."""
        return ""


@dataclass(frozen=True)
class Decaying(Recipe):
    """The decaying recipes: dense, decay, fine-tune."""

    @property
    def decays(self) -> bool:
        """True."""
        return True


def check_phases(recipe: Recipe) -> None:
    """Raise a `RecipeError` for phases or scales that no run could have."""
    for name in ("scale", "lr_scale"):
        check_positive(name, getattr(recipe, name), RecipeError, ", where 1.0 changes nothing")
    given = {n: getattr(recipe, n) for n in ("dense", "finetune") if hasattr(recipe, n)}
    for name, amount in given.items():
        check_amount(name, amount)
    fractions = [a for a in given.values() if isinstance(a, float)]
    if sum(fractions) > 1.0 + 1e-9:
        said = " and ".join(f"{n} {a}" for n, a in given.items())
        raise RecipeError(
            f"{said} add up to more than 1: give fractions of total_steps that fit into one run"
        )


def check_fading(recipe: Recipe, beta: float | None) -> None:
    """Raise a `RecipeError` for a β, a gradient rule or phases that cannot be."""
    if beta is not None:
        per = " per optimizer step, or None to solve it from the decay phase"
        check_positive("beta", beta, RecipeError, per)
    check_choice("gradient", recipe.gradient, GRADIENTS)
    check_phases(recipe)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a `RecipeError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        said = " or ".join(repr(c) for c in choices)
        raise RecipeError(f"{name} is {value!r}: choose {said}")


def check_stairs(recipe: Recipe) -> None:
    """Raise a `RecipeError` unless the stairs are a whole number, 0 or more."""
    of = " of updates in the decay phase (0: one at every step)"
    check_whole("stairs", recipe.stairs, RecipeError, 0, of)


def warn_of_high_delta(decay: str, beta: float | None, span: int) -> None:
    """Warn when δ is still above 0.1 as the mask turns binary."""
    end = schedules.DECAYS[decay](span, span, beta)
    if end > 0.1:
        warnings.warn(
            f"beta is {beta}, so δ is still {end:.2g} after the {span} steps of decay, when the "
            "mask turns binary: raise beta, or leave it None",
            NMFlowWarning,
            stacklevel=3,
        )


def frames_note(structure: str, pattern: Pattern, length: int) -> str:
    """Say which geometric frames had to shrink to divide an axis of `length`; and of no panels."""
    if structure == "panels" and pattern.panel == 1:
        return f"no panels in '{pattern}': every frame is {pattern}; write '{pattern}@16'"
    if structure != "geometric":
        return ""
    full = schedules.geometric_frames(pattern, 8 * pattern.m * length)
    used = schedules.geometric_frames(pattern, length)
    if used == full:
        return ""
    said = ", ".join(str(p) for p in used)
    return f"geometric frames {said}: {full[0].m} does not divide {length}"
