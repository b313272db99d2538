"""Small products of every kernel, once, for compute-sanitizer; all else is done on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import _gpu
from _gpu import Row
from nmflow.kernels import gpu, gpu_panels, gpu_plan, int8
from nmflow.kernels.gpu_panels import Group
from nmflow.kernels.layout import Shape, canonical_from_dense, tiled_from_canonical
from nmflow.masks import mask

TAKEN = [
    ("1:16", 3), ("2:4", 9), ("1:8", 1), ("1:32", 2), ("3:8", 1), ("1:16@16", 20), ("1:16", 64),
    ("1:4", 16), ("3:16", 70),
]  # fmt: skip
# What no plan of the products above takes; numbers as `gpu_plan.make` takes them.
OTHERS: list[tuple[str, int, Any]] = [
    ("1:16", 1, (8, 2, 1, 1, 4, "lookup")), ("2:4", 3, (4, 1, 1, 2, 4, "lookup")),
    ("1:16", 64, (8, 2, 1, 1, 3, "groups")), ("2:4", 9, (4, 1, 1, 2, 3, "groups")),
    ("1:8", 64, (16, 1, 1, 1, 3, "ready")), ("2:4", 20, (8, 2, 1, 2, 2, "ready")),
    ("1:16@64", 150, Group(64, 128, 2, 32, 3, 1)), ("1:16@128", 150, Group(128, 128, 1, 32, 3, 1)),
]  # fmt: skip
BYTES = [("1:8", 1), ("2:4", 3), ("1:16", 20), ("1:16@16", 20), ("1:32", 70)]


def weight(shape: Shape) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A weight on the CPU, and what is packed of it on the GPU."""
    w = torch.randn(shape.out, shape.inputs).bfloat16()
    w = w * mask(w, shape.pattern)
    values, codes = tiled_from_canonical(*canonical_from_dense(w, shape), shape)
    return w, (values.to(_gpu.DEVICE), codes.to(_gpu.DEVICE))


def check(search: bool = False) -> Iterator[Row]:
    """Products by the plans that are taken, by others, and with 8-bit values; raises at the end."""
    wrong = 0
    for made in itertools.chain(taken(), others(), of_bytes()):
        wrong += "failed" in made
        yield made
    if wrong:
        raise RuntimeError(f"{wrong} products are wrong")


def taken() -> Iterator[Row]:
    """With a bias and ReLU, and tails of rows and inputs."""
    for spec, tokens in TAKEN:
        shape = Shape.of(100, 1056 if "32" in spec else 1040, spec)
        w, there = weight(shape)
        x, b = torch.randn(tokens, shape.inputs).bfloat16(), torch.randn(shape.out).bfloat16()
        y = gpu.matmul(x.to(_gpu.DEVICE), *there, b.to(_gpu.DEVICE), shape, 2)
        want = (x.double() @ w.double().t() + b.double()).relu()
        yield row("check", spec, tokens, y, want)


def others() -> Iterator[Row]:
    """Without a bias."""
    card = _gpu.card()
    for spec, tokens, numbers in OTHERS:
        shape = Shape.of(100, 1024, spec)
        w, there = weight(shape)
        x = torch.randn(tokens, shape.inputs).bfloat16()
        given = x.to(_gpu.DEVICE), *there, None, shape
        if isinstance(numbers, Group):
            if not card.groups:
                continue
            y = gpu_panels.matmul(*given, cut=numbers)
        else:
            plan = gpu_plan.make(shape, False, tokens, card, *numbers)
            if plan is None:
                continue
            with _gpu.taking(plan):
                y = gpu.matmul(*given)
        yield row("check", spec, tokens, y, x.double() @ w.double().t())


def of_bytes() -> Iterator[Row]:
    """Look-ups, fragments, panels of them, and many tokens."""
    for spec, tokens in BYTES:
        shape = Shape.of(100, 1024, spec)
        w = torch.randn(shape.out, shape.inputs)
        values, index = canonical_from_dense(w * mask(w, spec), shape)
        stream = int8.stream_from_canonical(*int8.round_values(values), index, shape)
        x = torch.randn(tokens, shape.inputs).bfloat16()
        y = gpu.matmul_int8(x.to(_gpu.DEVICE), stream.to(_gpu.DEVICE), None, shape)
        yield row(
            "check int8", spec, tokens, y, x.double() @ int8.dense(stream, shape).double().t()
        )


def row(what: str, spec: str, tokens: int, y: Tensor, want: Tensor) -> Row:
    """The error of a product, and whether that is right."""
    made: Row = {"what": what, "pattern": spec, "tokens": tokens}
    return _gpu.tried(made, lambda: {"error": _gpu.error(y.cpu(), want)})
