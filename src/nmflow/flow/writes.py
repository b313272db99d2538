"""Writes by others: which places of a parameter no longer hold W̃, and how W adopts them."""

from __future__ import annotations

import torch
from torch import Tensor

from nmflow.errors import StateError
from nmflow.flow.sharding import local, sharded
from nmflow.flow.slot_masks import Stages
from nmflow.flow.slots import Slot
from nmflow.flow.state import DENSE_KEY, SCALE_KEY, SLOT_KEYS
from nmflow.masks import touched


def shown(slot: Slot, stages: Stages, held: bool) -> Tensor:
    """W̃ as `slot.write` writes it, in a tensor of its own."""
    expected = torch.empty_like(local(slot.dense))
    slot.project(stages, held, False, expected)
    return expected


def written(slot: Slot, stages: Stages, held: bool) -> Tensor | None:
    """The places of a parameter that somebody wrote, by value; None if there are none.

    A place counts as written if it does not hold W̃. All places count if `load_state_dict` gave the
    whole weight and it differs from W̃. NaN is a write; the sign of a zero is not.

    Args:
        slot: the parameter.
        stages: the stage of each target at the last write of W̃.
        held: whether its masks are those in the state.

    Returns:
        A bool tensor shaped like this rank's part. Without a True in it, somebody converted or
        moved the parameter.

    Raises:
        StateError: the parameter has another shape than W.
    """
    now, dense = local(slot.param), local(slot.dense)
    if not slot.moved() and bool(slot.same()):
        return None
    check_kind(slot)
    places = now != shown(slot, stages, held).to(now)
    if bool(places.any()):
        return torch.ones_like(places) if slot.loaded else places
    if (now.dtype, now.device) != (dense.dtype, dense.device):
        return places
    slot.seen()
    return None


def check_kind(slot: Slot) -> None:
    """Raise a `StateError` unless the parameter may hold W: its shape, in a floating dtype."""
    now, dense = local(slot.param), local(slot.dense)
    if now.shape != dense.shape or not now.is_floating_point() or now.is_meta:
        raise StateError(
            f"'{slot.name}' was attached as {_kind(dense)} and is {_kind(now)} now: put a weight "
            "of the old shape back, or change the model before attach()"
        )


def mend_kind(slot: Slot) -> None:
    """Give a parameter memory like W's if `param.data = x` gave it another kind."""
    now, dense = local(slot.param), local(slot.dense)
    kinds = [(x.shape, x.dtype, x.device) for x in (now, dense)]
    if kinds[0] != kinds[1] and not sharded(slot.param):
        slot.param.data = torch.empty_like(dense)


def take(slot: Slot, places: Tensor | None) -> None:
    """Adopt as W what the parameter holds, at some places or all; and its dtype and device."""
    now, dense = local(slot.param), local(slot.dense)
    if (dense.dtype, dense.device) != (now.dtype, now.device):
        tensors = slot.tensors
        for key in SLOT_KEYS:
            if key in tensors:
                dtype = now.dtype if key in (DENSE_KEY, SCALE_KEY) else torch.bool
                tensors[key] = tensors[key].to(device=now.device, dtype=dtype)
        slot.store()
        dense = local(slot.dense)
    dense.copy_(now if places is None else torch.where(places, now, dense))


def retake(slot: Slot, stages: Stages, places: Tensor) -> None:
    """Make held masks again from W, in the groups that contain one of the places."""
    for region in slot.regions:
        stage, target = stages[region.target.label], region.target
        if region.count == 0 or stage.pattern is None:
            continue
        part = region.of(places)
        old, new = slot.masks(region, stage, True), slot.masks(region, stage, False)
        masks: list[Tensor | None] = [None, None]
        for i, pattern in enumerate(stage.masks):
            before, after = old[i], new[i]
            if pattern is not None and before is not None and after is not None:
                masks[i] = torch.where(
                    touched(part, pattern, target.dim, target.stacked), after, before
                )
        kept, fading = masks
        assert kept is not None
        slot.hold(region, kept, fading)


def put_back(slot: Slot, stages: Stages, held: bool, places: Tensor) -> None:
    """Write W̃ around the places that somebody wrote; those stay, so that they are noticed."""
    now = local(slot.param)
    now.copy_(torch.where(places, now, shown(slot, stages, held).to(now)))


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)} on {x.device}"
