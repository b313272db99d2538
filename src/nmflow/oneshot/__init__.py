"""Pruning in one shot, without training: by magnitude, by activations, or with an update."""

from nmflow.oneshot.prune import METHODS, Pruned, PrunedWeight, prune
from nmflow.oneshot.sparsegpt import sparsegpt

__all__ = ["METHODS", "Pruned", "PrunedWeight", "prune", "sparsegpt"]
