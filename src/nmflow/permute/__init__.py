"""Reorder hidden units so that N:M masks keep more, without a change of the network's function."""

from nmflow.permute.apply import Permuted, PermutedBlock, permute_hidden

__all__ = ["Permuted", "PermutedBlock", "permute_hidden"]
