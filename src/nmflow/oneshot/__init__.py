"""Pruning in one shot, for whoever cannot train: by magnitude, by activations, with an update."""

from nmflow.oneshot.prune import METHODS, Pruned, PrunedWeight, prune
from nmflow.oneshot.sparsegpt import sparsegpt

__all__ = ["METHODS", "Pruned", "PrunedWeight", "prune", "sparsegpt"]
