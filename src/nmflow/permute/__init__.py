"""Hidden units in an order that N:M masks keep more of; the network's function stays as it is."""

from nmflow.permute.apply import Permuted, PermutedBlock, permute_hidden

__all__ = ["Permuted", "PermutedBlock", "permute_hidden"]
