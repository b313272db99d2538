"""Cut a narrower dense network out of a trained one, as the rival of a sparse one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nmflow.errors import ConfigError
from nmflow.permute.blocks import Axis, HiddenBlock, find_blocks
from nmflow.select.plan import plan

KEY = "model.keep_units"
_FIELDS = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim",
           "decoder_ffn_dim")  # fmt: skip


@torch.no_grad()
def keep_units(model: Any, units: int) -> None:
    r"""Keep the hidden units of largest norm in each feed-forward block, in place.

    Unit i scores `Σ W₁[i, :]² + Σ W₂[:, i]²`, over all matrices that write it and the one that
    reads it. Other units are removed with their biases; those that stay keep their order. The
    network's config gets the new width.

    Args:
        model: a network of transformers.
        units: the number of units that each block keeps.

    Raises:
        ConfigError: there is no feed-forward block, a block has no more units than that, or the
            config does not hold the width. The network is then as it was.
    """
    blocks, left_out = find_blocks(model, plan(model, "1:1", "ff"))
    if not blocks or left_out:
        why = f": {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
        raise ConfigError(f"{KEY} is {units}: not every feed-forward weight lies in a block{why}")
    widths = {block.units for block in blocks}
    if units >= min(widths):
        raise ConfigError(f"{KEY} is {units}, and a block has {min(widths)}: keep fewer")
    said = [f for f in _FIELDS if getattr(model.config, f, None) in widths]
    if not said:
        raise ConfigError(
            f"{KEY} is {units}: the config of {type(model).__name__} does not say the width of "
            "its feed-forward blocks, so a narrower one could not be saved"
        )
    for block in blocks:
        kept = _score(block).topk(units).indices.sort().values
        for axis in block.axes:
            _cut(model, axis, kept, block.units)
    for name in said:
        setattr(model.config, name, units)


def _score(block: HiddenBlock) -> Tensor:
    """The squared norm of each unit's weights."""
    total = torch.zeros(block.units, dtype=torch.float64)
    for axis in block.axes:
        if axis.param.ndim == 2:
            along = axis.param.detach().double().square().sum(1 - axis.dim)
            total += along.view(axis.times, block.units).sum(0).cpu()
    return total


def _cut(model: nn.Module, axis: Axis, kept: Tensor, units: int) -> None:
    index = torch.cat([kept + i * units for i in range(axis.times)]).to(axis.param.device)
    home, _, own = axis.name.rpartition(".")
    module: Any = model.get_submodule(home)
    smaller = axis.param.detach().index_select(axis.dim, index)
    setattr(module, own, nn.Parameter(smaller, requires_grad=axis.param.requires_grad))
    if own != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = smaller.shape
    elif hasattr(module, "nf"):  # transformers' Conv1D
        module.nx, module.nf = smaller.shape
