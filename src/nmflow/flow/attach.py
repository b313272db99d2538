"""`attach`: a recipe on an optimizer, by its hooks; the optimizer owns W, the network owns W̃."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.errors import RecipeError
from nmflow.flow import scores
from nmflow.flow.flow import Flow
from nmflow.flow.hosts import check_model, optimizers_of
from nmflow.flow.sparse_steps import Mode, check_mode
from nmflow.flow.state import Run
from nmflow.numbers import check_whole
from nmflow.recipes import DEFAULT, Recipe, resolve
from nmflow.select.plan import Names, Patterns, plan


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    recipe: str | Recipe = DEFAULT,
    pattern: Patterns = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    total_steps: int,
    remainder: str = "auto",
    mask_interval: int = 1,
    freeze_mask: bool = False,
    norms: Mapping[str, Tensor] | None = None,
    sparse_steps: Mode = "off",
) -> Flow:
    r"""Train a model's weights to N:M sparsity: one line before an unchanged training loop.

    From here on, the network computes with `W̃ = W ⊙ (m + (1 - m) ⊙ m' · δ)`, and `optimizer.step`
    steps the dense W, whose gradient is ∂L/∂W̃ under the recipe's rule. The model keeps its modules,
    parameters and state-dict keys. `optimizer.state` holds W and the step, so they are part of
    `optimizer.state_dict()`, and resuming the optimizer resumes the recipe.

    Args:
        model: the network; attach after it is moved, wrapped or sharded.
        optimizer: the optimizer that owns the weights, or several that own them together.
        recipe: a name, such as `"settling"`, the default, or a recipe, such as `MDGF(dense=0.1)`.
        pattern: N:M with N kept, or patterns by glob or preset: `{"ff": "1:16", "qk": "1:4"}`.
        include: presets, globs or both, see `plan`; if `pattern` has keys, they are included.
        exclude: presets or globs to leave out.
        total_steps: K, the optimizer steps of the whole run, including those before a resume.
        remainder: `"auto"`, `"error"` or `"skip"` an axis that M does not divide, see `plan`.
        mask_interval: take the mask from W only every so many steps, and hold it in between, at
            one byte per weight.
        freeze_mask: hold the mask through the fine-tune phase.
        norms: ‖x‖ of each input of each target, by label or parameter name, `(in,)`: masks then
            keep the largest |W|·‖x‖ of a group, not the largest |W|. A resumed run needs the same.
        sparse_steps: `"on"` computes the forward and backward pass of a layer on kept places, once
            its mask is binary and the gradient cannot bring pruned weights back; their `.grad` is
            then 0. `"auto"` does so where the first step measures it to be faster; `"off"` never.
            Results are equal within rounding. `Flow.explain` shows which layers do.

    Returns:
        The flow. The loop needs only its `finalize`, at the end.

    Raises:
        NMFlowError: a `PlanError`, `RecipeError`, `FlowError`, `StateError` or `WeightError`; the
            model and the optimizer are then as they were.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> flow = attach(model, optimizer, "mdgf-linear", "1:16", include="0.*", total_steps=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 32)).square().mean().backward()
        ...     optimizer.step()
        >>> flow.finalize()
        >>> int((model[0].weight != 0).sum())  # of 8 × 32 weights
        16

    References:
        arXiv 2402.04744. Differs from the released code: the mask is taken once per optimizer
        step instead of in every forward pass.
    """
    recipe = resolve(recipe)
    recipe.check(total_steps)
    _check_options(recipe, mask_interval, freeze_mask)
    check_mode(sparse_steps)
    check_model(model)
    optimizers = optimizers_of(optimizer)
    chosen = plan(model, pattern, include, exclude, remainder=remainder, recipe=recipe)
    found = scores.of(chosen, norms) if norms is not None else {}
    run = Run(recipe, total_steps, mask_interval, freeze_mask, norms=scores.digest(found))
    with torch.inference_mode(False):  # whose tensors no step could change
        flow = Flow(model, optimizers, chosen, run, found, sparse_steps)
        flow._start()
    return flow


def _check_options(recipe: Recipe, mask_interval: int, freeze_mask: bool) -> None:
    check_whole("mask_interval", mask_interval, RecipeError, 1, " of steps")
    if recipe.stairs and mask_interval > 1:
        raise RecipeError(
            f"mask_interval is {mask_interval}, but under stairs={recipe.stairs} the mask changes "
            "at the stairs only: leave one of them out"
        )
    if not isinstance(freeze_mask, bool):
        raise RecipeError(f"freeze_mask is {freeze_mask!r}: give True or False")
