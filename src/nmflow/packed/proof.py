"""Run a network on an example, before and after its layers were packed, and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmflow.errors import CompressError

# Shares of an output's largest value: activations that are fused are rounded once less, and values
# of 8 bits are each off by up to half a step.
NEAR, NEAR_INT8 = 0.05, 0.2


class Ran(NamedTuple):
    """How often the modules at some paths ran, and the output, if it can be compared."""

    calls: dict[str, int]
    output: list[Tensor]


def run_once(model: nn.Module, paths: Iterable[str], example: Any) -> Ran:
    """Run a model without gradients on a tensor, a tuple of arguments, or a mapping of them."""
    calls = dict.fromkeys(paths, 0)

    def counter(path: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            calls[path] += 1

        return count

    handles = [model.get_submodule(path).register_forward_hook(counter(path)) for path in calls]
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                output = model(**example)
            else:
                output = model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
    leaves = [] if model.training else tree_leaves(output)
    return Ran(calls, [t.double() for t in leaves if isinstance(t, Tensor) and not t.is_complex()])


def check_same(before: Ran, after: Ran, near: float = NEAR) -> None:
    """Raise `CompressError` where a layer no longer runs, or the output is another one."""
    lost = [name for name, count in before.calls.items() if count and not after.calls[name]]
    if lost:
        raise CompressError(
            f"{', '.join(name or 'the model' for name in lost[:5])} ran in the dense network and "
            "not in the packed one: something holds the old layers, so pass inplace=True"
        )
    for i, (a, b) in enumerate(zip(before.output, after.output, strict=True)):
        far = float((a - b).nan_to_num().abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or far > near * max(float(a.nan_to_num().abs().max()), 1e-6):
            raise CompressError(
                f"output {i} of the packed network differs from the dense one's by {far:.3g}: pass "
                "fuse=False if a layer's output is read past its activation, or leave that layer "
                "out (exclude)"
            )
