"""Train networks to N:M structured sparsity, and run them faster than dense."""

from nmflow.flow import Flow, attach
from nmflow.masks import holds, mask
from nmflow.pattern import Pattern
from nmflow.recipes import MDGF, SDGF, SRSTE, STE, STEP, Dense, Hybrid, OneShot, Recipe
from nmflow.schedules import Stage
from nmflow.targets import Target, plan

__all__ = [
    "MDGF",
    "SDGF",
    "SRSTE",
    "STE",
    "STEP",
    "Dense",
    "Flow",
    "Hybrid",
    "OneShot",
    "Pattern",
    "Recipe",
    "Stage",
    "Target",
    "attach",
    "holds",
    "mask",
    "plan",
]
__version__ = "0.1.0"
