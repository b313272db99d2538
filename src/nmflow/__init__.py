"""Train networks to N:M structured sparsity, and run them faster than dense."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nmflow.errors import (
    CompressError,
    ConfigError,
    DataError,
    DistillError,
    FileFormatError,
    FlowError,
    NMFlowError,
    NMFlowWarning,
    PatternError,
    PlanError,
    RecipeError,
    StateError,
    WeightError,
)
from nmflow.flow import Flow, FlowStage, GraphedStep, LayerStep, LayerSteps, attach
from nmflow.inspect.audit import Audit, audit
from nmflow.inspect.cost import Cost, cost
from nmflow.integrations import registering
from nmflow.masks import holds, mask
from nmflow.pattern import Pattern
from nmflow.recipes import (
    MDGF,
    SDGF,
    SRSTE,
    SSTE,
    STE,
    STEP,
    Dense,
    Gradual,
    Hybrid,
    MaxQ,
    OneShot,
    Recipe,
    Settling,
)
from nmflow.recipes.schedules import Stage
from nmflow.select.plan import Plan, Target, plan
from nmflow.version import __version__

if TYPE_CHECKING:
    from nmflow import kernels
    from nmflow.distill import Distiller
    from nmflow.inspect.machine import doctor
    from nmflow.inspect.memory import Memory, memory
    from nmflow.inspect.noise import gradient_noise
    from nmflow.inspect.track import Tracker, track
    from nmflow.integrations.pretrained import from_pretrained
    from nmflow.oneshot import prune
    from nmflow.packed import (
        OnnxDecoder,
        compress,
        decompress,
        export_decoder,
        export_onnx,
        export_onnx_int8,
        export_program,
        load,
        load_state,
        onnxruntime_session_options,
        report_of,
        save,
        save_state,
        to_semi_structured,
    )
    from nmflow.permute import permute_hidden

__all__ = [
    "MDGF",
    "SDGF",
    "SRSTE",
    "SSTE",
    "STE",
    "STEP",
    "Audit",
    "CompressError",
    "ConfigError",
    "Cost",
    "DataError",
    "Dense",
    "DistillError",
    "Distiller",
    "FileFormatError",
    "Flow",
    "FlowError",
    "FlowStage",
    "Gradual",
    "GraphedStep",
    "Hybrid",
    "LayerStep",
    "LayerSteps",
    "MaxQ",
    "Memory",
    "NMFlowError",
    "NMFlowWarning",
    "OneShot",
    "OnnxDecoder",
    "Pattern",
    "PatternError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Settling",
    "Stage",
    "StateError",
    "Target",
    "Tracker",
    "WeightError",
    "__version__",
    "attach",
    "audit",
    "compress",
    "cost",
    "decompress",
    "doctor",
    "export_decoder",
    "export_onnx",
    "export_onnx_int8",
    "export_program",
    "from_pretrained",
    "gradient_noise",
    "holds",
    "kernels",
    "load",
    "load_state",
    "mask",
    "memory",
    "onnxruntime_session_options",
    "permute_hidden",
    "plan",
    "prune",
    "report_of",
    "save",
    "save_state",
    "to_semi_structured",
    "track",
]

registering.wait()

# What training does not need is imported at first use.
_LATER = {
    "Distiller": "nmflow.distill",
    "Memory": "nmflow.inspect.memory",
    "OnnxDecoder": "nmflow.packed",
    "Tracker": "nmflow.inspect.track",
    "compress": "nmflow.packed",
    "decompress": "nmflow.packed",
    "doctor": "nmflow.inspect.machine",
    "export_decoder": "nmflow.packed",
    "export_onnx": "nmflow.packed",
    "export_onnx_int8": "nmflow.packed",
    "export_program": "nmflow.packed",
    "from_pretrained": "nmflow.integrations.pretrained",
    "gradient_noise": "nmflow.inspect.noise",
    "kernels": "",
    "load": "nmflow.packed",
    "load_state": "nmflow.packed",
    "memory": "nmflow.inspect.memory",
    "onnxruntime_session_options": "nmflow.packed",
    "permute_hidden": "nmflow.permute",
    "prune": "nmflow.oneshot",
    "report_of": "nmflow.packed",
    "save": "nmflow.packed",
    "save_state": "nmflow.packed",
    "to_semi_structured": "nmflow.packed",
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
