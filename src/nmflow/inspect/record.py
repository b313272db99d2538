"""The record of what a run pruned: names and patterns, in a file beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nmflow import disk
from nmflow.errors import FileFormatError, PatternError
from nmflow.inspect.checkpoints import SavedState, open_state
from nmflow.pattern import Pattern
from nmflow.select.target import Target, out_dim
from nmflow.text_table import shown

RECORD = "nmflow_patterns.json"
_FORMAT, _VERSION = "nmflow patterns", 1


def write_record(
    folder: str | os.PathLike[str], targets: Iterable[Target], parameters: Mapping[str, Tensor]
) -> list[str]:
    """Write which of the saved weights a run pruned into a file beside them, for `audit`.

    Libraries save weights under other names than the network's own (`transformers` keeps those of
    older versions), so each weight is looked up in the file by its name, or else by its content.

    Args:
        folder: where the weights are saved, for example by `model.save_pretrained(folder)`.
        targets: what was pruned: `flow.plan`, or what `plan` returned.
        parameters: the network's parameters by the names in `targets`.

    Returns:
        The names of weights that the file does not hold as the network does, such as parts of a
        matrix that was joined when saved. The record leaves them out.

    Raises:
        FileFormatError: the folder holds no weights, or cannot be written.

    Example:
        >>> import tempfile, nmflow
        >>> from safetensors.torch import save_file
        >>> model = torch.nn.Linear(8, 4)
        >>> model.weight.data *= nmflow.mask(model.weight, "1:4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(model.state_dict(), f"{folder}/model.safetensors")
        ...     lost = write_record(folder, nmflow.plan(model, "1:4"), model.state_dict())
        ...     found = nmflow.audit(folder)
        >>> lost, found.ok, [str(row.pattern) for row in found.rows]
        ([], True, ['1:4'])
    """
    saved = open_state(Path(folder))
    by_content: dict[str, str] | None = None
    entries, lost = [], []
    for target in targets:
        weight = parameters[target.name].detach()
        name: str | None = target.name
        if saved.shapes.get(target.name) != tuple(weight.shape):
            if by_content is None:
                by_content = {_digest(saved.read(n)): n for n in saved.shapes}
            name = by_content.get(_digest(weight))
        if name is None:
            lost.append(target.name)
            continue
        rows = None if target.rows is None else list(target.rows)
        entry = {"name": name, "rows": rows, "axis": target.dim, "pattern": str(target.pattern)}
        # Only for parameters that hold several matrices, so other records stay as they were.
        more = {"stacked": target.stacked, "unit": target.unit}
        entries.append(entry | {key: value for key, value in more.items() if value})
    made = {"format": _FORMAT, "version": _VERSION, "weights": entries}
    try:
        with disk.locked(folder):
            disk.write_whole(Path(folder) / RECORD, json.dumps(made, indent=1) + "\n")
    except OSError as error:
        raise FileFormatError(f"'{folder}' cannot be written: {error}") from error
    return lost


def read_record(folder: str | os.PathLike[str], saved: SavedState) -> list[Target] | None:
    """The targets in the record beside saved weights; None if there is no record.

    Raises:
        FileFormatError: the record is damaged, or names weights that are not there.
    """
    path = Path(folder) / RECORD
    if not os.path.lexists(path):
        return None
    try:
        found = disk.read_json(path)
        if found["format"] != _FORMAT or found["version"] != _VERSION:
            raise ValueError("another format or version")
        return [_target(entry, saved) for entry in found["weights"]]
    except (OSError, ValueError, KeyError, TypeError, PatternError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise FileFormatError(
            f"'{path}' is not a record of these weights ({shown(reason, 200)}): delete it, and "
            "name the pattern"
        ) from error


def _target(entry: Any, saved: SavedState) -> Target:
    name, axis, rows = entry["name"], entry["axis"], entry["rows"]
    if not isinstance(name, str) or name not in saved.shapes:
        raise ValueError(f"it names {shown(str(name))}, which is not there")
    shape = saved.shapes[name]
    pattern = Pattern(entry["pattern"])
    stacked, unit = entry.get("stacked", False), entry.get("unit", 0)
    if type(axis) is not int or not 0 <= axis < min(len(shape), 3) or len(shape) < 2:
        raise ValueError(f"{shown(name)} has no such axis")
    if type(stacked) is not bool or (stacked and (len(shape) != 3 or axis == 0)):
        raise ValueError(f"{shown(name)} is not a stack of matrices")
    if type(unit) is not int or unit < 0 or (unit and shape[axis] % unit):
        raise ValueError(f"{shown(name)} has no matrices of {shown(str(unit))}")
    if not shape[axis] or (unit or shape[axis]) % pattern.m:
        raise ValueError(f"{shown(name)} cannot be grouped by {pattern}")
    if rows is not None:
        out = shape[out_dim(axis, stacked)]
        start, stop = rows
        if not (type(start) is type(stop) is int and 0 <= start < stop <= out):
            raise ValueError(f"{shown(name)} has no rows {start}:{stop}")
        rows = (start, stop)
    return Target(name, shape, axis, pattern, rows, stacked=stacked, unit=unit)


def _digest(t: Tensor) -> str:
    plain = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    said = f"{t.dtype}{tuple(t.shape)}".encode()
    return hashlib.sha256(said + plain.numpy().tobytes()).hexdigest()
