"""Training FLOPs of a step at each stage of a recipe, and their sum over a run."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from nmflow.inspect.flops import Passes, flops_of
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe
from nmflow.recipes.schedules import Stage
from nmflow.select.target import Target

RULE = (
    "A step costs forward + backward. Forward products with a targeted weight, and those for the "
    "gradient of its input, count by the share of weights that are not zero at that step: N/M "
    "under a binary mask (and all of the groups that it keeps whole), everything while δ > 0 (a "
    "hybrid: what its two masks keep). "
    "Products for the gradient of a weight count in full, since the dense weight receives the "
    "straight-through gradient; under gradient='masked' they count by the same share."
)


def shares(stage: Stage, gradient: str) -> tuple[Fraction, Fraction]:
    """The shares of products that count at a stage: forward and input's gradient, then weight's."""
    if stage.pattern is None:
        return Fraction(1), Fraction(1)
    whole = Fraction(stage.whole)
    share = whole + (1 - whole) * density(stage.pattern)
    if stage.delta > 0:
        if stage.previous is None:
            share = Fraction(1)
        elif stage.previous.m == stage.pattern.m:  # nested: the earlier mask holds the later one
            share = max(share, density(stage.previous))
        else:
            share = min(Fraction(1), share + density(stage.previous))
    return share, share if gradient == "masked" else Fraction(1)


def by_phase(
    recipe: Recipe, total_steps: int, targets: list[Target], passes: Passes, dense_step: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Training FLOPs and steps by phase."""
    kinds: dict[tuple[Pattern, int], list[int]] = {}
    for t in targets:
        once = flops_of(passes.forward.get(t.name, ()), t)
        back = flops_of(passes.backward_input.get(t.name, ()), t)
        own = once if t.name in passes.trained else 0
        total = kinds.setdefault((t.pattern, t.length), [0, 0])
        total[0] += once + back
        total[1] += own
    training: dict[str, Fraction] = {}
    steps: Counter[str] = Counter()
    for nth, ((pattern, length), (both, own)) in enumerate(kinds.items()):
        # Equal stages are counted together, so that a long run is summed fast.
        tally: Counter[tuple[str, Pattern | None, Pattern | None, bool, float]] = Counter()
        for k in range(total_steps):
            stage = recipe.stage(k, total_steps, pattern, length)
            tally[stage.phase, stage.pattern, stage.previous, stage.delta > 0, stage.whole] += 1
        for (phase, kept, previous, fades, whole), times in tally.items():
            stage = Stage(phase, kept, previous, fades, whole)
            share, weight_share = shares(stage, recipe.gradient)
            saved = both * (1 - share) + own * (1 - weight_share)
            if nth == 0:
                steps[phase] += times
            training[phase] = training.get(phase, Fraction(0)) - saved * times
    total = {phase: round(dense_step * steps[phase] + saved) for phase, saved in training.items()}
    return total, dict(steps)


def density(pattern: Pattern) -> Fraction:
    """N/M."""
    return Fraction(pattern.n, pattern.m)
