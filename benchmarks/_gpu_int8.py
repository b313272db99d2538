"""Products with 8-bit values on a GPU, against cuBLAS and the same products of two bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nmflow.kernels import gpu, gpu_cuts, gpu_driver, gpu_plan, int8
from nmflow.kernels.gpu_plan import Card, Kernel, Plan
from nmflow.kernels.layout import Shape
from nmflow.packed.measure import copies_past_cache, gpu_ways, time_on_gpu

DEVICE = "cuda"
LAYERS = [(28672, 8192), (11008, 4096), (3072, 768)]
PATTERNS = ["1:8", "1:16", "1:4"]
TOKENS = [1, 4, 16]
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
    q = torch.randint(-127, 128, (shape.out, shape.entries), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(shape.out, device=DEVICE) * 1e-3
    groups = shape.entries // shape.n
    draw = torch.rand(shape.lists, groups, shape.m, device=DEVICE)
    index = draw.topk(shape.n, -1).indices.sort(-1).values.flatten(1).to(torch.uint8)
    return int8.stream_from_canonical(q, scale, index, shape)


def _timed(calls: list[Any]) -> float:
    return time_on_gpu({"packed": calls}, 12)["packed"].median


def products() -> Iterator[dict[str, Any]]:
    """A row for each plan; `ratio` is against cuBLAS, `ready_us` the product of two bytes."""
    card, planned = gpu_driver.driver(0).card, gpu._planned
    for layer in LAYERS:
        for tokens in TOKENS:
            x = torch.randn(tokens, layer[1], device=DEVICE).bfloat16()
            dense = gpu_ways(torch.randn(layer, device=DEVICE).bfloat16(), None, x)
            best = _timed(dense["cuBLAS"])
            del dense
            for spec in PATTERNS:
                shape = Shape.of(*layer, spec)
                stream = random_stream(shape)
                two = gpu.widened(stream, shape, torch.bfloat16)
                want = x.double() @ int8.dense(stream, shape).double().t()
                size = sum(t.nbytes for t in two)
                many = range(copies_past_cache(size, stream.device))
                calls = [partial(gpu.matmul, x, *map(torch.clone, two), None, shape) for _ in many]
                other = _timed(calls)
                del calls, two
                many = range(copies_past_cache(stream.nbytes, stream.device))
                streams = [stream.clone() for _ in many]
                plans = cuts(shape, tokens, card)
                for plan in plans:
                    gpu._planned = lambda *args, plan=plan: plan  # pyright: ignore
                    try:
                        calls = [partial(gpu.matmul_int8, x, s, None, shape) for s in streams]
                        y = calls[0]().double()
                        took = _timed(calls)
                        yield {
                            "what": "int8", "out": layer[0], "inputs": layer[1], "tokens": tokens,
                            "pattern": spec, "dense_us": best, "packed_us": took,
                            "ready_us": other, "ratio": best / took,
                            "error": float((y - want).norm() / want.norm()),
                            "tb_per_s": stream.nbytes / took / 1e6, "taken": plan is plans[0],
                            "plan": plan.told(),
                        }  # fmt: skip
                    finally:
                        gpu._planned = planned
