"""Run a network on an example, before and after its layers were packed, and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nmflow.errors import CompressError
from nmflow.packed.outputs import check_near

# Shares of an output's largest value: activations that are fused are rounded once less, and values
# of 8 bits are each off by up to half a step.
NEAR, NEAR_INT8 = 0.05, 0.2
_APART = (
    "pass fuse=False if a layer's output is read past its activation, or leave that layer out "
    "(exclude)"
)
_FEWER = (
    "leave out (exclude) the layers whose error is largest in the report of a compress without "
    "example_inputs, or pass values=None"
)


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


def check_same(before: Ran, after: Ran, rounded: bool = False) -> None:
    """Raise `CompressError` where a layer no longer runs, or the output is another one.

    Args:
        before: the run of the dense network.
        after: that of the packed one.
        rounded: whether its values have 8 bits.
    """
    lost = [name for name, count in before.calls.items() if count and not after.calls[name]]
    if lost:
        raise CompressError(
            f"{', '.join(name or 'the model' for name in lost[:5])} ran in the dense network and "
            "not in the packed one: something holds the old layers, so pass inplace=True"
        )
    near, mend = (NEAR_INT8, _FEWER) if rounded else (NEAR, _APART)
    check_near(before.output, after.output, near, "the packed network", "the dense one", mend)
