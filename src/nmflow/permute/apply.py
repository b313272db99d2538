"""`permute_hidden`: reorder the hidden units of feed-forward blocks, and check the outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmflow.errors import FlowError, PlanError
from nmflow.flow.flow import Flow
from nmflow.flow.hosts import optimizers_of
from nmflow.flow.owners import is_owned
from nmflow.flow.sharding import sharded
from nmflow.permute.blocks import Axis, HiddenBlock, find_blocks, permute_, reorder_
from nmflow.permute.orders import kept_share, order_for_groups, order_for_panels
from nmflow.permute.same import moved, outputs_and_tolerance, outputs_of, same
from nmflow.select.plan import Names, Patterns, plan
from nmflow.select.target import Target
from nmflow.text_table import table


@dataclass(frozen=True)
class PermutedBlock:
    """One block whose hidden units were reordered.

    Attributes:
        name: its part of the network.
        units: the number of its hidden units.
        order: unit `order[i]` moved to place i.
        up: the share of Σ|W| that the masks of the matrices into the units keep, before and after.
        down: the same for the matrix out of them.
    """

    name: str
    units: int
    order: Tensor
    up: tuple[float, float]
    down: tuple[float, float]


class Permuted(list[PermutedBlock]):
    """The blocks that were permuted; as `str`, a table that also says what was left out.

    Attributes:
        left_out: (name, reason) of each that was not.
    """

    def __init__(
        self, blocks: Iterable[PermutedBlock] = (), left_out: Iterable[tuple[str, str]] = ()
    ) -> None:
        super().__init__(blocks)
        self.left_out = list(left_out)

    def __str__(self) -> str:
        head = ("block", "units", "kept into them", "kept out of them")
        rows = [(b.name, str(b.units), _share(b.up), _share(b.down)) for b in self]
        lines = [table([head, *rows])]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out]
        return "\n".join(lines)


@torch.no_grad()
def permute_hidden(
    model: nn.Module,
    example_inputs: Any,
    pattern: Patterns,
    include: Names = "ff",
    exclude: Names = (),
    *,
    optimizer: Optimizer | Sequence[Optimizer] = (),
    flow: Flow | None = None,
    rounds: int = 40,
    seed: int = 0,
) -> Permuted:
    r"""Reorder the hidden units of feed-forward blocks, so that N:M masks keep more of the weights.

    The units between two matrices may stand in any order: with a permutation P,
    `W₂·act(W₁·x + b₁) = (W₂·Pᵀ)·act(P·W₁·x + P·b₁)`. The order decides which inputs of W₂ share a
    group of M and, with panels, which rows of W₁ share their kept columns. Call it once, before
    training or in the dense phase of a run; it works in place. Gate and up projections move
    together.

    The network runs on `example_inputs` twice for each block: with a wrong order, and with the new
    one. A block is left out if the new order changes the outputs, as with a norm over its hidden
    units, or if a wrong one does not, as of an expert that no token reaches.

    Args:
        model: the network. It runs in evaluation mode, and its own mode is restored.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of named
            ones.
        pattern: as for `attach`: the patterns that the order is for.
        include: presets or globs of the weights, see `plan`.
        exclude: presets or globs to leave out.
        optimizer: the optimizers of a run that has begun; their states are permuted too.
        flow: the flow on the model, in its dense phase. You need not pass its optimizers.
        rounds: rounds of improvement, see `orders.order_for_groups`.
        seed: the seed of the search.

    Returns:
        The blocks, with the share of Σ|W| that a magnitude mask keeps, before and after.

    Raises:
        PlanError: there is no such block, or the outputs hold no tensor to check.
        FlowError: a weight is under a flow that was not given or is past its dense phase, is
            sharded, or has an optimizer state of another shape. Nothing is changed then, nor if
            the network itself raises.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> x = torch.randn(4, 8)
        >>> before = mlp(x)
        >>> done = permute_hidden(mlp, x, "1:4", include="*")
        >>> torch.allclose(mlp(x), before, atol=1e-5), done[0].down[1] >= done[0].down[0]
        (True, True)

    References:
        Pool and Yu, NeurIPS 2021, for groups of inputs; panels are nmflow's.
    """
    chosen = plan(model, pattern, include, exclude)
    blocks, left_out = find_blocks(model, chosen)
    if not blocks:
        said = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        raise PlanError(f"include is {include!r}: it contains no feed-forward block ({said})")
    optimizers = [] if optimizer == () else optimizers_of(optimizer)
    if flow is not None:
        optimizers += [s.optimizer for s in flow._steppers]
        if any(pattern is not None for pattern in flow.stage.patterns.values()):
            raise FlowError(
                f"flow is at step {flow.steps_done}, past its dense phase: its masks are of the "
                "old order, so permute before the first mask"
            )
    states = [_states(block, optimizers, flow) for block in blocks]
    with flow.dense() if flow is not None else contextlib.nullcontext():
        pairs = list(zip(blocks, states, strict=True))
        return _checked(model, example_inputs, pairs, left_out, rounds, seed)


def _checked(
    model: nn.Module,
    example_inputs: Any,
    blocks: list[tuple[HiddenBlock, list[tuple[Axis, Tensor]]]],
    left_out: list[tuple[str, str]],
    rounds: int,
    seed: int,
) -> Permuted:
    """Permute block after block, those that leave the outputs as they were; an error undoes all."""
    done = Permuted(left_out=left_out)
    taken: list[tuple[HiddenBlock, Tensor, list[tuple[Axis, Tensor]]]] = []
    before, near = outputs_and_tolerance(model, [block for block, _ in blocks], example_inputs)
    try:
        for block, state in blocks:
            order, shares = _order(block, rounds, seed), _shares(block)
            before, fault = _fault(model, example_inputs, before, near, block, order)
            if fault:
                done.left_out.append((block.name, fault))
                continue
            permute_(block.axes, order)
            taken.append((block, order, state))
            kept = zip(shares, _shares(block), strict=True)
            done.append(PermutedBlock(block.name, block.units, order, *kept))
    except BaseException:
        for block, order, _ in taken:
            permute_(block.axes, order.argsort())
        raise
    for _, order, state in taken:
        for axis, tensor in state:
            reorder_(tensor, axis, order)
    return done


def _fault(
    model: nn.Module,
    example_inputs: Any,
    before: list[Tensor],
    near: float,
    block: HiddenBlock,
    order: Tensor,
) -> tuple[list[Tensor], str]:
    """The outputs after a new order of a block, and why it may not have it; empty if it may.

    The matrix that reads the units gets the order alone at first: that is how far the outputs
    move if an order is wrong. Rounding moves them less, whatever the dtype.
    """
    if torch.equal(order, torch.arange(len(order))):
        return before, ""
    with _reordered(block.axes[:1], order):
        wrong = moved(before, outputs_of(model, example_inputs))
    if wrong == 0:
        return before, "its units do not reach the outputs, so that no order can be checked"
    with _reordered(block.axes, order):
        after = outputs_of(model, example_inputs)
    if same(before, after, near) and moved(before, after) < wrong / 2:
        return after, ""
    return before, "another order of its units changes the outputs"


@contextlib.contextmanager
def _reordered(axes: Sequence[Axis], order: Tensor) -> Iterator[None]:
    permute_(axes, order)
    try:
        yield
    finally:
        permute_(axes, order.argsort())


def _order(block: HiddenBlock, rounds: int, seed: int) -> Tensor:
    """The order of a block's units: panels of the first matrices, then groups of the second."""
    units, pattern = block.units, block.down.pattern
    wide = max((t.pattern for t in block.ups), key=lambda p: p.panel)
    down = _matrix(block, block.down)
    if wide.panel == 1:
        return order_for_groups(down, pattern, rounds=rounds, seed=seed)
    alike = [t for t in block.ups if t.pattern == wide]
    order = order_for_panels(torch.cat([m for t in alike for m in _halves(block, t)], 1), wide)
    order = order.to(down.device)
    # Inside a panel, units may trade places to improve the groups of the second matrix.
    if wide.panel % (2 * pattern.m) == 0 and units % wide.panel == 0:
        inner = order_for_groups(
            down[:, order], pattern, rounds=rounds, seed=seed, within=wide.panel
        )
        order = order[inner.to(order.device)]
    return order.cpu()


def _shares(block: HiddenBlock) -> tuple[float, float]:
    """The shares that masks keep: of the matrices into the units on average, and of the one out."""
    ups = [kept_share(_matrix(block, t), t.pattern) for t in block.ups]
    return sum(ups) / len(ups), kept_share(_matrix(block, block.down), block.down.pattern)


def _matrix(block: HiddenBlock, target: Target) -> Tensor:
    """A target's weight as `(out, in)`."""
    weight = next(axis.param for axis in block.axes if axis.name == target.name).detach()
    return weight if target.dim else weight.T


def _halves(block: HiddenBlock, target: Target) -> Sequence[Tensor]:
    """The matrices of a target that write all units; a fused gate and up projection has two."""
    return _matrix(block, target).split(block.units)


def _states(
    block: HiddenBlock, optimizers: Sequence[Optimizer], flow: Flow | None
) -> list[tuple[Axis, Tensor]]:
    """The optimizer states of a block's parameters, as pairs of axis and tensor."""
    found = []
    for axis in block.axes:
        if sharded(axis.param):
            raise FlowError(f"'{axis.name}' is sharded: permute the model before you shard it")
        if flow is None and is_owned(axis.param):
            raise FlowError(
                f"'{axis.name}' has a recipe attached: give its flow, as in "
                "permute_hidden(..., flow=flow)"
            )
        for one in optimizers:
            for key, value in one.state.get(axis.param, {}).items():
                if not isinstance(value, Tensor) or value.numel() == 1:
                    continue
                if value.shape != axis.param.shape:
                    raise FlowError(
                        f"'{axis.name}' has a state {key!r} of shape {tuple(value.shape)} in its "
                        f"{type(one).__name__}, which nmflow does not know how to reorder: "
                        "permute before the first step"
                    )
                found.append((axis, value))
    return found


def _share(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} → {pair[1]:.3f}"
