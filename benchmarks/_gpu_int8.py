"""Products with 8-bit values on a GPU, against cuBLAS and the same products of two bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import _gpu
from _gpu import Row, timed
from nmflow.kernels import gpu, gpu_cuts, gpu_plan, int8
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape

LAYERS = [(28672, 8192), (11008, 4096), (3072, 768)]
PATTERNS = ["1:8", "1:16", "1:4"]
TOKENS = [1, 4, 16]
ROUNDS = 12
# Other cuts than those of two bytes: warps, slices, row tiles, shares, stages.
LOOKUPS = [(16, 2, 1, 1, 4), (16, 8, 1, 1, 4), (8, 2, 1, 1, 4), (16, 4, 1, 1, 2), (16, 1, 1, 2, 4)]
DECODES = [(16, 1, 1, 2, 3), (8, 1, 2, 4, 2), (16, 2, 2, 2, 2), (8, 1, 1, 4, 3)]


def cuts(shape: Shape, tokens: int, card: Card) -> list[Plan]:
    """The plan that is taken, and some others."""
    kind, others = ("lookup", LOOKUPS) if tokens <= 4 else ("decode", DECODES)
    taken = gpu_cuts.plan(shape, False, tokens, card, True)
    made = (gpu_plan.make(shape, False, tokens, card, *one, kind=kind, int8=True) for one in others)
    return [*dict.fromkeys(plan for plan in (taken, *made) if plan is not None)]


def kernels(card: Card) -> Iterator[Kernel]:
    """All that is timed."""
    for layer in LAYERS:
        for spec in PATTERNS:
            shape = Shape.of(*layer, spec)
            yield Kernel("widen.cu", "widen", (("N", 1), ("M", shape.m), ("HALF", 0)))
            for tokens in TOKENS:
                if plan := gpu_cuts.plan(shape, False, tokens, card):
                    yield plan.kernel
                yield from (cut.kernel for cut in cuts(shape, tokens, card))


def random_stream(shape: Shape) -> Tensor:
    """A random weight with 8-bit values, on the GPU."""
    size = shape.out, shape.entries
    q = torch.randint(-127, 128, size, device=_gpu.DEVICE, dtype=torch.int8)
    scale = torch.rand(shape.out, device=_gpu.DEVICE) * 1e-3
    return int8.stream_from_canonical(q, scale, _gpu.random_index(shape), shape)


def products(search: bool = False) -> Iterator[Row]:
    """Few tokens; `ratio` is against cuBLAS, `ready_us` the product of two bytes."""
    card = _gpu.card()
    for layer in LAYERS:
        for tokens in TOKENS:
            _gpu.rested()
            x = torch.randn(tokens, layer[1], device=_gpu.DEVICE).bfloat16()
            best = _gpu.best_dense(torch.randn(layer, device=_gpu.DEVICE).bfloat16(), x, ROUNDS)
            for spec in PATTERNS:
                shape = Shape.of(*layer, spec)
                stream = random_stream(shape)
                row: Row = {
                    "what": "int8", "out": layer[0], "inputs": layer[1], "tokens": tokens,
                    "pattern": spec, "dense_us": best,
                }  # fmt: skip
                two = gpu.widened(stream, shape, torch.bfloat16)
                many = _gpu.past_cache(sum(t.nbytes for t in two))
                calls = [partial(gpu.matmul, x, *map(torch.clone, two), None, shape) for _ in many]
                row["ready_us"] = timed({"two bytes": calls}, ROUNDS)["two bytes"]
                del calls, two
                want = x.double() @ int8.dense(stream, shape).double().t()
                streams = [stream.clone() for _ in _gpu.past_cache(stream.nbytes)]
                own = [partial(gpu.matmul_int8, x, s, None, shape) for s in streams]

                one = partial(_gpu.product, own, want, best, stream.nbytes, ROUNDS)
                plans = cuts(shape, tokens, card)
                for plan in plans:
                    told = {"taken": plan is plans[0], "plan": plan.told()}
                    with _gpu.taking(plan):
                        made = _gpu.tried(row | told, one)
                    yield made
