"""One weight in a file's header: its description and its tensors, checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nmflow.errors import CompressError, FileFormatError, PatternError
from nmflow.kernels import int8
from nmflow.kernels.layout import DTYPES, Shape, check_canonical
from nmflow.numbers import is_whole
from nmflow.packed.files.stored import Stored
from nmflow.packed.layout import bytes_to_index, file_bits
from nmflow.packed.parts import Part

_LARGEST_SIZE = 1 << 48
_LONGEST_PATTERN = 40
# Names of a part's `values` if they do not have the parameter's dtype.
_ROUNDED = {"int8": torch.int8, "bfloat16": torch.bfloat16}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def bad(what: str) -> FileFormatError:
    """The error of a damaged or hostile file."""
    return FileFormatError(f"the saved network is damaged or not one of nmflow's: {what[:400]}")


def read_weight(name: str, described: Any, data: dict[str, Tensor]) -> Stored:
    """Check the description of one weight, and take its tensors out of `data`."""
    if not isinstance(described, dict):
        raise bad(f"the header says nothing of {name!r}")
    shape = get(described, "shape", list)
    axis, dtype = get(described, "axis", int), _NAMES.get(get(described, "dtype", str))
    run = get(described, "run", str)
    sizes_right = len(shape) >= 2 and all(is_size(s) for s in shape)
    if not sizes_right or axis not in (0, 1) or dtype is None or run not in ("packed", "dense"):
        raise bad(f"{name!r} has an impossible shape, axis, dtype or run")
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST_SIZE:
            raise bad(f"{name!r} has a shape that overflows")
    out = shape[0 if axis else 1]
    stored = Stored(tuple(shape), axis, dtype, run)
    at = 0
    for i, part in enumerate(get(described, "parts", list)):
        rows = get(part, "rows", list) if isinstance(part, dict) else []
        if len(rows) != 2 or not all(is_size(r, 0) for r in rows) or not at == rows[0] < rows[1]:
            raise bad(f"part {i} of {name!r} has rows that do not follow on the last")
        try:
            stored.parts.append(_part(name, i, part, rows, count // out, dtype, data))
        except (CompressError, PatternError) as error:
            raise bad(f"part {i} of {name!r}: {error}") from error
        at = rows[1]
    if at != out:
        raise bad(f"the parts of {name!r} end at row {at} of {out}")
    if stored.is_int8:
        stored.activations = get(described, "activations", str)
        if stored.activations not in int8.ACTIVATIONS or dtype is torch.float64:
            raise bad(f"{name!r} has activations or a dtype that 8-bit values do not go with")
    return stored


def _part(
    name: str, i: int, part: dict[str, Any], rows: list[int], inputs: int, dtype: torch.dtype,
    data: dict[str, Tensor],
) -> Part:  # fmt: skip
    values = data.pop(f"{name}#{i}.values", None)
    kind = part.get("values")
    if kind not in (None, *_ROUNDED) or values is None or (kind and dtype is _ROUNDED[kind]):
        raise bad(f"the values of part {i} of {name!r} are missing or of an impossible kind")
    if values.dtype != (_ROUNDED[kind] if kind else dtype):
        raise bad(f"the values of part {i} of {name!r} are of another dtype")
    pattern = part.get("pattern")
    if pattern is None:
        if tuple(values.shape) != (rows[1] - rows[0], inputs) or kind:
            raise bad(f"part {i} of {name!r} has the shape {tuple(values.shape)}")
        return Part(rows[0], rows[1], None, values)
    if not isinstance(pattern, str) or len(pattern) > _LONGEST_PATTERN:
        raise bad(f"part {i} of {name!r} has a pattern that is too long or not text")
    shape = Shape.of(rows[1] - rows[0], inputs, pattern)
    packed = data.pop(f"{name}#{i}.index", None)
    bits = file_bits(shape.m)
    size = (shape.lists, -(-shape.entries * bits // 8))
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != size:
        raise bad(f"the index of part {i} of {name!r} is missing or not uint8 {size}")
    if part.get("bits") != bits:
        raise bad(f"part {i} of {name!r} does not have indices of {bits} bits")
    # Checked now, and kept in bits until its layer is built: bytes of a whole network take more.
    index = bytes_to_index(packed, shape.entries, shape.m)
    if kind != "int8":
        check_canonical(values, index, shape)
        return Part(rows[0], rows[1], shape, values, packed, in_bits=True)
    scale = data.pop(f"{name}#{i}.scale", None)
    if scale is None:
        raise bad(f"the scales of part {i} of {name!r} are missing")
    int8.check_canonical(values, scale, index, shape)
    return Part(rows[0], rows[1], shape, values, packed, scale, in_bits=True)


def is_size(value: object, least: int = 1) -> bool:
    """Whether a value of a header can be the size of an axis."""
    return is_whole(value, least) and value <= _LARGEST_SIZE


def get(mapping: Mapping[str, Any], key: str, kind: type) -> Any:
    """A value of a header, which has to be of a type."""
    value = mapping.get(key)
    if type(value) is not kind:
        raise bad(f"the header has no {key!r}, or it is not of type {kind.__name__}")
    return value
