"""A flow's state in an optimizer's: checked before it is loaded, adopted afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow.errors import FlowError, StateError, WeightError
from nmflow.flow.sharding import local
from nmflow.flow.slots import Slot
from nmflow.flow.state import (
    DENSE_KEY,
    GROUP_KEYS,
    PENDING_KEY,
    RECIPE_KEY,
    SCALE_KEY,
    STEP_KEY,
    Run,
)
from nmflow.numbers import is_whole
from nmflow.select.target import Target


def is_there(optimizer: Optimizer) -> bool:
    """Whether an optimizer was loaded with the state of a run under a recipe."""
    return any(key in group for key in GROUP_KEYS for group in optimizer.param_groups)


def steps_in(groups: Sequence[dict[str, Any]]) -> int:
    """k from checked param groups; a group that was added since the last step has none."""
    return next(int(group[STEP_KEY]) for group in groups if STEP_KEY in group)


def run_of(groups: Sequence[dict[str, Any]], run: Run, targets: Sequence[Target]) -> Run:
    """The run that continues from param groups; a `StateError` if they belong to another one."""
    found = run
    marked = [group for group in groups if any(key in group for key in GROUP_KEYS)]
    if not marked:
        raise StateError(
            "the optimizer state comes from a run without a recipe, so it has no dense weights "
            "and no step: load it before attach(), which then starts from it at step 0"
        )
    for group in marked:
        for key in GROUP_KEYS:
            if key not in group:
                raise StateError(
                    f"the optimizer state has a param group without {key}: it is damaged, so "
                    "resume from another"
                )
        k = group[STEP_KEY]
        if not is_whole(k) or k != marked[0][STEP_KEY]:
            raise StateError(
                f"the optimizer state has {STEP_KEY}={k!r}, which is not a number of steps: it is "
                "damaged, so resume from another"
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
        needed: the slots' keys that the state must have.
    """
    places = _places(optimizer)
    pending = state.get(PENDING_KEY, {})
    for slot in slots:
        place = places[id(slot.param)]
        found = {**state.get(keys[place], {}), **pending.get(place, {})}
        for key in needed:
            if key not in found:
                raise StateError(
                    f"the optimizer state has no {key} of '{slot.name}', which a copy of the "
                    "optimizer lacks before its first step: load the whole state_dict() of the "
                    "original optimizer"
                )
            _check_tensor(slot, key, found[key])


def _check_tensor(slot: Slot, key: str, value: Any) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    asked = (len(slot.regions),) if key == SCALE_KEY else tuple(slot.param.shape)
    if shape != asked:
        raise StateError(
            f"the optimizer state's {key} of '{slot.name}' is {shape}, but the weight takes "
            f"{asked}: it is damaged, so resume from another"
        )
    if not bool(torch.isfinite(local(value)).all()):
        raise WeightError(
            f"the optimizer state's {key} of '{slot.name}' holds a NaN or an infinity, which no "
            "magnitude mask can order: resume from an earlier state"
        )


def adopt(optimizer: Optimizer, slots: Sequence[Slot]) -> None:
    """Adopt the slots' tensors from a state that was loaded and checked."""
    pending = optimizer.state.pop(PENDING_KEY, {})  # type: ignore[call-overload]
    places = _places(optimizer)
    for slot in slots:
        own = optimizer.state.get(slot.param, {})
        slot.adopt({**own, **pending.get(places[id(slot.param)], {})})


def is_foreign(optimizer: Optimizer, slots: Sequence[Slot], k: int, bundled: bool) -> bool:
    """Whether somebody put another state into the optimizer since step `k`, past its hooks.

    Args:
        optimizer: the optimizer.
        slots: the slots whose state may have changed.
        k: the optimizer steps done.
        bundled: whether there are other slots, whose state was checked already.
    """
    steps = [group[STEP_KEY] for group in optimizer.param_groups if STEP_KEY in group]
    kept = [slot for slot in slots if slot.tensors and slot.stored is not None]
    moved = any(slot.stored is not slot.tensors[DENSE_KEY] for slot in kept)
    if moved or any(step != k for step in steps):
        return True
    return PENDING_KEY in optimizer.state or not (steps or kept or bundled)


def check_saved(optimizer: Optimizer, saved: Any) -> None:
    """Raise a `FlowError` for an optimizer whose saved state cannot resume a recipe."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if (
        not groups
        or not isinstance(saved.get("state"), dict)
        or not all(key in group for group in groups for key in GROUP_KEYS)
    ):
        raise FlowError(
            f"optimizer is a {type(optimizer).__name__}, whose state_dict() leaves out the step of "
            "a recipe, so that no run could be resumed: use an optimizer that saves its state and "
            "param groups whole"
        )


def add_pending(optimizer: Optimizer, slots: Sequence[Slot], state_dict: dict) -> dict:
    """Add the tensors of slots that a saved state lacks."""
    places, state = _places(optimizer), state_dict["state"]
    pending = {}
    for slot in slots:
        place = places[id(slot.param)]
        if slot.tensors and DENSE_KEY not in state.get(place, {}):
            pending[place] = dict(slot.tensors)
    if pending:
        state_dict["state"] = {**state, PENDING_KEY: pending}
    return state_dict


def params_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    """The parameters of param groups, or their keys in a saved state, in order."""
    return [p for group in groups for p in group["params"]]


def _places(optimizer: Optimizer) -> dict[int, int]:
    return {id(p): i for i, p in enumerate(params_of(optimizer.param_groups))}
