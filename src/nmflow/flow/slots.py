"""A slot: one parameter under a recipe, its dense weights and its place in the optimizer's state.

Between steps the parameter's memory holds the sparse weights W̃ and the optimizer's state holds the
dense ones W. For the time of a step the two change places, so that the optimizer, unchanged, steps
on W. Nothing else lives between steps, but for a mask that is held on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nmflow.flow import gradients
from nmflow.flow.sharding import Region, local
from nmflow.flow.state import DENSE_KEY, FADING_KEY, KEPT_KEY, SLOT_KEYS
from nmflow.masks import one_pass, one_pass_serves, project, select
from nmflow.pattern import Pattern
from nmflow.recipes.schedules import Stage

_SAMPLE = 16
_EVERY = Pattern("1:1")  # what a dense weight keeps

Stages = Mapping[str, Stage]


class Slot:
    """One parameter, in one optimizer, with the targets that lie in it.

    Attributes:
        name: the parameter's name in the model.
        param: the parameter.
        optimizer: the optimizer that owns it.
        regions: its targets' rows on this rank.
        pending: the slot's tensors until the optimizer has state of its own for the parameter.
            A foreign key must not be there before it: lazily built state asks whether any is, and
            Adam cannot load a state that has no step.
        stepping: whether the parameter holds the dense weights now, for the optimizer's step.
    """

    def __init__(
        self, name: str, param: Tensor, optimizer: Optimizer, regions: Sequence[Region]
    ) -> None:
        self.name, self.param, self.optimizer, self.regions = name, param, optimizer, regions
        self.pending: dict[str, Tensor] | None = None
        self.stepping = False
        self._tensors: dict[str, Tensor] = {}
        self._resting: Tensor | None = None
        self._mark: tuple[int, int, tuple[float, ...]] = (-1, 0, ())
        rows = sum(r.count for r in regions)
        self._covered = rows == local(param).shape[regions[0].target.out_dim]

    # -- where the tensors are -----------------------------------------------------------------

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The slot's tensors by key, wherever they are at the moment."""
        if self.stepping:
            return self._tensors
        return self.optimizer.state[self.param] if self.pending is None else self.pending

    @property
    def dense(self) -> Tensor:
        """The dense weights W, shaped and sharded like the parameter."""
        return self.tensors[DENSE_KEY]

    def start(self, keys: Sequence[str]) -> None:
        """Take the parameter as W, before the optimizer's first step, and make room for masks.

        Args:
            keys: the masks that the run will ever hold. They are there from the start, since a
                distributed checkpoint reads what a fresh state has, and on empty shards too.
        """
        self.pending = {DENSE_KEY: self.param.detach().clone()}
        for key in keys:
            self.pending[key] = torch.ones_like(self.param, dtype=torch.bool).detach()

    def take(self) -> None:
        """Take what the parameter holds now as W; masks that are held stay until the next write."""
        self.tensors[DENSE_KEY] = self.param.detach().clone()

    def adopt(self, pending: dict[str, Tensor] | None) -> None:
        """Take the tensors that a loaded state brought, in the parameter's own or as pending."""
        self.pending = pending
        for key in (KEPT_KEY, FADING_KEY):
            if key in self.tensors:  # an optimizer casts what it loads to the parameter's dtype
                self.tensors[key] = self.tensors[key].bool()

    def clear(self) -> None:
        """Leave the optimizer's state as it would be without the slot."""
        self.pending = None
        state = self.optimizer.state.get(self.param)
        if state is not None:
            for key in SLOT_KEYS:
                state.pop(key, None)
            if not state:
                del self.optimizer.state[self.param]

    # -- the step ------------------------------------------------------------------------------

    def enter(self) -> None:
        """Put W into the parameter, for the optimizer's step."""
        tensors = self.tensors
        self._tensors = {key: tensors.pop(key) for key in SLOT_KEYS if key in tensors}
        self.pending = None
        if self.param in self.optimizer.state and not self.optimizer.state[self.param]:
            del self.optimizer.state[self.param]
        self.stepping = True
        dense = self._tensors[DENSE_KEY]
        if isinstance(self.param, DTensor):
            local(self.param).copy_(local(dense))
        else:
            # The two trade memory instead of values: the optimizer writes W where it is, and the
            # forward pass finds W̃ at the address that it always had.
            self._resting = self.param.data
            self.param.data = dense

    def leave(self, stateless: bool) -> None:
        """Take W out of the parameter again, into the optimizer's state.

        Args:
            stateless: whether this optimizer keeps no state, so that a foreign key is no harm.
        """
        if isinstance(self.param, DTensor):
            local(self._tensors[DENSE_KEY]).copy_(local(self.param))
        else:
            assert self._resting is not None
            self.param.data, self._resting = self._resting, None
        self.stepping = False
        if stateless or self.optimizer.state.get(self.param):
            self.optimizer.state[self.param].update(self._tensors)
        else:
            self.pending = self._tensors
        self._tensors = {}

    # -- what the network sees -----------------------------------------------------------------

    def masks(self, region: Region, stage: Stage, held: bool) -> tuple[Tensor, Tensor | None]:
        """The masks m and m' of a region whose stage has a pattern."""
        kept, fading, _ = self._select(region, stage, held)
        return kept, fading

    def fade(self, region: Region, stage: Stage, held: bool, g: Tensor) -> None:
        """The masked rule on `g`, the gradient of a region whose stage has a pattern, in place."""
        w = region.of(local(self.dense))
        if not held and g.dtype == w.dtype and _in_one_pass(region, stage, w, g):
            _project(region, stage, w, stage.delta, out=g, values=g)
        else:
            gradients.masked(g, *self.masks(region, stage, held), stage.delta)

    def refine(
        self, region: Region, stage: Stage, held: bool, g: Tensor, lam: float, scale: Tensor | None
    ) -> None:
        """SR-STE's term on `g`, as `fade`; `scale` is the loss scale still in it."""
        w = region.of(local(self.dense))
        if not held and g.dtype == w.dtype and _in_one_pass(region, stage, w, g):
            pull = lam * (1.0 - stage.delta)
            _project(region, stage, w, 1.0, out=g, values=g, pull=pull, scale=scale)
        else:
            gradients.refined(g, w, region.of(local(self.param)), lam, scale)

    def write(self, stages: Stages, held: bool, hold: bool) -> list[Tensor]:
        """Write W̃ into the parameter.

        Args:
            stages: the stage of each target, by label.
            held: whether the masks are those of the state, rather than taken from W.
            hold: whether the masks are to be held in the state; False leaves what is held there.

        Returns:
            Bool scalars, on the parameter's device: whether the weights were finite.
        """
        source, sink = local(self.dense), local(self.param)
        finite = []
        if not self._covered:
            sink.copy_(source)
        for region in self.regions:
            if region.count == 0:
                continue
            stage, w, out = stages[region.target.label], region.of(source), region.of(sink)
            masked = stage.pattern is not None
            if _in_one_pass(region, stage, w, out) and not (masked and (held or hold)):
                finite.append(_project(region, stage, w, stage.delta, out=out))
            elif not masked:
                out.copy_(w)
                finite.append(torch.isfinite(w).all())
            else:
                kept, fading, fine = self._select(region, stage, held)
                out.copy_(project(w, kept, fading, stage.delta))
                finite.append(fine)
                if hold and not held:
                    self._hold(region, kept, fading)
        # The kernel's write is unknown to autograd, which must not reuse the old weight.
        torch.autograd.graph.increment_version(sink)
        self.seen()
        return finite

    def rest(self) -> None:
        """Show W itself: what is left to do when W is not finite and has no mask."""
        local(self.param).copy_(local(self.dense))
        self.seen()

    def seen(self) -> None:
        """Remember the parameter as it is, so that a write by somebody else is noticed."""
        self._mark = self._marks()

    def untouched(self) -> bool:
        """Whether nobody has written the parameter since it was last seen.

        Three marks tell: torch's version of it, its address (`p.data = x` changes that alone), and
        on a CPU a sample of its values (`p.data.copy_(x)` changes neither).
        """
        return self._mark == self._marks()

    def _marks(self) -> tuple[int, int, tuple[float, ...]]:
        shown = local(self.param)
        sample: tuple[float, ...] = ()
        if shown.device.type == "cpu" and (count := min(shown.numel(), _SAMPLE)):
            stride = shown.numel() // count
            spread = shown.as_strided((count,), (stride,)) if _is_dense(shown) else shown.flatten()
            sample = tuple(spread[:count].nan_to_num().tolist())  # NaN is unequal to itself
        return shown._version, shown.data_ptr(), sample

    def shows(self, stages: Stages, held: bool) -> bool:
        """Whether the parameter still holds W̃, bit for bit, whoever wrote it."""
        source, sink = local(self.dense), local(self.param)
        if (source.dtype, source.device) != (sink.dtype, sink.device):
            return False
        expected = source.clone()
        for region in self.regions:
            stage = stages[region.target.label]
            if region.count and stage.pattern is not None:
                kept, fading, _ = self._select(region, stage, held)
                part = project(region.of(source), kept, fading, stage.delta)
                region.of(expected).copy_(part)
        return torch.equal(expected, sink)

    # -- masks ---------------------------------------------------------------------------------

    def _select(self, region: Region, stage: Stage, held: bool):
        """m, m' and whether W is finite, for a stage that has a pattern."""
        pattern, previous = stage.masks
        assert pattern is not None
        if held:
            tensors = self.tensors
            kept = region.of(local(tensors[KEPT_KEY]))
            fading = region.of(local(tensors[FADING_KEY])) if previous else None
            return kept, fading, torch.ones((), dtype=torch.bool, device=kept.device)
        w, target = region.of(local(self.dense)), region.target
        kept, finite = select(w, pattern, target.dim, target.stacked)
        fading = select(w, previous, target.dim, target.stacked)[0] if previous else None
        return kept, fading, finite

    def _hold(self, region: Region, kept: Tensor, fading: Tensor | None) -> None:
        region.of(local(self.tensors[KEPT_KEY])).copy_(kept)
        if fading is not None:
            region.of(local(self.tensors[FADING_KEY])).copy_(fading)


def _is_dense(x: Tensor) -> bool:
    """Whether the values of `x` fill its memory without gaps, in whatever order."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _project(region: Region, stage: Stage, w: Tensor, delta: float, **more: Any) -> Tensor:
    """The kernel by the pattern of a stage; whether `w` was finite."""
    target = region.target
    pattern = stage.pattern or _EVERY
    return one_pass(w, pattern, target.dim, delta, stacked=target.stacked, **more)


def _in_one_pass(region: Region, stage: Stage, w: Tensor, out: Tensor) -> bool:
    """Whether a kernel can go from W to W̃ in one pass over memory."""
    (pattern, previous), target = stage.masks, region.target
    return previous is None and one_pass_serves(
        w, pattern or _EVERY, target.dim, out, target.stacked
    )
