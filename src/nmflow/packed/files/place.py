"""Where a weight of a file goes in a model, and why it cannot be packed there."""

from __future__ import annotations

import torch
from torch import nn

from nmflow.packed import build
from nmflow.packed.files.stored import Stored
from nmflow.select.weights import is_hf_conv1d


def why_not(module: nn.Module, own: str, stored: Stored) -> str:
    """Why a stored weight cannot be packed into a module of a model; empty if it can."""
    why = build.why_not(module, own) if "." not in own else ""
    if not why and stored.axis != (0 if is_hf_conv1d(module) else 1):
        why = f"its groups lie along axis {stored.axis}, those of {type(module).__name__} do not"
    return why or build.why_not_runs(module, stored.runs)


def alike(dtype: torch.dtype, was: torch.dtype) -> bool:
    """Whether a dtype of a file may replace a model's: floats replace floats, others themselves."""
    if was.is_floating_point or dtype.is_floating_point:
        return was.is_floating_point and dtype.is_floating_point
    return was == dtype
