"""Many tokens: products of panels against cuBLAS, and how their work is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import _gpu
from _gpu import Row, timed
from nmflow.kernels import gpu, gpu_panels
from nmflow.kernels.gpu_panels import Block, Group
from nmflow.kernels.gpu_plan import Card
from nmflow.kernels.layout import Shape

MANY = [
    ((11008, 4096), 4096, "1:16@64"), ((11008, 4096), 4096, "1:8@64"),
    ((11008, 4096), 4096, "1:16@128"), ((11008, 4096), 256, "1:16@64"),
    ((4096, 11008), 4096, "1:16@64"), ((3072, 768), 25216, "1:16@64"),
    ((768, 3072), 25216, "1:16@64"), ((11008, 4096), 4096, "1:16"), ((11008, 4096), 256, "1:8"),
]  # fmt: skip
SEARCHED = 7  # of MANY
Way = Callable[[], Tensor]
GROUPS = [
    Group(64, 256, 2, 32, 4, 2), Group(64, 256, 1, 32, 3, 3), Group(64, 128, 1, 32, 4, 4),
    Group(64, 256, 1, 32, 4, 2), Group(64, 512, 2, 32, 4, 1), Group(64, 512, 4, 32, 4, 1),
    Group(64, 256, 2, 64, 3, 1), Group(64, 256, 2, 32, 3, 2), Group(64, 128, 2, 32, 4, 3),
    Group(64, 128, 1, 64, 3, 3), Group(128, 256, 2, 32, 4, 1), Group(128, 128, 1, 32, 4, 2),
    Group(128, 256, 1, 32, 4, 1), Group(128, 128, 1, 64, 3, 2), Group(128, 256, 2, 64, 3, 1),
    Group(128, 128, 1, 32, 3, 2),
]  # fmt: skip


def cuts(shape: Shape, card: Card) -> list[Block | Group]:
    """Cuts of a product of panels that are worth a measurement."""
    return [
        *(cut for cut in GROUPS if gpu_panels.shared_bytes(shape, cut, card)),
        *(Block(64, 32, tokens, tokens // 32, 4) for tokens in (128, 256)),
    ]


def searched() -> Iterator[tuple[Shape, int]]:
    """The products whose cuts are timed."""
    for layer, tokens, spec in MANY[:SEARCHED]:
        yield Shape.of(*layer, spec), tokens


def panels(search: bool) -> Iterator[Row]:
    """`turn_us` is of turning x alone, `ready_us` of a product of x that is turned."""
    for (out, inputs), tokens, spec in MANY[:SEARCHED] if search else MANY:
        _gpu.rested()
        shape = Shape.of(out, inputs, spec)
        x = torch.randn(tokens, inputs, device=_gpu.DEVICE).bfloat16()
        buffers = _gpu.random_packed(shape)
        w = gpu.expand(*buffers, shape)
        xt = x.t().contiguous()
        ways = {"x @ wt": partial(F.linear, x, w), "w @ xt": partial(torch.matmul, w, xt)}
        ways["turn"] = partial(gpu_panels.turned, x)
        took = timed({name: [way] * 4 for name, way in ways.items()})
        best, turn = min(took["x @ wt"], took["w @ xt"]), took["turn"]
        want = x.double() @ w.double().t()
        for cut in cuts(shape, _gpu.card()) if search else [None]:
            row: Row = {
                "what": "panels-search" if search else "panels", "out": out, "inputs": inputs,
                "tokens": tokens, "pattern": spec, "dense_us": best, "turn_us": turn, "plan": cut,
                "taken": not search or cut == gpu_panels.group(shape, tokens),
            }  # fmt: skip
            call: Any = partial(gpu.matmul, x, *buffers, None, shape)
            if cut is not None:
                call = partial(gpu_panels.matmul, x, *buffers, None, shape, cut=cut)
            turned: Any = partial(call.func, xt.t(), *call.args[1:], **call.keywords)

            yield _gpu.tried(row, partial(_timed, call, turned, want, best))


def _timed(call: Way, turned: Way, want: Tensor, best: float) -> Row:
    wrong = max((_gpu.error(way(), want) for way in (call, turned)), key=lambda e: (e != e, e))
    us = timed({"packed": [call] * 4, "ready": [turned] * 4}, 8)
    ratio = best / us["packed"]
    return {"error": wrong, "packed_us": us["packed"], "ratio": ratio, "ready_us": us["ready"]}
