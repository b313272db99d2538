"""A slot: one parameter under a recipe, its dense weights and its place in the optimizer's state.

Between steps the parameter's memory holds the sparse weights W̃ and the optimizer's state holds the
dense ones W. During a step the two change places, so that the optimizer, unchanged, steps on W.
Nothing else is kept between steps, except a mask that is held on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from nmflow import masks
from nmflow.flow import gradients
from nmflow.flow.homes import Home
from nmflow.flow.loan import Loan
from nmflow.flow.marks import Mark, blank
from nmflow.flow.scores import Norms
from nmflow.flow.sharding import Region, bare, local, sharded
from nmflow.flow.slot_kept import SlotKept
from nmflow.flow.slot_masks import Stages, project_region
from nmflow.flow.state import DENSE_KEY, FADING_KEY, KEPT_KEY, SCALE_KEY, SLOT_KEYS
from nmflow.recipes.schedules import Stage


class Slot(SlotKept):
    """One parameter, in one optimizer, with the targets inside it.

    Attributes:
        name: the parameter's name in the model.
        param: the parameter.
        optimizer: the optimizer that owns it.
        regions: its targets' rows on this rank.
        home: its places in the model.
        tensors: W and the held masks, by key. The optimizer's state has the same ones between
            steps, so that they travel with it. Whatever happens to that state, nothing is lost.
        norms: the norms that masks are chosen by, see `attach`.
        covered: whether the regions are all of the parameter on this rank.
        stepping: whether the parameter holds the dense weights now, for the optimizer's step.
    """

    def __init__(
        self,
        name: str,
        param: Tensor,
        optimizer: Optimizer,
        regions: Sequence[Region],
        home: Home,
        norms: Norms,
    ) -> None:
        self.name, self.param, self.optimizer, self.regions = name, param, optimizer, regions
        self.home, self.norms = home, norms
        self.tensors: dict[str, Tensor] = {}
        self.stepping = False
        self._loan = Loan(name, param)
        self._mark: Mark | None = None
        self._loading: int | None = None
        rows = sum(r.count for r in regions)
        self.covered = rows == local(param).shape[regions[0].target.out_dim]

    # -- where the tensors are -----------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """W: the dense weights, or the parameter itself if the recipe does not prune."""
        return self.dense if DENSE_KEY in self.tensors else self.param

    @property
    def stored(self) -> Tensor | None:
        """What the optimizer's state has as W: ours, another after a load, or nothing.

        Nothing until the optimizer has state of its own for the parameter. No foreign key may be
        there before: optimizers that build state lazily check whether there is any, and Adam cannot
        load a state without a step.
        """
        return self.optimizer.state.get(self.param, {}).get(DENSE_KEY)

    def start(self, keys: Sequence[str]) -> None:
        """Take the parameter as W, before the optimizer's first step, and make room for masks.

        Args:
            keys: the masks that the run will ever hold. They are there from the start, since a
                distributed checkpoint reads what a fresh state has, and on empty shards too.
        """
        self.tensors = {DENSE_KEY: self.param.detach().clone()}
        for key in keys:
            if key == SCALE_KEY:
                self.tensors[key] = self.param.detach().new_zeros(len(self.regions))
                continue
            self.tensors[key] = torch.ones_like(self.param, dtype=torch.bool).detach()

    def store(self) -> None:
        """Put the slot's tensors into the optimizer's state, if such tensors were there before."""
        if self.stored is not None:
            self.optimizer.state[self.param].update(self.tensors)

    def adopt(self, loaded: Mapping[str, Tensor]) -> None:
        """Adopt the tensors of a loaded state, which are in its entry for the parameter."""
        self.places = None
        self.tensors = {key: loaded[key] for key in SLOT_KEYS if key in loaded}
        for key in (KEPT_KEY, FADING_KEY):
            if key in self.tensors:  # an optimizer casts what it loads to the parameter's dtype
                self.tensors[key] = self.tensors[key].bool()
        self.store()

    def clear(self) -> None:
        """Leave the optimizer's state as it would be without the slot."""
        state = self.optimizer.state.get(self.param)
        if state is not None:
            for key in SLOT_KEYS:
                state.pop(key, None)
            if not state:
                del self.optimizer.state[self.param]

    # -- the step ------------------------------------------------------------------------------

    def enter(self) -> None:
        """Put W into the parameter, for the optimizer's step."""
        self.clear()
        self.stepping = True
        if self.places is None:
            self._loan.give(self.dense)
        else:
            self.enter_kept(self.places)

    def leave(self, stateless: bool) -> None:
        """Take W out of the parameter again, into the optimizer's state.

        Args:
            stateless: whether this optimizer keeps no state, so that a foreign key does no harm.

        Raises:
            FlowError: the optimizer did not step the parameter, see `Loan.take_back`.
        """
        try:
            if self.places is None:
                kind = type(self.optimizer).__name__
                self.tensors[DENSE_KEY] = self._loan.take_back(self.dense, kind)
            else:
                self.leave_kept()
        finally:
            self.stepping = False
            if stateless or self.optimizer.state.get(self.param):
                self.optimizer.state[self.param].update(self.tensors)

    @property
    def settled(self) -> bool:
        """Whether a step has shown that the optimizer steps the parameter's own memory."""
        return self._loan.tried or sharded(self.param)

    def lent(self, shown: Tensor) -> None:
        """W is in the parameter, and W̃ of it in a tensor: `leave` takes it from there."""
        self._loan.given(shown)

    # -- what the network sees -----------------------------------------------------------------

    def fade(self, region: Region, stage: Stage, held: bool, g: Tensor) -> None:
        """The masked rule on `g`, the gradient of a region whose stage has a pattern, in place."""
        w = region.of(local(self.dense))
        if not held and g.dtype == w.dtype and self._in_one_pass(region, stage, w, g):
            project_region(region, stage, w, stage.delta / stage.gain, out=g, values=g)
        else:
            gradients.masked(g, *self.masks(region, stage, held), stage.delta / stage.gain)
        if stage.gain != 1.0:
            g.mul_(stage.gain)

    def refine(
        self, region: Region, stage: Stage, held: bool, g: Tensor, lam: float, scale: Tensor | None
    ) -> None:
        """SR-STE's term on `g`, as `fade`; `scale` is the loss scale still in it."""
        w = region.of(local(self.dense))
        if not held and g.dtype == w.dtype and self._in_one_pass(region, stage, w, g):
            pull = lam * (1.0 - stage.delta)
            project_region(region, stage, w, 1.0, out=g, values=g, pull=pull, scale=scale)
        else:
            gradients.refined(g, w, self.masks(region, stage, held)[0], lam, scale)

    def write(self, stages: Stages, held: bool, hold: bool) -> list[Tensor]:
        """Write W̃ into the parameter.

        Args:
            stages: the stage of each target, by label.
            held: whether to use the masks in the state; otherwise they are made from W.
            hold: whether to keep the masks in the state; False leaves the state's masks alone.

        Returns:
            Bool scalars, on the parameter's device: whether the weights were finite.
        """
        if self.places is not None and held:
            finite, prints_of_it = self.write_kept(self.places)
            self.wrote(prints_of_it)
            return [finite]
        param = local(self.param)
        # A kernel that applies a held mask computes the fingerprint in the same pass.
        prints = blank(param) if self._in_one_pass_held(stages, held, param) else None
        finite = self.project(stages, held, hold, param, prints)
        self.wrote(None if prints is None else prints[1])
        return finite

    def wrote(self, prints: Tensor | None = None) -> None:
        """Note that W̃ is in the parameter; `prints` is its fingerprint, if already taken."""
        # The kernel's write is unknown to autograd, which must not reuse the old weight.
        torch.autograd.graph.increment_version(bare(self.param))
        self.seen(prints)

    def project(
        self,
        stages: Stages,
        held: bool,
        hold: bool,
        sink: Tensor,
        prints: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Write W̃ into a tensor shaped like this rank's part; see `write`."""
        source, finite = local(self.dense), []
        if not self.covered:
            sink.copy_(source)
        for region in self.regions:
            if region.count == 0:
                continue
            stage, w, out = stages[region.target.label], region.of(source), region.of(sink)
            masked = stage.pattern is not None
            kept_as_is = not stage.form and not (masked and (held or hold))
            if kept_as_is and self._in_one_pass(region, stage, w, out):
                finite.append(project_region(region, stage, w, stage.delta / stage.gain, out=out))
            elif not masked:
                out.copy_(w)
                finite.append(torch.isfinite(w).all())
            else:
                kept, fading = self.masks(region, stage, held)
                fades = {"fading": fading, "delta": stage.delta / stage.gain}
                finite.append(masks.hold(w, kept, out, **fades, prints=prints))
                if stage.form:
                    out.copy_(torch.where(kept, self.formed(region, stage, kept), out))
                if hold and not held:
                    self.hold(region, kept, fading)
            if stage.gain != 1.0:
                out.mul_(stage.gain)
        return finite

    def rest(self) -> None:
        """Show W itself, the only way left when W is not finite and has no mask."""
        local(self.param).copy_(local(self.dense))
        self.seen()

    # -- writes by others ----------------------------------------------------------------------

    def seen(self, prints: Tensor | None = None) -> None:
        """Remember the parameter as it is, so that a write by somebody else is noticed.

        Args:
            prints: its fingerprint, if the writer took it.
        """
        self._mark, self._loading = Mark.of(local(self.param), prints), None

    def known(self, version: int, prints: Tensor, rows: slice) -> None:
        """As `seen`, for a known version, with the fingerprint in rows of one for many tensors."""
        assert self._mark is not None
        self._mark.version, self._mark.whole, self._mark.rows = version, prints, rows
        self._loading = None

    def seen_in(self, prints: Tensor) -> bool:
        """Whether the parameter was last seen when these fingerprints of many were taken."""
        return self._mark is not None and self._mark.whole is prints

    @property
    def version(self) -> int | None:
        """Torch's version of the parameter when it was last seen."""
        return None if self._mark is None else self._mark.version

    def moved(self) -> bool:
        """Whether torch's version of the parameter or its address has changed since it was seen."""
        return self._mark is None or self._mark.moved(bare(self.param))

    def same(self) -> Tensor:
        """Whether the parameter's values are unchanged since: a bool scalar on its device."""
        assert self._mark is not None
        return self._mark.same(local(self.param))

    @property
    def prints(self) -> Tensor:
        """The fingerprint of the parameter when it was last seen."""
        assert self._mark is not None
        return self._mark.prints

    def expect_load(self) -> None:
        """A `load_state_dict` will now write the parameter whole."""
        self._loading = local(self.param)._version

    @property
    def loaded(self) -> bool:
        """Whether a `load_state_dict` wrote all of the parameter since it was seen."""
        return self._loading is not None and local(self.param)._version > self._loading
