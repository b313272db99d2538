"""Packed networks in files: the container, folders, and weights of any saved network."""
