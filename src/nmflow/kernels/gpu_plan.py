"""How a product of few tokens is launched on a GPU, of the numbers that cut it: pure functions.

`cuda/decode.cu`, `groups.cu` and `lookup.cu` say what the numbers mean. They are choices of speed
only: every plan gives the right product. `gpu_cuts` chooses them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from nmflow.kernels.int8 import Layout
from nmflow.kernels.layout import LANES, Shape

# Tokens that fragments serve in one pass over the weights; with more, a dense product is faster.
MOST_TOKENS = 64
# Tokens that are served without fragments, at most.
MOST_LOOKUP = 8
# Panels of less than 64 rows: their weights are read again for every 64 tokens.
MOST_PANEL_TOKENS = 256
_STAGE = 1280  # bytes that a warp copies at a time, about
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Card:
    """What a plan must know of a GPU: multiprocessors, bytes that a block shares, `wgmma`."""

    processors: int = 132
    shared: int = 232_448
    groups: bool = True


@dataclass(frozen=True)
class Kernel:
    """One function of one file of `cuda/`, compiled with some constants."""

    file: str
    function: str
    constants: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """How a product is launched: `chunks` of each share of the inputs, `shares` of them."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    shared: int
    chunks: int

    @property
    def shares(self) -> int:
        """Blocks that add to the same outputs."""
        return self.grid[1]

    @property
    def ready(self) -> bool:
        """Whether x is put in order for the kernel first, by `ready.cu`."""
        return ("READY", 1) in self.kernel.constants

    @property
    def kind(self) -> str:
        """Which of the kernels it is of, as `make` takes it."""
        return "ready" if self.ready else self.kernel.function

    def told(self) -> dict[str, Any]:
        """What a table says of it."""
        numbers = ("NT", "RT", "WARPS", "SLICES", "CHUNK", "STAGES")
        own = {k: v for k, v in self.kernel.constants if k in numbers}
        name = {} if self.kind == "decode" else {"kernel": self.kind}
        return {
            **own, "grid": self.grid, "shared": self.shared, "chunks": self.chunks, **name
        }  # fmt: skip


def why_no_fragments(shape: Shape) -> str | None:
    """Why a weight is multiplied by its dense matrix whatever the tokens; None if by fragments."""
    if LANES % shape.m and shape.m % LANES:
        return f"M={shape.m} neither divides {LANES} nor is a multiple of it"
    if shape.shared and shape.entries % 4:
        return f"a row keeps {shape.entries} weights, which is no multiple of 4"
    return None


def unit(shape: Shape) -> int:
    """The inputs after which codes and fragments start anew: a chunk is a multiple of them."""
    if not shape.shared:
        return 4 * shape.m if shape.m > LANES else 128
    span = max(shape.m, LANES)
    return span * LANES // math.gcd(LANES, span // shape.m * shape.n)


def bytes_of(shape: Shape, inputs: int, int8: bool = False) -> int:
    """Bytes of that many inputs of sixteen rows: values and codes."""
    entries = inputs // shape.m * shape.n
    if int8:
        per = Layout.of(shape).per
        return entries // (4 * per) * (1 + per) * 64
    return entries * 32 + (entries if shape.shared else entries * 2 * shape.bits)


def make(
    shape: Shape, half: bool, tokens: int, card: Card,
    warps: int, slices: int, rows: int, shares: int, stages: int = 3, kind: str = "decode",
    int8: bool = False,
) -> Plan | None:  # fmt: skip
    """The plan of some numbers; None where the kernel or the memory of a block does not take them.

    Args:
        shape: sizes and pattern.
        half: whether the dtype is float16.
        tokens: rows of x.
        card: the GPU.
        warps: warps of a block.
        slices: warps that share the inputs of a row tile; divides `warps`.
        rows: row tiles that a warp multiplies each block of x with; of "ready" how many times as
            many inputs a chunk has.
        shares: shares of the inputs, each in blocks of its own.
        stages: chunks that a warp has room for.
        kind: the kernel: fragments of a warp ("decode"), or of a warp group ("groups"; "ready"
            where x is put in order first), or none for a few tokens ("lookup").
        int8: whether values are of 8 bits.
    """
    return _MAKERS[kind](shape, half, tokens, card, warps, slices, rows, shares, stages, int8)


def _decode(
    shape: Shape, half: bool, tokens: int, card: Card,
    warps: int, slices: int, rows: int, shares: int, stages: int, int8: bool,
) -> Plan | None:  # fmt: skip
    tiles = _tiles(tokens)
    chunk, chunks, count = _chunks(shape, slices, shares, int8)
    stride = -(-chunks * chunk // 64) * 64 + 16
    held = tokens if tiles == 1 else tiles * 8  # rows of x
    shared = held * stride * 2 + warps * stages * rows * bytes_of(shape, chunk, int8)
    shared = max(shared, (slices - 1) * (warps // slices) * rows * tiles * 4 * 32 * 4)
    if shared > card.shared:
        return None
    constants = {
        "N": shape.n, "M": shape.m, "PANEL": int(shape.shared), "HALF": int(half), "NT": tiles,
        "RT": rows, "WARPS": warps, "SLICES": slices, "CHUNK": chunk, "STAGES": stages,
        **_INT8[int8],
    }  # fmt: skip
    blocks = -(-shape.tiles // (warps // slices * rows))
    grid = (blocks, -(-count // chunks), -(-tokens // (tiles * 8)))
    kernel = Kernel("decode.cu", "decode", tuple(constants.items()))
    return Plan(kernel, grid, warps * 32, shared, chunks)


def _groups(
    shape: Shape, half: bool, tokens: int, card: Card,
    warps: int, slices: int, rows: int, shares: int, stages: int, int8: bool, ready: bool = False,
) -> Plan | None:  # fmt: skip
    # Values of 8 bits would be converted beside sums that fill the registers.
    if int8 or not card.groups or shape.shared or warps // 4 % slices or (rows > 1 and not ready):
        return None
    tiles = _tiles(tokens)
    # Each thread holds 16 inputs of at most four tokens; where x is copied, a place has 32 KiB.
    most = (rows << 14 if ready else 4 * warps * 32 * 16) // (tiles * 8 * slices)
    if most < unit(shape):
        return None
    chunk, chunks, count = _chunks(shape, slices, shares, False, most, rows)
    places = stages if ready else 2
    shared = places * slices * chunk * tiles * 16 + warps * stages * bytes_of(shape, chunk)
    shared = max(shared, (slices - 1) * (warps // slices) * tiles * 4 * 32 * 4)
    if shared > card.shared:
        return None
    constants = {
        "N": shape.n, "M": shape.m, "PANEL": 0, "HALF": int(half), "NT": tiles,
        "WARPS": warps, "SLICES": slices, "CHUNK": chunk, "STAGES": stages, "READY": int(ready),
        "GROUPS": 1, **({"RT": rows} if ready else {}),
    }  # fmt: skip
    grid = (
        -(-shape.tiles // (warps // slices)), -(-count // chunks), -(-tokens // (tiles * 8))
    )  # fmt: skip
    kernel = Kernel("groups.cu", "groups", tuple(constants.items()))
    return Plan(kernel, grid, warps * 32, shared, chunks)


def _lookup(
    shape: Shape, half: bool, tokens: int, card: Card,
    warps: int, slices: int, rows: int, shares: int, stages: int, int8: bool,
) -> Plan | None:  # fmt: skip
    # Inputs that a code reaches over, what is kept of them, and the codes of a word. With values of
    # 8 bits a code reaches over its group, and every row of a panel has its own.
    span, word = max(shape.m, LANES), 32 // shape.bits
    if int8:
        span, word = shape.m, 4 * Layout.of(shape).per
    elif shape.shared:
        return None
    kept = span // shape.m * shape.n
    if tokens > MOST_LOOKUP or rows != 1 or word % kept or shape.entries % word:
        return None
    wide = word // kept * span
    held = 1 << (tokens - 1).bit_length()
    place = 8 if held > 1 else 4
    stride = wide * 4 * held
    if wide % LANES or stages * slices * stride % 256:
        return None
    words = shape.entries // word
    chunks = -(-words // (2 * slices * shares)) * 2 * slices
    # Damaged codes may reach over the end.
    shared = chunks * stride + 128 + (256 if shape.m > LANES else LANES * int8) * place
    shared = max(shared, warps * 32 * held * 4)
    if shared > card.shared:
        return None
    constants = {
        "N": shape.n, "M": shape.m, "HALF": int(half), "TOKENS": held, "WARPS": warps,
        "SLICES": slices, "STAGES": stages, **_INT8[int8],
    }  # fmt: skip
    grid = (-(-shape.tiles // (warps // slices)), -(-words // chunks), 1)
    kernel = Kernel("lookup.cu", "lookup", tuple(constants.items()))
    return Plan(kernel, grid, warps * 32, shared, chunks)


_MAKERS = {
    "decode": _decode, "groups": _groups, "lookup": _lookup,
    "ready": functools.partial(_groups, ready=True),
}  # fmt: skip
OF_GROUPS = ("groups", "ready")
"""The kinds that cards without warp groups do not have."""

_INT8: tuple[dict[str, int], ...] = {}, {"INT8": 1}


def _tiles(tokens: int) -> int:
    """Tiles of eight tokens that a block multiplies at once."""
    tiles = 1
    while tiles < 8 and tiles * 8 < tokens:
        tiles *= 2
    return tiles


def _chunks(
    shape: Shape, slices: int, shares: int, int8: bool, most: int = 1 << 30, times: int = 1
) -> tuple[int, int, int]:
    """Inputs of a chunk of so many stages, `most` at most; chunks of a share; and all of them."""
    step = unit(shape)
    whole = -(-shape.inputs // step)
    each = max(1, round(times * _STAGE / bytes_of(shape, step, int8)))
    each = min(each, max(1, whole // (slices * shares)), most // step)
    count = -(-shape.inputs // (step * each))
    return step * each, -(-count // shares), count


def most_tokens(shape: Shape) -> int:
    """The tokens up to which fragments multiply; 0 where they never do."""
    if why_no_fragments(shape):
        return 0
    return MOST_PANEL_TOKENS if shape.shared else MOST_TOKENS
