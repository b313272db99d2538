"""A flow's state in an optimizer's: checked before it is loaded, taken over after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import StateError, WeightError
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import GROUP_KEYS, PENDING_KEY, RECIPE_KEY, STEP_KEY, Run
from nmflow.select.target import Target


def is_there(optimizer: Optimizer) -> bool:
    """Whether an optimizer was loaded with the state of a run under a recipe."""
    return any(key in group for key in GROUP_KEYS for group in optimizer.param_groups)


def run_of(groups: Sequence[dict[str, Any]], run: Run, targets: Sequence[Target]) -> Run:
    """The run that goes on from param groups; a `StateError` unless they are of the same one."""
    found = run
    for group in groups:
        if RECIPE_KEY not in group or STEP_KEY not in group:
            raise StateError(
                "the optimizer state is of a run without a recipe, so it has no dense weights "
                "and no step: load it before attach(), which then starts from it at step 0"
            )
        k = group[STEP_KEY]
        if isinstance(k, bool) or not isinstance(k, int) or k < 0 or k != groups[0][STEP_KEY]:
            raise StateError(
                f"the optimizer state has {STEP_KEY}={k!r}, which is no number of steps done: it "
                "is damaged, so resume from another"
            )
        found = run.resuming(group[RECIPE_KEY], targets, k)
    return found


def check_slots(
    optimizer: Optimizer,
    slots: Sequence[Slot],
    state: dict,
    keys: Sequence[Any],
    needed: Sequence[str],
) -> None:
    """Raise a `StateError` unless a state has the tensors of every slot.

    Args:
        optimizer: the optimizer that owns the slots.
        slots: the slots.
        state: an optimizer's state, saved or live.
        keys: the key in it of each of the optimizer's parameters, in order.
        needed: the slots' keys that it has to have.
    """
    places = _places(optimizer)
    pending = state.get(PENDING_KEY, {})
    for slot in slots:
        place = places[id(slot.param)]
        found = {**state.get(keys[place], {}), **pending.get(place, {})}
        for key in needed:
            if key not in found:
                raise StateError(
                    f"the optimizer state has no {key} of '{slot.name}': load the whole optimizer "
                    "state of the run that is resumed"
                )
            _check_tensor(slot, key, found[key])


def _check_tensor(slot: Slot, key: str, value: Any) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != tuple(slot.param.shape):
        raise StateError(
            f"the optimizer state's {key} of '{slot.name}' is {shape}, but the weight is "
            f"{tuple(slot.param.shape)}: it is damaged, so resume from another"
        )
    if not bool(torch.isfinite(local(value)).all()):
        raise WeightError(
            f"the optimizer state's {key} of '{slot.name}' holds a NaN or an infinity, which no "
            "magnitude mask can order: resume from an earlier state"
        )


def adopt(optimizer: Optimizer, slots: Sequence[Slot]) -> None:
    """Take over the slots' tensors from a state that was loaded and checked."""
    pending = optimizer.state.pop(PENDING_KEY, {})  # type: ignore[call-overload]
    places = _places(optimizer)
    for slot in slots:
        slot.adopt(pending.get(places[id(slot.param)]))


def add_pending(optimizer: Optimizer, slots: Sequence[Slot], state_dict: dict) -> dict:
    """Put the tensors of slots whose parameter has no state of its own into a saved state."""
    places = _places(optimizer)
    pending = {places[id(s.param)]: s.pending for s in slots if s.pending is not None}
    if pending:
        state_dict["state"][PENDING_KEY] = pending
    return state_dict


def params_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """The parameters of param groups, or their keys in a saved state, in order."""
    return [p for group in groups for p in group["params"]]


def _places(optimizer: Optimizer) -> dict[int, int]:
    return {id(p): i for i, p in enumerate(params_of(optimizer.param_groups))}
