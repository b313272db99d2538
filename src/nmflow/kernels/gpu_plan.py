"""Which kernel multiplies on a GPU, and how its work is cut: pure functions of sizes.

`cuda/decode.cu` says what the numbers mean. They are choices of speed only: every plan gives the
right product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nmflow.kernels.layout import LANES, Shape

# Tokens that fragments serve in one pass over the weights; with more, a dense product is faster.
MOST_TOKENS = 64
# A panel's weights are read again for every 64 tokens, at a sixteenth of the cost of dense ones.
MOST_PANEL_TOKENS = 256
_STAGE = 1280  # bytes that a warp copies at a time, about
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Card:
    """What a plan must know of a GPU: its multiprocessors, and the bytes that a block may share."""

    processors: int = 132
    shared: int = 232_448


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


def bytes_of(shape: Shape, inputs: int) -> int:
    """Bytes of that many inputs of sixteen rows: values and codes."""
    entries = inputs // shape.m * shape.n
    return entries * 32 + (entries if shape.shared else entries * 2 * shape.bits)


def make(
    shape: Shape, half: bool, tokens: int, card: Card,
    warps: int, slices: int, rows: int, shares: int, stages: int = 3,
) -> Plan | None:  # fmt: skip
    """The plan of some numbers; None where it does not fit into the memory of a block.

    Args:
        shape: sizes and pattern.
        half: whether the dtype is float16.
        tokens: rows of x.
        card: the GPU.
        warps: warps of a block.
        slices: warps that share the inputs of a row tile; divides `warps`.
        rows: row tiles that a warp multiplies each block of x with.
        shares: shares of the inputs, each in blocks of its own.
        stages: chunks that a warp has room for.
    """
    tiles = 1
    while tiles < 8 and tiles * 8 < tokens:
        tiles *= 2
    step = unit(shape)
    whole = -(-shape.inputs // step)
    each = max(1, round(_STAGE / bytes_of(shape, step)))
    each = min(each, max(1, whole // (slices * shares)))
    chunk = step * each
    count = -(-shape.inputs // chunk)
    chunks = -(-count // shares)
    stride = -(-chunks * chunk // 64) * 64 + 16
    held = tokens if tiles == 1 else tiles * 8  # rows of x
    shared = held * stride * 2 + warps * stages * rows * bytes_of(shape, chunk)
    shared = max(shared, (slices - 1) * (warps // slices) * rows * tiles * 4 * 32 * 4)
    if shared > card.shared:
        return None
    constants = {
        "N": shape.n, "M": shape.m, "PANEL": int(shape.shared), "HALF": int(half), "NT": tiles,
        "RT": rows, "WARPS": warps, "SLICES": slices, "CHUNK": chunk, "STAGES": stages,
    }  # fmt: skip
    blocks = -(-shape.tiles // (warps // slices * rows))
    grid = (blocks, -(-count // chunks), -(-tokens // (tiles * 8)))
    kernel = Kernel("decode.cu", "decode", tuple(constants.items()))
    return Plan(kernel, grid, warps * 32, shared, chunks)


def plans(shape: Shape, half: bool, tokens: int, card: Card) -> Iterator[Plan]:
    """Every plan that is worth a measurement."""
    most = -(-shape.inputs // unit(shape))
    cuts = sorted({*(2**i for i in range(most.bit_length())), most})
    seen: set[Plan] = set()
    for warps, rows, stages in itertools.product((4, 8, 16), (1, 2), (2, 3, 4)):
        if warps * rows * min(tokens, 64) > 1024:
            continue  # 16 warps have 128 registers a thread, and the sums alone would take 64
        for slices in (s for s in (1, 2, 4, 8, 16) if s <= warps):
            for shares in (cut for cut in cuts if cut * slices <= max(most, slices)):
                made = make(shape, half, tokens, card, warps, slices, rows, shares, stages)
                if made is not None and made not in seen:
                    seen.add(made)
                    yield made


def most_tokens(shape: Shape) -> int:
    """The tokens up to which fragments multiply; 0 where they never do."""
    if why_no_fragments(shape):
        return 0
    return MOST_PANEL_TOKENS if shape.shared else MOST_TOKENS


def plan(shape: Shape, half: bool, tokens: int, card: Card) -> Plan | None:
    """The plan that `cost` expects to be the fastest; None where the dense matrix is to be made."""
    if tokens > most_tokens(shape):
        return None
    found = plans(shape, half, tokens, card)
    return min(found, key=lambda one: cost(one, shape, tokens, card), default=None)


def cost(plan: Plan, shape: Shape, tokens: int, card: Card) -> float:
    """About the microseconds of a plan on a card like an H100; only the order of plans matters.

    A block of 16 x 16 weights takes its instructions, or its loads of x, or its products, whatever
    is most; a warp alone waits for each of them in turn. To that come the weights from memory, x
    for each row of blocks, and sums that meet in memory.
    """
    c = dict(plan.kernel.constants)
    blocks = math.prod(plan.grid)
    resident = max(1, min(card.shared // plan.shared, 2048 // plan.threads))
    turns = -(-blocks // (card.processors * resident))  # waves of blocks
    here = min(resident, -(-blocks // card.processors))  # blocks on a multiprocessor at a time
    share = shape.n / shape.m if shape.shared else 1.0  # a panel's fragments are not expanded
    busy = max(14 + 4 * shape.n, 8 * c["NT"] / c["RT"] + 10, 5 * c["NT"]) * share
    alone = (60 + 8 * c["NT"]) * share
    tiles = c["WARPS"] // c["SLICES"] * c["RT"]
    work = tiles * plan.chunks * c["CHUNK"] / 16 * here / 4  # blocks of 16 x 16 on a scheduler
    compute = turns * work * max(busy, alone / (c["WARPS"] * here / 4)) / 1700
    size = bytes_of(shape, c["CHUNK"])
    flying = c["WARPS"] * here * (c["STAGES"] - 1) * c["RT"] * size
    each = turns * here * tiles * plan.chunks * size  # bytes that a multiprocessor reads
    total = bytes_of(shape, shape.inputs) * shape.tiles * plan.grid[2]
    read = max(total / 2.8e6, each / min(flying / 0.8, 1e5))
    tokens_here = min(tokens, c["NT"] * 8) * 2
    x = max(
        plan.grid[0] * plan.grid[2] * tokens_here * shape.inputs / 5e6,
        turns * here * tokens_here * plan.chunks * c["CHUNK"] / 6e4,
    )
    meet = 2.0 + plan.shares * tokens * shape.out * 8 / 5e6 if plan.shares > 1 else 0.0
    return max(compute, read) + x + meet
