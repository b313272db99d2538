"""Train networks to N:M structured sparsity, and run them faster than dense."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nmflow.flow import Flow, attach
from nmflow.inspect.audit import audit
from nmflow.inspect.cost import cost
from nmflow.masks import holds, mask
from nmflow.pattern import Pattern
from nmflow.recipes import (
    MDGF,
    SDGF,
    SRSTE,
    STE,
    STEP,
    Dense,
    Gradual,
    Hybrid,
    OneShot,
    Recipe,
    Settling,
)
from nmflow.recipes.schedules import Stage
from nmflow.select.plan import Target, plan
from nmflow.version import __version__

if TYPE_CHECKING:
    from nmflow import kernels
    from nmflow.inspect.track import track
    from nmflow.packed import compress, decompress, load, save

__all__ = [
    "MDGF",
    "SDGF",
    "SRSTE",
    "STE",
    "STEP",
    "Dense",
    "Flow",
    "Gradual",
    "Hybrid",
    "OneShot",
    "Pattern",
    "Recipe",
    "Settling",
    "Stage",
    "Target",
    "__version__",
    "attach",
    "audit",
    "compress",
    "cost",
    "decompress",
    "holds",
    "kernels",
    "load",
    "mask",
    "plan",
    "save",
    "track",
]

# What training does not need is imported at first use.
_LATER = {
    "compress": "nmflow.packed",
    "decompress": "nmflow.packed",
    "kernels": "",
    "load": "nmflow.packed",
    "save": "nmflow.packed",
    "track": "nmflow.inspect.track",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'nmflow' has no attribute {name!r}")
    home = _LATER[name]
    if not home:
        return importlib.import_module(f"nmflow.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
