"""A flow apart from its weights: pure functions of the step, and its name in a saved state."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nmflow.errors import StateError
from nmflow.flow.prolonging import planned
from nmflow.numbers import is_whole
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe, describe
from nmflow.recipes.schedules import Stage
from nmflow.select.target import Target

STEP_KEY, RECIPE_KEY = GROUP_KEYS = ("nmflow_step", "nmflow_recipe")
"""The keys of a flow in an optimizer's param groups: k, and `Run.signature`. Both plain."""

SLOT_KEYS = ("nmflow_dense", "nmflow_mask", "nmflow_fading", "nmflow_scale")
DENSE_KEY, KEPT_KEY, FADING_KEY, SCALE_KEY = SLOT_KEYS
"""The keys of a weight in `optimizer.state[p]`: W, the masks m and m' where they are held, and β
if a recipe scales each weight: one for each target in it, 0 before the first mask."""
PENDING_KEY = "nmflow_pending"
"""The key in a saved state of the weights whose parameter has no state of its own yet."""

_STEPS = ("total_steps", "begun")  # in which a resumed run may differ

# What wrappers put into a parameter's name; a state may be resumed with or without them.
_WRAPPINGS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


Kind = tuple[Pattern, int]
"""The pattern of a target and the length of its grouped axis, which alone decide its stages."""


def kind_of(target: Target) -> Kind:
    """The kind of a target."""
    return target.pattern, target.length


@dataclass(frozen=True)
class Run:
    """A recipe over a run of `total_steps`: everything but the weights and k.

    Attributes:
        recipe: the recipe.
        total_steps: K.
        mask_interval: the steps between two masks.
        freeze_mask: whether the mask is held through the fine-tune phase.
        begun: the number of steps by which the phases count, if the run was resumed with
            another K; None if it is K, see `prolonging`.
        norms: the digest of the norms from which masks are made; empty without any.
    """

    recipe: Recipe
    total_steps: int
    mask_interval: int = 1
    freeze_mask: bool = False
    begun: int | None = None
    norms: str = ""

    @property
    def planned(self) -> int:
        """The number of steps by which the phases count."""
        return self.total_steps if self.begun is None else self.begun

    def stages(self, targets: Sequence[Target], k: int) -> dict[str, Stage]:
        """The stage of each target after `k` steps, by label."""
        return self.spread(targets, self.kinds(dict.fromkeys(map(kind_of, targets)), k))

    def kinds(self, kinds: Iterable[Kind], k: int) -> dict[Kind, Stage]:
        """The stage of each kind of target after `k` steps."""
        stages = {kind: self.recipe.stage(k, self.planned, *kind) for kind in kinds}
        if self.begun is None or not self.recipe.prunes:
            return stages
        if k >= self.total_steps:
            return {kind: replace(stage, phase="final") for kind, stage in stages.items()}
        if k >= self.begun:
            return {kind: replace(stage, phase="finetune") for kind, stage in stages.items()}
        return stages

    def spread(self, targets: Sequence[Target], kinds: Mapping[Kind, Stage]) -> dict[str, Stage]:
        """The stage of each target, by label, from that of each kind."""
        return {t.label: kinds[kind_of(t)] for t in targets}

    @property
    def dense_steps(self) -> int:
        """d, the steps before the first mask."""
        return self.recipe.phases(self.planned)[0]

    def frozen_since(self) -> int | None:
        """The step whose mask is kept for good; None if there is none."""
        own = self.recipe.frozen_since(self.planned)
        asked = self.planned - self.recipe.phases(self.planned)[1] if self.freeze_mask else None
        return min((since for since in (own, asked) if since is not None), default=None)

    @property
    def held_keys(self) -> tuple[str, ...]:
        """What the run may hold for a weight beside W between steps, by its key in the state."""
        scale = (SCALE_KEY,) if self.recipe.form == "soft-threshold" else ()
        if self.mask_interval == 1 and self.recipe.stairs == 0 and self.frozen_since() is None:
            return scale
        fading = (FADING_KEY,) if self.recipe.fades_between else ()
        return (KEPT_KEY, *fading, *scale)

    def final(self, target: Target) -> Stage:
        """The stage of a target at the end."""
        return self.recipe.dressed(Stage("final", target.pattern), target.pattern)

    def holds(self, k: int) -> bool:
        """Whether to keep the masks of step `k`, because a later step needs them."""
        since = self.frozen_since()
        often = self.mask_interval > 1 or self.recipe.stairs > 0
        return often or (since is not None and k >= since)

    def reuses(self, kinds: Collection[Kind], k: int) -> bool:
        """Whether the masks of step `k` are those of step `k - 1`; otherwise W gives new ones."""
        since = self.frozen_since()
        if since is not None and k > since:
            return True
        due = k % self.mask_interval == 0
        if self.recipe.stairs:
            due = not self.recipe.same_stair(k, self.planned)
        if k == 0 or due:
            return False
        now, before = self.kinds(kinds, k), self.kinds(kinds, k - 1)
        return all(now[kind].masks == before[kind].masks for kind in now)

    def signature(self, targets: Sequence[Target]) -> str:
        """Text that two runs share when one can resume the other's state."""
        names = [[unwrapped(t.label), list(t.shape), t.dim, str(t.pattern)] for t in targets]
        digest = hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()[:16]
        patterns = Counter(str(t.pattern) for t in targets)
        signature = {
            "recipe": describe(self.recipe),
            "total_steps": self.total_steps,
            "mask_interval": self.mask_interval,
            "freeze_mask": self.freeze_mask,
            "patterns": dict(sorted(patterns.items())),
            "weights": digest,
        }
        if self.begun is not None:
            signature["begun"] = self.begun
        if self.norms:
            signature["norms"] = self.norms
        return json.dumps(signature, ensure_ascii=True)

    def resuming(self, saved: object, targets: Sequence[Target], k: int) -> Run:
        """This run, as it continues from a state of step `k` that was saved with a signature.

        Args:
            saved: the signature in the state.
            targets: this run's targets.
            k: the step in the state.

        Raises:
            StateError: the state belongs to another run, or cannot continue for `total_steps`.
        """
        theirs = _read(saved)
        said = differences(theirs, json.loads(self.signature(targets)))
        if said:
            raise StateError(
                f"the optimizer state is of another run: {said}; attach as that run did, or "
                "start without its state"
            )
        their_steps = theirs["total_steps"]
        begun = theirs.get("begun", their_steps)
        if their_steps != self.total_steps:
            begun = planned(self.recipe, begun, self.total_steps, k)
        return replace(self, begun=None if begun == self.total_steps else begun)


def _read(saved: object) -> dict[str, Any]:
    """A signature's values, with the numbers of steps as numbers."""
    try:
        read = json.loads(saved)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        read = None
    steps = [read.get(key, 1) for key in _STEPS] if isinstance(read, dict) else [0]
    if not all(is_whole(n, 1) for n in steps):
        raise StateError(
            f"the optimizer state is of another run: its {RECIPE_KEY} cannot be read; attach as "
            "that run did, or start without its state"
        )
    assert isinstance(read, dict)
    return {"total_steps": 0, **read}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The differences of two signatures in words, except their steps; empty if there are none."""
    said = []
    for key in dict.fromkeys([*ours, *theirs]):
        value = ours.get(key)
        if key not in _STEPS and theirs.get(key) != value:
            said.append(
                "the weights (their names, shapes, axes or patterns) differ"
                if key == "weights"
                else f"{key} is {_short(theirs.get(key))} there and {_short(value)} here"
            )
    return "; ".join(said)


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPINGS)


def _short(value: object) -> str:
    if isinstance(value, dict) and "name" in value:
        options = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value['name']} ({options})" if options else str(value["name"])
    if isinstance(value, dict):
        return ", ".join(f"{count} × {name}" for name, count in value.items())
    return str(value)
