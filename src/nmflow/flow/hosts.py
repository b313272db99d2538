"""Which models and optimizers a flow can be attached to, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from nmflow.errors import FlowError

_HOOKS = (
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)
# Wrappers that hand `step` on to the optimizer that they hold: Accelerate's and Lightning's.
_WRAPPERS = {"AcceleratedOptimizer", "LightningOptimizer"}
_REFUSED = {
    "ZeroRedundancyOptimizer": "FSDP2 (torch.distributed.fsdp.fully_shard) with a plain optimizer",
    "DeepSpeedZeroOptimizer": "FSDP2 (torch.distributed.fsdp.fully_shard) with a plain optimizer",
    "DeepSpeedZeroOptimizer_Stage3": "FSDP2 (torch.distributed.fsdp.fully_shard)",
}


def optimizers_of(optimizer: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers themselves, out of one or several, wrapped or not.

    Raises:
        FlowError: one of them cannot be hooked, or there is none.
    """
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    if not given:
        raise FlowError("optimizer is an empty list: give the optimizer that steps the weights")
    found: list[Optimizer] = []
    for one in map(_unwrap, given):
        kind = type(one).__name__
        names = {c.__name__ for c in type(one).__mro__}
        for name, instead in _REFUSED.items():
            if name in names:
                raise FlowError(
                    f"optimizer is a {kind}, which steps parts of the weights where no hook sees "
                    f"them whole: use {instead} instead"
                )
        if not isinstance(one, Optimizer) or not all(hasattr(one, h) for h in _HOOKS):
            raise FlowError(
                f"optimizer is a {kind}, which has no step hooks: give a torch.optim.Optimizer, or "
                "the one that this wraps"
            )
        if not hasattr(one, "_optimizer_step_pre_hooks"):
            raise FlowError(
                f"optimizer is a {kind} that never called Optimizer.__init__, so it has no step "
                "hooks: give the torch.optim.Optimizer that it wraps"
            )
        if isinstance(one, LBFGS):
            raise FlowError(
                "optimizer is LBFGS, which evaluates the network several times inside a step, on "
                "weights that no recipe has masked: use a first-order optimizer, such as AdamW"
            )
        found.append(one)
    return found


def check_model(model: nn.Module) -> None:
    """Raise a `FlowError` for a model whose weights are not its own parameters."""
    if not isinstance(model, nn.Module):
        raise FlowError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    for name, module in model.named_modules():
        kinds = {c.__name__ for c in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise FlowError(
                f"'{name or type(model).__name__}' is wrapped by FSDP1, whose flat parameters have "
                "no groups: use FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
        if "DeepSpeedEngine" in kinds:
            raise FlowError(
                "model is a DeepSpeedEngine, whose partitioned parameters have no groups: use "
                "FSDP2 (torch.distributed.fsdp.fully_shard) instead"
            )
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            raise FlowError(
                f"'{name}' is partitioned by DeepSpeed's ZeRO-3, so it has no groups: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard) instead"
            )


def _unwrap(optimizer: Any) -> Any:
    while type(optimizer).__name__ in _WRAPPERS and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
