"""`gradient_noise`: signal and noise of gradients over independent batches, at frozen weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import DataError, PlanError
from nmflow.masks import mask
from nmflow.select.modules import check_model
from nmflow.select.target import Target, rows_of
from nmflow.text_table import table


@dataclass(frozen=True)
class NoiseRow:
    """Signal and noise of the gradients of some weights.

    Attributes:
        target: the target's label, or `"all"` over every target.
        part: `"all"`, `"kept"` or `"pruned"` weights.
        weights: the number of weights.
        signal: ‖mean over batches of g‖².
        noise: Σ over weights of the variance of g over batches (unbiased).
        second: Σ over weights of the mean over batches of g².
        batches: B, the number of batches.
    """

    target: str
    part: str
    weights: int
    signal: float
    noise: float
    second: float
    batches: int

    @property
    def snr(self) -> float:
        """signal / noise; infinite without noise, NaN without either."""
        return _ratio(self.signal, self.noise)

    @property
    def snr_unbiased(self) -> float:
        """`snr` less 1 / B, the value that B batches of pure noise would show; may be below 0."""
        return self.snr - 1.0 / self.batches


@dataclass(frozen=True)
class GradientNoise:
    """Rows for each target and for all together; as `str`, a table."""

    rows: tuple[NoiseRow, ...]

    def of(self, part: str = "all", target: str = "all") -> NoiseRow:
        """The row of the `"kept"`, `"pruned"` or `"all"` weights of a target, or of all targets."""
        return next(row for row in self.rows if (row.part, row.target) == (part, target))

    def to_dict(self) -> dict[str, Any]:
        """Every row as plain types, with its ratios."""
        return {
            "rows": [
                {**asdict(row), "snr": row.snr, "snr_unbiased": row.snr_unbiased}
                for row in self.rows
            ]
        }

    def __str__(self) -> str:
        lines: list[Sequence[str]] = [
            ("weight", "part", "weights", "signal", "noise", "snr", "unbiased")
        ]
        for row in self.rows:
            lines.append((
                row.target, row.part, f"{row.weights:,}", f"{row.signal:.3e}", f"{row.noise:.3e}",
                f"{row.snr:.4f}", f"{row.snr_unbiased:.4f}",
            ))  # fmt: skip
        return f"{table(lines, right=range(2, 7))}\nover {self.rows[0].batches} batches"


def gradient_noise(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    targets: Sequence[Target],
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> GradientNoise:
    r"""Signal-to-noise of the gradients of many independent batches at frozen weights.

    `snr = ‖ḡ‖² / Σ Var(g)` with the mean and the unbiased variance of each weight's gradient over
    the batches, separately for kept and pruned weights. Unlike a second moment, it does not change
    when the gradient is scaled, so it can compare recipes. Over B batches of pure noise, its
    expectation is 1/B, which `snr_unbiased` subtracts: use 256 batches or more.

    The model does not change: no `.grad`, no weight, not its training or evaluation mode. The
    memory is two tensors per targeted weight for any number of batches (Welford's method).

    Args:
        model: the network at the weights in question.
        loss_fn: `loss_fn(model, batch)`, the mean loss of a batch, a scalar.
        batches: independent batches, at least two; read once.
        targets: the weights, such as a `Plan` or `flow.plan`.
        weights: dense weights by parameter name whose masks tell kept from pruned, such as
            `flow.dense_weights()`; the model's own by default.

    Raises:
        PlanError: no target, or one that is not in the model or in `weights`, or has no gradient
            to take.
        DataError: fewer than two batches, or a loss that is not a finite scalar.

    Example:
        >>> import nmflow
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(16, 4)
        >>> batches = torch.randn(64, 8, 16)
        >>> noise = gradient_noise(
        ...     model, lambda m, x: m(x).square().mean(), batches, nmflow.plan(model, "1:4")
        ... )
        >>> noise.of("kept").weights, noise.of("kept").snr > noise.of("pruned").snr
        (16, True)

    References:
        arXiv 2402.04744, section 5, which takes the second moment for noise.
    """
    check_model(model, PlanError)
    chosen = list(targets)
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(target.name for target in chosen))
    _check_targets(names, parameters)
    given = parameters if weights is None else weights
    for name in names:
        if name not in given:
            raise PlanError(
                f"weights has no {name}: give dense weights of all targets, or leave weights out"
            )
    mean = {n: torch.zeros_like(parameters[n], dtype=torch.float32) for n in names}
    spread = {n: torch.zeros_like(mean[n]) for n in names}
    count = 0
    for batch in batches:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
            raise DataError(
                f"loss_fn gave {loss!r} for batch {count}: it has to return one finite number as "
                "a tensor"
            )
        grads = torch.autograd.grad(loss.sum(), [parameters[n] for n in names], allow_unused=True)
        count += 1
        for name, grad in zip(names, grads, strict=True):
            # A weight that this batch did not use has a gradient of zero.
            g = torch.zeros_like(mean[name]) if grad is None else grad.float()
            off = g - mean[name]
            mean[name] += off / count
            spread[name] += off * (g - mean[name])
    if count < 2:
        raise DataError(f"batches holds {count}: a variance over batches needs at least two")
    return GradientNoise(_rows(chosen, given, mean, spread, count))


def _rows(
    targets: Sequence[Target], weights: Mapping[str, Tensor], mean: Mapping[str, Tensor],
    spread: Mapping[str, Tensor], count: int,
) -> tuple[NoiseRow, ...]:  # fmt: skip
    rows: list[NoiseRow] = []
    for target in targets:
        weight = rows_of(weights[target.name].detach(), target)
        kept = mask(weight, target.pattern, target.dim, stacked=target.stacked)
        first = rows_of(mean[target.name], target).double().square()
        noise = rows_of(spread[target.name], target).double() / (count - 1)
        second = first + noise * ((count - 1) / count)
        for part, where in (("all", None), ("kept", kept), ("pruned", ~kept)):
            signal, spread_sum, second_sum = (
                float(x.sum() if where is None else x[where].sum()) for x in (first, noise, second)
            )
            size = kept.numel() if where is None else int(where.sum())
            rows.append(NoiseRow(target.label, part, size, signal, spread_sum, second_sum, count))
    total = []
    for part in ("all", "kept", "pruned"):
        own = [row for row in rows if row.part == part]
        total.append(
            NoiseRow(
                "all", part, sum(r.weights for r in own), sum(r.signal for r in own),
                sum(r.noise for r in own), sum(r.second for r in own), count,
            )
        )  # fmt: skip
    return (*total, *rows)


def _check_targets(names: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
    if not names:
        raise PlanError("targets is empty: give the plan of the weights to measure")
    for name in names:
        if name not in parameters:
            raise PlanError(f"{name} is not a parameter of the model: give the plan of this model")
        if not parameters[name].requires_grad:
            raise PlanError(f"{name} has requires_grad False: a frozen weight has no gradient")


def _ratio(signal: float, noise: float) -> float:
    if noise > 0:
        return signal / noise
    return math.inf if signal > 0 else math.nan
