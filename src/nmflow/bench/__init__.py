"""Packed networks measured against the best dense ways in the same run."""
