"""`memory`: the bytes that a training run holds between two steps, counted before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nmflow.errors import PlanError
from nmflow.flow.sparse_steps import Mode, check_mode, why_recipe_whole
from nmflow.flow.state import Run
from nmflow.numbers import check_whole
from nmflow.recipes import DEFAULT, Recipe, resolve
from nmflow.select.modules import check_model
from nmflow.select.plan import Names, Patterns, plan
from nmflow.select.target import by_name
from nmflow.text_table import table


@dataclass(frozen=True)
class Memory:
    """The bytes of a training run; as `str`, a table in GB (10⁹ bytes), or in MB or kB.

    Attributes:
        weights: the parameters, which hold W̃ if they are targets.
        gradients: the gradients of the parameters that are trained.
        state: the optimizer's own tensors for them.
        dense: W of every parameter with a target, which a recipe adds.
        masks: masks that are held between steps, a byte per weight each.
        shards: the processes over which everything is split evenly.
        kept: the bytes of state, dense weights and masks while the mask is frozen and the optimizer
            steps only kept values; None if it never does.
    """

    weights: int
    gradients: int
    state: int
    dense: int
    masks: int
    shards: int = 1
    kept: int | None = None

    @property
    def without(self) -> int:
        """The bytes of the same run without a recipe."""
        return self.weights + self.gradients + self.state

    @property
    def total(self) -> int:
        """All of it."""
        return self.without + self.dense + self.masks

    @property
    def frozen(self) -> int:
        """All of it in a frozen phase; `total` if that changes nothing."""
        return self.total if self.kept is None else self.weights + self.gradients + self.kept

    def __str__(self) -> str:
        parts = {
            "weights W̃": self.weights,
            "gradients": self.gradients,
            "optimizer's state": self.state,
            "without a recipe": self.without,
            "dense weights W": self.dense,
            "held masks": self.masks,
            "under a recipe": self.total,
        }
        if self.kept is not None:
            parts["while its mask is frozen"] = self.frozen
        units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
        unit = next((name for name, one in units.items() if self.total >= one), "kB")
        one = units[unit]
        lines: list[Sequence[str]] = [(unit, "in all", f"of {self.shards}")]
        lines += [
            (name, f"{size / one:.1f}", f"{size / one / self.shards:.1f}")
            for name, size in parts.items()
        ]
        return table(lines, right=range(1, 3))


def memory(
    model: nn.Module,
    pattern: Patterns = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    recipe: str | Recipe = DEFAULT,
    state: int = 2,
    state_bytes: int | None = None,
    mask_interval: int = 1,
    freeze_mask: bool = False,
    sparse_steps: Mode = "off",
    shards: int = 1,
) -> Memory:
    """Count the bytes that a run under a recipe holds between two steps, without activations.

    Args:
        model: the network, in the dtype that it trains in; it may be on `meta`.
        pattern: as in `attach`.
        include: as in `attach`.
        exclude: as in `attach`.
        recipe: as in `attach`.
        state: the tensors that the optimizer keeps for a parameter: 2 for AdamW, 1 for SGD with
            momentum, 0 for SGD without.
        state_bytes: bytes of one value in them; those of the parameter by default.
        mask_interval: as in `attach`.
        freeze_mask: as in `attach`.
        sparse_steps: as in `attach`. In a frozen phase on a CPU, an elementwise optimizer of torch
            then holds only kept values.
        shards: the processes that share parameters, gradients and state (FSDP2).

    Returns:
        A `Memory`.

    Raises:
        PlanError: as in `plan`; a count that is below 0 (of `shards`, below 1).
        RecipeError: `sparse_steps` is none of its values.

    Example:
        >>> model = nn.Linear(64, 64, bias=False)
        >>> found = memory(model, "1:16", include="*")
        >>> found.without, found.total  # 4 × 4 bytes a weight, and W
        (65536, 81920)
        >>> frozen = {"recipe": "one-shot", "sparse_steps": "on"}
        >>> memory(model, "1:16", include="*", **frozen).frozen  # 8 bytes a weight, and .875
        36872
    """
    check_model(model, PlanError)
    check_mode(sparse_steps)
    for name, value, least in (
        ("state", state, 0), ("state_bytes", state_bytes or 0, 0), ("shards", shards, 1)
    ):  # fmt: skip
        check_whole(name, value, PlanError, least)
    known = resolve(recipe)
    params = dict(model.named_parameters())
    targets = list(plan(model, pattern, include, exclude))
    held = {t.name: params[t.name] for t in targets} if known.prunes else {}
    run = Run(known, _LONG, mask_interval, freeze_mask)
    trained = [p for p in params.values() if p.requires_grad]
    of_state = {p: state * (state_bytes or p.element_size()) for p in trained}  # bytes a weight
    whole = sum(p.numel() * size for p, size in of_state.items())
    kept = None
    if sparse_steps != "off" and run.frozen_since() is not None and not why_recipe_whole(known):
        others = (len(run.held_keys) - 1) * sum(p.numel() for p in held.values())
        kept = whole + others + sum(_bits(p) for p in held.values())
        for name, own in by_name(targets).items():
            p = held[name]
            count = p.numel() - sum(t.numel - t.numel // t.pattern.m * t.pattern.n for t in own)
            kept += count * (p.element_size() + of_state.get(p, 0)) - p.numel() * of_state.get(p, 0)
    return Memory(
        weights=sum(map(_bytes, params.values())),
        gradients=sum(map(_bytes, trained)),
        state=whole,
        dense=sum(map(_bytes, held.values())),
        masks=len(run.held_keys) * sum(p.numel() for p in held.values()),
        shards=shards,
        kept=kept,
    )


_LONG = 1 << 20  # steps of a run: their number does not decide whether masks are held


def _bytes(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _bits(p: Tensor) -> int:
    """Bytes of a mask as bits, with the offsets of its rows."""
    rows = p.shape[0] if p.ndim else 1
    return rows * (-(-p.numel() // max(rows, 1) // 64) * 8) + 8 * (rows + 1)
