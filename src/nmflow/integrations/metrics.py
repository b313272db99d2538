"""Figures of a flow for trackers of experiments: numbers that any of them takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nmflow.flow import Flow, View
from nmflow.pattern import EVERY, Pattern

__all__ = ["PHASES", "Metrics", "figures"]

PHASES = ("dense", "decay", "sparse", "finetune", "final")
"""The phases in their order; the number of one is its place here."""


class Metrics:
    """δ, pattern, density, phase, flip rate and noise of a run, to log beside its loss.

    The callbacks of `Trainer` and Lightning log them by themselves. In your own loop, such as one
    with Accelerate, call an object of this class at each entry of the log. It returns

    * `nmflow_delta`: δ;
    * `nmflow_density`: the share of the targets' weights that the masks keep;
    * `nmflow_pattern_n`, `nmflow_pattern_m`: N and M of the sparsest mask; 1 and 1 while all is
      dense;
    * `nmflow_phase_number`: the place of the phase in dense, decay, sparse, finetune, final;
    * `nmflow_flip_rate`: the share of the masks' entries that changed between the last two of the
      steps 0, `every`, 2 · `every` …, from the second on;
    * `nmflow_noise_kept`, `nmflow_noise_pruned`: the variance of ∂L/∂W̃ over the kept and over the
      pruned weights, at the last of those steps.

    Between two of those steps it holds one byte a weight, the masks. Under a sharded model each
    process reports its own part.

    Args:
        flow: a flow that is not finalized.
        every: the steps between two that are compared; that of the log, as a rule.

    Raises:
        FlowError: `every` is not a whole number of at least 1.

    Example:
        >>> import nmflow
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> flow = nmflow.attach(model, optimizer, pattern="1:4", include="*", total_steps=9)
        >>> metrics = Metrics(flow)
        >>> sorted(metrics())[:3]  # accelerator.log({"loss": loss, **metrics()}, step=step)
        ['nmflow_delta', 'nmflow_density', 'nmflow_pattern_m']
    """

    def __init__(self, flow: Flow, *, every: int = 1) -> None:
        self._flow = flow
        self._masks: dict[str, Tensor] = {}
        self._seen: dict[str, float] = {}
        self._step, self._total = -1, torch.zeros(8, dtype=_SUM)
        flow.observe(self._observe, every=every)

    def __call__(self) -> dict[str, float]:
        """The figures now: plain numbers, by name."""
        return {**_numbers(figures(self._flow)), **self._seen}

    def _observe(self, step: int, views: list[View]) -> None:
        if step != self._step:  # several optimizers report a step one after the other
            self._step, self._total = step, torch.zeros(8, dtype=_SUM)
        self._total += torch.stack([self._sums(view) for view in views]).sum(0).cpu()
        changed, compared, *parts = self._total.tolist()
        if compared:
            self._seen["nmflow_flip_rate"] = changed / compared
        for part, (count, first, second) in (("kept", parts[:3]), ("pruned", parts[3:])):
            if count:
                mean = first / count
                self._seen[f"nmflow_noise_{part}"] = max(0.0, second / count - mean * mean)
        self._masks.update((view.target.label, view.mask.clone()) for view in views)

    def _sums(self, view: View) -> Tensor:
        """Of one target: entries that changed and that were compared; n, Σg, Σg², kept and not."""
        kept, before = view.mask, self._masks.get(view.target.label)
        size = torch.tensor(float(kept.numel()), dtype=_SUM, device=kept.device)
        zero = torch.zeros_like(size)
        flips = (zero, zero) if before is None else ((kept != before).sum().to(_SUM), size)
        if view.grad is None:
            return torch.stack([*flips, *(zero,) * 6])
        g = view.grad.detach()
        part = torch.where(kept, g, 0)
        count = kept.sum().to(_SUM)
        whole, inside = ((x.sum(dtype=_SUM), _squares(x)) for x in (g, part))
        outside = (size - count, whole[0] - inside[0], whole[1] - inside[1])
        return torch.stack([*flips, count, *inside, *outside])


_SUM = torch.float64


def _squares(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide).to(_SUM).square()


def figures(flow: Flow) -> dict[str, Any]:
    """δ, the density of the targets' masks, the sparsest of their patterns, and the phase, now."""
    stage = flow.stage
    kept = total = 0.0
    sparsest = None
    for target in flow.plan:
        pattern = stage.patterns[target.label]
        kept += target.numel * stage.targets[target.label].kept
        total += target.numel
        if pattern and (sparsest is None or pattern.density < sparsest.density):
            sparsest = pattern
    return {
        "nmflow_delta": stage.delta,
        "nmflow_density": kept / total,
        "nmflow_phase": stage.phase,
        "nmflow_pattern": str(sparsest or "dense"),
    }


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """Figures with numbers for words, since few trackers take text."""
    text, phase = found.pop("nmflow_pattern"), found.pop("nmflow_phase")
    pattern = EVERY if text == "dense" else Pattern(text)
    found |= {"nmflow_pattern_n": pattern.n, "nmflow_pattern_m": pattern.m}
    return {**found, "nmflow_phase_number": PHASES.index(phase)}
