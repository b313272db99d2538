"""Parameters that hold several matrices at once: experts of a mixture, heads of an attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from nmflow.numbers import is_whole


class Stack(NamedTuple):
    """Along which axis the groups of a parameter run, or why that is unknown.

    Attributes:
        dim: the grouped axis.
        stacked: whether axis 0 counts matrices.
        unit: the length of one matrix, where they lie one after the other along `dim`.
        why_not: why it cannot be grouped; empty if it can.
    """

    dim: int = 1
    stacked: bool = False
    unit: int = 0
    why_not: str = ""


_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts", "moe_num_experts",
           "num_linears", "num_codebooks", "n_local_experts", "local_experts")  # fmt: skip
_HIDDEN = ("hidden_size", "hidden_dim", "d_model", "model_dim", "embed_dim", "dim", "emb_dim",
           "n_embd")  # fmt: skip
_INNER = ("intermediate_size", "intermediate_dim", "expert_dim", "moe_intermediate_size", "ffn_dim",
          "ffn_hidden_size", "d_ff", "inner_dim", "hidden_features", "ffn_size")  # fmt: skip
_READS = ("input_size", "in_features", "input_dim", "in_dim", "d_in")
_WRITES = ("output_size", "out_features", "output_dim", "out_dim", "d_out")
# InklingSharedExperts counts its shared experts separately.
_KIND = re.compile(r"experts?|moe|grouped(mlp|linear)", re.IGNORECASE)
UP = {"gate_up_proj", "up_proj", "gate_proj", "w1", "w3", "v1", "wi", "wi_0", "wi_1", "w_in", "up",
       "fc1", "mlp1", "input_linear", "w13", "mlp1_weight", "lin1", "w_gate", "w_up"}  # fmt: skip
_DOWN = {"down_proj", "w2", "wo", "w_out", "fc2", "mlp2", "output_linear", "mlp2_weight", "lin2",
         "w_down", "down"}  # fmt: skip
# Modules that multiply by einsum: {class: {parameter: the axis of its inputs}}.
_KNOWN = {
    "XLNetRelativeAttention": {"q": 0, "k": 0, "v": 0, "r": 0, "o": 2},  # (model, heads, size)
    "FunnelRelMultiheadAttention": {"r_kernel": 0},  # (model, heads, size)
}
# (matrices, out, in): Moshi's and Kyutai's codebooks, JetMoE's experts.
_OUT_IN = re.compile(r"FlexibleLinear$|ParallelExperts$")
UNTOLD = (
    "a stack of matrices of which neither its module nor its shape tells the axis of the inputs: "
    "set is_transposed on the module, True for (experts, in, out)"
)


def stack_of(
    module: nn.Module,
    own: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
) -> Stack | None:
    """The groups of parameter `own` of a module that is no plain layer; None if it is no stack.

    It is decided by, in this order: a table of known classes; the module's `is_transposed`; the
    sizes of its inputs and outputs; the shapes of a fused pair; hidden and intermediate sizes. It
    is never guessed.

    Args:
        module: the module that owns the parameter.
        own: the parameter's name in it.
        shapes: the shapes of all of its parameters.
        config: the configuration of the model around it.
    """
    kind, shape = type(module).__name__, shapes[own]
    known = next((_KNOWN[c.__name__] for c in type(module).__mro__ if c.__name__ in _KNOWN), {})
    if own in known:
        return Stack(known[own])
    if own == "weight" and _OUT_IN.search(kind):
        return Stack(2, True)
    if own.endswith("bias"):
        return None
    counted = {_number(module, name) for name in _COUNTS} - {0}
    if len(shape) == 2:
        return _flat(module, own, shape, counted)
    if len(shape) != 3 or (shape[0] not in counted and not _KIND.search(kind)):
        return None
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return Stack(1 if transposed else 2, True)
    reads, writes = _numbers(module, _READS), _numbers(module, _WRITES)
    hidden, inner = _numbers(module, _HIDDEN), _numbers(module, _INNER)
    hidden = hidden or _of_config(config, _HIDDEN)
    inner = inner or _of_config(config, _INNER)
    return axis_of(own, shapes, reads, writes, hidden, inner)


def axis_of(
    own: str,
    shapes: Mapping[str, tuple[int, ...]],
    reads: set[int] = frozenset(),  # pyright: ignore[reportArgumentType]
    writes: set[int] = frozenset(),  # pyright: ignore[reportArgumentType]
    hidden: set[int] = frozenset(),  # pyright: ignore[reportArgumentType]
    inner: set[int] = frozenset(),  # pyright: ignore[reportArgumentType]
) -> Stack:
    """The axis of a stack's inputs, from shapes and sizes alone.

    Args:
        own: the parameter's name.
        shapes: the shapes of all parameters of its module.
        reads: sizes of the module's input, by its attributes.
        writes: sizes of its output.
        hidden: hidden sizes.
        inner: intermediate sizes.
    """
    _, first, second = shapes[own]
    if (dim := _told(first, second, reads, writes)) is not None:
        return Stack(dim, True)
    up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    if own in ("gate_up_proj", "down_proj") and len(up) == len(down) == 3:
        # Gate and up lie together, so the pair fits one way only.
        as_stored = up[2] == down[1] and up[1] == 2 * down[2]
        turned = up[1] == down[2] and up[2] == 2 * down[1]
        if as_stored != turned:
            return Stack(2 if as_stored else 1, True)
    wide = inner | {2 * size for size in inner}
    if own in UP and (dim := _told(first, second, hidden, wide)) is not None:
        return Stack(dim, True)
    if own in _DOWN and (dim := _told(first, second, inner, hidden)) is not None:
        return Stack(dim, True)
    return Stack(why_not=UNTOLD)


def _told(first: int, second: int, reads: set[int], writes: set[int]) -> int | None:
    """1 or 2, the axis of the inputs, if only one of them fits."""
    if not reads and not writes:
        return None
    fits_first = (not reads or first in reads) and (not writes or second in writes)
    fits_second = (not reads or second in reads) and (not writes or first in writes)
    if fits_first == fits_second:
        return None
    return 1 if fits_first else 2


def _flat(module: nn.Module, own: str, shape: tuple[int, ...], counted: set[int]) -> Stack | None:
    """DBRX's experts: (experts · intermediate, hidden), for all three matrices."""
    inner, hidden = _numbers(module, _INNER), _numbers(module, _HIDDEN)
    if own not in UP | _DOWN or shape[1] not in hidden:
        return None
    units = {size for size in inner for count in counted if count * size == shape[0]}
    if len(units) != 1:
        return None
    (unit,) = units
    return Stack(0, unit=unit) if own in _DOWN else Stack(1)


def _number(module: nn.Module, name: str) -> int:
    value = getattr(module, name, 0)
    return value if is_whole(value) else 0


def _numbers(module: nn.Module, names: tuple[str, ...]) -> set[int]:
    return {_number(module, name) for name in names} - {0}


def _of_config(config: Mapping[str, Any], names: tuple[str, ...]) -> set[int]:
    return {config[n] for n in names if isinstance(config.get(n), int)}


def experts_of(module: nn.Module) -> int:
    """A module's number of experts; 0 if it has none."""
    says = vars(module)
    return next((says[n] for n in _COUNTS if isinstance(says.get(n), int)), 0)
