"""`cost`: parameters, bytes, inference and training FLOPs of a network under a pattern."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nmflow.errors import RecipeError
from nmflow.inspect.flops import Passes, count, flops_of
from nmflow.inspect.training_flops import RULE, by_phase, density
from nmflow.pattern import Pattern
from nmflow.recipes import Recipe, resolve
from nmflow.select.plan import Names, Patterns, Target, plan
from nmflow.text_table import table


@dataclass(frozen=True)
class CostRow:
    """One target.

    Attributes:
        name: the parameter's name, with the rows if it is not all of them.
        pattern: its final pattern.
        weights: its weights.
        kept: weights that stay.
        dense_bytes: bytes of its weights.
        value_bytes: bytes of the kept weights.
        index_bytes: bytes of their index.
        dense_flops: inference FLOPs with every weight.
        flops: inference FLOPs with the kept weights.
    """

    name: str
    pattern: str
    weights: int
    kept: int
    dense_bytes: int
    value_bytes: int
    index_bytes: int
    dense_flops: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """What a network costs, dense and sparse; as `str`, a table.

    FLOPs are two per multiply-add, of matrix products and convolutions, for one pass over the
    example inputs.

    Attributes:
        parameters: parameters of the model, tied ones once.
        targeted: weights that a pattern covers.
        kept: the targeted weights that stay.
        dense_bytes: bytes of all parameters.
        bytes: the same, with targets as values and indices.
        index_bytes: the indices' part of `bytes`: ⌈log2 M⌉ bits per kept weight, which the rows of
            a panel share.
        dense_flops: inference FLOPs of the dense network.
        flops: inference FLOPs of the sparse network.
        other_flops: the part of both in products without a weight, such as attention's own.
        dense_step: training FLOPs of one dense step; 0 without a recipe.
        training: training FLOPs by phase, over its steps.
        steps: optimizer steps by phase.
        dense_training: training FLOPs of as many dense steps.
        rule: how training FLOPs are counted.
        rows: one row per target.
    """

    parameters: int
    targeted: int
    kept: int
    dense_bytes: int
    bytes: int
    index_bytes: int
    dense_flops: int
    flops: int
    other_flops: int
    dense_step: int = 0
    training: dict[str, int] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    dense_training: int = 0
    rule: str = RULE
    rows: tuple[CostRow, ...] = ()

    @property
    def remaining(self) -> int:
        """Parameters that stay."""
        return self.parameters - self.targeted + self.kept

    @property
    def training_flops(self) -> int:
        """Training FLOPs over every phase."""
        return sum(self.training.values())

    def to_dict(self) -> dict[str, Any]:
        """Every field and the two sums, as plain types for JSON."""
        fields = dataclasses.asdict(self)
        fields["rows"] = list(fields["rows"])
        return {**fields, "remaining": self.remaining, "training_flops": self.training_flops}

    def __str__(self) -> str:
        head = ("weight", "pattern", "weights", "kept", "bytes", "of", "FLOPs", "of")
        lines: list[Sequence[str]] = [head]
        for row in self.rows:
            stored = row.value_bytes + row.index_bytes
            lines.append((
                row.name, row.pattern, f"{row.weights:,}", f"{row.kept:,}", f"{stored:,}",
                f"{row.dense_bytes:,}", f"{row.flops:,}", f"{row.dense_flops:,}",
            ))  # fmt: skip
        text = [table(lines, right=range(2, 8)), ""] if self.rows else []
        total: list[Sequence[str]] = [("", "dense", "sparse", "ratio")]
        total.append(_compared("parameters", self.parameters, self.remaining))
        total.append(_compared("bytes", self.dense_bytes, self.bytes))
        total.append(_compared("inference FLOPs", self.dense_flops, self.flops))
        if self.training:
            for phase, flops in self.training.items():
                label = f"training FLOPs, {phase} ({self.steps[phase]:,} steps)"
                total.append(_compared(label, self.dense_step * self.steps[phase], flops))
            total.append(_compared("training FLOPs", self.dense_training, self.training_flops))
        text += [table(total, right=range(1, 4)), f"indices take {self.index_bytes:,} bytes of it"]
        text.append(f"of the inference FLOPs, {self.other_flops:,} use no weight")
        return "\n".join([*text, self.rule] if self.training else text)


def cost(
    model: nn.Module,
    example_inputs: Any,
    pattern: Patterns | None = None,
    include: Names = "all",
    exclude: Names = (),
    *,
    recipe: str | Recipe | None = None,
    total_steps: int | None = None,
) -> Cost:
    """Count what a network costs to store, to run and to train under a pattern and a recipe.

    Args:
        model: the model; it runs once on `example_inputs` (and back, if a recipe is given), in
            evaluation mode, and stays as it is.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of named ones; for
            training FLOPs the batch of one optimizer step.
        pattern: as in `plan`; None counts the dense network only.
        include: as in `plan`.
        exclude: as in `plan`.
        recipe: the recipe whose training FLOPs are summed.
        total_steps: K, the optimizer steps of the whole run.

    Returns:
        A `Cost`. Training FLOPs follow `Cost.rule`. Weights whose axis M does not divide count as
        dense. The recipe `"dense"` prunes nothing, so its network costs what the dense one does.

    Raises:
        RecipeError: `recipe` without `total_steps` or `pattern`, or the reverse.
        PlanError: a preset or a glob that takes nothing.
        DataError: example inputs of another kind, or outputs without a gradient.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> found = cost(model, torch.zeros(10, 64), "1:16", recipe="sr-ste", total_steps=100)
        >>> found.dense_flops, found.flops, found.kept
        (92160, 15360, 256)
        >>> found.training == {"sparse": 100 * (92160 + 92160 + 10240 - 76800)}
        True

    References:
        arXiv 2402.04744, section 4.4 (FLOPs); the rule for the backward pass is stated in `RULE`.
    """
    known = _checked(recipe, pattern, total_steps)
    targets = (
        [] if pattern is None else list(plan(model, pattern, include, exclude, remainder="skip"))
    )
    passes = count(model, example_inputs, backward=known is not None)
    final = known is None or known.prunes
    sizes = {name: p.element_size() for name, p in model.named_parameters()}
    parameters = sum(p.numel() for p in model.parameters())
    rows = tuple(_row(t, sizes[t.name], passes, final) for t in targets)
    dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    saved = sum(r.dense_bytes - r.value_bytes - r.index_bytes for r in rows)
    dense_flops = passes.forward_total
    found = Cost(
        parameters=parameters,
        targeted=sum(r.weights for r in rows),
        kept=sum(r.kept for r in rows),
        dense_bytes=dense_bytes,
        bytes=dense_bytes - saved,
        index_bytes=sum(r.index_bytes for r in rows),
        dense_flops=dense_flops,
        flops=dense_flops - sum(r.dense_flops - r.flops for r in rows),
        other_flops=passes.other_forward,
        rows=rows,
    )
    if known is None or total_steps is None:
        return found
    step = passes.forward_total + passes.backward_total
    training, steps = by_phase(known, total_steps, targets, passes, step)
    return dataclasses.replace(
        found, dense_step=step, training=training, steps=steps, dense_training=step * total_steps
    )


def _row(target: Target, size: int, passes: Passes, final: bool) -> CostRow:
    pattern = target.pattern if final else Pattern.of(1, 1)
    weights = target.numel
    kept = weights // pattern.m * pattern.n
    out = target.shape[target.out_dim]
    rows = out if target.rows is None else target.rows[1] - target.rows[0]
    lists = -(-rows // pattern.panel)
    bits = 0 if pattern.n == pattern.m else math.ceil(math.log2(pattern.m))
    flops = flops_of(passes.forward.get(target.name, ()), target)
    return CostRow(
        target.label,
        str(target.pattern),
        weights,
        kept,
        weights * size,
        kept * size,
        -(-kept // rows * lists * bits // 8),
        flops,
        round(flops * density(pattern)),
    )


def _checked(
    recipe: str | Recipe | None, pattern: Patterns | None, total_steps: int | None
) -> Recipe | None:
    if recipe is None:
        if total_steps is not None:
            raise RecipeError(f"total_steps is {total_steps}, but there is no recipe: name one")
        return None
    known = resolve(recipe)
    if total_steps is None or pattern is None:
        missing = "total_steps" if total_steps is None else "pattern"
        raise RecipeError(f"recipe is {known.name!r}, but {missing} is missing: give both")
    known.check(total_steps)
    return known


def _compared(label: str, dense: int, sparse: int) -> tuple[str, str, str, str]:
    return label, f"{dense:,}", f"{sparse:,}", f"{sparse / max(1, dense):.3f}"
