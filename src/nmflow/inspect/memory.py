"""`memory`: the bytes that a training run holds between two steps, counted before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from nmflow.errors import PlanError
from nmflow.flow.state import Run
from nmflow.recipes import DEFAULT, Recipe, resolve
from nmflow.select.plan import Names, Patterns, plan
from nmflow.text_table import table


@dataclass(frozen=True)
class Memory:
    """The bytes of a training run; as `str`, a table in GB (10⁹ bytes).

    Attributes:
        weights: the parameters, which hold W̃ where a recipe has them.
        gradients: of the parameters that are trained.
        state: the optimizer's own tensors of them.
        dense: W of every parameter with a target, which a recipe adds.
        masks: masks that are held between steps, a byte a weight each.
        shards: the processes that share all of it evenly.
    """

    weights: int
    gradients: int
    state: int
    dense: int
    masks: int
    shards: int = 1

    @property
    def without(self) -> int:
        """What the same run holds without a recipe."""
        return self.weights + self.gradients + self.state

    @property
    def total(self) -> int:
        """All of it."""
        return self.without + self.dense + self.masks

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
        lines: list[Sequence[str]] = [("GB", "in all", f"of {self.shards}")]
        lines += [
            (name, f"{size / 1e9:.1f}", f"{size / 1e9 / self.shards:.1f}")
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
    shards: int = 1,
) -> Memory:
    """Count the bytes that a run under a recipe holds between two steps; activations are not in it.

    Args:
        model: the network, in the dtype that it trains in; one on `meta` will do.
        pattern: as in `attach`.
        include: as in `attach`.
        exclude: as in `attach`.
        recipe: as in `attach`.
        state: the tensors that the optimizer keeps of a parameter: 2 for AdamW, 1 for SGD with
            momentum, 0 without.
        state_bytes: bytes of one value in them; those of the parameter by default.
        mask_interval: as in `attach`.
        freeze_mask: as in `attach`.
        shards: the processes that share parameters, gradients and state (FSDP2).

    Returns:
        A `Memory`.

    Raises:
        PlanError: as in `plan`; a count that is below 0 (of `shards`, below 1).

    Example:
        >>> model = nn.Linear(64, 64, bias=False)
        >>> found = memory(model, "1:16", include="*")
        >>> found.without, found.total  # 4 × 4 bytes a weight, and W
        (65536, 81920)
    """
    for name, value, least in (
        ("state", state, 0), ("state_bytes", state_bytes or 0, 0), ("shards", shards, 1)
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{name} is {value!r}: give a whole number of at least {least}")
    known = resolve(recipe)
    params = dict(model.named_parameters())
    targeted = {target.name for target in plan(model, pattern, include, exclude)}
    held = [params[name] for name in targeted] if known.prunes else []
    keys = Run(known, _LONG, mask_interval, freeze_mask).held_keys
    trained = [p for p in params.values() if p.requires_grad]
    return Memory(
        weights=sum(map(_bytes, params.values())),
        gradients=sum(map(_bytes, trained)),
        state=state * sum(p.numel() * (state_bytes or p.element_size()) for p in trained),
        dense=sum(map(_bytes, held)),
        masks=len(keys) * sum(p.numel() for p in held),
        shards=shards,
    )


_LONG = 1 << 20  # steps of a run: whether masks are held does not hang on their number


def _bytes(p: Tensor) -> int:
    return p.numel() * p.element_size()
