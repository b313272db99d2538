"""Which layers compute on kept places at a step, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from nmflow.errors import CompressError, RecipeError
from nmflow.flow import kept_layers
from nmflow.flow.kept_layers import Way
from nmflow.flow.observing import Observation
from nmflow.flow.sharding import local, sharded
from nmflow.flow.slots import Slot
from nmflow.flow.state import Run
from nmflow.kernels import cpu_steps, gpu_steps
from nmflow.kernels.layout import Shape
from nmflow.recipes import Recipe
from nmflow.recipes.schedules import Stage
from nmflow.text_table import table

Mode = Literal["off", "auto", "on"]

DENSEST = 0.25
"""The largest N/M that pays: at 1:4 the products are about twice as fast as dense ones."""

ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in (
        *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
        *("RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop"),
    )
)
"""Optimizers that step each weight by its own gradient alone; subclasses might not."""


@dataclass(frozen=True)
class LayerStep:
    """How a weight's layer computes at a step.

    Attributes:
        name: the parameter's name.
        sparse: whether forward and backward run on kept places.
        why: why they do not; "" where they do.
        compact: whether the optimizer steps kept values alone.
        why_whole: why it does not; "" where it does.
    """

    name: str
    sparse: bool
    why: str
    compact: bool
    why_whole: str


@dataclass(frozen=True)
class LayerSteps:
    """How each weight's layer computes now; a table as text."""

    layers: tuple[LayerStep, ...]

    def __str__(self) -> str:
        rows = [("weight", "forward and backward", "optimizer step")]
        for x in self.layers:
            layer = "kept places" if x.sparse else f"dense: {x.why}"
            rows.append((x.name, layer, "kept values" if x.compact else f"whole: {x.why_whole}"))
        return table(rows)


def check_mode(mode: object) -> None:
    """Raise a `RecipeError` unless `sparse_steps` is one of its values."""
    if mode not in get_args(Mode):
        said = ", ".join(map(repr, get_args(Mode)))
        raise RecipeError(f"sparse_steps is {mode!r}: give one of {said}")


class SparseSteps:
    """The layers of one optimizer's weights.

    Attributes:
        mode: the `sparse_steps` of `attach`.
    """

    def __init__(
        self,
        mode: Mode,
        slots: Sequence[Slot],
        optimizer: Optimizer,
        observations: Sequence[Observation],
    ) -> None:
        self.mode: Mode = mode
        self._slots, self._optimizer, self._observations = slots, optimizer, observations
        self._why: dict[str, str] = {}
        self._whole: dict[str, str] = {}

    def show(self, run: Run, k: int) -> None:
        """Make each layer compute as step `k` allows."""
        if self.mode == "off":
            return
        targets = [r.target for s in self._slots for r in s.regions]
        stages, held = run.stages(targets, k), run.holds(k)
        observed = any(k % o.every == 0 for o in self._observations)
        for slot in self._slots:
            stage = stages[slot.regions[0].target.label]
            whole = why_whole(slot, run, self._optimizer, stages, k)
            self._whole[slot.name], slot.shrinks = whole, not whole
            why = why_dense(slot) or why_not_yet(run, self._optimizer, stage, k)
            if not why:
                others = [stages[r.target.label].masks for r in slot.regions]
                why = why_mixed(slot) if all(o == stage.masks for o in others) else _MIXED
            if not why:
                why = why_shape(slot, stage)
            if not why and observed:
                why = "an observer looks at this step's gradients, which are then of all weights"
            self._why[slot.name] = why
            for module, _ in slot.home.modules():
                if why:
                    kept_layers.unswap(module)
                else:
                    self._swap(slot, module, stage, held)

    def _swap(self, slot: Slot, module: nn.Module, stage: Stage, held: bool) -> None:
        assert stage.pattern is not None
        p = stage.pattern
        pattern = p.n, p.m, p.panel
        kept = slot.bits(kept_layers.transposed(module)) if held else None
        known = kept_layers.way_of(module)
        if known is not None and known.pattern == pattern:
            known.kept = kept
            return
        decided = None if self.mode == "auto" else True
        kept_layers.swap(module, Way(pattern, kept, decided))

    def explain(self) -> list[LayerStep]:
        """How each weight's layer computes now."""
        found = []
        for slot in self._slots:
            off = "sparse_steps is 'off'" if self.mode == "off" else ""
            why, whole = off or self._why.get(slot.name, ""), off or self._whole.get(slot.name, "")
            for module, _ in slot.home.modules():
                way = kept_layers.way_of(module)
                if way is not None and not why:
                    why = way.said
                    if way.decided is None and not way.compiled and not why:
                        why = "not measured yet: the next step in training does"
            found.append(LayerStep(slot.name, not why, why, not whole, whole))
        return found

    def stop(self) -> None:
        """Make each layer compute dense again."""
        for slot in self._slots:
            slot.shrinks = False
            for module, _ in slot.home.modules():
                kept_layers.unswap(module)


_MIXED = "its rows are several targets, with masks of their own"


def why_dense(slot: Slot) -> str:
    """Why a weight's layer is dense at every step, in one clause; or "" if it is not."""
    if sharded(slot.param):
        return "sharded: each rank has rows of it"
    if len(slot.home.names) > 1:
        return f"tied: {' and '.join(map(repr, slot.home.names))} are one weight"
    found = slot.home.modules()
    if not found:
        return "its layer is gone"
    module, own = found[0]
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return "parametrized: the network computes with a function of it"
    if not kept_layers.served(module) or own != "weight":
        return f"it is the {own} of a {type(module).__name__}, not of a Linear or Conv1D"
    if "forward" in vars(module):
        return "its layer's forward was replaced on the object"
    param = local(slot.param)
    kind = str(param.dtype).removeprefix("torch.")
    if param.device.type == "cuda":
        fits = param.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return "" if fits else f"it is {kind}: the kernels take floats of 16 and 32 bits"
    if param.dtype not in (torch.float32, torch.bfloat16):
        return f"it is {kind}: the kernels of CPUs take float32 and bfloat16"
    if param.device.type == "cpu":
        return ""
    return f"it is on {param.device}: the kernels are those of CPUs and NVIDIA GPUs"


def why_not_yet(run: Run, optimizer: Optimizer, stage: Stage, k: int) -> str:
    """Why no layer of a stage computes on kept places, by its mask and its gradient; or ""."""
    recipe = run.recipe
    if stage.pattern is None:
        return "its phase is dense"
    if not binary(stage):
        return "its mask is not binary yet: what is pruned fades"
    if masked(recipe):
        return ""
    since = run.frozen_since()
    if since is None or k < since:
        return (
            f"the gradient of {recipe.name} reaches pruned weights, which the next mask may keep: "
            "freeze_mask=True holds the mask in the fine-tune phase"
        )
    if recipe.form:
        return "the value of a kept weight depends on the pruned ones of its group"
    return why_not_elementwise(optimizer)


def why_whole(
    slot: Slot, run: Run, optimizer: Optimizer, stages: Mapping[str, Stage], k: int
) -> str:
    """Why the optimizer steps all of a weight, in one clause; or ""."""
    since, param = run.frozen_since(), local(slot.param)
    if sharded(slot.param) or param.device.type != "cpu":
        return "it is sharded" if sharded(slot.param) else f"it is on {param.device}"
    own = [stages[r.target.label] for r in slot.regions]
    if since is None or k < since or not all(map(binary, own)):
        return "its mask is not frozen"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "the optimizer is differentiable"
    return why_recipe_whole(run.recipe) or why_not_elementwise(optimizer)


def why_recipe_whole(recipe: Recipe) -> str:
    """Why no optimizer steps kept values alone under a recipe, in one clause; or ""."""
    if recipe.form or recipe.lr_scale != 1.0 or recipe.scale != 1.0:
        return f"{recipe.name} scales or changes kept weights"
    return f"{recipe.name} freezes the second moment itself" if recipe.freezes_second_moment else ""


def binary(stage: Stage) -> bool:
    """Whether W̃ is N:M."""
    return stage.pattern is not None and not (stage.delta or stage.previous or stage.whole)


def masked(recipe: Recipe) -> bool:
    """Whether a pruned weight gets no gradient under a binary mask."""
    return recipe.gradient == "masked" and not recipe.lam


def why_not_elementwise(optimizer: Optimizer) -> str:
    """Why the step of a kept weight may depend on the gradients of pruned ones; or ""."""
    if type(optimizer) in ELEMENTWISE:
        return ""
    kind = type(optimizer).__name__
    return f"{kind} is not known to step each weight by its own gradient alone"


def why_mixed(slot: Slot) -> str:
    """Why the rows of a weight are not one N:M matrix; or ""."""
    rows = sum(region.count for region in slot.regions)
    target = slot.regions[0].target
    if rows != local(slot.param).shape[target.out_dim]:
        return "some of its rows are not targets"
    panel = target.pattern.panel
    if any(region.count % panel for region in slot.regions[:-1]):
        return _MIXED
    return ""


def why_shape(slot: Slot, stage: Stage) -> str:
    """Why no kernel serves a weight's shape and pattern; or ""."""
    assert stage.pattern is not None
    p, target = stage.pattern, slot.regions[0].target
    if p.n / p.m > DENSEST:
        return f"{p} keeps more than a quarter, where dense products are as fast"
    size = local(slot.param).shape
    out, inputs = (size[1], size[0]) if target.dim == 0 else (size[0], size[1])
    try:
        shape = Shape.of(out, inputs, p)
        on_gpu = local(slot.param).device.type == "cuda"
        return gpu_steps.why_not(shape) if on_gpu else cpu_steps.why_not(shape)
    except CompressError as error:
        return str(error)
