"""Every recipe a second time: in the forward pass, with autograd, in the plainest way.

Nothing here comes from nmflow. The dense weights are ordinary parameters of an ordinary model;
each forward replaces the targets by a function of them, of the step and of the recipe, and
autograd carries the gradient back. Masks are a stable sort in numpy; the schedules are worked out
from the definition of the recipes. It is slow, and it is what the library must equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from models import Spec
from settings import Case, MakeOptimizer

NM = tuple[int, ...]
"""N and M, and V where it is another than the final pattern's."""
Frame = tuple[NM, "NM | None", float]
"""The pattern, the pattern before it or None for all weights, and delta."""


# --- masks ------------------------------------------------------------------------------------


def parse(pattern: str) -> tuple[int, int, int]:
    body, _, panel = pattern.partition("@")
    n, m = body.split(":")
    return int(n), int(m), int(panel or 1)


def keep(
    weight: torch.Tensor, n: int, m: int, dim: int = 1, panel: int = 1, stacked: bool = False
) -> torch.Tensor:
    """The n largest |w| of every m along `dim`, ties to the lowest index, by a stable sort."""
    if stacked:
        return torch.stack([keep(one, n, m, dim - 1, panel) for one in weight])
    w = np.abs(weight.detach().to(torch.float64).cpu().numpy())
    out_axis = 0 if dim % w.ndim != 0 else 1
    moved = np.moveaxis(w, (out_axis, dim % w.ndim), (0, -1))
    kept = np.zeros(moved.shape, dtype=bool)
    for start in range(0, moved.shape[0], panel):
        score = moved[start : start + panel].sum(axis=0)
        groups = score.reshape(*score.shape[:-1], -1, m)
        order = np.argsort(-groups, axis=-1, kind="stable")[..., :n]
        chosen = np.zeros(groups.shape, dtype=bool)
        np.put_along_axis(chosen, order, True, axis=-1)
        kept[start : start + panel] = chosen.reshape(score.shape)
    kept = np.ascontiguousarray(np.moveaxis(kept, (0, -1), (out_axis, dim)))
    return torch.from_numpy(kept).to(weight.device)


def holds(
    weight: torch.Tensor, n: int, m: int, dim: int = 1, panel: int = 1, stacked: bool = False
) -> bool:
    """At most n non-zeros in every group; within a panel, at most n columns with a non-zero."""
    if stacked:
        return all(holds(one, n, m, dim - 1, panel) for one in weight)
    w = weight.detach().to(torch.float64).cpu().numpy() != 0
    out_axis = 0 if dim % w.ndim != 0 else 1
    moved = np.moveaxis(w, (out_axis, dim % w.ndim), (0, -1))
    for start in range(0, moved.shape[0], panel):
        used = moved[start : start + panel].any(axis=0)
        if used.reshape(-1, m).sum(axis=1).max() > n:
            return False
    return True


def enhanced(weight: torch.Tensor, n: int, m: int, spec: Spec, tau: float) -> torch.Tensor:
    """MaxQ's soft mask: a sigmoid above the threshold of an output row, in numpy, row by row."""
    w = np.abs(weight.detach().to(torch.float64).cpu().numpy())
    out = 3 - spec.dim if spec.stacked else (0 if spec.dim else 1)
    found = np.zeros_like(w)
    firsts = [(i,) for i in range(w.shape[0])] if spec.stacked else [()]
    views = []
    for lead in firsts:
        axis = out - len(lead)
        rows, to = (np.moveaxis(x[lead], axis, 0) for x in (w, found))
        views += [(rows[i], to[i]) for i in range(len(rows))]
    if w.ndim > 2 and not spec.stacked and math.prod(w.shape[2:]) > 1:
        views += [
            (w[(slice(None), slice(None), *at)], found[(slice(None), slice(None), *at)])
            for at in np.ndindex(*w.shape[2:])
        ]
    for row, to in views:
        flat = np.sort(row.ravel())
        pruned = len(flat) * (m - n) // m
        t = (flat[pruned - 1] + flat[pruned]) / 2
        among = np.zeros(len(flat), dtype=bool)
        among[np.argsort(-row.ravel(), kind="stable")[: len(flat) - pruned]] = True
        to += np.where(among.reshape(row.shape), 1 / (1 + np.exp(-(row - t) / tau)), 0.0)
    return torch.from_numpy(found).to(weight)


def spared(weight: torch.Tensor, share: float, m: int, spec: Spec, panel: int = 1) -> torch.Tensor:
    """The groups, or panels of them, of largest sum, as many as the share says."""
    w = weight.detach().abs()
    order = [i for i in range(w.ndim) if i != spec.dim]
    if spec.stacked:  # rows first, then which matrix
        order = [3 - spec.dim, 0]
    elif spec.dim == 0:
        order = list(range(1, w.ndim))
    moved = w.permute(*order, spec.dim)
    sums = moved.reshape(*moved.shape[:-1], -1, m).sum(-1)
    blocks = list(sums.split(panel))
    totals = torch.stack([block.sum(0) for block in blocks])
    best = totals.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(totals.numel(), dtype=torch.bool, device=w.device)
    chosen[best[: int(share * totals.numel())]] = True
    some = chosen.reshape(totals.shape).repeat_interleave(panel, 0)[: len(sums)]
    places = some.unsqueeze(-1).expand(*some.shape, m).reshape(moved.shape)
    return places.permute(*np.argsort([*order, spec.dim]).tolist())


def rows_of(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    return tensor if spec.rows is None else tensor[spec.rows[0] : spec.rows[1]]


# --- schedules --------------------------------------------------------------------------------


def ladder(structure: str, n: int, m: int, length: int, panel: int = 1) -> list[NM]:
    """The patterns of SDGF's frames."""
    if structure == "panels":  # divisors of V, each by the largest power of two that is left
        twos = [2**i for i in range(panel.bit_length()) if panel % 2**i == 0]
        widths = sorted({1, *(panel // two for two in twos)})
        return [(n, m, v) for v in widths[:-1]] + [(n, m)]
    if structure == "geometric":
        frames: list[NM] = []
        for j in (3, 2, 1, 0):
            while length % (2**j * m):
                j -= 1
            frames.append((2**j * n, 2**j * m))
        return frames
    kept = [max(n, m - 1)] if n < m else [n]
    half = 2
    while kept[-1] > n:
        kept.append(max(n, math.ceil(m / half)))
        half *= 2
    return [(value, m) for i, value in enumerate(kept) if i == 0 or value != kept[i - 1]]


def fade(decay: str, beta: float | None, j: int, span: int) -> float:
    """Delta after j steps; without beta it reaches 0 or e^-5 after `span` of them."""
    if decay == "linear":
        return max(0.0, 1.0 - (j / span if beta is None else beta * j))
    return math.exp(-(5.0 * j / span if beta is None else beta * j))


def cubic(final: Fraction, done: Fraction) -> Fraction:
    """The density of gradual pruning when a share of its steps is done."""
    return final + (1 - final) * (1 - done) ** 3


def treads(stairs: int, span: int) -> list[int]:
    """The steps of a decay phase at which stairs begin, the first step after the phase too."""
    return sorted({math.ceil(Fraction(i * span, stairs)) for i in range(stairs + 1)})


def frame_at(
    case: Case, k: int, total: int, n: int, m: int, length: int, panel: int = 1
) -> Frame | None:
    """What the network computes with after k steps; None is the dense weight."""
    options = case.kwargs
    dense = options.get("dense", 0)
    end = total - options.get("finetune", 0)
    if case.kind == "Dense" or (k < dense and k < total):
        return None
    if case.kind in ("OneShot", "STE", "SRSTE", "SSTE", "STEP", "MaxQ") or k >= end:
        return (n, m), None, 0.0
    j, span = k - dense, end - dense
    if stairs := options.get("stairs"):
        j = max(tread for tread in treads(stairs, span) if tread <= j)
    if case.kind == "Gradual":
        kept = math.ceil(m * cubic(Fraction(n, m), Fraction(j, span)))
        return (max(n, min(kept, m - 1)), m), None, 0.0
    if case.kind in ("MDGF", "Settling"):
        return (n, m), None, fade(options["decay"], options.get("beta"), j, span)
    frames = ladder(options["structure"], n, m, length, panel)
    index = j * len(frames) // span
    if case.kind == "SDGF":
        return frames[index], None, 0.0
    start, stop = (math.ceil(i * span / len(frames)) for i in (index, index + 1))
    previous = frames[index - 1] if index else None
    delta = fade(options["decay"], options.get("beta"), j - start, stop - start)
    return frames[index], previous, delta


# --- the run ----------------------------------------------------------------------------------


class _Through(torch.autograd.Function):
    """w * factor forward; g, or g * factor under the masked rule, backward."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, factor: torch.Tensor, masked: bool) -> torch.Tensor:
        ctx.factor = factor if masked else None
        return w * factor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (g,) = grads
        return (g if ctx.factor is None else g * ctx.factor), None, None


class Reference:
    """A training run of one recipe with the masks in the forward pass."""

    def __init__(
        self,
        model: nn.Module,
        make: MakeOptimizer,
        case: Case,
        targets: Mapping[str, Spec],
        pattern: str,
        total: int,
        parameters: Callable[[nn.Module], Any] = nn.Module.parameters,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = make(parameters(self.model))
        self.case, self.targets, self.total = case, targets, total
        self.n, self.m, self.panel = parse(pattern)
        self.k = 0
        self.frozen: dict[str, torch.Tensor] = {}
        self.dense_steps: dict[torch.Tensor, float] = {}
        self.held: dict[str, tuple[int, NM, torch.Tensor]] = {}
        self.betas: dict[str, float] = {}

    def _frame(self, weight: torch.Tensor, spec: Spec) -> Frame | None:
        size = weight.shape[spec.dim]
        return frame_at(self.case, self.k, self.total, self.n, self.m, size, self.panel)

    def _keep(self, name: str, weight: torch.Tensor, nm: NM, spec: Spec) -> torch.Tensor:
        n, m, panel = nm if len(nm) == 3 else (*nm, self.panel)
        return keep(self._scored(name, weight), n, m, spec.dim, panel, spec.stacked)

    def _masks(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The kept weights, and the factor of every weight, for the rows of one target."""
        spec = self.targets[name]
        weight = rows_of(self.model.get_parameter(name), spec)
        frame = self._frame(weight, spec)
        if frame is None:
            return None
        now, previous, delta = frame
        kept = self._kept(name, weight, now, spec)
        finetune = self.k >= self.total - self.case.kwargs.get("finetune", 0)
        if self.case.kind == "OneShot" or (self.case.attach.get("freeze_mask") and finetune):
            kept = self.frozen.setdefault(name, kept)
        fading = torch.ones_like(kept)
        if previous is not None:
            fading = self._keep(name, weight, previous, spec)
        factor = kept.to(weight.dtype) + (~kept & fading).to(weight.dtype) * delta
        if self.case.kind == "SSTE":
            factor = self._thresholded(name, weight, kept, spec)
        elif self.case.kind == "MaxQ":
            factor = kept * (1 + enhanced(weight, self.n, self.m, spec, self.case.kwargs["tau"]))
        if "scale" in self.case.kwargs:
            factor = torch.where(kept, factor * self._grown("scale", now, previous, delta), factor)
        return kept, factor

    def _grown(self, option: str, nm: NM, previous: NM | None, delta: float) -> float:
        """A factor that goes from 1 to what was given as the mean of the mask goes down."""
        shares = [Fraction(*x[:2]) for x in (nm, previous or (1, 1), (self.n, self.m))]
        now, before, final = map(float, shares)
        come = (1 - (now + delta * (before - now))) / (1 - final)
        return 1 + (self.case.kwargs.get(option, 1.0) - 1) * come

    def _thresholded(
        self, name: str, weight: torch.Tensor, kept: torch.Tensor, spec: Spec
    ) -> torch.Tensor:
        """S-STE as a factor: beta (|w| - t) / |w|, with beta of the first call for each weight."""
        w = weight.detach()
        size = w.abs()
        moved = torch.where(kept, torch.zeros_like(size), size).movedim(spec.dim, -1)
        groups = moved.reshape(*moved.shape[:-1], -1, self.m)
        t = groups.max(-1, keepdim=True).values.expand_as(groups).reshape(moved.shape)
        over = (size - t.movedim(-1, spec.dim)).clamp(min=0) * kept
        sparse = over * w.sign()
        beta = self.betas.setdefault(name, ((w * sparse).sum() / (sparse * sparse).sum()).item())
        if w.dtype != torch.float64:  # the state has it in the weight's dtype
            beta = self.betas[name] = float(torch.tensor(beta, dtype=w.dtype))
        return torch.where(over > 0, beta * over / size, torch.zeros_like(over))

    def _scored(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """What masks are chosen by: |w| times the norm of its input, where there are norms."""
        norms = self.case.attach.get("norms")
        return weight.detach() if norms is None else weight.detach().abs() * norms[name]

    def _kept(self, name: str, weight: torch.Tensor, nm: NM, spec: Spec) -> torch.Tensor:
        """The mask, held since the last step that `mask_interval` divides."""
        since, held, kept = self.held.get(name, (-1, (0, 0), weight))
        due = self.k % self.case.attach.get("mask_interval", 1) == 0
        if stairs := self.case.kwargs.get("stairs"):
            dense, finetune = (self.case.kwargs.get(x, 0) for x in ("dense", "finetune"))
            due = self.k - dense in treads(stairs, self.total - dense - finetune)
        if held != nm or (due and since != self.k):
            kept = self._keep(name, weight, nm, spec)
            if self.case.kind == "MaxQ":
                kept |= spared(weight, self._share(), self.m, spec, self.panel)
            self.held[name] = (self.k, nm, kept)
        return self.held[name][2]

    def _share(self) -> float:
        """The share of groups that MaxQ leaves dense now."""
        options = self.case.kwargs
        j, end = self.k - options["dense"], self.total - options["finetune"]
        if self.k >= end:
            return 0.0
        done = j / (end - options["dense"])
        return 1 - done if options["schedule"] == "linear" else math.cos(math.pi / 2 * done)

    def effective(self) -> dict[str, torch.Tensor]:
        """What the network computes with now, as differentiable functions of the dense weight."""
        whole = ("STE", "SRSTE", "SSTE", "STEP", "SDGF", "Settling", "MaxQ")
        usual = "straight-through" if self.case.kind in whole else "masked"
        masked = self.case.kwargs.get("gradient", usual) == "masked"
        weights: dict[str, torch.Tensor] = {}
        for name, spec in self.targets.items():
            dense, masks = self.model.get_parameter(name), self._masks(name)
            if masks is None:
                continue
            factor = torch.ones_like(dense)
            rows_of(factor, spec).copy_(masks[1])
            weights[name] = _Through.apply(dense, factor, masked)  # type: ignore[assignment]
        return weights

    def __call__(self, *inputs: torch.Tensor) -> Any:
        return functional_call(self.model, self.effective(), inputs)

    @torch.no_grad()
    def regularise(self) -> None:
        """SR-STE's term or the pull, once a step; under a loss scaler after `unscale_`."""
        if self.case.kind == "Settling":
            self._draw()
        if self.case.kind not in ("SRSTE", "STEP", "MaxQ") or self.k < self.case.kwargs.get(
            "dense", 0
        ):
            return
        for name, spec in self.targets.items():
            dense, masks = self.model.get_parameter(name), self._masks(name)
            if dense.grad is not None and masks is not None:
                term = self.case.kwargs["lam"] * rows_of(dense, spec) * ~masks[0]
                rows_of(dense.grad, spec).add_(term)

    @torch.no_grad()
    def _draw(self) -> None:
        """The pull of the dense weights to the sparse ones, at the learning rate of their group."""
        for name, spec in self.targets.items():
            dense, masks = self.model.get_parameter(name), self._masks(name)
            if dense.grad is None or masks is None:
                continue
            (lr,) = (
                float(group["lr"])
                for group in self.optimizer.param_groups
                if any(p is dense for p in group["params"])
            )
            w = rows_of(dense, spec)
            frame = self._frame(w, spec)
            assert frame is not None
            amount = min(1.0, lr * self.case.kwargs["pull"] * self._rate(frame))
            faded = torch.where(masks[0], w, w * frame[2])
            w.copy_((1 - amount) * w + amount * faded)

    def _rate(self, frame: Frame | None) -> float:
        return 1.0 if frame is None else self._grown("lr_scale", *frame)

    def step(self) -> None:
        self.regularise()
        before = self.dense_weights()
        frames = {n: self._frame(rows_of(before[n], s), s) for n, s in self.targets.items()}
        self._step()
        with torch.no_grad():
            for name, spec in self.targets.items() if "lr_scale" in self.case.kwargs else ():
                w, old = (rows_of(x, spec) for x in (self.model.get_parameter(name), before[name]))
                w.copy_(old + self._rate(frames[name]) * (w - old))
        self.k += 1
        for name, spec in self.targets.items() if self.case.kind == "SSTE" else ():
            weight = rows_of(self.model.get_parameter(name), spec)
            if self._frame(weight, spec) is not None:  # beta is of the step, not of what is read
                kept = keep(
                    self._scored(name, weight), self.n, self.m, spec.dim, self.panel, spec.stacked
                )
                self._thresholded(name, weight, kept, spec)

    def _step(self) -> None:
        if self.case.kind == "STEP" and self.k >= self.case.kwargs["dense"]:
            self._preconditioned_step()
        else:
            self.optimizer.step()

    @torch.no_grad()
    def _preconditioned_step(self) -> None:
        """AdamW, written out, with the second moment of the dense phase and its correction."""
        (group,) = self.optimizer.param_groups
        lr, decay, eps, (b1, b2) = (group[k] for k in ("lr", "weight_decay", "eps", "betas"))
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.optimizer.state[p]
            d = self.dense_steps.setdefault(p, float(state["step"]))
            state["step"] += 1
            t = float(state["step"])
            state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
            divisor = state["exp_avg_sq"].sqrt() / math.sqrt(1 - b2**d) + eps
            p.mul_(1 - lr * decay).sub_(lr / (1 - b1**t) * state["exp_avg"] / divisor)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter as the network computes with it."""
        now = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return now | {name: w.detach().clone() for name, w in self.effective().items()}

    def dense_weights(self) -> dict[str, torch.Tensor]:
        return {name: self.model.get_parameter(name).detach().clone() for name in self.targets}
