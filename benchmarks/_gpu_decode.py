"""Few tokens: products of packed weights against cuBLAS, by the plan that is taken or by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import _gpu
from _gpu import Row
from nmflow.kernels import gpu, gpu_cuts, gpu_plan
from nmflow.kernels.gpu_plan import Card, Plan
from nmflow.kernels.layout import Shape

# What decides comes first: (out, in), patterns, tokens.
DECODE = [
    ([(28672, 8192), (11008, 4096)], ["1:8", "1:16", "1:4", "2:4"], [1, 16, 64, 4]),
    ([(11008, 4096)], ["1:32", "1:16@16", "1:8@16"], [1, 16, 64]),
    ([(4096, 4096), (4096, 11008), (768, 3072)], ["1:8", "1:16"], [1, 16]),
    ([(32000, 4096)], ["1:8"], [1]),
    ([(28672, 8192), (11008, 4096)], ["1:8", "1:16"], [8, 32]),
]
NEIGHBOURS = 3  # plans of a product that are those of its neighbours
# Warps, slices, row tiles, shares, stages.
LOOKUPS = [
    (8, 2, 1, 1, 4), (16, 2, 1, 1, 4), (8, 4, 1, 1, 4), (16, 4, 1, 1, 4), (4, 2, 1, 1, 4),
    (4, 4, 1, 1, 4), (8, 1, 1, 1, 4), (16, 8, 1, 1, 4), (16, 2, 1, 2, 4), (8, 2, 1, 2, 4),
    (16, 1, 1, 2, 4), (16, 1, 1, 4, 4), (16, 4, 1, 1, 2), (8, 2, 1, 1, 2),
]  # fmt: skip
GROUPS = [
    (16, 1, 1, 1, 3), (8, 1, 1, 1, 3), (16, 2, 1, 1, 3), (8, 2, 1, 1, 3), (8, 1, 1, 2, 3),
    (16, 1, 1, 2, 3), (16, 4, 1, 1, 3), (4, 1, 1, 1, 4), (16, 2, 1, 2, 3), (8, 2, 1, 2, 3),
    (16, 1, 1, 4, 3), (4, 1, 1, 2, 4), (16, 1, 1, 1, 2), (8, 1, 1, 4, 3),
]  # fmt: skip
READY = [
    (16, 1, 2, 1, 2), (16, 1, 1, 1, 3), (16, 1, 2, 1, 3), (16, 1, 1, 1, 4), (16, 1, 4, 1, 2),
    (16, 1, 2, 2, 2), (16, 1, 1, 1, 2), (8, 1, 1, 1, 3), (16, 2, 1, 1, 3), (16, 1, 1, 2, 3),
    (16, 1, 1, 3, 3), (8, 1, 1, 2, 3), (8, 1, 1, 3, 3), (16, 1, 1, 4, 3),
]  # fmt: skip

Point = tuple[tuple[int, int], int, list[str]]
"""A layer, tokens and patterns."""
Plans = Callable[[Shape, int, Card, bool], list[Plan | None]]


def candidates(shape: Shape, tokens: int, card: Card, search: bool) -> list[Plan | None]:
    """The plan that is taken; with `search` some of every kernel's, and other products'."""
    taken = gpu_cuts.plan(shape, False, tokens, card)
    if not search or gpu_plan.why_no_fragments(shape):
        return [taken]
    likely = [*dict.fromkeys(gpu_cuts.near(shape, False, tokens, card))][:NEIGHBOURS]
    numbers = [(*one, "lookup") for one in LOOKUPS]
    numbers += [(*one, "groups") for one in GROUPS[: 4 if tokens < 5 else None]]
    made = (gpu_plan.make(shape, False, tokens, card, *one) for one in numbers)
    return [*dict.fromkeys([*likely, *(plan for plan in made if plan is not None)])]


def in_order(shape: Shape, tokens: int, card: Card, search: bool = True) -> list[Plan | None]:
    """The plan that is taken, and those whose x is put in order first."""
    made = (gpu_plan.make(shape, False, tokens, card, *one, kind="ready") for one in READY)
    taken = gpu_cuts.plan(shape, False, tokens, card)
    return [*dict.fromkeys([taken, *(plan for plan in made if plan is not None)])]


def points() -> Iterator[Point]:
    """What `decode` times."""
    for layers, patterns, tokens in DECODE:
        for count in tokens:
            for layer in layers:
                yield layer, count, patterns


def points_in_order() -> Iterator[Point]:
    """What `ready` times."""
    for tokens in (64, 32, 16):
        for layer in ((28672, 8192), (11008, 4096)):
            yield layer, tokens, ["1:8", "1:16", "1:4", "2:4"]


def decode(search: bool) -> Iterator[Row]:
    """Few tokens; the rows that decide come first."""
    yield from few(points(), candidates, search)


def ready(search: bool = True) -> Iterator[Row]:
    """Rows of a search, of plans whose x is put in order first beside those that are taken."""
    yield from few(points_in_order(), in_order, True)


def few(of: Iterator[Point], plans: Plans, search: bool) -> Iterator[Row]:
    """A row for each plan of each product."""
    card = _gpu.card()
    for (out, inputs), tokens, patterns in of:
        _gpu.rested()
        x = torch.randn(tokens, inputs, device=_gpu.DEVICE).bfloat16()
        some = torch.randn(out, inputs, device=_gpu.DEVICE).bfloat16() * 0.02
        best = _gpu.best_dense(some, x)
        yield {
            "what": "dense", "out": out, "inputs": inputs, "tokens": tokens, "dense_us": best,
            "tb_per_s": some.nbytes / best / 1e6,
        }  # fmt: skip
        for spec in patterns:
            shape = Shape.of(out, inputs, spec)
            buffers = _gpu.random_packed(shape)
            want = x.double() @ gpu.expand(*buffers, shape).double().t()
            size = sum(b.nbytes for b in buffers)
            many = [tuple(b.clone() for b in buffers) for _ in _gpu.past_cache(size)]
            calls = [partial(gpu.matmul, x, *b, None, shape) for b in many]
            taken = gpu_cuts.plan(shape, False, tokens, card)

            one = partial(_gpu.product, calls, want, best, size, 6 if search else 20)
            for plan in plans(shape, tokens, card, search):
                if search and plan is not None and not _gpu.compiled(plan.kernel):
                    continue
                row: Row = {
                    "what": "search" if search else "decode", "out": out, "inputs": inputs,
                    "tokens": tokens, "pattern": spec, "dense_us": best, "taken": plan == taken,
                    "plan": plan and plan.told(),
                }  # fmt: skip
                with _gpu.taking(plan):
                    row = _gpu.tried(row, one)
                if plan is not None and "failed" not in row:
                    best_yet = _gpu.FASTEST.get((shape, tokens), (row["packed_us"], plan))
                    if row["packed_us"] <= best_yet[0]:
                        _gpu.FASTEST[shape, tokens] = row["packed_us"], plan
                yield row
