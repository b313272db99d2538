"""Adapters of PEFT on a sparse base: merged into it, and made N:M again."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from nmflow.errors import FlowError
from nmflow.oneshot import prune
from nmflow.packed.build import PACKED
from nmflow.select.plan import Names, Patterns

__all__ = ["merge"]


def merge(
    model: Any,
    pattern: Patterns = "1:16",
    include: Names = "all",
    exclude: Names = (),
    *,
    inplace: bool = False,
) -> nn.Module:
    r"""Merge the adapters of a PEFT network into its base, and make the base N:M again.

    An adapter changes every weight of its layer, `W + B·A`, so merging alone leaves a
    dense network. This keeps the N largest \|W + B·A\| of every group of M, whichever weights the
    base kept before: of all N:M networks the nearest to the merged one. It loses what the adapters
    say of the others; evaluate it, or keep base and adapters apart, which loses nothing.

    Args:
        model: a network with adapters that can be merged, such as LoRA's.
        pattern: N:M with N kept, or patterns by glob or preset, as of the base.
        include: presets, globs or both, by the names of the base without adapters.
        exclude: presets or globs to leave out.
        inplace: merge into the network that is given, instead of into a copy of it.

    Returns:
        A plain network without adapters, exactly N:M.

    Raises:
        FlowError: the network has no adapters that can be merged, or is packed.
        PlanError: as `nmflow.plan`; with `inplace` the adapters are merged then.
        WeightError: a merged weight is not finite.

    Example:
        >>> from peft import LoraConfig, get_peft_model  # doctest: +SKIP
        >>> model = get_peft_model(sparse, LoraConfig(target_modules=["fc1"]))  # doctest: +SKIP
        >>> merged = merge(model, "1:16", include="ff")  # doctest: +SKIP
    """
    if not callable(getattr(model, "merge_and_unload", None)):
        raise FlowError(
            f"model is a {type(model).__name__}, which has no adapters to merge: give a network of "
            "PEFT's get_peft_model with adapters such as LoRA's, or call nmflow.prune"
        )
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise FlowError("model is packed: merge nmflow.decompress(model), and compress the result")
    merged = (model if inplace else copy.deepcopy(model)).merge_and_unload()
    prune(merged, pattern, include, exclude)
    return merged
