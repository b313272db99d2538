"""What one launch on a GPU does for many weights of a bundle, at steps of one kind.

A kind is everything that decides which kernel does what: patterns, forms and held masks, but not
δ, which is an argument of the launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nmflow import masks
from nmflow.flow.bundle import Bundle
from nmflow.flow.hosts import Groups
from nmflow.flow.sharding import Region, local
from nmflow.flow.slots import Slot
from nmflow.flow.state import KEPT_KEY, Kind, kind_of
from nmflow.pattern import EVERY
from nmflow.recipes.schedules import Stage

_KEPT = 32  # plans: few patterns come back, such as those of two optimizers


@dataclass(frozen=True)
class Part:
    """The rows of a target in a bundle.

    Attributes:
        place: the place of its slot in the bundle.
        among: the place of its slot among all slots of the optimizer.
        region: the rows.
        w: W of them.
        shown: W̃ of them.
        offset: where they begin in the parameter's memory, in bytes.
    """

    place: int
    among: int
    region: Region
    w: Tensor
    shown: Tensor
    offset: int

    @property
    def kind(self) -> Kind:
        """What decides its stage."""
        return kind_of(self.region.target)


class Share:
    """The parts of a launch, all at the same stage.

    Attributes:
        kind: the kind of one of them.
        launch: the launch.
        parts: the parts, in the order of the launch.
        labels: the labels of their targets.
        out: the addresses of their W̃.
    """

    def __init__(self, kind: Kind, launch: masks.Launch, parts: list[Part]) -> None:
        self.kind, self.launch, self.parts = kind, launch, parts
        self.labels = [part.region.target.label for part in parts]
        self.out = [part.shown.data_ptr() for part in parts]
        self._by: tuple[int, list[tuple[int, list[Tensor], list[Tensor]]]] = -1, []

    def by(self, groups: Groups) -> list[tuple[int, list[Tensor], list[Tensor]]]:
        """W and W̃ of the parts of each param group, with the place of one of its slots."""
        changes, found = self._by
        if changes != groups.changes:
            some: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}
            for part in self.parts:
                group = groups.of[part.among]
                _, w, shown = some.setdefault(group, (part.among, [], []))
                w.append(part.w)
                shown.append(part.shown)
            found = list(some.values())
            self._by = groups.changes, found
        return found


@dataclass(frozen=True, eq=False)
class Plan:
    """The launches for steps of a kind, and what is left to do one by one.

    Attributes:
        shares: the launches.
        places: the places of the slots whose parts are all in the launches.
        rest: the other slots of the bundle.
    """

    shares: list[Share]
    places: list[int]
    rest: list[Slot]


class Plans:
    """The plans of one bundle.

    Args:
        bundle: the bundle.
        slots: all slots of the optimizer.
    """

    def __init__(self, bundle: Bundle, slots: Sequence[Slot]) -> None:
        self._bundle = bundle
        among = {id(slot): i for i, slot in enumerate(slots)}
        self._parts: list[list[Part]] = []
        for i, slot in enumerate(bundle.slots):
            at = bundle.shown[i].data_ptr()
            parts = [
                Part(i, among[id(slot)], region, w, out, out.data_ptr() - at)
                for region in slot.regions
                if region.count
                for w, out in [(region.of(bundle.dense[i]), region.of(bundle.shown[i]))]
            ]
            whole = bundle.dense[i].is_contiguous() and slot.covered and _waits(bundle.dense[i])
            fits = whole and all(part.w.is_contiguous() for part in parts)
            self._parts.append(parts if fits else [])
        self.kinds = list(dict.fromkeys(part.kind for parts in self._parts for part in parts))
        self._plans: dict[Any, Plan] = {}

    def of(
        self,
        stages: Mapping[Kind, Stage],
        held: bool,
        hold: bool,
        among: frozenset[int] | None = None,
    ) -> Plan:
        """The plan of a step.

        Args:
            stages: the stage of each kind of target.
            held: whether to use the masks in the state.
            hold: whether to keep the masks in the state, as for `Slot.write`.
            among: the places of the slots that take part; None is all.
        """
        own = [stages[kind] for kind in self.kinds]
        key = (held, hold, among, *(_key(s) for s in own), *(own.index(s) for s in own))
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _KEPT:
                self._plans.pop(next(iter(self._plans)))
            plan = self._plans[key] = self._make(stages, held, hold, among)
        return plan

    def _make(
        self,
        stages: Mapping[Kind, Stage],
        held: bool,
        hold: bool,
        among: frozenset[int] | None,
    ) -> Plan:
        taken: dict[int, list[Part]] = {}  # by the place of the first stage that is equal
        own = [stages[kind] for kind in self.kinds]
        places: list[int] = []
        rest: list[Slot] = []
        for i, (slot, parts) in enumerate(zip(self._bundle.slots, self._parts, strict=True)):
            if among is not None and i not in among:
                continue
            if not parts or not all(self._serves(p, stages[p.kind], held, hold) for p in parts):
                rest.append(slot)
                continue
            places.append(i)
            for part in parts:
                taken.setdefault(own.index(stages[part.kind]), []).append(part)
        shares = []
        for first, parts in taken.items():
            jobs = [self._job(part, own[first], held) for part in parts]
            for launch in masks.launches_of(jobs):
                some = [parts[i] for i in launch.members]
                shares.append(Share(self.kinds[first], launch, some))
        return Plan(shares, places, rest)

    def _serves(self, part: Part, stage: Stage, held: bool, hold: bool) -> bool:
        """Whether a launch goes from W to W̃ of a part, or to its gradient by the rule."""
        if stage.form or stage.gain != 1.0 or stage.masks[1] is not None:
            return False
        target, by_mask = part.region.target, held and stage.pattern is not None
        pattern = EVERY if by_mask or stage.pattern is None else stage.pattern
        if not masks.one_pass_serves(part.w, pattern, target.dim, part.shown, target.stacked):
            return False
        if by_mask:
            return self._mask(part).is_contiguous()
        norms = self._bundle.slots[part.place].norms
        chosen = stage.pattern is None or not (hold or target.label in norms)
        return chosen and pattern.panel == 1 and not stage.whole

    def _job(self, part: Part, stage: Stage, held: bool) -> masks.Job:
        mask = self._mask(part) if held and stage.pattern is not None else None
        return masks.Job(part.w, stage.pattern or EVERY, part.region.target.dim, mask)

    def _mask(self, part: Part) -> Tensor:
        return part.region.of(local(self._bundle.slots[part.place].tensors[KEPT_KEY]))


def _key(stage: Stage) -> tuple[Any, ...]:
    """The fields of a stage that decide on the kernels."""
    return stage.masks, bool(stage.whole), stage.gain == 1.0, stage.form


def addresses(parts: Sequence[Part], tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of parts in tensors like the parameters, one tensor for each slot of the bundle."""
    return [tensors[part.place].data_ptr() + part.offset for part in parts]


def _waits(w: Tensor) -> bool:
    """Whether one launch for each weight would cost more than the work, as on a GPU."""
    return w.device.type == "cuda"
