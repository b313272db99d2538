"""What a flow is besides its weights: pure functions of the step, and its name in a saved state."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nmflow.recipes import Recipe, describe
from nmflow.recipes.schedules import Stage
from nmflow.select.target import Target

STEP_KEY, RECIPE_KEY = GROUP_KEYS = ("nmflow_step", "nmflow_recipe")
"""The keys of a flow in an optimizer's param groups: k, and `Run.signature`. Plain types both."""

DENSE_KEY, KEPT_KEY, FADING_KEY = SLOT_KEYS = ("nmflow_dense", "nmflow_mask", "nmflow_fading")
"""The keys of a weight in `optimizer.state[p]`: W, and the masks m and m' where they are held."""
PENDING_KEY = "nmflow_pending"
"""The key in a saved state of the weights whose parameter has no state of its own yet."""

# What wrappers put into a parameter's name; a state may be resumed with or without them.
_WRAPPINGS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Run:
    """A recipe over a run of `total_steps`: everything but the weights and k."""

    recipe: Recipe
    total_steps: int
    mask_interval: int = 1
    freeze_mask: bool = False

    def stages(self, targets: Sequence[Target], k: int) -> dict[str, Stage]:
        """The stage of each target after `k` steps, by label."""
        return {
            t.label: self.recipe.stage(k, self.total_steps, t.pattern, t.length) for t in targets
        }

    @property
    def dense_steps(self) -> int:
        """d, the steps before the first mask."""
        return self.recipe.phases(self.total_steps)[0]

    def frozen_since(self) -> int | None:
        """The step at which the mask is taken for good; None if it never is."""
        if self.freeze_mask:
            return self.total_steps - self.recipe.phases(self.total_steps)[1]
        return self.recipe.frozen_since(self.total_steps)

    @property
    def held_keys(self) -> tuple[str, ...]:
        """The masks that the run ever holds between steps, by their key in the state."""
        if self.mask_interval == 1 and self.frozen_since() is None:
            return ()
        return (KEPT_KEY, FADING_KEY) if self.recipe.fades_between else (KEPT_KEY,)

    def holds(self, k: int) -> bool:
        """Whether the masks of step `k` are to be held, since a later step needs them."""
        since = self.frozen_since()
        return self.mask_interval > 1 or (since is not None and k >= since)

    def reuses(self, targets: Sequence[Target], k: int) -> bool:
        """Whether the masks of step `k` are those of step `k - 1`, rather than taken from W."""
        since = self.frozen_since()
        if since is not None and k > since:
            return True
        if k == 0 or k % self.mask_interval == 0:
            return False
        now, before = self.stages(targets, k), self.stages(targets, k - 1)
        return all(now[label].masks == before[label].masks for label in now)

    def signature(self, targets: Sequence[Target]) -> str:
        """Text that two runs share when one can resume the other's state."""
        names = [[_unwrapped(t.label), list(t.shape), t.dim, str(t.pattern)] for t in targets]
        digest = hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:16]
        patterns = Counter(str(t.pattern) for t in targets)
        return json.dumps(
            {
                "recipe": describe(self.recipe),
                "total_steps": self.total_steps,
                "mask_interval": self.mask_interval,
                "freeze_mask": self.freeze_mask,
                "patterns": dict(sorted(patterns.items())),
                "weights": digest,
            },
            ensure_ascii=True,
        )


def differences(saved: str, own: str) -> str:
    """What two signatures differ in, in words; empty if nothing."""
    try:
        theirs = json.loads(saved)
    except (TypeError, ValueError):
        return f"its {RECIPE_KEY} cannot be read"
    if not isinstance(theirs, dict):
        return f"its {RECIPE_KEY} cannot be read"
    ours = json.loads(own)
    said = []
    for key, value in ours.items():
        if theirs.get(key) != value:
            said.append(
                "the weights (their names, shapes, axes or patterns) differ"
                if key == "weights"
                else f"{key} is {_short(theirs.get(key))} there and {_short(value)} here"
            )
    return "; ".join(said)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPINGS)


def _short(value: object) -> str:
    if isinstance(value, dict) and "name" in value:
        options = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value['name']} ({options})" if options else str(value["name"])
    if isinstance(value, dict):
        return ", ".join(f"{count} × {name}" for name, count in value.items())
    return str(value)
