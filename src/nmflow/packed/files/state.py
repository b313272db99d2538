"""`save_state` and `load_state`: a bare state dict in a packed folder, without a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError
from nmflow.packed import build
from nmflow.packed.files import container, writing
from nmflow.packed.files.saving import Folder
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import as_matrix, file_bits, fits, runs
from nmflow.packed.report import Report, Row
from nmflow.pattern import EVERY
from nmflow.select.plan import Names, Patterns, choose
from nmflow.select.states import layers_of_state


def save_state(
    state: Mapping[str, Tensor], folder: Folder, pattern: Patterns | None = None,
    include: Names = "*", exclude: Names = (),
) -> Report:  # fmt: skip
    """Write a bare state dict as `save` writes a model; names and shapes say what a weight is.

    Returns:
        A row per weight, with its bytes before and in the file.

    Raises:
        CompressError: as `save`; PlanError: as `plan`.
    """
    if not isinstance(state, Mapping):
        raise CompressError(f"state is a {type(state).__name__}: give tensors by their names")
    layers = [(x, x.why_not) for x in layers_of_state({n: t.shape for n, t in state.items()})]
    wanted = choose(layers, EVERY if pattern is None else pattern, include, exclude, "skip")
    aliases = _same_tensors(state)
    tensors = {name: t for name, t in state.items() if name not in aliases}
    weights: dict[str, Stored] = {}
    for target in wanted:
        if target.stacked or target.rows is not None or target.name not in tensors:
            continue
        w = state[target.name]
        matrix = as_matrix(w, target.dim)
        if pattern is None:
            found = [build.Run(*run) for run in runs(matrix)]
        else:
            whole = build.Run(0, matrix.shape[0], target.pattern)
            found = [] if fits(matrix, target.pattern) else [whole]
        if found:
            weights[target.name] = Stored.of(w, target.dim, found, "packed")
            del tensors[target.name]
    if not weights:
        raise CompressError("the state has no weight that holds an N:M pattern: prune it first")
    writing.write(folder, weights, tensors, aliases)
    return Report(
        _row(name, state[name], weights.get(name)) for name in state if state[name].ndim > 1
    )


def load_state(folder: Folder, *, max_bytes: int | None = None) -> dict[str, Tensor]:
    """The dense state dict of a saved network, without a model.

    A file of 1:256 names a dense network of up to 256 times its size, so the size is checked
    before a weight is rebuilt.

    Args:
        folder: what `save` wrote.
        max_bytes: the most bytes that the dense weights may take; by default 64 times the bytes of
            their values, but at least 1 GiB.

    Raises:
        FileFormatError: as `load`; the dense weights would take more than `max_bytes`.
    """
    weights, tensors, aliases = container.read(folder)
    container.check_size(weights.values(), max_bytes)
    state = {**{name: w.dense() for name, w in weights.items()}, **tensors}
    return {**state, **{alias: state[target] for alias, target in aliases.items()}}


def _row(name: str, w: Tensor, stored: Stored | None) -> Row:
    size = w.numel() * w.element_size()
    if stored is None:
        return Row(name, tuple(w.shape), "", "dense", "holds no N:M pattern", size, size)
    small, said = 0, []
    for part in stored.parts:
        small += part.values.nbytes
        if part.shape is not None:
            bits = file_bits(part.shape.m)
            small += part.shape.lists * -(-part.shape.entries * bits // 8)
            rows = f" [{part.start}:{part.stop}]" if len(stored.parts) > 1 else ""
            said.append(f"{part.shape.pattern}{rows}")
    return Row(name, tuple(w.shape), ", ".join(said), "packed", "in the file", size, small)


def _same_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of a tensor in a bare state to its first."""
    first: dict[tuple[Any, ...], str] = {}
    again: dict[str, str] = {}
    for name, t in state.items():
        if t.layout != torch.strided or t.is_meta or t.is_nested or not t.numel():
            continue
        key = (t.data_ptr(), t.dtype, t.shape, t.stride())
        if first.setdefault(key, name) != name:
            again[name] = first[key]
    return again
