"""`track`: metrics of gradients and masks at each step of a recipe."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nmflow.errors import FlowError, StateError
from nmflow.flow import Flow, View
from nmflow.inspect.noise import GradientNoise, gradient_noise
from nmflow.recipes.schedules import Stage

__all__ = ["GradientNoise", "Tracker", "gradient_noise", "track"]

ALL = "all"
"""The `target` of rows that are aggregated over every target."""

# The sums over the weights of a target, and then over targets.
_SUMS = (
    "weights", "kept", "seen", "seen_kept", "grad", "grad_kept", "square", "square_kept",
    "changed", "compared", "norm", "off", "off_hard",
)  # fmt: skip


class Tracker:
    """A running stream of metrics; made by `track`.

    Attributes:
        rows: one dictionary per step and target, and one per step over all (`"target": "all"`).
            Aggregates are over weights, so a large target counts more.

    Some columns describe the gradient g = ∂L/∂W̃ as it reaches the dense weights. Each is over all
    weights of a target, and with `_kept` or `_pruned` over those that the mask keeps or prunes:

    * `grad_mean`, `grad_var`, `grad_second`: mean, variance and second moment of g across weights;
    * `grad_norm`: ‖g‖.

    And: `step` (optimizer steps done before this one), `target`, `phase`, `pattern`, `delta`,
    `weights`, `kept`; `sad`, the entries of the mask that changed since the last observed step,
    and `flip_rate`, their share (both None at the first); `distance` ‖W − W̃‖ / ‖W‖; and
    `distance_hard` ‖W − W ⊙ m‖ / ‖W‖, for a dense network the distance to its pruned self.
    """

    def __init__(self, flow: Flow, every: int, per_target: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._per_target = per_target
        self._labels = {target.label for target in flow.plan}
        self._masks: dict[str, Tensor] = {}
        # Several optimizers report a step one after the other.
        self._open: dict[int, dict[str, tuple[Stage, list[float]]]] = {}
        self._observation = flow.observe(self._observe, every=every)

    def stop(self) -> None:
        """End the stream. `rows` stay; the masks that were held for comparison are freed."""
        self._observation.remove()
        self._masks.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue with the same rows: tensors and plain values.

        It has the rows, and the masks of the last observed step as bits, on the CPU.

        Example:
            >>> import nmflow, torch
            >>> model = torch.nn.Linear(32, 8)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> flow = nmflow.attach(model, optimizer, "sr-ste", "1:16", "*", total_steps=3)
            >>> state = track(flow).state_dict()
            >>> sorted(state), track(flow).load_state_dict(state)
            (['masks', 'rows', 'shapes'], None)
        """
        masks = {name: np.packbits(m.cpu().numpy()) for name, m in self._masks.items()}
        return {
            "rows": [dict(row) for row in self.rows],
            "masks": {name: torch.from_numpy(bits) for name, bits in masks.items()},
            "shapes": {name: list(m.shape) for name, m in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, which replaces the rows so far.

        Raises:
            StateError: it belongs to other weights, or is damaged; nothing changes then.
        """
        try:
            rows = [dict(row) for row in state["rows"]]
            masks = {
                name: _unpacked(m, state["shapes"][name]) for name, m in state["masks"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise StateError(
                f"the tracker's state cannot be read ({type(error).__name__}: {error}): give what "
                "Tracker.state_dict() returned"
            ) from error
        unknown = sorted(set(masks) - self._labels)
        if unknown:
            raise StateError(
                f"the tracker's state has a mask of '{unknown[0]}', which is not a target of this "
                "flow: track the flow of the run that is resumed"
            )
        self.rows, self._masks, self._open = rows, masks, {}

    def to_csv(self, path: str | Path) -> None:
        """Write `rows` as a CSV file with a header; None is an empty cell."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def _observe(self, step: int, views: list[View]) -> None:
        # One transfer from the device for all targets.
        sums = torch.stack([self._measure(view).cpu() for view in views]).tolist()
        seen = self._open.setdefault(step, {})
        for view, values in zip(views, sums, strict=True):
            seen[view.target.label] = (view.stage, values)
            if self._per_target:
                self.rows.append(_row(step, view.target.label, [view.stage], values))
        if set(seen) == self._labels:
            total = [sum(column) for column in zip(*(v for _, v in seen.values()), strict=True)]
            self.rows.append(_row(step, ALL, [stage for stage, _ in seen.values()], total))
            del self._open[step]

    def _measure(self, view: View) -> Tensor:
        """The sums of one target, in float64, on its device."""
        w, kept = view.weight.detach().double(), view.mask
        before = self._masks.get(view.target.label)
        if before is not None and before.shape != kept.shape:
            raise StateError(
                f"the tracker's mask of '{view.target.label}' has the shape "
                f"{tuple(before.shape)}, but the weight has {tuple(kept.shape)}: load the state "
                "of this run's tracker"
            )
        before = None if before is None else before.to(kept.device)
        self._masks[view.target.label] = kept.clone()
        zero = w.new_zeros(())
        size = w.new_tensor(float(w.numel()))
        if view.grad is None:
            gradient = (zero,) * 6
        else:
            g = view.grad.detach().double()
            k = torch.where(kept, g, zero)
            gradient = (size, kept.sum(), g.sum(), k.sum(), (g * g).sum(), (k * k).sum())
        pruned, off = torch.where(kept, zero, w), w - view.shown.double()
        flips = (zero, zero) if before is None else ((before != kept).sum(), size)
        norms = ((w * w).sum(), (off * off).sum(), (pruned * pruned).sum())
        sums = (size, kept.sum(), *gradient, *flips, *norms)
        return torch.stack([s.double() for s in sums])


def track(flow: Flow, *, every: int = 1, per_target: bool = True) -> Tracker:
    """Record gradients, masks and distances of a flow's targets before each optimizer step.

    A dense run (`attach(recipe="dense")`) has a mask too, the one that its pattern would give, so
    its rows are the baseline. In a sharded model, each rank records its own rows of each weight.
    Between steps, the tracker holds one bool per weight, the mask for `flip_rate`.

    Args:
        flow: a flow that is not finalized.
        every: record at steps 0, `every`, 2 · `every` …
        per_target: False records only the aggregate.

    Returns:
        A `Tracker`; see it for the columns.

    Raises:
        FlowError: `every` is not a whole number of at least 1.

    Example:
        >>> import nmflow, torch
        >>> model = torch.nn.Linear(32, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> flow = nmflow.attach(model, optimizer, "sr-ste", "1:16", "*", total_steps=3)
        >>> tracker = track(flow, per_target=False)
        >>> for _ in range(3):
        ...     model(torch.randn(4, 32)).square().mean().backward()
        ...     optimizer.step()
        >>> [(row["step"], row["kept"]) for row in tracker.rows]
        [(0, 16), (1, 16), (2, 16)]

    References:
        arXiv 2402.04744, section 5 (noise of gradients). SAD is the sum of absolute differences
        of two masks.
    """
    if not isinstance(flow, Flow):
        raise FlowError(f"flow is a {type(flow).__name__}: give what nmflow.attach returned")
    return Tracker(flow, every, per_target)


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    if bits.numel() != -(-count // 8):
        raise ValueError(f"{bits.numel()} bytes of bits for the shape {list(shape)}")
    flat = np.unpackbits(bits.cpu().numpy(), count=count)
    return torch.from_numpy(flat.astype(bool)).reshape(list(shape))


def _row(step: int, label: str, stages: list[Stage], values: Sequence[float]) -> dict[str, Any]:
    s = dict(zip(_SUMS, values, strict=True))
    patterns = sorted({str(stage.pattern or "dense") for stage in stages})
    row: dict[str, Any] = {
        "step": step, "target": label, "phase": stages[0].phase,
        "pattern": " ".join(patterns), "delta": max(stage.delta for stage in stages),
        "weights": int(s["weights"]), "kept": int(s["kept"]),
    }  # fmt: skip
    for suffix, n, first, second in (
        ("", s["seen"], s["grad"], s["square"]),
        ("_kept", s["seen_kept"], s["grad_kept"], s["square_kept"]),
        ("_pruned", s["seen"] - s["seen_kept"], s["grad"] - s["grad_kept"],
         s["square"] - s["square_kept"]),
    ):  # fmt: skip
        mean = first / n if n else None
        row[f"grad_mean{suffix}"] = mean
        row[f"grad_var{suffix}"] = None if mean is None else max(0.0, second / n - mean * mean)
        row[f"grad_second{suffix}"] = second / n if n else None
        row[f"grad_norm{suffix}"] = math.sqrt(max(0.0, second)) if n else None
    row["sad"] = int(s["changed"]) if s["compared"] else None
    row["flip_rate"] = s["changed"] / s["compared"] if s["compared"] else None
    row["distance"] = math.sqrt(s["off"] / s["norm"]) if s["norm"] else 0.0
    row["distance_hard"] = math.sqrt(s["off_hard"] / s["norm"]) if s["norm"] else 0.0
    return row
