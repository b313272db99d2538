"""The masks of a parameter under a recipe: made from W, or held; and the forms of kept weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nmflow import masks
from nmflow.flow.scores import Norms, scored
from nmflow.flow.sharding import Region, local
from nmflow.flow.state import FADING_KEY, SCALE_KEY
from nmflow.pattern import EVERY, Pattern
from nmflow.recipes.schedules import Stage

Stages = Mapping[str, Stage]


class SlotMasks:
    """The masks of a slot's regions.

    Attributes:
        regions: its targets' rows on this rank.
        tensors: W, the held masks, and β, by key.
        norms: the norms that masks are chosen by, by label.
        covered: whether the regions are all of the parameter on this rank.
    """

    regions: Sequence[Region]
    tensors: dict[str, Tensor]
    dense: Any  # the dense weights W, shaped and sharded like the parameter
    held_mask: Any  # the mask that is held, like them
    norms: Norms
    covered: bool

    def masks(self, region: Region, stage: Stage, held: bool) -> tuple[Tensor, Tensor | None]:
        """The masks m and m' of a region whose stage has a pattern."""
        pattern, previous = stage.masks
        assert pattern is not None
        if held:
            kept = region.of(local(self.held_mask))
            fading = region.of(local(self.tensors[FADING_KEY])) if previous else None
            return kept, fading
        w, target = region.of(local(self.dense)), region.target
        kept = self.chosen(region, w, pattern)
        if stage.whole:
            share = stage.whole
            kept |= masks.largest_groups(w, pattern, target.dim, share, target.stacked)
        fading = self.chosen(region, w, previous) if previous else None
        return kept, fading

    def chosen(self, region: Region, w: Tensor, pattern: Pattern) -> Tensor:
        """The mask of a pattern on the weights of a region."""
        target = region.target
        return masks.select(scored(w, target, self.norms), pattern, target.dim, target.stacked)[0]

    def _in_one_pass(self, region: Region, stage: Stage, w: Tensor, out: Tensor) -> bool:
        """Whether a kernel can go from W to W̃ in one pass over memory."""
        if stage.pattern is not None and region.target.label in self.norms:
            return False
        (pattern, previous), target = stage.masks, region.target
        return (
            previous is None
            and not stage.whole
            and masks.one_pass_serves(w, pattern or EVERY, target.dim, out, target.stacked)
        )

    def _in_one_pass_held(self, stages: Stages, held: bool, out: Tensor) -> bool:
        """Whether a kernel goes from W to all of W̃ by one held mask."""
        if not (held and self.covered and len(self.regions) == 1):
            return False
        stage = stages[self.regions[0].target.label]
        kept = local(self.held_mask)
        bare = not stage.form and stage.gain == 1.0
        fits = bare and stage.pattern is not None and stage.masks[1] is None
        return fits and masks.one_pass_holds(local(self.dense), kept, out)

    def hold(self, region: Region, kept: Tensor, fading: Tensor | None) -> None:
        """Put the masks of a region into the state."""
        region.of(local(self.held_mask)).copy_(kept)
        if fading is not None:
            region.of(local(self.tensors[FADING_KEY])).copy_(fading)

    def formed(self, region: Region, stage: Stage, kept: Tensor) -> Tensor:
        """The values of a region's kept weights under the form of its stage."""
        w, target = region.of(local(self.dense)), region.target
        assert stage.pattern is not None
        if stage.form == "multi-axis":
            tau = stage.tau
            return w + w * masks.importance(
                w, stage.pattern, target.dim, stacked=target.stacked, tau=tau
            )
        sparse = masks.soft_threshold(w, kept, stage.pattern, target.dim, stacked=target.stacked)
        scale = self.tensors[SCALE_KEY][self.regions.index(region)]
        # There is none yet when a dense phase shows its final masks.
        return sparse * (scale if bool(scale) else masks.least_squares(w, sparse))

    def take_scales(self, stages: Stages) -> None:
        """Compute β of each region that gets its first mask now, once and for all."""
        scales = self.tensors[SCALE_KEY]
        for i, region in enumerate(self.regions):
            stage, target = stages[region.target.label], region.target
            if stage.pattern is None or bool(scales[i]) or region.count == 0:
                continue
            w = region.of(local(self.dense))
            kept = self.masks(region, stage, False)[0]
            sparse = masks.soft_threshold(
                w, kept, stage.pattern, target.dim, stacked=target.stacked
            )
            scales[i] = masks.least_squares(w, sparse)


def project_region(region: Region, stage: Stage, w: Tensor, delta: float, **more: Any) -> Tensor:
    """The kernel by the pattern of a stage; whether `w` was finite."""
    target, pattern = region.target, stage.pattern or EVERY
    return masks.one_pass(w, pattern, target.dim, delta, stacked=target.stacked, **more)
